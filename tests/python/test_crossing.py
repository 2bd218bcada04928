"""Averages that cross racks: against a simulation of their meaning in numpy, with whatever may come between a crossing and its
correction; exact all_reduces by racks; and what is said where racks are not as they should be.

Ranks of a test share a host. Over TCP alone each counts as a host of its own, so a topology file can put them into racks.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import time
from dataclasses import dataclass, field
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from harness import die, run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import dssync_pg
from dssync_pg import Options, Plan, Topology, _C
from dssync_pg import sync as sync_module
from dssync_pg.topology import Host, Link, Rack

Array = numpy.ndarray[Any, Any]

SHAPES = ((7, 11), (130,), (3, 5, 4))
LENGTH = sum(int(numpy.prod(shape)) for shape in SHAPES)


def topology_of(sizes: tuple[int, ...]) -> Topology:
    """Racks of so many hosts of one worker."""
    ranks = itertools.count()
    hosts = [[Host(f"host{(rank := next(ranks))}", (rank,), Link(5e8)) for _ in range(size)] for size in sizes]
    return Topology(Rack(f"rack{index}", tuple(inside), Link(1e8)) for index, inside in enumerate(hosts))


@pytest.fixture
def racks(tmp_path):
    """Options under which the ranks stand in racks of the given sizes."""

    def options(sizes: tuple[int, ...], **named: Any) -> Options:
        file = tmp_path / f"racks{'-'.join(map(str, sizes))}.toml"
        topology_of(sizes).save(file)
        return Options(**{"topology": str(file), "transport": "tcp", "replan_steps": "never", **named})

    return options


def plan_of(sizes: tuple[int, ...], delay: int, kind: str = "striped") -> Plan:
    plan = Plan.create(None, kind, topology=topology_of(sizes), delay=delay)
    assert plan.delay == delay
    return plan


def most_delayed(sizes: tuple[int, ...], kind: str = "striped") -> Plan:
    """tau = P - 1."""
    plan = plan_of(sizes, 7, kind)
    assert plan.period == 8
    return plan


# ---- the meaning, in numpy -------------------------------------------------------------------------------------------------------


def start(rank: int) -> Array:
    return numpy.random.default_rng(rank).normal(size=LENGTH)


def gradient(rank: int, step: int) -> Array:
    return numpy.random.default_rng([rank, step, 1]).normal(size=LENGTH)


@dataclass
class Job:
    """What the ranks do, and the reference."""

    script: list[Any]
    """Of each entry: "step", "exact step", ("use", plan), "consensus", "global average", "detach", ("load", step)."""
    learning_rate: float = 0.1
    momentum: float = 0.0
    starts: list[Array] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return sum(isinstance(entry, str) and entry.endswith("step") for entry in self.script)


class Reference:
    """All ranks in one place, float64: local step; averages by stripe; a rack's mean at once, and the correction tau steps later."""

    def __init__(self, plan: Plan, world: int, job: Job, crosses_late: bool, averages_momentum: bool) -> None:
        self.plan, self.world, self.job = plan, world, job
        self.crosses_late = crosses_late
        self.weights = numpy.stack([start(rank) for rank in range(world)])
        self.momenta = numpy.zeros_like(self.weights)
        self.averaged = [self.weights, self.momenta] if averages_momentum else [self.weights]
        self.pending: list[tuple[int, Array, Array]] = []
        self.taken = 0
        self.round_step = 0

    def run(self) -> Array:
        history = []
        for entry in self.job.script:
            if entry in ("step", "exact step"):
                self.step(exact=entry == "exact step")
            elif entry == "detach":
                self.settle()
                for values in (self.weights, self.momenta):
                    values[:] = values.mean(0)
            elif isinstance(entry, tuple) and entry[0] == "use":
                self.settle()
                self.plan = entry[1]
            elif isinstance(entry, tuple) and entry[0] == "load":
                self.pending.clear()
                self.round_step = entry[1]
            history.append(self.weights.copy())
        return numpy.stack(history)

    def step(self, exact: bool) -> None:
        for rank in range(self.world):
            self.momenta[rank] = self.job.momentum * self.momenta[rank] + gradient(rank, self.taken)
        self.weights -= self.job.learning_rate * self.momenta
        plan, now = self.plan, self.round_step
        if exact:
            self.settle()
            for values in self.averaged:
                values[:] = values.mean(0)
        else:
            for values, stripe in itertools.product(self.averaged, range(plan.stripe_count)):
                self.average(values[:, self.bounds(stripe)], (now + stripe) % plan.period, now + plan.delay)
        self.settle(now)
        self.taken += 1
        self.round_step += 1

    def bounds(self, stripe: int) -> slice:
        count = self.plan.stripe_count
        return slice(_C.stripe_begin(LENGTH, count, stripe), _C.stripe_begin(LENGTH, count, stripe + 1))

    def average(self, part: Array, round_: int, due: int) -> None:
        correction = numpy.zeros_like(part)
        for group in self.plan.rounds[round_]:
            mean = part[group].mean(0)
            if not (self.crosses_late and self.plan.delay and self.plan.is_crossing(round_)):
                part[group] = mean
                continue
            for rack in {self.plan.rack_of[rank] for rank in group}:
                members = [rank for rank in group if self.plan.rack_of[rank] == rack]
                part[members] = part[members].mean(0)
                correction[members] = mean - part[members]
        if correction.any():
            self.pending.append((due, part, correction))

    def settle(self, until: int | None = None) -> None:
        for due, part, correction in self.pending:
            if until is None or due <= until:
                part += correction
        self.pending = [entry for entry in self.pending if until is not None and entry[0] > until]


# ---- the ranks -------------------------------------------------------------------------------------------------------------------


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList(nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in SHAPES)

    def forward(self, gradient: torch.Tensor) -> torch.Tensor:
        return (torch.cat([part.reshape(-1) for part in self.parts]) * gradient).sum()


def flat(module: nn.Module) -> torch.Tensor:
    return torch.cat([part.detach().reshape(-1) for part in module.parameters()])


def fill(module: nn.Module, values: Array) -> None:
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(torch.from_numpy(values), module.parameters())


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    out = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(out, tensor.contiguous())
    return torch.stack(out)


def follows(rank, world, job):
    """(weights after each entry of the script, what entries gave, stats)"""
    sync_module.MIN_STRIPE_BYTES = 64
    model = Weights()
    optimizer = torch.optim.SGD(model.parameters(), lr=job.learning_rate, momentum=job.momentum)
    sync = dssync_pg.attach(model, optimizer)
    fill(model, start(rank))
    history, told, taken = [], [], 0
    for entry in job.script:
        if entry in ("step", "exact step"):
            with dssync_pg.exact() if entry == "exact step" else contextlib.nullcontext():
                optimizer.zero_grad()
                model(torch.from_numpy(gradient(rank, taken))).backward()
                optimizer.step()
            taken += 1
        elif entry == "consensus":
            told.append(sync.consensus_distance())
        elif entry == "global average":
            with sync.global_average():
                told.append(flat(model).numpy())
        elif entry == "detach":
            sync.detach()
        elif entry[0] == "use":
            sync.use_plan(entry[1])
        elif entry[0] == "load":
            sync.load_state_dict({**sync.state_dict(), "step": entry[1]})
        history.append(flat(model).numpy().copy())
    return numpy.stack(history), told, sync.stats() if "detach" not in job.script else None


def compare(world: int, job: Job, options: Options) -> tuple[Array, list[list[Any]]]:
    """Runs the ranks and the reference; both histories must be equal, and the mean what it is without any average."""
    results = run_ranks(world, follows, job, pg_options=options)
    got = numpy.stack([history for history, _, _ in results], axis=1)  # entry, rank, element
    reference = Reference(options.plan, world, job, options.engine != "gloo", options.average_state == "all")
    numpy.testing.assert_allclose(got, reference.run(), rtol=1e-11, atol=1e-12)
    return got, [told for _, told, _ in results]


SIZES = [(2, 2), (1, 3), (2, 3)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("tau", [0, 1, 7])
def test_training_equals_its_meaning_in_numpy(racks, sizes, tau):
    plan = plan_of(sizes, tau)
    got, _ = compare(sum(sizes), Job(["step"] * 20, momentum=0.9), racks(sizes, plan=plan))
    local = numpy.stack([start(rank) for rank in range(sum(sizes))])
    momenta = numpy.zeros_like(local)
    mean = []
    for step in range(20):
        momenta = 0.9 * momenta + numpy.stack([gradient(rank, step) for rank in range(sum(sizes))])
        local -= 0.1 * momenta
        mean.append(local.mean(0))
    numpy.testing.assert_allclose(got.mean(1), mean, rtol=0, atol=1e-12)  # no average moves the mean


@pytest.mark.parametrize("sizes", [(2, 3), (2, 1, 2)])
def test_momenta_cross_like_parameters(racks, sizes):
    plan = plan_of(sizes, 3)
    compare(sum(sizes), Job(["step"] * 14, momentum=0.9), racks(sizes, plan=plan, average_state="all"))


@pytest.mark.parametrize("tau", [0, 1, 7])
def test_with_learning_rate_zero_all_agree_after_the_longest_wait(racks, tau):
    plan = plan_of((2, 3), tau)
    got, _ = compare(5, Job(["step"] * (plan.longest_wait + 4), learning_rate=0.0), racks((2, 3), plan=plan))
    mean = numpy.stack([start(rank) for rank in range(5)]).mean(0)
    for after in got[plan.longest_wait - 1 :]:
        numpy.testing.assert_allclose(after, numpy.broadcast_to(mean, after.shape), rtol=0, atol=1e-12)
    assert numpy.abs(got[plan.longest_wait - 2] - mean).max() > 1e-3  # and not before


@pytest.mark.parametrize(
    "script",
    [
        ["step"] * 9 + ["exact step"] * 3 + ["step"] * 11,
        ["step"] * 9 + ["consensus", "step", "global average"] + ["step"] * 10,
        ["step"] * 9 + [("use", plan_of((2, 3), 1))] + ["step"] * 9 + [("use", plan_of((2, 3), 4))] + ["step"] * 12,
        ["step"] * 9 + [("load", 4)] + ["step"] * 7 + [("load", 30)] + ["step"] * 12,
        ["step"] * 10 + ["detach"],
    ],
    ids=["exact", "global average", "use plan", "load", "detach"],
)
@pytest.mark.parametrize("tau", [3, 7])
def test_what_comes_between_a_crossing_and_its_correction(racks, script, tau):
    plan = plan_of((2, 3), tau)
    job = Job(script, momentum=0.9)
    got, told = compare(5, job, racks((2, 3), plan=plan))
    for entry, after in zip(script, got, strict=True):
        if entry in ("exact step", "detach"):
            assert (after == after[0]).all()
    if "consensus" in script:
        at = script.index("consensus")
        distance = numpy.sqrt(((got[at] - got[at].mean(0)) ** 2).sum(1).mean())
        at = script.index("global average")
        for consensus, average in told:
            assert consensus == pytest.approx(distance, rel=1e-9)
            numpy.testing.assert_allclose(average, got[at].mean(0), rtol=0, atol=1e-12)


def test_warmup_and_then_crossings(racks):
    plan = plan_of((2, 2), 5)
    job = Job(["step"] * 16, momentum=0.9)
    results = run_ranks(4, follows, job, pg_options=racks((2, 2), plan=plan, warmup_steps=6))
    got = numpy.stack([history for history, _, _ in results], axis=1)
    as_scripted = Job(["exact step"] * 6 + ["step"] * 10, momentum=0.9)
    numpy.testing.assert_allclose(got, Reference(plan, 4, as_scripted, True, False).run(), rtol=1e-11, atol=1e-12)
    assert results[0][2]["exact_steps"] == 6


def test_after_an_exact_step_nothing_moves_replicas_apart(racks):
    plan = most_delayed((2, 3))
    script = ["step"] * 7 + ["exact step"] + ["step"] * 20
    got, _ = compare(5, Job(script, learning_rate=0.0), racks((2, 3), plan=plan))
    assert numpy.ptp(got[7], axis=0).max() == 0
    assert numpy.ptp(got[8:], axis=1).max() < 1e-14


def test_over_gloo_crossings_are_waited_for(racks):
    plan = plan_of((2, 3), 4)
    compare(5, Job(["step"] * 12, momentum=0.9), racks((2, 3), plan=plan, engine="gloo", transport="auto"))
