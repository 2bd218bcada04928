"""What the benchmark of plans makes of its samples."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from harness import ROOT, run_ranks

sys.path.insert(0, str(ROOT / "benchmarks"))
import plans
import plans_worker

from dssync_pg import Plan, Topology

MBIT = 1e6
SIZE = 32 << 20


@pytest.fixture
def topology() -> Topology:
    return plans.nominal([4, 4], 500, 100)


def test_ranks_count_through_racks():
    assert plans.ranks_of([3, 1, 2]) == [[0, 1, 2], [3], [4, 5]]


def test_nominal_topology_has_the_clusters_racks_and_rates():
    topology = plans.nominal([5, 3], 500, 50)
    assert [rack.ranks for rack in topology.racks] == plans.ranks_of([5, 3])
    assert {host.nic.rate for host in topology.hosts} == {500 * MBIT}
    assert {rack.uplink.rate for rack in topology.racks} == {50 * MBIT}


def test_bound_is_the_busier_direction_of_the_link_that_takes_longest():
    sent = {"worker 0": [5e6, 50e6], "uplink 0": [20e6, 1e6]}
    assert plans.wire_bound(sent, {"worker 0": 500, "uplink 0": 100}) == (pytest.approx(1.6), "uplink 0")
    assert plans.wire_bound(sent, {"worker 0": 100, "uplink 0": 100}) == (pytest.approx(4.0), "worker 0")
    assert plans.wire_bound({}, {}) == (0.0, "")


def test_a_step_ends_with_its_slowest_rank():
    ends = torch.tensor([[0.0, 1.0, 2.0], [0.5, 1.0, 4.5]], dtype=torch.float64)
    assert plans_worker.mean_step(ends) == pytest.approx(2.0)
    assert plans_worker.median_step([ends, ends + 7]) == pytest.approx((1.0 + 3.5) / 2)


def test_rounds_inside_a_rack_are_the_plans_without_what_crosses(topology: Topology):
    plan = Plan.create(plan="striped", topology=topology)
    for rack in plans.ranks_of([4, 4]):
        rounds = plans_worker.rounds_inside(plan, rack)
        for index, groups in enumerate(rounds):
            back = [[rack[member] for member in group] for group in groups]
            assert back == [rack] if plan.is_crossing(index) else all(group in plan.rounds[index] for group in back)
        assert Plan.from_rounds(rounds).contraction < 1


def test_compute_times_repeat_and_are_now_and_then_longer():
    spec = {"compute": 0.5, "noise": 0.0, "straggler_factor": 2.0, "straggler_probability": 0.1}
    times = plans_worker.compute_times("3 1", 2000, spec)
    assert times == plans_worker.compute_times("3 1", 2000, spec) != plans_worker.compute_times("4 1", 2000, spec)
    assert set(times) == {0.5, 1.0}
    assert 0.07 < times.count(1.0) / 2000 < 0.13


def test_predictions_are_about_what_was_measured(topology: Topology):
    striped = Plan.create(plan="striped", topology=topology)
    cost = striped.cost(topology, SIZE)
    found = plans.predict("plan auto = striped", striped, topology, SIZE, {})
    assert found["cost_seconds"] == cost.sync_s and found["plan_bound_seconds"] == cost.bound_s
    assert found["simulated_seconds"] == pytest.approx(cost.sync_s, rel=0.2)
    ring = plans.predict(plans.RING, None, topology, SIZE, {})
    assert "cost_seconds" not in ring
    assert ring["simulated_seconds"] == pytest.approx(4.9, rel=0.1)  # 2 (N-1)/N of the bytes and headers over 100 Mbit/s
    exact = plans.predict(plans.ALL_REDUCE, None, topology, SIZE, {})
    assert exact["cost_seconds"] == pytest.approx(2.8, rel=0.05)
    computing = {"compute": 1.0, "noise": 0.3, "straggler_probability": 0.05, "straggler_factor": 2.0}
    assert (
        plans.predict("plan auto", striped, topology, SIZE, computing)["simulated_seconds"] > 1.0 + found["simulated_seconds"] / 2
    )


def measure(rank: int, world: int, spec: plans.Record) -> None:
    bench = plans_worker.Bench(spec)
    bench.find_topology()
    bench.add_gloo()
    bench.add_composed()
    bench.add_plans(spec["plans"], True)
    bench.measure()


def test_every_kind_of_plan_can_be_measured(tmp_path: Path):
    """On one host, where times mean nothing: the workers check what is averaged."""
    out = tmp_path / "records.jsonl"
    racks = [2, 2]
    spec = {"case": "a case", "out": str(out), "mib": 1, "racks": plans.ranks_of(racks), "repetitions": 1, "plans": plans.KINDS}
    spec["topology"] = plans.nominal(racks, 500, 100).to_json()
    run_ranks(4, measure, spec, backend="gloo", env={"DSSYNC_TRANSPORT": "tcp"})
    found = [json.loads(line) for line in out.read_text().splitlines()]
    kinds = {Plan.from_bytes(bytes.fromhex(record["plan"])).kind for record in found if record.get("plan")}
    assert kinds == set(plans.KINDS) - {"auto"}
    assert {plans.RING, plans.ALL_REDUCE} < {record["series"] for record in found}
    assert all(record["seconds"] > 0 for record in found if "seconds" in record)


def records() -> list[plans.Record]:
    """What workers write of a striped plan, a ring and a composed exchange, on links that carried what they should."""
    topology = plans.nominal([4, 4], 500, 100)
    plan = Plan.create(plan="striped", topology=topology, model_bytes=SIZE)
    nics, uplinks = plan.link_bytes(topology, SIZE)
    sent = {f"worker {rank}": [count, count] for rank, count in enumerate(nics)}
    sent |= {f"uplink {rack}": [count, count] for rack, count in enumerate(uplinks)}
    rates = dict.fromkeys(sent, 500.0) | {"uplink 0": 100.0, "uplink 1": 100.0}

    def record(series: str, seconds: float, plan: Plan | None = None) -> plans.Record:
        text = plan.to_bytes().hex() if plan else None
        about = {"plan": text, "link_bytes": sent, "turns": [seconds], "median_step_seconds": seconds}
        return {"case": "a case", "series": series, "seconds": seconds, **about}

    found = [
        {"case": "a case", "series": "topology", "topology": topology.to_json(), "probe": "probed"},
        record(plans.RING, 5.4),
        record("composed: leaders", 4.6),
        record("composed: two-dimensional, 4 pieces", 4.0),
        record(plans.ALL_REDUCE, 3.0),
        record("plan auto = striped", 0.75, plan),
    ]
    return plans.complete(found, rates, SIZE, uplink=100, compute={})


def test_bounds_and_verdicts():
    found = records()
    auto = found[-1]
    assert auto["bound_seconds"] == pytest.approx(auto["plan_bound_seconds"], rel=1e-6)
    text = "\n".join(plans.verdicts(found))
    assert "7.2x as fast as the ring" in text and "5.3x as the best composed" in text
    assert "exact all_reduce 1.80x" in text
    assert "cost model: within 15%" in text


def test_pictures(tmp_path):
    found = records()
    plans.plot_bars(found, tmp_path / "bars.png")
    plans.plot_model(found, tmp_path / "model.png")
    plans.plot_uplinks(found, 500, 8 << 20, tmp_path / "uplinks.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in ("bars", "model", "uplinks"))
    assert len(plans.steps_tables(found)) == 1
