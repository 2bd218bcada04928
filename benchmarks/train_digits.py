"""Trains a small convolutional network on handwritten digits with DistributedDataParallel, as any script does.

    torchrun --nproc-per-node 4 benchmarks/train_digits.py --backend gloo
    torchrun --nproc-per-node 4 benchmarks/train_digits.py --backend dssync

Nothing but the name of the backend differs between the two. `dssync_pg.global_average` gives the mean of the replicas for each
evaluation; under gloo, where replicas are always equal, it does nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn  # before the group is made: see end()
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import dssync_pg

BATCH_SIZE = 16  # samples a worker and step
LEARNING_RATE = 0.02  # at its peak; the same for both backends
SEED = 0


def load_data() -> tuple[TensorDataset, TensorDataset]:
    """1,347 images to train with and 450 to test with: float32 [1, 8, 8] in 0..1, and their digits. The split never changes."""
    images, digits = load_digits(return_X_y=True)
    split = train_test_split(images, digits, test_size=450, stratify=digits, random_state=SEED)
    train_x, test_x = (torch.tensor(part / 16, dtype=torch.float32).view(-1, 1, 8, 8) for part in split[:2])
    train_y, test_y = (torch.tensor(part, dtype=torch.int64) for part in split[2:])
    return TensorDataset(train_x, train_y), TensorDataset(test_x, test_y)


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(64 * 4 * 4, 10),
    )  # fmt: skip


def sum_over_ranks(*values: float) -> list[float]:
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


@torch.no_grad()
def test_accuracy(model: nn.Module, test: TensorDataset) -> float:
    """The part of the test images that the averaged model reads correctly; each rank looks at its share of them."""
    images, digits = (tensor[dist.get_rank() :: dist.get_world_size()] for tensor in test.tensors)
    model.eval()
    with dssync_pg.global_average(model):
        correct = (model(images).argmax(dim=1) == digits).sum().item()
    model.train()
    return sum_over_ranks(correct)[0] / len(test)


def bytes_sent(model: nn.Module) -> int:
    """What this rank has sent so far to average parameters; 0 where gradients are all-reduced."""
    return sum(sync.stats()["averager"]["bytes_sent"] for sync in dssync_pg.get_syncs(model))


def ring_bytes(model: nn.Module) -> float:
    """What each rank sends in a step to all-reduce the gradients in a ring: 2(N-1)/N of them."""
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    return 2 * (dist.get_world_size() - 1) / dist.get_world_size() * gradients


def consensus_distance(model: nn.Module) -> float:
    """sqrt(mean over ranks of ||x_i - mean x||^2): how far the replicas are from each other; 0 without a sync."""
    return sum(sync.consensus_distance() ** 2 for sync in dssync_pg.get_syncs(model)) ** 0.5


def weights_norm(model: nn.Module) -> float:
    return sum(p.detach().square().sum().item() for p in model.parameters()) ** 0.5


def train(args: argparse.Namespace) -> dict[str, object]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(SEED + rank)  # dropout differs between ranks; the weights begin as rank 0's
    train_set, test_set = load_data()
    sampler = DistributedSampler(train_set, seed=SEED)
    loader: DataLoader[list[Tensor]] = DataLoader(train_set, BATCH_SIZE, sampler=sampler)

    model = DistributedDataParallel(make_model())
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=5e-4)
    total_steps = args.epochs * len(loader)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps, pct_start=0.15, cycle_momentum=False)

    curves: dict[str, list[float]] = {"train_loss": [], "test_accuracy": [], "consensus_distance": [], "seconds": []}
    sent = 0.0
    columns = TextColumn("{task.description:<6}"), BarColumn(bar_width=10), TextColumn("{task.fields[news]}")  # fits 80 columns
    console = Console()
    with Progress(*columns, console=console, disable=rank != 0 or not console.is_terminal) as progress:
        bar = progress.add_task(args.backend, total=total_steps, news="", visible=False)
        for epoch in range(args.epochs):
            sampler.set_epoch(epoch)
            loss_sum, sent_before, began = 0.0, bytes_sent(model), time.perf_counter()
            for images, digits in loader:
                loss = F.cross_entropy(model(images), digits)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                loss_sum += loss.item()
                progress.update(bar, advance=1, visible=True)
            seconds, epoch_sent = time.perf_counter() - began, bytes_sent(model) - sent_before

            # Once an epoch and after the last step: a collective that everybody waits for is never between two steps.
            losses, all_sent = sum_over_ranks(loss_sum, epoch_sent)
            sent += all_sent / world_size
            curves["train_loss"].append(losses / world_size / len(loader))
            curves["consensus_distance"].append(consensus_distance(model))
            curves["test_accuracy"].append(test_accuracy(model, test_set))
            curves["seconds"].append(seconds)
            news = (
                f"epoch {epoch + 1}/{args.epochs}  loss {curves['train_loss'][-1]:.3f}  "
                f"accuracy {100 * curves['test_accuracy'][-1]:.1f} %  consensus {curves['consensus_distance'][-1]:.1g}"
            )
            progress.update(bar, news=news)
            if rank == 0 and not console.is_terminal:  # no moving bar in a log: a line an epoch
                print(f"{args.backend:<6} {news}", flush=True)

    syncs = dssync_pg.get_syncs(model)
    return {
        "backend": args.backend,
        "workers": world_size,
        "epochs": args.epochs,
        "steps": total_steps,
        "test_images": len(test_set),
        "curves": curves,
        "weights_norm": weights_norm(model),
        "bytes_per_step": sent / total_steps if syncs else ring_bytes(model),
        "bytes_are": "counted" if syncs else "computed",  # torch's Gloo counts nothing
        "syncs": [sync.stats() for sync in syncs],
    }


def end() -> None:
    """Ends the process group, and over gloo its threads: one that drops a tensor while the interpreter ends aborts the process.

    torch joins them when nothing refers to the group any more: neither what DDP leaves in cycles, nor torch.distributed.nn, whose
    functions hold the default group as an argument's default if they are loaded (by DDP, for one) after it was made.
    """
    gc.collect()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("gloo", "dssync"), default="dssync", help="of torch.distributed (default: dssync)")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training images (default: 20)")
    parser.add_argument("--out", type=Path, help="a JSON file for the curves (default: none)")
    args = parser.parse_args()

    torch.set_num_threads(1)
    dist.init_process_group(backend=args.backend, timeout=timedelta(seconds=60))
    result = train(args)
    if args.out is not None and dist.get_rank() == 0:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    end()


if __name__ == "__main__":
    main()
