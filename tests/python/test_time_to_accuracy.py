"""The benchmark of time to accuracy: what it calls reached, how it compares, and its script tests the right weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import time_to_accuracy as benchmark
import train_to_accuracy as script

ABOUT = {"access_mbit": 500.0, "uplink_mbit": 100.0, "racks": [4, 4], "congestion": "reno", "target": 0.97}


def run(backend: str, seed: int, accuracies: list[float], step_s: float) -> dict[str, Any]:
    """A test every second step."""
    steps = 2 * (len(accuracies) - 1)
    return {
        "backend": backend,
        "seed": seed,
        "parameters_bytes": 1 << 20,
        "seconds": [step * step_s for step in range(steps + 1)],
        "tested_steps": list(range(0, steps + 1, 2)),
        "test_accuracy": accuracies,
        "seconds_a_test": 1.0,
        "syncs": [],
    }


RUNS = [
    run("gloo", 0, [0.1, 0.5, 0.97, 0.96, 0.98], 2.0),  # after 4 steps, 8 s
    run("dssync", 0, [0.1, 0.4, 0.96, 0.98, 0.98], 0.5),  # after 6 steps, 3 s
    run("gloo", 1, [0.1, 0.98, 0.98, 0.98, 0.98], 2.0),  # after 2 steps, 4 s
    run("dssync", 1, [0.1, 0.98, 0.98, 0.98, 0.98], 0.5),  # after 2 steps, 1 s
]


def test_first_test_that_reaches_the_target_counts() -> None:
    assert [benchmark.steps_to(one, 0.97) for one in RUNS] == [4, 6, 2, 2]
    assert [benchmark.seconds_to(one, 0.97) for one in RUNS] == [8, 3, 4, 1]
    assert benchmark.steps_to(RUNS[0], 0.99) is None
    assert benchmark.seconds_to(RUNS[0], 0.99) is None
    assert benchmark.seconds_a_step(RUNS[0]) == 2


def test_comparison_is_of_sums_over_seeds() -> None:
    assert benchmark.times_as_fast(RUNS, 0.97) == pytest.approx(12 / 4)
    assert benchmark.times_as_fast(RUNS, 0.99) is None
    assert benchmark.times_as_fast([*RUNS, run("dssync", 2, [0.1, 0.9], 0.1)], 0.97) is None  # one that failed is not left out
    assert benchmark.times_as_fast(RUNS[:1], 0.97) is None
    assert "3.00 times as fast" in benchmark.verdict(RUNS, 0.97) and ": met" in benchmark.verdict(RUNS, 0.97)
    assert "MISSED" in benchmark.verdict(RUNS[:2], 0.97)  # 8 s over 3 s
    assert "did not reach" in benchmark.verdict(RUNS, 0.99)


def test_report_holds_every_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.report(RUNS, ABOUT, tmp_path)

    written = json.loads((tmp_path / "time_to_accuracy.json").read_text())
    assert written["runs"] == RUNS
    assert written["machine"]["target"] == 0.97
    assert (tmp_path / "time_to_accuracy.png").stat().st_size > 10_000


def test_learning_rate_rises_and_falls_to_nothing() -> None:
    factors = [script.rate_factor(step, 60) for step in range(61)]
    assert factors[:3] == pytest.approx([0.2, 0.4, 0.6])
    assert max(factors) < 1 and factors[60] == 0
    assert all(later < earlier for earlier, later in pairwise(factors[5:]))


def test_restored_weights_are_those_kept() -> None:
    model = script.make_model(8)
    kept = [tensor.clone() for tensor in script.tensors_of(model)]
    for _ in range(2):  # BatchNorm's buffers change too
        model(torch.rand(4, 1, 8, 8)).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    script.copy(kept, script.tensors_of(model))
    assert all(torch.equal(tensor, old) for tensor, old in zip(script.tensors_of(model), kept, strict=True))


def test_two_workers_learn(tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(benchmark.SCRIPT)]
    arguments = ["--backend=dssync", "--width=64", "--steps=50", "--every=25", f"--out={out}"]
    subprocess.run([*torchrun, *arguments], env={"OMP_NUM_THREADS": "1", **os.environ}, check=True, timeout=120)

    result = json.loads(out.read_text())
    assert result["tested_steps"] == [0, 25, 50]
    assert result["seconds"] == sorted(result["seconds"]) and len(result["seconds"]) == 51
    first, _, last = result["test_accuracy"]
    assert first < 0.3 < 0.8 < last  # the copy of step 0 was not tested with the last weights
    assert result["syncs"][0]["step"] == 50  # restoring and testing launched nothing
