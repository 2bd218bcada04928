"""The probe: racks and rates found on simulated networks of many shapes; flows that stop in time; real runs."""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import ROOT, run_ranks

from dssync_pg import Options, Topology, _probe_flows
from dssync_pg._backend import live
from dssync_pg._probe_flows import rates_of, timed_flow
from dssync_pg._probe_racks import Search, fit
from dssync_pg.probe import probe, run_from_command_line

sys.path.insert(0, str(ROOT / "benchmarks"))
import cluster
from cluster import Cluster

# ---- a simulated network ---------------------------------------------------------------------------------------------------

MBIT = 1e6
ENOUGH = 1e6 * MBIT
"""Of an uplink that is nobody's bottleneck."""


class Network:
    """Flows share links max-min fairly, but for weights by chance, as TCP's shares are; what is measured is a little off."""

    def __init__(self, rack_of: list[int], nics: list[float], uplinks: list[float], seed: int) -> None:
        self.rack_of, self.nics, self.uplinks = rack_of, nics, uplinks
        self.chance = random.Random(seed)

    def run(self, pairs: list[tuple[int, int]]) -> dict[tuple[int, int], float]:
        assert len({host for pair in pairs for host in pair}) == 2 * len(pairs), "a round's pairs are disjoint"
        assert all(a < b for a, b in pairs)
        users: dict[tuple[str, int], set[int]] = {}
        for flow, pair in enumerate(pairs):
            racks = [self.rack_of[host] for host in pair]
            links = [("nic", host) for host in pair] + ([("uplink", rack) for rack in racks] if racks[0] != racks[1] else [])
            for link in links:
                users.setdefault(link, set()).add(flow)
        weights = [self.chance.uniform(0.7, 1.3) for _ in pairs]
        rates: dict[int, float] = {}
        while len(rates) < len(pairs):
            level, tightest = min(
                (
                    (self.capacity(link) - sum(rates.get(flow, 0) for flow in flows))
                    / sum(weights[flow] for flow in flows if flow not in rates),
                    link,
                )
                for link, flows in users.items()
                if flows - rates.keys()
            )
            for flow in users[tightest] - rates.keys():
                rates[flow] = level * weights[flow]
        return {pair: self.noisy(rates[flow]) for flow, pair in enumerate(pairs)}

    def capacity(self, link: tuple[str, int]) -> float:
        return (self.nics if link[0] == "nic" else self.uplinks)[link[1]]

    def noisy(self, rate: float) -> float:
        """A percent, and now and then a process that the machine was too busy to run."""
        busy = self.chance.uniform(0.6, 0.9) if self.chance.random() < 0.01 else 1
        return rate * self.chance.gauss(1, 0.01) * busy


def searched(network: Network) -> Search:
    search = Search(len(network.rack_of))
    while not search.settled:
        assert len(search.rounds) < 60
        search.add([network.run(pairs) for pairs in search.next_rounds(4)])
    return search


def racks(*sizes: int) -> list[int]:
    return [rack for rack, size in enumerate(sizes) for _ in range(size)]


def numbered(labels: list[int]) -> tuple[int, ...]:
    return tuple(list(dict.fromkeys(labels)).index(label) for label in labels)


SHAPES = {
    "two racks behind slow uplinks": (racks(4, 4), 500, 100),
    "an uplink as fast as a NIC": (racks(4, 4), 500, 500),
    "an uplink of half its NICs": (racks(4, 4), 500, 1000),
    "two of two": (racks(2, 2), 500, 100),
    "three of three, fast": (racks(3, 3, 3), 25_000, 20_000),
    "three of four": (racks(4, 4, 4), 500, 100),
    "three of two": (racks(2, 2, 2), 500, 100),
    "unequal": (racks(5, 3), 500, 100),
    "unequal, three": (racks(4, 2, 2), 500, 200),
    "an odd number": (racks(4, 3), 500, 100),
    "large": (racks(8, 8, 8, 8), 1000, 1000),
    "flat, fast": (racks(8), 25_000, ENOUGH),
    "flat, slow": (racks(8), 20, ENOUGH),
    "flat, four": (racks(4), 500, ENOUGH),
    "flat, many": (racks(24), 500, ENOUGH),
    "three hosts": (racks(3), 500, ENOUGH),
    "a pair": (racks(2), 500, ENOUGH),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("order", ["by rack", "mixed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_racks_and_rates_are_found(shape, order, seed):
    rack_of, nic, uplink = SHAPES[shape]
    if order == "mixed":
        rack_of = random.Random(seed).sample(rack_of, len(rack_of))
    flat = uplink == ENOUGH
    network = Network(rack_of, [nic * MBIT] * len(rack_of), [uplink * MBIT] * len(set(rack_of)), seed)
    found = searched(network).fit
    assert found.labels == numbered(rack_of)
    assert list(found.nics) == pytest.approx(network.nics, rel=0.05)
    assert list(found.uplinks) == (pytest.approx(network.uplinks, rel=0.05) if not flat else [math.inf])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sizes", [(8,), (4, 4), (3, 3, 3)])
def test_one_slow_nic_is_that_host_s_alone(sizes, seed):
    rack_of = racks(*sizes)
    nics = [500.0 * MBIT] * len(rack_of)
    nics[5] = 120.0 * MBIT
    network = Network(rack_of, nics, [300.0 * MBIT if len(sizes) > 1 else ENOUGH] * len(sizes), seed)
    found = searched(network).fit
    assert found.labels == tuple(rack_of)
    assert list(found.nics) == pytest.approx(nics, rel=0.05)


def test_different_uplinks():
    network = Network(racks(4, 4, 4), [500.0 * MBIT] * 12, [100 * MBIT, 400 * MBIT, 400 * MBIT], 0)
    found = searched(network).fit
    assert found.labels == tuple(racks(4, 4, 4))
    assert list(found.uplinks) == pytest.approx(network.uplinks, rel=0.05)


def test_losses_that_no_racks_explain_make_none():
    """All hosts on one machine, say: together they are slower, whoever exchanges with whom."""
    chance = random.Random(1)
    search = Search(8)
    while not search.settled:
        rounds = search.next_rounds(4)
        search.add([{pair: 3e9 * chance.uniform(0.3, 1) for pair in pairs} for pairs in rounds])
    assert search.fit.rack_count == 1


def test_the_same_measurements_give_the_same_answer_and_nothing_gives_one_rack():
    network = Network(racks(4, 4), [500.0 * MBIT] * 8, [100.0 * MBIT] * 2, 3)
    search = searched(network)
    assert fit(search.rounds, 8) == fit(list(search.rounds), 8)
    assert fit([], 3).labels == (0, 0, 0) and fit([], 3).nics == (math.inf,) * 3


# ---- flows -----------------------------------------------------------------------------------------------------------------


class Wire:
    """The other end, and a clock that only exchanges move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bytes_per_s: float, stops_after: float = math.inf) -> None:
        self.now, self.bytes_per_s, self.stops_after = 100.0, bytes_per_s, stops_after
        self.pieces: list[int] = []
        monkeypatch.setattr(_probe_flows.time, "monotonic", lambda: self.now)

    def average(self, piece: torch.Tensor) -> None:
        self.pieces.append(4 * piece.numel())
        theirs = torch.zeros_like(piece)
        theirs[_probe_flows._STOP] = float(len(self.pieces) > self.stops_after)
        theirs[_probe_flows._GROW] = 1.0
        piece.add_(theirs).div_(2)
        self.now += 4 * piece.numel() / self.bytes_per_s


def test_a_flow_ends_in_time_with_pieces_that_take_long_enough(monkeypatch):
    wire = Wire(monkeypatch, 50e6)
    profile = timed_flow(wire.average, 0.4, 1e9, 64 << 10)
    assert 0.4 < profile[0] < 0.45
    assert 0.01 <= max(wire.pieces) / 50e6 < 0.02
    assert rates_of([profile]) == pytest.approx([8 * 50e6])


def test_a_flow_ends_within_its_bytes(monkeypatch):
    wire = Wire(monkeypatch, 10e9)
    profile = timed_flow(wire.average, 0.4, 4e6, 64 << 10)
    assert 2e6 < sum(wire.pieces) <= 4e6 and profile[-1] == sum(wire.pieces)
    assert len(wire.pieces) > 8


def test_a_slow_link_is_measured_by_a_few_pieces(monkeypatch):
    wire = Wire(monkeypatch, 1e5)
    assert rates_of([timed_flow(wire.average, 0.4, 1e9, 64 << 10)]) == pytest.approx([8e5])
    assert wire.pieces == [64 << 10] * 4


def test_either_end_ends_a_flow(monkeypatch):
    wire = Wire(monkeypatch, 50e6, stops_after=6)
    timed_flow(wire.average, 100.0, 1e9, 64 << 10)
    assert len(wire.pieces) == 7


def test_flows_that_last_about_equally_long_count_over_the_same_time():
    """The second gets all of a link that both share once the first has ended: that is not what it gets beside it."""
    first = [1.0, *(50.0 * at for at in range(17))]
    second = [1.5, *(50.0 * at * 1.5 if at * 1.5 <= 16 else 800 + 100 * (at * 1.5 - 16) for at in range(17))]
    rates = rates_of([first, second])
    assert rates[0] == pytest.approx(8 * 800)
    assert rates[1] == pytest.approx(8 * 800, rel=0.04)  # what is known of each sixteenth, evenly
    long = [10.0, *(10.0 * at for at in range(17))]
    assert rates_of([first, long]) == pytest.approx([8 * 800, 8 * 16])


# ---- for real --------------------------------------------------------------------------------------------------------------


def probes(rank: int, size: int, max_bytes: int) -> tuple[str, dict[str, Any], int]:
    (group,) = live
    assert group.engine is not None
    before = group.engine.stats()["bytes_sent"]
    topology, report = probe(group.engine, rank, size, timedelta(seconds=20), group.exchange, max_seconds=3, max_bytes=max_bytes)
    sent = group.engine.stats()["bytes_sent"] - before
    again, _ = probe(group.engine, rank, size, timedelta(seconds=20), group.exchange, max_seconds=0.5, max_bytes=1 << 20)
    assert again.host_of == topology.host_of
    dist.barrier()
    return topology.to_json(), vars(report), sent


def test_every_rank_gets_the_same_and_bounds_hold():
    results = run_ranks(4, probes, 32 << 20, pg_options=Options(transport="tcp", topology="flat"))
    texts, reports, sent = zip(*results, strict=True)
    assert len(set(texts)) == 1 and all(report == reports[0] for report in reports)
    topology = Topology.from_json(texts[0])
    assert [host.ranks for host in topology.hosts] == [(0,), (1,), (2,), (3,)]
    assert all(10 * MBIT < host.nic.rate < math.inf and 0 < host.nic.latency < 1 for host in topology.hosts)
    assert reports[0]["seconds"] < 5
    assert max(sent) == pytest.approx(reports[0]["sent_bytes"], rel=0.1) and max(sent) < 32 << 20


def test_one_host_has_a_memory_and_no_nic():
    (text, report, _), *_ = run_ranks(3, probes, 32 << 20, pg_options=Options(topology="flat"))
    topology = Topology.from_json(text)
    assert [host.ranks for host in topology.hosts] == [(0, 1, 2)]
    assert topology.hosts[0].nic.rate == math.inf
    assert 100 * MBIT < topology.memory.rate < math.inf
    assert "probed 1 host in" in report["text"]


def probes_two_hosts(rank: int, size: int) -> tuple[str, float]:
    (group,) = live
    assert group.engine is not None
    engine: Any = SimpleNamespace(hosts=[0, 0, 2, 2], average=group.engine.average)  # they only say so
    topology, report = probe(engine, rank, size, timedelta(seconds=20), group.exchange, max_seconds=2, max_bytes=16 << 20)
    dist.barrier()
    return topology.to_json(), report.sent_bytes


def test_hosts_of_several_ranks_exchange_through_all_of_them():
    options = Options(transport="tcp", topology="flat")
    results = run_ranks(4, probes_two_hosts, pg_options=options)
    assert len(set(results)) == 1
    topology = Topology.from_json(results[0][0])
    assert topology.host_of == (0, 0, 1, 1) and len(topology.racks) == 1
    assert all(10 * MBIT < host.nic.rate < math.inf for host in topology.hosts)
    assert 10 * MBIT < topology.memory.rate < math.inf and topology.memory.latency > 0
    assert 1 << 20 < results[0][1] < 17 << 20


def command(rank: int, size: int, save: str, as_json: bool) -> int:
    return run_from_command_line(argparse.Namespace(save=save, json=as_json))


OF_THE_JOB = {"DSSYNC_PLAN": "striped", "DSSYNC_ALL_REDUCE": "exact", "DSSYNC_GROUP_SIZE": "5", "DSSYNC_MAX_PERIOD": "1"}
"""Variables that are for its training."""


@pytest.mark.parametrize(("as_json", "variables"), [(False, OF_THE_JOB), (True, {})])
def test_the_command_prints_and_saves(tmp_path, as_json, variables):
    file = tmp_path / "found.toml"
    variables = {"DSSYNC_TRANSPORT": "tcp", **variables}
    outcomes = run_ranks(2, command, str(file), as_json, init=False, env=variables, check=False)
    assert all(outcome.ok and outcome.value == 0 for outcome in outcomes), outcomes
    topology = Topology.load(file, world_size=2)
    printed = outcomes[0].output
    assert "probed 2 hosts in" in printed
    if as_json:
        line = next(line for line in printed.splitlines() if line.startswith("{"))
        assert Topology.from_json(json.dumps(json.loads(line)["topology"])) == topology
    else:
        assert str(topology) in printed and f"DSSYNC_TOPOLOGY={file}" in printed
    assert "2 workers" not in outcomes[1].output


def test_outside_of_a_launcher_the_command_says_so(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="torchrun"):
        run_from_command_line(argparse.Namespace(save=None, json=False))


def test_a_file_that_cannot_be_written_is_told_before_measuring(monkeypatch, tmp_path):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "nowhere"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OSError, match="no such folder"):
        run_from_command_line(argparse.Namespace(save=str(tmp_path / "no such folder" / "found.toml"), json=False))


MISSING = [tool for tool in cluster.PACKAGES if shutil.which(tool) is None]
UNABLE = "needs Linux" if sys.platform != "linux" else "needs root" if os.geteuid() != 0 else f"needs {', '.join(MISSING)}"


@pytest.mark.skipif(UNABLE != "needs ", reason=UNABLE)
def test_racks_of_an_emulated_cluster(tmp_path: Path):
    file = tmp_path / "found.json"
    with Cluster([2, 2], 200, 50) as bed:
        bed.run([sys.executable, "-m", "dssync_pg", "probe", "--save", str(file)], logs=tmp_path, timeout=60)
    topology = Topology.load(file)
    assert topology.rack_of == (0, 0, 1, 1)
    assert [host.nic.rate for host in topology.hosts] == pytest.approx([200 * MBIT] * 4, rel=0.05)
    assert [rack.uplink.rate for rack in topology.racks] == pytest.approx([50 * MBIT] * 2, rel=0.05)
