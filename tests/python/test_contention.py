"""Links that become slower or faster while training runs: what rank 0 makes of the rates, and how every rank takes its plan."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import rank_store, run_ranks
from torch._C._distributed_c10d import PrefixStore

import dssync_pg
from dssync_pg import Options, Plan, Topology
from dssync_pg._contention import Contention, Judge, Meter
from dssync_pg.topology import Host, Link, Rack

MODEL_BYTES = 32 << 20
NIC, UPLINK = 500e6, 100e6

Flow = tuple[int, int]
Factor = Callable[[int, int], float]


def topology_of(*sizes: int) -> Topology:
    ranks = iter(range(sum(sizes)))
    hosts = [[Host(f"node{(rank := next(ranks))}", (rank,), Link(NIC)) for _ in range(size)] for size in sizes]
    return Topology(Rack(f"rack{index}", tuple(inside), Link(UPLINK)) for index, inside in enumerate(hosts))


def make(topology: Topology) -> Plan:
    return Plan.create(None, "auto", topology=topology, model_bytes=MODEL_BYTES)


class Network:
    """What each flow would give: those inside a rack the NICs' rate, those between racks their share of an uplink."""

    def __init__(self, *sizes: int) -> None:
        self.topology = topology_of(*sizes)
        self.nic_factors = [1.0] * sum(sizes)
        self.uplink_factors = [1.0] * len(sizes)
        self.judge = Judge(self.topology, make(self.topology), make, MODEL_BYTES)

    def rate(self, rank: int, peer: int) -> float:
        racks, workers = self.topology.rack_of, self.topology.world_size
        if racks[rank] == racks[peer]:
            return NIC / 8 * min(self.nic_factors[rank], self.nic_factors[peer])
        share = UPLINK / 8 / workers * min(self.uplink_factors[racks[rank]], self.uplink_factors[racks[peer]])
        return min(share, NIC / 8 * min(self.nic_factors[rank], self.nic_factors[peer]))

    def window(self, also: Factor = lambda rank, peer: 1.0) -> tuple[Plan, str] | None:
        """The verdict on a window in which every flow was so many times as fast."""
        ranks = range(self.topology.world_size)
        reports = [
            {str(peer): [self.rate(rank, peer) * also(rank, peer), 0.02] for peer in ranks if peer != rank} for rank in ranks
        ]
        return self.judge.judge(reports)

    def verdict(self) -> tuple[Plan, str]:
        """Of the first of a few windows that has one."""
        found = next((found for found in (self.window() for _ in range(4)) if found), None)
        assert found is not None, "nothing was noticed"
        return found


SIZES = [(4, 4), (2, 6), (3, 3, 2)]


@pytest.mark.parametrize("sizes", SIZES)
def test_an_uplink_that_is_cut_and_recovers(sizes):
    network = Network(*sizes)
    before = network.judge.plan
    assert not any(network.window() for _ in range(3))
    network.uplink_factors[1] = 0.4
    plan, text = network.verdict()
    assert "rack 1 uplink 100 Mbit/s -> 40 Mbit/s" in text
    assert len(sizes) == 2 or "rack 0" not in text  # with two racks nobody can tell which end is slow
    assert "NIC" not in text
    assert plan != before
    assert plan == make(network.judge.believed)
    assert not any(network.window() for _ in range(3))  # and stays
    network.uplink_factors[1] = 1.0
    plan, text = network.verdict()
    assert "rack 1 uplink 40 Mbit/s -> 100 Mbit/s" in text
    assert plan == before
    assert network.judge.believed == network.topology
    assert not any(network.window() for _ in range(3))


def test_a_nic_that_is_cut_and_recovers():
    network = Network(4, 4)
    before = network.judge.plan
    assert not any(network.window() for _ in range(3))
    network.nic_factors[2] = 0.2
    found = [network.window() for _ in range(4)]
    if any(found):  # else the planner would do nothing about it
        text = next(f for f in found if f)[1]
        assert "host node2 NIC 500 Mbit/s -> 100 Mbit/s" in text
        assert "uplink" not in text
        network.nic_factors[2] = 1.0
        plan, text = network.verdict()
        assert "host node2 NIC 100 Mbit/s -> 500 Mbit/s" in text
        assert plan == before
    else:
        assert make(network.topology.with_links([Link(NIC * (0.2 if h == 2 else 1)) for h in range(8)])) == before


@pytest.mark.parametrize("sizes", SIZES)
def test_noise_changes_nothing(sizes):
    noise = random.Random(5)
    network = Network(*sizes)
    assert not any(network.window(lambda rank, peer: noise.uniform(0.9, 1.1)) for _ in range(200))


@pytest.mark.parametrize("sizes", SIZES)
def test_a_worker_that_computes_longer_changes_nothing(sizes):
    """What comes from it comes slower, since it is busy; what it takes in may be slower too, for some peers."""
    network = Network(*sizes)
    noise = random.Random(6)
    assert not any(network.window() for _ in range(2))
    for _ in range(50):
        assert network.window(lambda rank, peer: noise.uniform(0.4, 1.0) if peer == 1 else 1.0) is None


def test_ranks_without_reports_change_nothing():
    network = Network(2, 2)
    assert network.judge.judge([{}] * 4) is None
    assert not any(network.window() for _ in range(2))
    assert network.judge.judge([{}] * 4) is None


# ---- on every rank ---------------------------------------------------------------------------------------------------------------


class Engine:
    """Every step brings 1 MiB from each peer, at the rate that the test sets."""

    def __init__(self, rank: int, network: Network) -> None:
        self.rank, self.network = rank, network
        self.received = [0] * network.topology.world_size
        self.nanoseconds = [0] * network.topology.world_size

    def step(self) -> None:
        for peer in range(len(self.received)):
            if peer != self.rank:
                self.received[peer] += 1 << 20
                self.nanoseconds[peer] += int((1 << 20) / self.network.rate(self.rank, peer) * 1e9)

    def transfers(self) -> tuple[list[int], list[int]]:
        return list(self.received), list(self.nanoseconds)


def thread_runs() -> bool:
    return any(thread.name == "dssync contention" for thread in threading.enumerate())


def senses(rank, world, every, cut_at, recovers_at, steps):
    network = Network(2, 2)
    engine: Any = Engine(rank, network)
    stores = [PrefixStore("contention", rank_store()) for _ in range(2)]
    sensing = Contention(rank, world, every, stores[0], stores[1] if rank == 0 else None, engine, network.judge)
    taken = []
    for step in range(steps):
        network.uplink_factors[0] = 0.3 if cut_at <= step < recovers_at else 1.0
        engine.step()
        dist.barrier()  # as averages hold ranks together
        time.sleep(0.001)
        plan = sensing.step_done()
        if plan is not None:
            taken.append((step, plan))
    ran = thread_runs()
    sensing.close()
    keys = stores[0].num_keys() if rank == 0 else 0
    return taken, sensing.changes, ran, thread_runs(), keys


def test_every_rank_takes_the_same_plan_at_the_same_step():
    results = run_ranks(4, senses, 50, 120, 320, 600, backend="gloo", timeout=60)
    network = Network(2, 2)
    cut = make(network.topology.with_links(uplinks=[Link(UPLINK * 0.3)] * 2))
    steps = [step for step, _ in results[0][0]]
    assert [plan for _, plan in results[0][0]] == [cut, network.judge.plan]
    assert 120 < steps[0] <= 220 and 320 < steps[1] <= 420  # within 100 steps
    for rank, (taken, changes, ran, left, _) in enumerate(results):
        assert taken == results[0][0]
        assert changes == 2
        assert ran == (rank == 0)
        assert not left


def nothing_changes(rank, world):
    taken = senses(rank, world, 10, 10_000, 10_000, 300)
    return taken[0], taken[4]


def test_without_changes_nothing_is_taken_and_little_is_left_in_the_store():
    results = run_ranks(4, nothing_changes, backend="gloo")
    assert [taken for taken, _ in results] == [[]] * 4
    assert results[0][1] < 40  # of 30 windows of 4 ranks


class LostStore:
    """A store that goes away."""

    def __init__(self) -> None:
        self.gone = False
        self.values: dict[str, bytes] = {}

    def check(self, keys: list[str]) -> bool:
        if self.gone:
            raise RuntimeError("Connection reset by peer")
        return all(key in self.values for key in keys)

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.values[key]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.values[key] for key in keys]

    def delete_key(self, key: str) -> bool:
        return self.values.pop(key, None) is not None


def test_a_store_that_is_gone_ends_the_thread_with_a_warning(caplog):
    store: Any = LostStore()
    network = Network(2, 2)
    engine: Any = Engine(0, network)
    with caplog.at_level(logging.WARNING, "dssync_pg"):
        sensing = Contention(0, 4, 50, store, store, engine, network.judge)
        store.gone = True
        for _ in range(140):  # two windows
            engine.step()
            assert sensing.step_done() is None
        deadline = time.monotonic() + 10
        while thread_runs() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not thread_runs()
        sensing.close()
    assert [record.getMessage() for record in caplog.records] == [
        "dssync: contention is not sensed any more: Connection reset by peer"
    ]


def test_closing_does_not_wait_for_ranks_that_do_not_report():
    store: Any = LostStore()
    network = Network(2, 2)
    engine: Any = Engine(0, network)
    sensing = Contention(0, 4, 50, store, store, engine, network.judge)
    for _ in range(60):
        engine.step()
        sensing.step_done()
    began = time.monotonic()
    sensing.close()
    assert time.monotonic() - began < 2
    assert not thread_runs()


def test_the_meter_leaves_out_what_says_nothing():
    network = Network(2, 2)
    engine: Any = Engine(0, network)
    meter = Meter(engine)
    for _ in range(5):
        engine.step()
        meter.take()
    assert meter.report() == {}  # too few steps
    for _ in range(20):
        engine.received[1] += 100  # a latency, no rate
        engine.nanoseconds[1] += 10**9
        meter.take()
        engine.step()
        meter.take()
    report = meter.report()
    assert sorted(report) == ["1", "2", "3"]
    assert report["1"][0] == pytest.approx(network.rate(0, 1), rel=1e-6)
    meter.forget()
    assert meter.report() == {}


# ---- in training -----------------------------------------------------------------------------------------------------------------


def resumes(rank, world):
    """A checkpoint's step lies in the middle of a window: nobody may wait for a verdict that is not published."""
    model = torch.nn.Linear(40, 40)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sync = dssync_pg.attach(model, optimizer)
    state = sync.state_dict()
    for begin in (526, 33, 0):
        sync.load_state_dict({**state, "step": begin})
        for _ in range(30):
            optimizer.zero_grad()
            model(torch.ones(3, 40)).sum().backward()
            optimizer.step()
    first = thread_runs()
    dist.destroy_process_group()
    return first, thread_runs()


def test_steps_that_jump_make_nobody_wait(tmp_path):
    topology_of(2, 2).save(tmp_path / "racks.toml")
    options = Options(topology=str(tmp_path / "racks.toml"), transport="tcp", replan_steps=10)
    results = run_ranks(4, resumes, pg_options=options, timeout=40)
    assert results == [(True, False)] + [(False, False)] * 3
