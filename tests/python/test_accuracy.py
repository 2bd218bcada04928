"""The accuracy comparison: its simulated workers against real ranks, its search and statistics, and a small part of its table."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import ROOT, THREADS, run_ranks
from torch.nn.parallel import DistributedDataParallel as DDP

import dssync_pg
import dssync_pg.sync
from dssync_pg import Options, Plan, Topology
from dssync_pg.topology import Host, Link, Rack

sys.path.insert(0, str(ROOT / "benchmarks"))
import accuracy
import accuracy_simulation as simulation
from accuracy_report import Interval, rows_of
from accuracy_tasks import DATA, DigitsNet, Recipe, Run

pytestmark = pytest.mark.timeout(600)  # seconds on free cores; minutes on a machine that does much else

WORLD = 4  # two rounds; eight slices of the second moments meet both of them in 16 steps
STEPS = 24
RATES = {"sgd": 0.1, "adamw": 0.004}


# ---- the simulation is the real thing --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A run to be done both ways."""

    optimizer: str
    method: str
    min_stripe_bytes: int = 1 << 20
    racks: tuple[int, ...] = ()  # workers of each, for the methods that know racks
    delay: int = 0

    def __str__(self) -> str:
        racks = f"-{'+'.join(map(str, self.racks))}-delay{self.delay}" if self.racks else ""
        return f"{self.optimizer}-{self.method}-{self.min_stripe_bytes}{racks}"

    @property
    def topology(self) -> Topology:
        ranks = iter(range(WORLD))
        racks = [[Host(f"host{rank}", (rank,), Link(500e6)) for rank in itertools.islice(ranks, size)] for size in self.racks]
        return Topology(Rack(f"rack{number}", tuple(hosts), Link(100e6)) for number, hosts in enumerate(racks))

    @property
    def plan(self) -> Plan:
        """Where there are racks, one of a short period, so that corrections are added over and over."""
        kind = simulation.METHODS[self.method].plan
        return Plan.create(plan=kind, topology=self.topology, max_period=4, delay=self.delay) if self.racks else Plan.create(WORLD)


FULL = [Case("sgd", "full"), Case("adamw", "full")]
AVERAGED = [
    Case("sgd", "none"),
    Case("sgd", "all"),
    Case("adamw", "none"),
    Case("adamw", "v"),
    Case("adamw", "all"),
    Case("adamw", "all", min_stripe_bytes=4096),
    Case("adamw", "warmup"),
]
RACKS = [
    Case("sgd", "striped", 1024, racks=(2, 2)),
    Case("sgd", "striped", 1024, racks=(2, 2), delay=2),
    Case("adamw", "striped_all", 1024, racks=(1, 3), delay=2),
    Case("adamw", "striped_all", 1 << 20, racks=(1, 3), delay=3),
    Case("sgd", "leaders", 1024, racks=(2, 2)),
    Case("sgd", "hybrid", 1024, racks=(2, 2), delay=1),
    Case("adamw", "hybrid_all", 1024, racks=(1, 3), delay=3),
]


@contextlib.contextmanager
def doubles() -> Iterator[None]:
    """Twice the digits, so that a slip of a round cannot hide in rounding."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def flat_rows(tensors: list[torch.Tensor], rows: int) -> torch.Tensor:
    return torch.cat([tensor.detach().reshape(rows, -1) for tensor in tensors], 1)


def everything(model, optimizer, rows: int) -> dict[str, torch.Tensor]:
    """Parameters, BatchNorm statistics and optimizer state as [rows, n]."""
    parameters = list(model.parameters())
    return {
        "parameters": flat_rows(parameters, rows),
        "statistics": flat_rows([buffer for buffer in model.buffers() if buffer.is_floating_point()], rows),
        "state": flat_rows([v for p in parameters for key, v in optimizer.state[p].items() if key != "step"], rows),
    }


def train_for_real(rank, world, folder, works):
    """An ordinary DDP script for each of (case, initial parameters, samples [STEPS, world, batch, 8, 8], targets)."""
    with doubles():
        return [train_one(rank, world, folder, *work) for work in works]


def train_one(rank, world, folder, case, start, samples, targets):
    method = simulation.METHODS[case.method]
    if method.parameters:
        options = Options(average_state=method.average_state, warmup_steps=math.ceil(method.warmup * STEPS))
        if case.racks:  # over TCP each rank counts as a host of its own
            options = dataclasses.replace(options, plan=case.plan, topology=f"{folder}/{case}.toml", transport="tcp")
        group = dist.new_group(backend="dssync", pg_options=options)
    else:
        group = dist.new_group(backend="gloo")
    dssync_pg.sync.MIN_STRIPE_BYTES = case.min_stripe_bytes
    net = DigitsNet()
    net.load_state_dict(start)
    model = DDP(net, process_group=group)
    recipe = Recipe("digits", world, STEPS, 16)
    optimizer = simulation.make_optimizer(case.optimizer, model.parameters(), RATES[case.optimizer], recipe)
    for step in range(STEPS):
        optimizer.zero_grad()
        logits = model(samples[step, rank].unsqueeze(1))[0]
        F.cross_entropy(logits, targets[step, rank]).backward()
        optimizer.step()
    dist.barrier(group)  # whatever average is still due comes first
    assert len(dssync_pg.get_syncs(model)) == method.parameters
    return everything(net, optimizer, 1)


def train_simulated(case):
    """The same, simulated; also what the real run starts from and is fed."""
    recipe = Recipe("digits", WORLD, STEPS, 16)
    data = DATA["digits"](0, WORLD, "sorted")
    workers = simulation.Workers(simulation.METHODS[case.method], case.optimizer, RATES[case.optimizer], 5, recipe, case.plan)
    workers.min_stripe_bytes = case.min_stripe_bytes
    start = {name: value.clone() for name, value in workers.single.state_dict().items()}
    taken = []
    for _, (samples, targets) in zip(range(STEPS), simulation.batches(data, recipe, seed=0), strict=False):
        taken.append((samples.double(), targets))
        workers.step(*taken[-1])
    found = everything(workers.model, workers.optimizer, WORLD)
    return found, (case, start, torch.stack([s for s, _ in taken]), torch.stack([t for _, t in taken]))


@pytest.fixture(scope="module")
def both_ways(tmp_path_factory) -> dict[Case, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """(simulated, real) of every case, as [WORLD, n]."""
    folder, cases = tmp_path_factory.mktemp("topologies"), [*FULL, *AVERAGED, *RACKS]
    for case in RACKS:
        case.topology.save(folder / f"{case}.toml")
    with doubles():
        simulated, works = zip(*map(train_simulated, cases), strict=True)
    by_rank = run_ranks(WORLD, train_for_real, str(folder), works, timeout=500, pg_timeout=300)
    real = [{name: torch.cat([of[name] for of in found]) for name in found[0]} for found in zip(*by_rank, strict=True)]
    return dict(zip(cases, zip(simulated, real, strict=True), strict=True))


@pytest.mark.parametrize("case", AVERAGED + RACKS, ids=str)
def test_a_simulated_run_equals_one_over_the_backend(both_ways, case):
    simulated, real = both_ways[case]
    parameters = simulated["parameters"]
    assert (parameters - parameters.mean(0)).abs().max() > 1e-4  # unlike replicas: rounds matter
    torch.testing.assert_close(real, simulated, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_the_baseline_equals_ddp_over_gloo(both_ways, case):
    simulated, real = both_ways[case]
    for name in ("parameters", "state"):
        torch.testing.assert_close(real[name], simulated[name], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(real["statistics"][0], simulated["statistics"][0], rtol=1e-6, atol=1e-8)


# ---- search and statistics -------------------------------------------------------------------------------------------------


def answer(study: accuracy.Study, loss_of) -> None:
    """Fills in what the study asks for until it asks for nothing."""
    for _ in range(20):
        missing = study.missing()
        if not missing:
            return
        for run in missing:
            study.results.add(run, {"loss": loss_of(run), "accuracy": 100 - loss_of(run), "rank0_accuracy": 0.0})
    raise AssertionError("the study never ends")


def make_study(path: Path, methods=("full", "none"), seeds: int = 6) -> accuracy.Study:
    rows = [accuracy.Cell("digits", "adamw", "iid", method) for method in methods]
    return accuracy.Study(rows, accuracy.Results(path, accuracy.RECIPES), sweep_seeds=2, seeds=seeds)


def test_the_grid_grows_until_its_best_point_has_neighbours(tmp_path):
    best = {"full": 0.064, "none": 0.00025}  # outside the first grid, on either side
    study = make_study(tmp_path / "runs.jsonl")
    answer(study, lambda run: abs(torch.tensor(run.lr / best[run.method]).log2().item()) + run.seed % 7 / 100)
    rates = {cell.method: cell.at(study.best(cell), 0).lr for cell in study.rows}
    assert rates == pytest.approx(best)
    elsewhere = {run.seed for run in study.results.known if run.lr not in rates.values()}
    assert elsewhere == {0, 1}


def test_the_comparison_never_sees_a_sweep_seed(tmp_path):
    study = make_study(tmp_path / "runs.jsonl")
    evaluated = {run.seed for cell in study.rows for run in study.evaluation(cell, 0)}
    assert len(evaluated) == 6
    assert evaluated.isdisjoint(range(study.sweep_seeds))


def test_an_interrupted_table_continues_and_drops_the_line_cut_short(tmp_path):
    path = tmp_path / "runs.jsonl"
    study = make_study(path)
    answer(study, lambda run: abs(torch.tensor(run.lr / 0.008).log2().item()))
    text = path.read_text()
    path.write_text(text[: len(text) - 20])  # as when killed in mid-write
    assert len(make_study(path).missing()) == 1
    answer(make_study(path), lambda run: 1.0)
    assert make_study(path).missing() == []


def test_a_changed_recipe_starts_anew(tmp_path):
    path = tmp_path / "runs.jsonl"
    answer(make_study(path), lambda run: abs(run.lr - 0.008))
    changed = {"digits": Recipe("digits", workers=8, steps=271, batch=16)}
    assert accuracy.Results(path, changed).known == {}
    assert len(accuracy.Results(path, accuracy.RECIPES).known) > 0


def test_the_interval_is_that_of_a_paired_t_test(tmp_path):
    from scipy import stats

    generator = torch.Generator().manual_seed(3)
    losses = {method: (2 + torch.randn(40, generator=generator)).tolist() for method in ("full", "none")}

    def loss(run: Run) -> float:
        return losses[run.method][run.seed - 1000] if run.seed >= 1000 else abs(torch.tensor(run.lr / 0.008).log2().item())

    study = make_study(tmp_path / "runs.jsonl", seeds=12)
    answer(study, loss)
    row = next(row for row in rows_of(study) if row.cell.method == "none")
    expected = stats.ttest_rel(losses["full"][:12], losses["none"][:12]).confidence_interval(0.95)
    assert isinstance(row.difference, Interval)
    assert (row.difference.low, row.difference.high) == pytest.approx((expected.low, expected.high))


# ---- a small part of the table ---------------------------------------------------------------------------------------------


def test_the_quick_table_and_its_control(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "accuracy.py"), "--quick", "--jobs", "2", "--out", str(tmp_path)]
    ended = subprocess.run(command, env={**os.environ, **THREADS}, capture_output=True, text=True, timeout=570, check=False)
    assert ended.returncode == 0, ended.stderr
    losses: dict[tuple[str, str], list[float]] = {}
    for line in (tmp_path / "accuracy.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry["seed"] >= accuracy.FIRST_EVALUATION_SEED:
            losses.setdefault((entry["optimizer"], entry["method"]), []).append(entry["result"]["loss"])
    means = {key: sum(values) / len(values) for key, values in losses.items()}
    for optimizer in ("sgd", "adamw"):
        assert means[optimizer, "full"] < 0.5 * means[optimizer, "solo"]
        assert means[optimizer, "none"] < 0.7 * means[optimizer, "solo"], means  # agreement is what makes the difference
    table = (tmp_path / "accuracy.md").read_text()
    assert "control: no averaging" in table
    assert {path.name for path in tmp_path.glob("*.png")} == {"accuracy.png", "accuracy_rates.png"}
