"""torch.compile around DDP on a dssync group: the same parameters as without it, and the averages still happen."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from test_training import batch, flat, make
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import dssync_pg


def trains(rank: int, world: int, what: str, steps: int) -> tuple[torch.Tensor, int, dict[str, int]]:
    torch.manual_seed(0)
    plain = make()
    model: nn.Module = plain if what.startswith("plain") else DDP(plain)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sync = dssync_pg.attach(model, optimizer) if what.startswith("plain") else None
    call = torch.compile(model, backend="aot_eager") if what in ("model", "plain model") else model

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = nn.functional.mse_loss(call(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    run = torch.compile(step, backend="aot_eager") if what in ("step", "plain step") else step
    for number in range(steps):
        run(*batch(rank, number))
    if rank == 0:
        dist.all_reduce(torch.zeros(1))
    else:
        dist.all_reduce(torch.ones(1))
    sync = sync or dssync_pg.get_syncs(model)[0]
    return flat(model), sync.step, sync.stats()["launched_by"]


@pytest.mark.parametrize("what", ["model", "step", "plain model", "plain step"])
def test_compiled_training_equals_eager(what: str) -> None:
    eager = run_ranks(2, trains, "plain" if what.startswith("plain") else "ddp", 5)
    compiled = run_ranks(2, trains, what, 5, timeout=150)
    for (expected, _, _), (got, count, launched_by) in zip(eager, compiled, strict=True):
        assert count == 5
        assert launched_by == {"optimizer step": 5}
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
