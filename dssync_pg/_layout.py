"""The flat vectors that a sync averages and how stripes cut them: which bytes of which tensor take which round.

A vector is a sequence of tensors read as one flat array: the parameters, the BatchNorm statistics, each kind of optimizer state.
Each vector is cut in the same number of stripes, so that the state of a parameter travels with about the same groups as the
parameter. Nothing is copied here: a stripe is a list of views, and the averager moves their bytes through buckets of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _C

MIN_STRIPE_BYTES = 1 << 20
"""A stripe is at least about 1 MiB: below that the latency of one more group costs more than the spike it avoids."""

AVERAGED_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def flat_view(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor as a 1-D view in storage order (complex tensors as their real and imaginary parts).

    Raises ValueError for tensors that are not dense (expanded or overlapping), and for dtypes that have no average.
    """
    real = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    if real.dtype not in AVERAGED_DTYPES:
        raise ValueError(f"dtype {tensor.dtype} has no average; supported: {', '.join(str(d) for d in AVERAGED_DTYPES)}")
    if real.is_contiguous():
        return real.view(-1)
    if not _is_dense(real):
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not dense in memory")
    return real.as_strided((real.numel(),), (1,), real.storage_offset())


def _is_dense(tensor: Tensor) -> bool:
    """True if the elements fill one block of memory, in whatever order of dimensions (channels_last, say)."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def describe(tensor: Tensor) -> str:
    """What must be the same on every rank: "float32[64, 3, 3, 3]", with the strides where they are not the usual ones."""
    strides = "" if tensor.is_contiguous() else f" strides {list(tensor.stride())}"
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}{strides}"


class Vector:
    """Tensors read as one flat array, cut in `stripe_count` stripes (formula: csrc/core/stripe.c)."""

    def __init__(self, tensors: Sequence[Tensor], stripe_count: int) -> None:
        views = [flat_view(tensor) for tensor in tensors]
        self.numel = sum(view.numel() for view in views)
        self.bytes = sum(view.numel() * view.element_size() for view in views)
        bounds = [_C.stripe_begin(self.numel, stripe_count, stripe) for stripe in range(stripe_count + 1)]
        self.stripes = [_slice(views, bounds[i], bounds[i + 1]) for i in range(stripe_count)]
        """self.stripes[s]: the views that make up stripe s, in order; empty where the vector is too short for so many stripes."""


def _slice(views: Sequence[Tensor], begin: int, end: int) -> list[Tensor]:
    """The part [begin, end) of the concatenation of 1-D `views`, as views."""
    parts, offset = [], 0
    for view in views:
        low, high = max(begin - offset, 0), min(end - offset, view.numel())
        if low < high:
            parts.append(view[low:high])
        offset += view.numel()
        if offset >= end:
            break
    return parts


@dataclass(frozen=True)
class Named:
    """A tensor to average, under the name that errors use."""

    name: str
    tensor: Tensor


def layout_hash(vectors: Sequence[Sequence[Named]], extra: str) -> int:
    """64-bit hash of names, dtypes, shapes and strides of everything averaged, in order, and of `extra`."""
    text = "\n\n".join("\n".join(f"{item.name} {describe(item.tensor)}" for item in vector) for vector in vectors)
    return _C.hash64(f"{extra}\n\n{text}".encode())
