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
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from harness import die, run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import dssync_pg
from dssync_pg import _C, Options, Plan, Topology
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
    plan: Plan | None = None
    """From the first step on; None: the group's."""
    learning_rate: float = 0.1
    momentum: float = 0.0

    @property
    def steps(self) -> int:
        return sum(isinstance(entry, str) and entry.endswith("step") for entry in self.script)


class Reference:
    """All ranks in one place, float64: local step; averages by stripe; of a late crossing the correction tau steps later."""

    def __init__(self, plan: Plan, world: int, job: Job, crosses_late: bool, averages_momentum: bool) -> None:
        self.plan, self.world, self.job = job.plan or plan, world, job
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
                rack_mean = part[members].mean(0)
                correction[members] = mean - rack_mean
                if not self.plan.keeps_values(round_):
                    part[members] = rack_mean
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


def follows(rank, world, *jobs):
    """Of each job (weights after each entry of the script, what entries gave, stats)."""
    found, sync = [], None
    for job in jobs:
        if sync is not None:
            sync.detach()
        sync, *result = follow(rank, job)
        found.append(result)
    return found  # and leaves with corrections under way


def follow(rank, job):
    sync_module.MIN_STRIPE_BYTES = 64
    model = Weights()
    optimizer = torch.optim.SGD(model.parameters(), lr=job.learning_rate, momentum=job.momentum)
    sync = dssync_pg.attach(model, optimizer)
    fill(model, start(rank))
    if job.plan is not None:
        sync.use_plan(job.plan)
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
    return sync, numpy.stack(history), told, sync.stats() if "detach" not in job.script else None


def compare(world: int, jobs: list[Job], options: Options, crosses_late: bool = True) -> list[tuple[Array, list[Any], list[Any]]]:
    """Runs the ranks and the reference, whose histories must be equal; of each job the history and by rank the rest."""
    found = []
    for job, results in zip(jobs, zip(*run_ranks(world, follows, *jobs, pg_options=options), strict=True), strict=True):
        histories, told, stats = zip(*results, strict=True)
        got = numpy.stack(histories, axis=1)  # entry, rank, element
        reference = Reference(options.plan, world, job, crosses_late, options.average_state == "all")
        numpy.testing.assert_allclose(got, reference.run(), rtol=1e-11, atol=1e-12)
        found.append((got, list(told), list(stats)))
    return found


@pytest.mark.parametrize(("sizes", "taus"), [((2, 2), (1,)), ((1, 3), (7,)), ((2, 3), (0, 1, 7)), ((1, 5), (2,))], ids=str)
def test_training_equals_its_meaning_in_numpy(racks, sizes, taus):
    plans = [plan_of(sizes, tau) for tau in taus]
    for plan in plans:
        assert plan.keeps_values(plan.period - 1) == (plan.delay > 0 and max(sizes) < 5)
    jobs = [Job(["step"] * 20, momentum=0.9, plan=plan) for plan in plans]
    runs = compare(sum(sizes), jobs, racks(sizes, plan=plans[0]))
    local = numpy.stack([start(rank) for rank in range(sum(sizes))])
    momenta = numpy.zeros_like(local)
    mean = []
    for step in range(20):
        momenta = 0.9 * momenta + numpy.stack([gradient(rank, step) for rank in range(sum(sizes))])
        local -= 0.1 * momenta
        mean.append(local.mean(0))
    for got, _, _ in runs:
        numpy.testing.assert_allclose(got.mean(1), mean, rtol=0, atol=1e-12)  # no average moves the mean


@pytest.mark.parametrize("sizes", [(2, 3), (2, 1, 2)])
def test_momenta_cross_like_parameters(racks, sizes):
    plan = plan_of(sizes, 3)
    compare(sum(sizes), [Job(["step"] * 14, momentum=0.9)], racks(sizes, plan=plan, average_state="all"))


def test_with_learning_rate_zero_all_agree_after_the_longest_wait(racks):
    plans = [plan_of((2, 3), tau) for tau in (0, 1, 7)]
    jobs = [Job(["step"] * (plan.longest_wait + 4), learning_rate=0.0, plan=plan) for plan in plans]
    mean = numpy.stack([start(rank) for rank in range(5)]).mean(0)
    for plan, (got, _, _) in zip(plans, compare(5, jobs, racks((2, 3), plan=plans[0])), strict=True):
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
def test_what_comes_between_a_crossing_and_its_correction(racks, script):
    jobs = [Job(script, momentum=0.9, plan=plan_of((2, 3), tau)) for tau in (3, 7)]
    for got, told, stats in compare(5, jobs, racks((2, 3), plan="striped")):
        if any(entry[0] == "use" for entry in script):
            assert {each["averager"]["launches"] for each in stats} == {script.count("step")}  # under all plans together
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
    results = [found for (found,) in run_ranks(4, follows, job, pg_options=racks((2, 2), plan=plan, warmup_steps=6))]
    got = numpy.stack([history for history, _, _ in results], axis=1)
    as_scripted = Job(["exact step"] * 6 + ["step"] * 10, momentum=0.9)
    numpy.testing.assert_allclose(got, Reference(plan, 4, as_scripted, True, False).run(), rtol=1e-11, atol=1e-12)
    assert results[0][2]["exact_steps"] == 6


def test_after_an_exact_step_nothing_moves_replicas_apart(racks):
    plan = most_delayed((2, 3))
    script = ["step"] * 7 + ["exact step"] + ["step"] * 20
    ((got, _, _),) = compare(5, [Job(script, learning_rate=0.0)], racks((2, 3), plan=plan))
    assert numpy.ptp(got[7], axis=0).max() == 0
    assert numpy.ptp(got[8:], axis=1).max() < 1e-14


def agrees_from_any_step(rank, world, steps):
    sync_module.MIN_STRIPE_BYTES = 64
    model = Weights()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sync = dssync_pg.attach(model, optimizer)
    spread = []
    for begin in range(sync.plan.period):
        sync.load_state_dict({**sync.state_dict(), "step": begin})
        fill(model, start(rank))
        for step in range(steps):
            optimizer.zero_grad()
            model(torch.from_numpy(gradient(rank, step))).backward()
            optimizer.step()
        everyone = gathered(flat(model))
        spread.append(float((everyone - everyone.mean(0)).abs().max()))
    return spread, sync.plan.longest_wait, sync.plan.delay


@pytest.mark.parametrize(("sizes", "kind"), [((2, 2), "striped"), ((2, 3), "striped"), ((2, 1, 1), "auto")])
def test_every_parameter_is_averaged_over_all_in_any_eight_steps_and_tau(racks, sizes, kind):
    """Whatever the step that one begins with: what ranks differ in is gone when each stripe has crossed once."""
    plan = Plan.create(None, kind, topology=topology_of(sizes))
    steps = 8 + plan.delay
    for spread, wait, delay in run_ranks(sum(sizes), agrees_from_any_step, steps, pg_options=racks(sizes, plan=plan)):
        assert wait <= 8 + delay
        assert max(spread) < 1e-12


def test_over_gloo_crossings_are_waited_for(racks):
    plan = plan_of((2, 3), 4)
    options = racks((2, 3), plan=plan, engine="gloo", transport="auto")
    compare(5, [Job(["step"] * 12, momentum=0.9)], options, crosses_late=False)


# ---- where the racks come from ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", ["auto", "flat"])
def test_a_plan_by_hand_brings_its_racks(topology):
    plan = plan_of((2, 3), 3)
    options = Options(plan=plan, topology=topology, transport="tcp", replan_steps="never")
    compare(5, [Job(["step"] * 12, momentum=0.9)], options)


def test_crossings_of_racks_that_share_a_host_are_waited_for():
    plan = plan_of((2, 2), 3)
    compare(4, [Job(["step"] * 12)], Options(plan=plan, transport="shm"), crosses_late=False)


def nothing(rank, world):
    return [group.topology is not None and group.topology.rack_of for group in dssync_pg._backend.live]


def says(world: int, what: str, **named: Any) -> None:
    """Every rank fails with the same text."""
    outcomes = run_ranks(world, nothing, check=False, timeout=40, **named)
    texts = {str(outcome.error) for outcome in outcomes}
    assert len(texts) == 1, texts
    assert re.search(what, texts.pop())


def test_a_plan_for_other_racks_is_an_error_on_every_rank(racks):
    says(4, r"the plan is for ranks in racks \[0, 0, 0, 1\], the topology has them in racks \[0, 0, 1, 1\]",
         pg_options=racks((2, 2), plan=plan_of((3, 1), 1)))  # fmt: skip


def test_wrong_topology_files_are_the_same_error_on_every_rank(tmp_path, racks):
    says(2, "no-such-file", pg_options=Options(topology="no-such-file"))
    says(3, r"racks2-2.toml.*(4|3)", pg_options=racks((2, 2)))
    wrong = tmp_path / "wrong.toml"
    wrong.write_text('[[rack]]\nuplink = "fast"\n')
    says(2, r"wrong.toml:2", pg_options=Options(topology=str(wrong)))


def test_a_topology_that_contradicts_the_hosts_is_an_error_on_every_rank(racks):
    says(2, "ranks 0 and 1 share a host, and the topology puts them into racks 0 and 1",
         pg_options=racks((1, 1), transport="auto"))  # fmt: skip


def test_the_topology_may_come_from_the_environment(tmp_path, racks):
    options = racks((1, 2), plan="striped")
    env = {"DSSYNC_TOPOLOGY": options.topology, "DSSYNC_TRANSPORT": "tcp", "DSSYNC_PLAN": "striped"}
    assert run_ranks(3, nothing, env=env) == [[(0, 1, 1)]] * 3
    assert run_ranks(3, nothing, env={**env, "DSSYNC_TOPOLOGY": "flat", "DSSYNC_PLAN": "auto"}) == [[False]] * 3
    says(3, "striped", env={**env, "DSSYNC_TOPOLOGY": "flat"})


def in_parts(rank, world):
    whole = torch.arange(5001.0) * (rank + 1)
    dist.all_reduce(whole)
    inherited = dist.new_group([0, 1, 3])
    with_options = dist.new_group([0, 1, 3], pg_options=Options())
    part = torch.arange(5001.0) * (rank + 1)
    if rank in (0, 1, 3):
        dist.all_reduce(part, group=inherited)
        average = torch.arange(5001.0) * (rank + 1)
        with dssync_pg.exact():
            dist.all_reduce(average, op=dist.ReduceOp.AVG, group=with_options)
        part += 1000 * average
    return whole, part, nothing(rank, world)


def test_groups_inherit_racks(racks):
    env = {"DSSYNC_TOPOLOGY": racks((2, 2)).topology, "DSSYNC_TRANSPORT": "tcp"}
    for rank, (whole, part, known) in enumerate(run_ranks(4, in_parts, env=env)):
        assert (whole == torch.arange(5001.0) * 10).all()
        if rank != 2:
            torch.testing.assert_close(part, torch.arange(5001.0) * 7 * (1 + 1000 / 3), rtol=1e-6, atol=0)
            assert known == [(0, 0, 1, 1), (0, 0, 1)]


# ---- hybrid ----------------------------------------------------------------------------------------------------------------------


def hybrid(rank, world, job, accumulate):
    sync_module.MIN_STRIPE_BYTES = 64
    net = Weights()
    fill(net, start(0))
    frozen = net.parts[1]
    frozen.requires_grad_(False)
    net.register_parameter("foreign", nn.Parameter(torch.ones(6, dtype=torch.float64)))
    original = net.forward
    net.forward = lambda gradient: original(gradient) + (net.foreign * gradient[:6]).sum()
    model = DDP(net)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p is not net.foreign], lr=job.learning_rate)
    sync = dssync_pg.attach(model, optimizer)
    history, foreign = [], []
    for step in range(job.steps):
        optimizer.zero_grad()
        net.foreign.grad = None
        for part in range(accumulate):
            with model.no_sync() if part + 1 < accumulate else contextlib.nullcontext():
                model(torch.from_numpy(gradient(rank, step * accumulate + part))).backward()
        optimizer.step()
        history.append(torch.cat([part.detach().reshape(-1) for part in net.parts]).numpy().copy())
        foreign.append(net.foreign.grad.numpy().copy())
    return numpy.stack(history), numpy.stack(foreign), sync.plan.kind


@pytest.mark.parametrize(
    ("sizes", "tau", "engine", "accumulate"),
    [((2, 2), 2, "native", 1), ((1, 3), 0, "native", 2), ((2, 1, 2), 7, "native", 1), ((2, 2), 2, "gloo", 2)],
)
def test_hybrid_averages_gradients_in_racks(racks, sizes, tau, engine, accumulate):
    world = sum(sizes)
    plan = plan_of(sizes, tau, "hybrid")
    job = Job(["step"] * 18, momentum=0.0)
    options = racks(sizes, plan=plan, engine=engine, transport="tcp" if engine == "native" else "auto")
    results = run_ranks(world, hybrid, job, accumulate, pg_options=options)
    got = numpy.stack([history for history, _, _ in results], axis=1)
    trained = numpy.r_[0:77, 207:267]  # the middle one is frozen
    rack_of = numpy.array(plan.rack_of)
    weights = numpy.stack([start(0)[trained]] * world)
    pending: list[tuple[int, Array, slice]] = []
    delay = plan.delay if engine == "native" else 0
    foreign = []
    for step in range(job.steps):
        gradients = numpy.stack(
            [sum(gradient(rank, step * accumulate + part) for part in range(accumulate)) for rank in range(world)]
        )
        foreign.append(gradients[:, :6].mean(0))
        for rack in range(len(sizes)):
            weights[rack_of == rack] -= 0.1 * gradients[rack_of == rack][:, trained].mean(0)
        count = min(plan.stripe_count, max(1, len(trained) * 8 // 64))
        for stripe in range(count):
            if plan.is_crossing((step + stripe) % plan.period):
                cut = slice(_C.stripe_begin(len(trained), count, stripe), _C.stripe_begin(len(trained), count, stripe + 1))
                pending.append((step + delay, weights[:, cut].mean(0) - weights[:, cut], cut))
        for due, correction, cut in pending:
            if due == step:
                weights[:, cut] += correction
        numpy.testing.assert_allclose(got[step][:, trained], weights, rtol=1e-11, atol=1e-12)
        assert (got[step][:, 77:207] == start(0)[77:207]).all()
        for rank in range(world):
            first = int(numpy.argmax(rack_of == rack_of[rank]))
            assert (got[step][rank] == got[step][first]).all(), "replicas of a rack differ"
    for _, seen, kind in results:
        assert kind == "hybrid"
        numpy.testing.assert_allclose(seen, numpy.stack(foreign), rtol=1e-11, atol=1e-12)  # as DDP does


def plain_hybrid(rank, world):
    model = Weights()
    with pytest.raises(ValueError, match="plan=hybrid averages gradients inside racks while DDP reduces them"):
        dssync_pg.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return True


def test_hybrid_refuses_modules_without_ddp(racks):
    assert run_ranks(3, plain_hybrid, pg_options=racks((2, 1), plan="hybrid")) == [True] * 3


def uneven(rank, world, inputs):
    sync_module.MIN_STRIPE_BYTES = 64
    net = Weights()
    fill(net, start(0))
    model = DDP(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    finals = []
    for epoch in range(2):
        with model.join():
            for step in range(inputs[rank]):
                optimizer.zero_grad()
                model(torch.from_numpy(gradient(rank, 100 * epoch + step))).backward()
                optimizer.step()
        finals.append(flat(model).numpy().copy())
    return finals, dssync_pg.get_syncs(model)[0].step


@pytest.mark.parametrize("kind", ["hybrid", "striped"])
def test_join_ends_with_equal_replicas_and_no_correction_left(racks, kind):
    inputs = (9, 12, 10, 11)
    results = run_ranks(4, uneven, inputs, pg_options=racks((2, 2), plan=plan_of((2, 2), 5, kind)))
    for finals, step in results:
        assert step == 24
        for epoch in range(2):
            assert numpy.isfinite(finals[epoch]).all()
            assert (finals[epoch] == results[0][0][epoch]).all()


# ---- values that must not become negative ----------------------------------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 40), nn.BatchNorm1d(40), nn.Linear(40, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.norm(self.first(x))))


def normed(rank, world, steps):
    sync_module.MIN_STRIPE_BYTES = 64
    torch.manual_seed(0)
    model = DDP(Normed())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.9))
    least, last = float("inf"), 0.0
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 * step + rank)
        scale = 10.0 ** ((rank + step // 3) % 4 - 2)  # racks see very different variances, and then others
        x = torch.randn(8, 6, generator=generator) * scale
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), x[:, :3])
        loss.backward()
        optimizer.step()
        last = loss.item()
        scales = [optimizer.state[p]["exp_avg_sq"] for p in model.parameters()] + [model.module.norm.running_var]
        least = min([least, *(s.min().item() for s in scales)])
    sync = dssync_pg.get_syncs(model)[0]
    statistics = torch.cat([model.module.norm.running_mean, model.module.norm.running_var])
    spread = gathered(statistics)
    sync.detach()
    return least, last, spread, gathered(flat(model))


@pytest.mark.parametrize("average_state", ["v", "all"])
def test_variances_and_second_moments_never_become_negative(racks, average_state):
    options = racks((1, 3), plan=plan_of((1, 3), 7), average_state=average_state)
    for least, last, _, after in run_ranks(4, normed, 40, pg_options=options):
        assert least >= 0
        assert numpy.isfinite(last)
        assert torch.isfinite(after).all()
        assert (after == after[0]).all()


# ---- exact all_reduces by racks --------------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8]
OPS = {"SUM": dist.ReduceOp.SUM, "MIN": dist.ReduceOp.MIN, "MAX": dist.ReduceOp.MAX, "PRODUCT": dist.ReduceOp.PRODUCT}


def reduces(rank, world):
    gloo = dist.new_group(backend="gloo")
    different = []
    shapes = [(1,), (3,), (5, 1001), (2, 65537)]
    for (i, dtype), (j, (name, op)) in itertools.product(enumerate(DTYPES), enumerate(OPS.items())):
        shape = shapes[(i + j) % len(shapes)]  # each with each dtype, and with each operation
        generator = torch.Generator().manual_seed(rank)
        ours = torch.randint(1, 4, shape, generator=generator).to(dtype)  # small whole numbers: exact in every order
        if len(shape) == 2:
            ours = ours.t()  # not contiguous
        theirs = ours.clone().contiguous()
        dist.all_reduce(ours, op=op)
        dist.all_reduce(theirs, op=op, group=gloo)
        if not torch.equal(ours, theirs):
            different.append((str(dtype), name, shape))
    return different


@pytest.mark.parametrize("sizes", [(2, 2), (1, 3), (2, 3)])
def test_exact_all_reduces_by_racks_give_what_gloo_gives(racks, sizes):
    assert run_ranks(sum(sizes), reduces, pg_options=racks(sizes)) == [[]] * sum(sizes)


def other_sizes(rank, world):
    dist.all_reduce(torch.ones(1 << 20))
    dist.all_reduce(torch.ones((1 << 20) + (rank == 2)))


def test_other_sizes_are_an_error_on_every_rank_that_names_both(racks):
    for outcome in run_ranks(4, other_sizes, check=False, pg_options=racks((2, 2)), pg_timeout=15):
        assert "1048576" in str(outcome.error) and "1048577" in str(outcome.error), outcome


def dies_while_others_reduce(rank, world, ends):
    tensor = torch.ones(1 << 22)
    began = time.monotonic()
    try:
        dist.all_reduce(tensor)  # others may still be in it when rank 3 is through
        if rank == 3:
            ends()
        began = time.monotonic()
        for _ in range(50):
            dist.all_reduce(tensor)
    except RuntimeError as error:
        return str(error), time.monotonic() - began
    raise AssertionError("no error")


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def dies_in_training(rank, world, ends):
    sync_module.MIN_STRIPE_BYTES = 64
    model = Weights()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dssync_pg.attach(model, optimizer)
    began = time.monotonic()
    try:
        for step in range(40):
            optimizer.zero_grad()
            model(torch.from_numpy(gradient(rank, step))).backward()
            if step == 12 and rank == 3:
                ends()  # others may be a step behind
            optimizer.step()
    except RuntimeError as error:
        return str(error), time.monotonic() - began
    raise AssertionError("no error")


@pytest.mark.parametrize("what", [dies_while_others_reduce, dies_in_training])
def test_a_killed_rank_is_an_error_on_all_that_names_it(racks, what):
    options = racks((2, 2), plan=plan_of((2, 2), 5))
    outcomes = run_ranks(4, what, die, check=False, pg_options=options, pg_timeout=60)
    assert outcomes[3].exitcode == -signal.SIGKILL
    for outcome in outcomes[:3]:
        text, seconds = outcome.value
        assert "rank 3" in text
        assert seconds < 15


@pytest.mark.parametrize("what", [dies_while_others_reduce, dies_in_training])
def test_a_stopped_rank_is_a_time_out(racks, what):
    timeouts = [30, 30, 3, 30]  # only rank 2 is sure to wait for rank 3, others may wait for rank 2
    options = racks((2, 2), plan=plan_of((2, 2), 5))
    outcomes = run_ranks(4, then_leaves, what, check=False, pg_options=options, pg_timeout=timeouts)
    for text, seconds in [outcome.value for outcome in outcomes[:3]]:
        assert "failed on rank" in text and "timed out after 3.0 s: rank 3" in text
        assert seconds < 20


def then_leaves(rank, world, what):
    """The stopped rank is killed by the others, once they have seen the error."""
    store = dist.distributed_c10d._get_default_store()
    if rank == 3:
        store.set("pid", str(os.getpid()))
    result = what(rank, world, stop)
    if store.add("seen", 1) == 3:
        os.kill(int(store.get("pid")), signal.SIGKILL)
    return result
