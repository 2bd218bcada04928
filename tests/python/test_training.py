"""Training through DDP and attach(): against DDP over Gloo, a plain mean, and simulations by hand."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import pickle
import random
import re
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import die, run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import dssync_pg
from dssync_pg import Options

both_engines = pytest.mark.usefixtures("engine")
"""Training is tested on the default engine, and this part of it on each."""


class Net(nn.Module):
    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.second = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.norm(self.first(x))))


def make(norm: bool = True, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(norm).double()


def batch(rank: int, step: int, size: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(size, 6, generator=generator, dtype=torch.float64), torch.randn(
        size, 3, generator=generator, dtype=torch.float64
    )


def flat(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def statistics(module: nn.Module) -> torch.Tensor:
    return torch.cat([b.reshape(-1) for n, b in module.named_buffers() if "running" in n])


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    out = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(out, tensor.contiguous())
    return torch.stack(out)


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, step: int) -> None:
    x, y = batch(rank, step)
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


# ---- against full all-reduce ---------------------------------------------------------------------------------------------------


def train(rank, world, steps, kind, norm=False):
    model = DDP(make(norm))
    optimizer = OPTIMIZERS[kind](model.parameters())
    for step in range(steps):
        one_step(model, optimizer, rank, step)
    return flat(model), [type(s).__name__ for s in dssync_pg.get_syncs(model)]


@both_engines
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_one_group_of_all_ranks_is_ddp(world):
    exact = run_ranks(world, train, 12, "sgd", backend="gloo")
    ours = run_ranks(world, train, 12, "sgd", pg_options=Options(plan="grid", group_size=world) if world > 1 else Options())
    for (expected, _), (got, syncs) in zip(exact, ours, strict=True):
        assert syncs == ["Sync"]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def two_optimizers(rank, world, steps):
    model = DDP(make(False))
    pair = [torch.optim.SGD(model.module.first.parameters(), lr=0.05), torch.optim.SGD(model.module.second.parameters(), lr=0.02)]
    for step in range(steps):
        x, y = batch(rank, step)
        nn.functional.mse_loss(model(x), y).backward()
        for optimizer in pair:
            optimizer.step()
            optimizer.zero_grad()
    return flat(model), [(s.step, s.stats()["launched_by"]) for s in dssync_pg.get_syncs(model)]


def test_two_optimizers_each_average_after_their_own_step():
    exact = run_ranks(3, two_optimizers, 6, backend="gloo")
    ours = run_ranks(3, two_optimizers, 6, pg_options=Options(plan="grid", group_size=3))
    for (expected, _), (got, syncs) in zip(exact, ours, strict=True):
        assert syncs == [(6, {"optimizer step": 6})] * 2
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def one_optimizer_for_two_modules(rank, world, steps):
    first, second = DDP(make(False, seed=1)), DDP(make(False, seed=2))
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.05)
    for step in range(steps):
        x, y = batch(rank, step)
        optimizer.zero_grad()
        nn.functional.mse_loss(first(x) + second(x), y).backward()
        optimizer.step()
    syncs = dssync_pg.get_syncs()
    return torch.cat([flat(first), flat(second)]), [(s.step, s.stats()["launched_by"]) for s in syncs]


def test_one_optimizer_over_two_modules_has_one_sync():
    exact = run_ranks(2, one_optimizer_for_two_modules, 5, backend="gloo")
    ours = run_ranks(2, one_optimizer_for_two_modules, 5)
    for (expected, none), (got, syncs) in zip(exact, ours, strict=True):
        assert none == []
        assert syncs == [(5, {"optimizer step": 5})]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def adam_with_averaged_state(rank, world, steps):
    model = DDP(make(False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(steps):
        one_step(model, optimizer, rank, step)
    moments = torch.cat([optimizer.state[p][k].reshape(-1) for p in model.parameters() for k in ("exp_avg", "exp_avg_sq")])
    return flat(model), moments


def by_hand(world, steps, groups_at, kind, state_keys=(), norm=False):
    """Independent reference: replicas in one process, plain means over the given groups after each local step."""
    models = [make(norm) for _ in range(world)]
    optimizers = [OPTIMIZERS[kind](m.parameters()) for m in models]
    for step in range(steps):
        for rank in range(world):
            one_step(models[rank], optimizers[rank], rank, step)
        for group in groups_at(step):
            for params in zip(*(models[r].parameters() for r in group), strict=True):
                for tensors in [
                    params,
                    *(tuple(optimizers[r].state[p][k] for r, p in zip(group, params, strict=True)) for k in state_keys),
                ]:
                    mean = torch.stack([t.detach() for t in tensors]).mean(0)
                    for t in tensors:
                        t.data.copy_(mean)
            for buffers in zip(*([b for n, b in models[r].named_buffers() if "running" in n] for r in group), strict=True):
                mean = torch.stack(buffers).mean(0)
                for b in buffers:
                    b.copy_(mean)
    return models, optimizers


def groups_of(world, **kwargs):
    plan = dssync_pg.Plan.create(world, **kwargs)
    return lambda step: plan.rounds[step % plan.period]


@both_engines
@pytest.mark.parametrize("world", [3, 4])
@pytest.mark.parametrize(("mode", "keys"), [("none", ()), ("all", ("exp_avg", "exp_avg_sq"))])
def test_adamw_equals_a_simulation_by_hand(world, mode, keys):
    results = run_ranks(world, adam_with_averaged_state, 9, pg_options=Options(average_state=mode))
    models, optimizers = by_hand(world, 9, groups_of(world), "adamw", keys)
    for rank, (params, moments) in enumerate(results):
        torch.testing.assert_close(params, flat(models[rank]), rtol=1e-10, atol=1e-12)
        expected = [optimizers[rank].state[p][k].reshape(-1) for p in models[rank].parameters() for k in ("exp_avg", "exp_avg_sq")]
        torch.testing.assert_close(moments, torch.cat(expected), rtol=1e-10, atol=1e-12)


def batch_norm_run(rank, world, steps):
    model = DDP(make())
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    for step in range(steps):
        one_step(model, optimizer, rank, step)
    counters = [int(b) for n, b in model.named_buffers() if "num_batches" in n]
    return flat(model), statistics(model), counters


@both_engines
def test_batch_norm_statistics_take_the_same_groups():
    results = run_ranks(4, batch_norm_run, 7)
    models, _ = by_hand(4, 7, groups_of(4), "sgd", norm=True)
    for rank, (params, stats, counters) in enumerate(results):
        torch.testing.assert_close(params, flat(models[rank]), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(stats, statistics(models[rank]), rtol=1e-10, atol=1e-12)
        assert counters == [7]


def second_moments(rank, world, steps):
    model = DDP(make(False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for step in range(steps):
        one_step(model, optimizer, rank, step)
    sync = dssync_pg.get_syncs(model)[0]
    v = torch.cat([optimizer.state[p]["exp_avg_sq"].reshape(-1) for p in model.parameters()])
    m = torch.cat([optimizer.state[p]["exp_avg"].reshape(-1) for p in model.parameters()])
    return gathered(v), gathered(m), sync.stats()["bytes_averaged_per_step"], flat(model).numel()


def test_second_moments_are_averaged_an_eighth_a_step():
    v, m, step_bytes, numel = run_ranks(2, second_moments, 1, pg_options=Options(average_state="v"))[0]
    same = v[0] == v[1]
    assert 0 < same.float().mean() <= 2 / 8  # step 0 averaged the first slice alone
    assert same[: int(same.sum())].all()
    assert not (m[0] == m[1]).any()
    assert step_bytes == numel * 8 + numel * 8 // 8
    v8, _, _, _ = run_ranks(2, second_moments, 8, pg_options=Options(average_state="v"))[0]
    assert (v8[0] != v8[1]).any()  # each slice went on locally after its turn


# ---- consensus -----------------------------------------------------------------------------------------------------------------


def learning_rate_zero(rank, world):
    model = DDP(make())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(rank)
    before = gathered(flat(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sync = None
    spread = []
    period = 1
    for step in range(4 * 8):
        one_step(model, optimizer, rank, step)
        sync = dssync_pg.get_syncs(model)[0]
        period = sync.stats()["period"]
        spread.append(sync.consensus_distance())
        if step + 1 == period:
            break
    return before, gathered(flat(model)), spread, sync.stats()["contraction"], period


@pytest.mark.parametrize("world", [1, 2, 3, 5, 7, 8])
def test_learning_rate_zero_reaches_consensus_in_a_period(world):
    before, after, spread, rho, _ = run_ranks(world, learning_rate_zero, timeout=120)[0]
    mean = before.mean(0)
    torch.testing.assert_close(after.mean(0), mean, rtol=0, atol=1e-12)  # every round keeps the mean
    if rho == 0:
        torch.testing.assert_close(after, mean.expand_as(after), rtol=0, atol=1e-12)
        assert spread[-1] < 1e-10
    else:
        start = (before - mean).norm(dim=1).square().mean().sqrt()
        assert spread[-1] <= rho * start * (1 + 1e-6)  # the contraction bounds a period
        assert spread[-1] > 0


@pytest.mark.parametrize("world", [1, 2, 3, 5, 7, 8])
def test_learning_rate_zero_makes_all_ranks_equal_after_a_grids_period(world):
    """Prime N has no grid but one group of all; the default there, shuffled unequal groups, only contracts (above)."""
    before, after, spread, rho, _ = run_ranks(world, learning_rate_zero, timeout=120, pg_options=Options(plan="grid"))[0]
    assert rho == 0
    torch.testing.assert_close(after, before.mean(0).expand_as(after), rtol=0, atol=1e-12)
    assert spread[-1] < 1e-10


def measures(rank, world):
    model = DDP(make())
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    for step in range(5):
        one_step(model, optimizer, rank, step)
    sync = dssync_pg.get_syncs(model)[0]
    local = flat(model)
    everyone = gathered(local)
    distance = sync.consensus_distance()
    untouched = torch.equal(flat(model), local)
    with dssync_pg.global_average(model):
        inside, stats_inside = flat(model), gathered(statistics(model))
        with dssync_pg.global_average(model):  # nested: nothing more happens
            assert torch.equal(flat(model), inside)
    return everyone, distance, untouched, gathered(inside), stats_inside, torch.equal(flat(model), local)


@both_engines
def test_global_average_and_consensus_distance():
    results = run_ranks(4, measures)
    everyone, distance, untouched, inside, stats_inside, restored = results[0]
    mean = everyone.mean(0)
    assert distance == pytest.approx(float((everyone - mean).square().sum(1).mean().sqrt()), rel=1e-9)
    assert distance > 0
    assert all(r[1] == distance for r in results)
    assert untouched
    assert restored
    torch.testing.assert_close(inside, mean.expand_as(inside), rtol=1e-12, atol=1e-14)
    assert all(torch.equal(inside[0], row) for row in inside)
    assert all(torch.equal(stats_inside[0], row) for row in stats_inside)


def steps_inside_average(rank, world):
    model = DDP(make())
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    one_step(model, optimizer, rank, 0)
    local = flat(model)
    with pytest.raises(RuntimeError, match="inside global_average"), dssync_pg.global_average(model):
        one_step(model, optimizer, rank, 1)
    return torch.equal(flat(model), local)


def test_a_step_inside_global_average_is_an_error():
    assert all(run_ranks(2, steps_inside_average))


# ---- the launch rule -----------------------------------------------------------------------------------------------------------


def amp_skips(rank, world, steps):
    """Random skips on random ranks, two optimizers, accumulation, and all_reduces after every step."""
    model = DDP(make(False))
    inner = model.module
    first = torch.optim.SGD(inner.first.parameters(), lr=0.02, momentum=0.9)
    second = torch.optim.AdamW(inner.second.parameters(), lr=0.01)
    skip = random.Random(rank)
    sums = []
    for step in range(steps):
        with model.no_sync():
            x, y = batch(rank, 2 * step)
            nn.functional.mse_loss(model(x), y).backward()
        x, y = batch(rank, 2 * step + 1)
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        for optimizer in (first, second):
            if skip.random() > 0.3:
                optimizer.step()
            optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        sums.append((loss.item(), total.item()))
    syncs = dssync_pg.get_syncs(model)
    with dssync_pg.global_average(model):
        mean = flat(model)
    return sums, [s.step for s in syncs], flat(model), mean


@both_engines
def test_200_steps_with_skips_on_random_ranks():
    results = run_ranks(4, amp_skips, 200, timeout=150)
    for step in range(200):
        expected = sum(r[0][step][0] for r in results)
        assert all(r[0][step][1] == pytest.approx(expected, rel=1e-12) for r in results)
    assert {tuple(r[1]) for r in results} == {(200, 200)}  # one average a backward, on every rank
    mean = torch.stack([r[2] for r in results]).mean(0)
    for r in results:
        torch.testing.assert_close(r[3], mean, rtol=1e-12, atol=1e-13)
        assert torch.isfinite(r[2]).all()


def grad_scaler(rank, world, steps):
    model = DDP(make(False).float())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    skipped = 0
    for step in range(steps):
        x, y = (t.float() for t in batch(rank, step))
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        if (step + rank) % 3 == 0:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < before
    return skipped, dssync_pg.get_syncs(model)[0].step, flat(model)


def test_grad_scaler_skips_on_one_rank_alone():
    results = run_ranks(3, grad_scaler, 12)
    assert all(skipped == 4 for skipped, _, _ in results)
    assert all(step == 11 or step == 12 for _, step, _ in results)
    assert all(torch.isfinite(params).all() for _, _, params in results)


def logs_between(rank, world):
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("dssync_pg").addHandler(handler)
    model = DDP(make(False))
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    for step in range(4):
        x, y = batch(rank, step)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        dist.all_reduce(torch.ones(1))
        optimizer.step()
    sync = dssync_pg.get_syncs(model)[0]
    return sync.step, sync.stats()["launched_by"], [r for r in records if "between backward() and optimizer.step()" in r]


def test_a_collective_between_backward_and_step_launches_and_warns_once():
    for step, launched_by, warnings in run_ranks(2, logs_between):
        assert step == 4
        assert launched_by == {"all_reduce": 4}
        assert len(warnings) == 1


def accumulates(rank, world, with_no_sync):
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("dssync_pg").addHandler(handler)
    model = DDP(make(False))
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    for step in range(3):
        optimizer.zero_grad()
        for part in range(3):
            x, y = batch(rank, 3 * step + part)
            with model.no_sync() if with_no_sync and part < 2 else contextlib.nullcontext():
                nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return dssync_pg.get_syncs(model)[0].step, [r for r in records if "no_sync()" in r], gathered(flat(model))


@pytest.mark.parametrize("with_no_sync", [True, False])
def test_accumulation(with_no_sync):
    for step, warnings, everyone in run_ranks(2, accumulates, with_no_sync):
        assert step == (3 if with_no_sync else 9)
        assert len(warnings) == (0 if with_no_sync else 1)
        torch.testing.assert_close(everyone[0], everyone[1], rtol=1e-12, atol=1e-13)  # two ranks: the last average was exact


def uneven(rank, world, inputs):
    model = DDP(make())
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with model.join():
        for step in range(inputs[rank]):
            one_step(model, optimizer, rank, step)
    return flat(model), statistics(model), dssync_pg.get_syncs(model)[0].step


@both_engines
@pytest.mark.parametrize("inputs", [(3, 5), (4, 0, 6), (2, 2, 7, 4)])
def test_join_with_uneven_inputs(inputs):
    results = run_ranks(len(inputs), uneven, inputs)
    assert {r[2] for r in results} == {max(inputs)}
    for params, stats, _ in results:
        assert torch.equal(params, results[0][0])
        assert torch.equal(stats, results[0][1])


# ---- models ----------------------------------------------------------------------------------------------------------------------


class Unusual(nn.Module):
    """Tied, frozen and unused parameters, and a checkpointed block."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.inner.weight
        self.frozen = nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.ignored = nn.Parameter(torch.ones(3))
        self.last = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)
        return self.last(torch.tanh(self.tied(self.frozen(x))))


def unusual(rank, world, static_graph):
    torch.manual_seed(0)
    net = Unusual().double()
    DDP._set_params_and_buffers_to_ignore_for_model(net, ["ignored"])
    model = DDP(net, find_unused_parameters=not static_graph, static_graph=static_graph)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with torch.no_grad():
        net.ignored.fill_(rank)
    for step in range(4):
        one_step(model, optimizer, rank, step)
    names = dssync_pg.get_syncs(model)[0].layout_summary()[1]
    return names, gathered(flat(model)), net.ignored.detach().clone()


@pytest.mark.parametrize("static_graph", [False, True])
def test_tied_frozen_unused_and_ignored_parameters(static_graph):
    for rank, (names, everyone, ignored) in enumerate(run_ranks(2, unusual, static_graph)):
        assert names == ["inner.weight", "inner.bias", "tied.bias", "unused.weight", "unused.bias", "last.weight", "last.bias"]
        assert (ignored == rank).all()
        differs = everyone[0] != everyone[1]
        assert int(differs.sum()) == 3  # the ignored parameter alone


def plain_module(rank, world):
    model = make()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(rank)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    sync = dssync_pg.attach(model, optimizer)
    start = gathered(flat(model))
    with sync.no_sync():
        x, y = batch(rank, 50)
        nn.functional.mse_loss(model(x), y).backward()
    none_due = sync.step
    for step in range(4):
        one_step(model, optimizer, rank, step)
    return start, none_due, sync.step, flat(model), statistics(model), dssync_pg.attach(model, optimizer) is sync


def test_attach_to_a_plain_module():
    results = run_ranks(4, plain_module)
    models, _ = by_hand(4, 4, groups_of(4), "sgd", norm=True)
    assert all(torch.equal(results[0][0][0], row) for row in results[0][0])  # rank 0's parameters everywhere
    for rank, (_, none_due, step, params, _, same) in enumerate(results):
        assert (none_due, step, same) == (0, 4, True)
        del params, rank
    assert models


def resumes(rank, world, stop, restore):
    model = DDP(make(False))
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    sync = dssync_pg.attach(model, optimizer)
    begin = 0
    if restore is not None:
        model.module.load_state_dict(restore[rank][0])
        optimizer.load_state_dict(restore[rank][1])
        sync.load_state_dict(restore[rank][2])
        begin = sync.step
    for step in range(begin, stop):
        one_step(model, optimizer, rank, step)
    return copy.deepcopy((model.module.state_dict(), optimizer.state_dict(), sync.state_dict())), flat(model)


@both_engines
def test_resume_in_mid_period_continues_the_same_rounds():
    whole = run_ranks(8, resumes, 7, None, timeout=120)
    half = run_ranks(8, resumes, 4, None, timeout=120)
    rest = run_ranks(8, resumes, 7, [r[0] for r in half], timeout=120)
    for (_, expected), (_, got) in zip(whole, rest, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def resumes_differently(rank, world):
    model = DDP(make(False))
    sync = dssync_pg.attach(model, OPTIMIZERS["sgd"](model.parameters()))
    state = sync.state_dict()
    with pytest.raises(ValueError, match="rank 0 continues from step 0, rank 1 from step 1"):
        sync.load_state_dict({**state, "step": rank})
    return sync.step


def test_resume_from_different_steps_is_an_error_on_every_rank():
    assert run_ranks(2, resumes_differently) == [0, 0]


def loads_damaged(rank, world, damage, text):
    """Of rank 1 only: every rank has to hear of it."""
    model = DDP(make(False))
    sync = dssync_pg.attach(model, OPTIMIZERS["sgd"](model.parameters()))
    state = sync.state_dict()
    if rank == 1:
        state = damage(state)
    with pytest.raises(ValueError, match=text):
        sync.load_state_dict(state)
    one_step(model, sync.optimizer, rank, 0)  # nothing has changed
    return sync.step


def cut_short(state):
    return {**state, "plan": state["plan"][:-3]}


def of_an_older_version(state):
    return {**state, "plan": state["plan"][:4] + bytes(4) + state["plan"][8:]}


def without_step(state):
    return {"plan": state["plan"]}


@pytest.mark.parametrize(
    ("damage", "text"),
    [(cut_short, "expected [0-9]+ for 2 ranks"), (of_an_older_version, "is of version 0"), (without_step, "'step' is missing")],
)
def test_a_damaged_state_of_one_rank_is_an_error_on_every_rank(damage, text):
    assert run_ranks(2, loads_damaged, damage, f"on rank 1: the saved state cannot be read .*{text}") == [1, 1]


def saved_under_different_plans(rank, world):
    model = DDP(make(False))
    sync = dssync_pg.attach(model, OPTIMIZERS["sgd"](model.parameters()))
    sync._contention = mock.Mock()  # plans follow the network
    plan = dssync_pg.Plan.create(world, seed=rank).to_bytes()
    with pytest.raises(ValueError, match="rank 0 and rank 1 saved different plans at step 3"):
        sync.load_state_dict({"step": 3, "plan": plan})
    return sync.step


def test_resume_from_different_plans_says_so():
    assert run_ranks(2, saved_under_different_plans) == [0, 0]


def ema_and_copies(rank, world):
    model = DDP(make())
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    one_step(model, optimizer, rank, 0)
    ema = torch.optim.swa_utils.AveragedModel(model.module)
    for step in range(1, 4):
        one_step(model, optimizer, rank, step)
        ema.update_parameters(model.module)
    sync = dssync_pg.get_syncs(model)[0]
    twin = copy.deepcopy(model.module)
    loaded = pickle.loads(pickle.dumps(model.module))
    for copied in (ema.module, twin, loaded):
        copied(batch(rank, 0)[0])
        copied.state_dict()
    return sync.step, b"dssync" in pickle.dumps(model.module), torch.isfinite(flat(ema)).all().item()


def test_ema_deepcopies_and_pickles_stay_apart():
    assert run_ranks(2, ema_and_copies) == [(4, False, True)] * 2


# ---- what stays exact ------------------------------------------------------------------------------------------------------------


class Lookahead(torch.optim.SGD):
    pass


class KeepsMasters(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["master_param"] = p.detach().clone()
        return super().step(closure)


def refused(rank, world, case):
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append((record.levelname, record.getMessage()))
    logging.getLogger("dssync_pg").addHandler(handler)
    net = make(False)
    model = DDP(net)
    if case == "hook":
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        model.register_comm_hook(None, allreduce_hook)
    if case == "zero":
        from torch.distributed.optim import ZeroRedundancyOptimizer

        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    elif case == "lbfgs":
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
    elif case == "lookahead":
        optimizer = Lookahead(model.parameters(), lr=0.1)
    elif case == "masters":
        optimizer = torch.optim.SGD([p.detach().clone().requires_grad_() for p in model.parameters()], lr=0.1)
    elif case == "exact":
        optimizer = OPTIMIZERS["sgd"](model.parameters())
    else:
        optimizer = OPTIMIZERS["sgd"](model.parameters())
    for step in range(4):
        x, y = batch(rank, step)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            return loss

        if case == "lbfgs":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    grads = gathered(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
    return len(dssync_pg.get_syncs(model)), [m for level, m in records if level == "WARNING"], grads


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("hook", "communication hook of its own"),
        ("zero", "ZeroRedundancyOptimizer"),
        ("lbfgs", "LBFGS"),
        ("lookahead", "Lookahead keeps copies"),
        ("masters", "no torch optimizer holds its parameters"),
    ],
)
def test_stays_exact_with_one_warning(case, reason):
    for syncs, warnings, grads in run_ranks(2, refused, case):
        assert syncs == 0
        assert len(warnings) == 1
        assert reason in warnings[0]
        assert "stays exact" in warnings[0]
        torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)  # all-reduced as DDP does


@pytest.mark.parametrize("options", [Options(auto_attach=False), Options(all_reduce="exact")])
def test_options_that_keep_everything_exact(options):
    for syncs, warnings, grads in run_ranks(2, refused, "none", pg_options=options):
        assert syncs == 0
        assert warnings == []
        torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def other_losses(rank, world):
    model = DDP(make(False))
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    one_step(model, optimizer, rank, 0)
    loss = torch.tensor([float(rank + 1)] * 1000, dtype=torch.float64)
    dist.all_reduce(loss)
    with dssync_pg.exact():
        average = torch.arange(1000, dtype=torch.float64) * (rank + 1)
        dist.all_reduce(average, op=dist.ReduceOp.AVG)
    return loss, average


def test_sums_and_exact_blocks_stay_exact_while_attached():
    for loss, average in run_ranks(4, other_losses):
        assert (loss == 10).all()
        torch.testing.assert_close(average, torch.arange(1000, dtype=torch.float64) * 2.5)


def detaches(rank, world):
    original = DDP._pre_forward
    model = DDP(make())
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    for step in range(3):
        one_step(model, optimizer, rank, step)
    sync = dssync_pg.get_syncs(model)[0]
    sync.detach()
    equal = gathered(flat(model))
    for step in range(3, 6):
        one_step(model, optimizer, rank, step)
    after = gathered(flat(model))
    broadcast = [n for n in ("norm.running_mean",) if n not in model.parameters_to_ignore]
    dist.destroy_process_group()
    return equal, after, sync.step, broadcast, DDP._pre_forward is not original, hasattr(DDP._pre_forward, "__wrapped__")


@both_engines
def test_detach_goes_back_to_all_reduced_gradients_and_destroy_unwraps():
    for equal, after, step, broadcast, _, wrapped in run_ranks(4, detaches):
        assert all(torch.equal(equal[0], row) for row in equal)
        torch.testing.assert_close(after, after[:1].expand_as(after), rtol=0, atol=1e-12)
        assert (step, broadcast, wrapped) == (3, ["norm.running_mean"], False)


def skips_alone_and_detaches(rank, world, kind):
    made = {"adamw": OPTIMIZERS["adamw"], "nadam": torch.optim.NAdam, "asgd": torch.optim.ASGD}
    model = DDP(make(norm=False))
    optimizer = made[kind](model.parameters())
    for step in range(5):
        x, y = batch(rank, step)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        if (rank, step) != (0, 2):  # as a gradient scaler does
            optimizer.step()
    sync = dssync_pg.get_syncs(model)[0]
    sync.detach()
    for step in range(5, 8):
        one_step(model, optimizer, rank, step)
    return flat(model), [float(state["step"]) for state in optimizer.state.values()]


@both_engines
@pytest.mark.parametrize("kind", ["adamw", "nadam", "asgd"])
def test_replicas_stay_equal_behind_detach_where_one_rank_skipped_a_step(kind):
    results = run_ranks(2, skips_alone_and_detaches, kind)
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1] == [8.0] * len(results[0][1])


def uses_wrong_plans(rank, world):
    model = make(norm=False)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    sync = dssync_pg.attach(model, optimizer)
    plan, texts = sync.plan, []
    racks = dssync_pg.Topology.uniform(2, 1, 2, nic=1e9, uplink=1e8)
    hybrid = dssync_pg.Plan.create(topology=racks, plan="hybrid", model_bytes=1 << 20)
    for wrong in (dssync_pg.Plan.create(world_size=world + 1, plan="grid"), hybrid):
        with pytest.raises(ValueError, match="use_plan") as caught:
            sync.use_plan(wrong)
        texts.append(str(caught.value))
    one_step(model, optimizer, rank, 0)
    same = sync.plan == plan
    sync.detach()
    with pytest.raises(RuntimeError, match="use_plan") as closed:
        sync.use_plan(dssync_pg.Plan.create(world_size=world, plan="random"))
    return same, sync.step, [*texts, str(closed.value)]


def test_plans_that_do_not_fit_are_refused_and_change_nothing():
    for same, step, (size, hybrid, closed) in run_ranks(4, uses_wrong_plans):
        assert same and step == 1
        assert "the plan is for 5 ranks, the group has 4" in size
        assert "wrap the module in DistributedDataParallel" in hybrid
        assert "use_plan() after detach()" in closed


def layouts_differ(rank, world):
    net = nn.Linear(4, 4 + rank)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match=r"layouts of rank 0 and rank 1 differ|ranks disagree"):
        dssync_pg.attach(net, optimizer)
    return True


@both_engines
def test_attach_with_different_models_is_an_error_on_every_rank():
    assert run_ranks(2, layouts_differ) == [True, True]


def wrapped_again(rank, world):
    net = make(False)
    for round_ in range(2):
        model = DDP(net)
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        one_step(model, optimizer, rank, round_)
        assert len(dssync_pg.get_syncs(model)) == 1
        del model, optimizer
        gc.collect()
        assert dssync_pg.get_syncs() == ()
    return True


def test_a_module_may_be_wrapped_again():
    assert run_ranks(2, wrapped_again) == [True, True]


def attached_twice(rank, world):
    net = make(False)
    dssync_pg.attach(net, OPTIMIZERS["sgd"](net.parameters()))
    with pytest.raises(ValueError, match="already belongs to sync 0"):
        dssync_pg.attach(net, OPTIMIZERS["adamw"](net.parameters()))
    other = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="holds none of the module's parameters"):
        dssync_pg.attach(other, OPTIMIZERS["sgd"](net.parameters()))
    return True


def test_parameters_belong_to_one_sync():
    assert run_ranks(2, attached_twice) == [True, True]


def warmed_up(rank, world):
    model = DDP(make(False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    spread = []
    for step in range(6):
        one_step(model, optimizer, rank, step)
        spread.append(dssync_pg.get_syncs(model)[0].consensus_distance())
    return spread, dssync_pg.get_syncs(model)[0].stats()["exact_steps"]


@both_engines
def test_warmup_steps_are_exact():
    for spread, exact in run_ranks(4, warmed_up, pg_options=Options(warmup_steps=3)):
        assert exact == 3
        assert max(spread[:3]) < 1e-12 < min(spread[3:])


# ---- failures --------------------------------------------------------------------------------------------------------------------


def raises_in_forward(rank, world):
    model = DDP(make(False))
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    for step in range(6):
        if rank == 1 and step == 3:
            raise ValueError("bad batch")
        one_step(model, optimizer, rank, step)


def test_an_exception_on_one_rank_is_an_error_on_the_others(engine):
    outcomes = run_ranks(4, raises_in_forward, check=False, pg_timeout=10.0, timeout=60)
    assert "bad batch" in str(outcomes[1].error)
    for outcome in (outcomes[0], outcomes[2], outcomes[3]):
        assert outcome.error is not None and "dssync" in str(outcome.error)


def dies(rank, world):
    model = DDP(make(False))
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    for step in range(6):
        x, y = batch(rank, step)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        if rank == 2 and step == 3:
            die()
        optimizer.step()


def test_a_killed_rank_is_an_error_on_the_others_that_names_the_step(engine):
    outcomes = run_ranks(4, dies, check=False, pg_timeout=8.0, timeout=60)
    for outcome in (outcomes[0], outcomes[1], outcomes[3]):
        assert outcome.error is not None
        assert re.search(r"of sync 0 .*failed on rank", str(outcome.error))
        assert "rank 2 (" in str(outcome.error) or engine == "gloo"
        assert "step 3" in str(outcome.error) or "step 4" in str(outcome.error)


def never_launches(rank, world):
    model = DDP(make(False))
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    for step in range(5):
        x, y = batch(rank, step)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        if rank == 1 and step == 3:
            raise_after = dist.distributed_c10d._get_default_store()
            raise_after.wait(["rank 0 has given up"])  # as a collective of another library would hold it
            return None
        try:
            optimizer.step()
        except RuntimeError as error:
            dist.distributed_c10d._get_default_store().set("rank 0 has given up", "1")
            return str(error)
    return None


def test_the_time_out_names_who_has_not_launched(engine):
    outcomes = run_ranks(2, never_launches, check=False, pg_timeout=4.0, timeout=60)
    assert re.search(r"rank 1 (\(.*\) )?has not launched", outcomes[0].value)
    assert "step 3" in outcomes[0].value
