"""Trains a wide network on handwritten digits with DistributedDataParallel and writes down how accurate it was at which time.

    torchrun --nproc-per-node 4 benchmarks/train_to_accuracy.py --backend gloo --out gloo.json
    torchrun --nproc-per-node 4 benchmarks/train_to_accuracy.py --backend dssync --out dssync.json

What time_to_accuracy.py runs on every worker of an emulated cluster. Nothing but the name of the backend differs between the two.

The clock never stops for a test: a pause would let averages that are under way in the background arrive at no cost. Instead each
worker keeps copies of its weights, and after the training their exact mean is tested, copy by copy. That mean is what
`dssync_pg.global_average` would have given in the middle of the training: averages in groups, and what of them is still under way,
do not change it.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from train_digits import end, load_data, test_accuracy

import dssync_pg

BATCH_SIZE = 16  # samples a worker and step
LEARNING_RATE = 0.05  # at its peak; the same for both backends
RISING_STEPS = 5
BUCKET_MIB = 4  # torch's 25 would hold the whole model, and DDP would have nothing to send while backward runs
REPORTED_STEPS = 10


def make_model(width: int) -> nn.Module:
    """1024 wide: 3.2 million parameters, 12.3 MiB."""

    def layer(inputs: int) -> list[nn.Module]:
        return [nn.Linear(inputs, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]

    hidden = [module for inputs in (64, width, width, width) for module in layer(inputs)]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))


def rate_factor(step: int, steps: int) -> float:
    """Of LEARNING_RATE at `step`: up in RISING_STEPS, then down to nothing at the end, both in a line."""
    return min((step + 1) / RISING_STEPS, 1 - step / steps)


def tensors_of(model: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]


def copy(source: list[Tensor], target: list[Tensor]) -> None:
    for old, new in zip(target, source, strict=True):
        old.copy_(new)


def train(args: argparse.Namespace) -> dict[str, object]:
    torch.manual_seed(args.seed)
    train_set, test_set = load_data()
    sampler = DistributedSampler(train_set, seed=args.seed)
    loader: DataLoader[list[Tensor]] = DataLoader(train_set, BATCH_SIZE, sampler=sampler, drop_last=True)
    model = DistributedDataParallel(make_model(args.width), bucket_cap_mb=BUCKET_MIB)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, args.steps))

    # All made at the start: memory that is new to a process comes slowly, and the clock would count it.
    copies = {step: [tensor.clone() for tensor in tensors_of(model)] for step in range(0, args.steps + 1, args.every)}
    seconds = [0.0]  # at the end of each step
    dist.barrier()
    began = time.perf_counter()
    while len(seconds) <= args.steps:
        sampler.set_epoch(len(seconds) // len(loader))
        for images, digits in loader:
            loss = F.cross_entropy(model(images), digits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            step = len(seconds)
            if step in copies:
                copy(tensors_of(model), copies[step])
            seconds.append(time.perf_counter() - began)
            if step % REPORTED_STEPS == 0 and dist.get_rank() == 0:
                print(f"{args.backend:<6} seed {args.seed}  step {step}/{args.steps}  loss {loss.item():.3f}  {seconds[-1]:.1f} s",
                      flush=True)  # fmt: skip
            if step == args.steps:
                break

    syncs = [sync.stats() for sync in dssync_pg.get_syncs(model)]
    slowest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)  # a mean of all weights exists when the last worker has its own
    accuracies = []
    tests_began = time.perf_counter()
    for kept in copies.values():
        copy(kept, tensors_of(model))
        accuracies.append(test_accuracy(model, test_set))
    return {
        "backend": args.backend,
        "seed": args.seed,
        "workers": dist.get_world_size(),
        "parameters_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "seconds": slowest.tolist(),
        "tested_steps": list(copies),
        "test_accuracy": accuracies,
        "seconds_a_test": (time.perf_counter() - tests_began) / len(copies),
        "syncs": syncs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("gloo", "dssync"), default="dssync", help="of torch.distributed (default: dssync)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and shuffles (default: 0)")
    parser.add_argument("--steps", type=int, default=60, help="of the optimizer (default: 60)")
    parser.add_argument("--every", type=int, default=2, help="steps from one test to the next (default: 2)")
    parser.add_argument("--width", type=int, default=1024, help="of the hidden layers (default: 1024)")
    parser.add_argument("--out", type=Path, help="a JSON file for the curve (default: none)")
    args = parser.parse_args()

    torch.set_num_threads(1)
    dist.init_process_group(backend=args.backend, timeout=timedelta(seconds=120))
    result = train(args)
    if args.out is not None and dist.get_rank() == 0:
        args.out.write_text(json.dumps(result) + "\n")
    end()


if __name__ == "__main__":
    main()
