"""Which tensors of an optimizer's state belong to each parameter, and which of them are second moments.

`average_state` averages optimizer state with the same groups as the parameters ("all"), or the second moments alone, an eighth of
them a step ("v"). The state of a rank may not exist yet (an optimizer makes it in its first step, which a gradient scaler may have
skipped on one rank alone), so what to average is derived here from the optimizer's class and options and never from what happens to
be in `optimizer.state`: every rank then averages the same layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Shape = tuple[int, ...]
Group = dict[str, Any]


@dataclass(frozen=True)
class StateTensor:
    """One tensor an optimizer keeps for a parameter; a second moment is a scale made of squared gradients."""

    key: str
    shape: Shape
    second_moment: bool


def _like_param(*keys: str, second: tuple[str, ...] = ()) -> Callable[[Group, Shape], list[StateTensor]]:
    return lambda group, shape: [StateTensor(key, shape, key in second) for key in keys]


def _adam(group: Group, shape: Shape) -> list[StateTensor]:
    keys = ["exp_avg", "exp_avg_sq"] + (["max_exp_avg_sq"] if group.get("amsgrad") else [])
    return [StateTensor(key, shape, key != "exp_avg") for key in keys]


def _sgd(group: Group, shape: Shape) -> list[StateTensor]:
    return [StateTensor("momentum_buffer", shape, False)] if group.get("momentum") else []


def _rmsprop(group: Group, shape: Shape) -> list[StateTensor]:
    found = [StateTensor("square_avg", shape, True)]
    if group.get("momentum"):
        found.append(StateTensor("momentum_buffer", shape, False))
    if group.get("centered"):
        found.append(StateTensor("grad_avg", shape, False))
    return found


def _adafactor(group: Group, shape: Shape) -> list[StateTensor]:
    if len(shape) > 1:
        return [StateTensor("row_var", (*shape[:-1], 1), True), StateTensor("col_var", (*shape[:-2], 1, shape[-1]), True)]
    return [StateTensor("variance", shape, True)]


_KNOWN: dict[str, Callable[[Group, Shape], list[StateTensor]]] = {
    "SGD": _sgd,
    "Adam": _adam,
    "AdamW": _adam,
    "SparseAdam": _like_param("exp_avg", "exp_avg_sq", second=("exp_avg_sq",)),
    "NAdam": _like_param("exp_avg", "exp_avg_sq", second=("exp_avg_sq",)),
    "RAdam": _like_param("exp_avg", "exp_avg_sq", second=("exp_avg_sq",)),
    "Adamax": _like_param("exp_avg", "exp_inf", second=("exp_inf",)),
    "RMSprop": _rmsprop,
    "Adagrad": _like_param("sum", second=("sum",)),
    "Adadelta": _like_param("square_avg", "acc_delta", second=("square_avg",)),
    "Adafactor": _adafactor,
    "ASGD": _like_param("ax"),
    "Rprop": _like_param("prev", "step_size"),
    "Muon": _like_param("momentum_buffer"),
}


def _table_of(optimizer: Optimizer) -> Callable[[Group, Shape], list[StateTensor]] | None:
    for cls in type(optimizer).__mro__:
        if cls.__module__.startswith("torch.optim") and cls.__name__ in _KNOWN:
            return _KNOWN[cls.__name__]
    return None


def is_known(optimizer: Optimizer) -> bool:
    """True if the state of `optimizer` can be averaged: it is, or derives from, an optimizer that torch ships."""
    return _table_of(optimizer) is not None


def has_second_moment(optimizer: Optimizer) -> bool:
    """True if `optimizer` keeps a second moment, what `average_state="v"` averages."""
    table = _table_of(optimizer)
    return table is not None and any(state.second_moment for group in optimizer.param_groups for state in table(group, (1, 1)))


def state_tensors(optimizer: Optimizer, group: Group, param: Tensor, mode: str) -> list[tuple[StateTensor, Tensor | None]]:
    """What to average of `param`'s state under `mode` (none|v|all), with the tensor, or None where this rank has none yet."""
    table = _table_of(optimizer) if mode != "none" else None
    if table is None:
        return []
    held = optimizer.state.get(param, {})
    found = []
    for spec in table(group, tuple(param.shape)):
        if mode == "v" and not spec.second_moment:
            continue
        tensor = held.get(spec.key)
        if tensor is not None and (not isinstance(tensor, Tensor) or tuple(tensor.shape) != spec.shape):
            raise RuntimeError(
                f"dssync: {type(optimizer).__name__} keeps {spec.key} of shape {getattr(tensor, 'shape', None)} for a parameter "
                f"of shape {tuple(param.shape)}; expected {spec.shape}. Use average_state=none with this optimizer."
            )
        found.append((spec, tensor))
    return found


# What else they keep for a parameter: a count of steps, and numbers that follow from it.
_NUMBERS = ("step", "mu_product", "mu", "eta")


def read_numbers(optimizer: Optimizer, params: list[Tensor]) -> Tensor:
    """The numbers in the state of `params`, and whether they are there. Shape (len(params), numbers, 2), float64, the same on all
    ranks, whichever have made their state."""
    numbers = torch.zeros(len(params), len(_NUMBERS), 2, dtype=torch.float64)
    for row, param in zip(numbers, params, strict=True):
        held = optimizer.state.get(param, {})
        for cell, key in zip(row, _NUMBERS, strict=True):
            if key in held:
                cell.copy_(torch.tensor([float(held[key]), 1.0]))
    return numbers


def write_numbers(optimizer: Optimizer, params: list[Tensor], mean: Tensor) -> None:
    """The mean over the ranks that have a number, of steps rounded up, into the state of this one. mean: of read_numbers()."""
    for row, param in zip(mean.tolist(), params, strict=True):
        held = optimizer.state.get(param, {})
        for (total, present), key in zip(row, _NUMBERS, strict=True):
            if key not in held:
                continue
            value = math.ceil(total / present - 1e-6) if key == "step" else total / present
            if isinstance(held[key], Tensor):
                held[key].fill_(value)
            else:
                held[key] = type(held[key])(value)


def zeros_for(spec: StateTensor, param: Tensor) -> Tensor:
    """Stands in for state that this rank has not made yet: what the optimizer would begin with."""
    if spec.shape == tuple(param.shape):
        return torch.zeros_like(param, memory_format=torch.preserve_format).detach()
    return torch.zeros(spec.shape, dtype=param.dtype, device=param.device)
