"""How long does a training take to a given test accuracy behind slow uplinks, over torch's Gloo and over dssync?

    sudo python benchmarks/time_to_accuracy.py                  # two racks of four, 3 seeds: about a quarter of an hour
    sudo python benchmarks/time_to_accuracy.py --seeds 0 --out /tmp/x

Every run is the same script, train_to_accuracy.py, in the emulated cluster of cluster.py. Over Gloo, DDP all-reduces gradients
while backward runs; for dssync the name of the backend is another, DSSYNC_TOPOLOGY names a file with the racks and rates,
and DSSYNC_PLAN=auto picks the plan. Both backends have the same weights, batches and learning rates. They take turns, seed by seed.

The clock runs from the first step, connecting included, to the end of the step after which the mean of the workers' weights reads
the target's part of the test images correctly, on the slowest worker. Tests cost no time: see train_to_accuracy.py.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, TypeAlias

from all_reduce import machine, new_table
from cluster import Cluster, ClusterError
from demo_digits import BACKENDS, COLORS, LABELS, decorate
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import dssync_pg

HERE = Path(__file__).parent
SCRIPT = HERE / "train_to_accuracy.py"
RACKS = [4, 4]
BAR = 3.0  # times as fast as Gloo
PAPER = 1.94  # what arXiv 2007.03298 reports
RUN_PATIENCE_S = 900.0

Run: TypeAlias = dict[str, Any]  # what train_to_accuracy.py writes

console = Console(highlight=False)


# ---- running -------------------------------------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> tuple[list[Run], Run]:
    """All runs, and what they ran on."""
    topology = dssync_pg.Topology.uniform(
        len(RACKS), RACKS[0], nic=arguments.access * 1e6, uplink=arguments.uplink * 1e6
    )  # as cluster.py counts: on the wire
    runs = []
    with (
        tempfile.TemporaryDirectory(prefix="dssync-bench-") as folder,
        Cluster(RACKS, arguments.access, arguments.uplink) as cluster,
    ):
        checked = cluster.check()
        for path in checked:
            console.print(f"cluster: {path}")
        file, out = Path(folder, "topology.toml"), Path(folder, "run.json")
        topology.save(file)
        added = {"gloo": {}, "dssync": {"DSSYNC_TOPOLOGY": str(file), "DSSYNC_PLAN": "auto"}}
        quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # it would warn that the addresses have no names
        for number, seed in enumerate(arguments.seeds):
            for backend in BACKENDS if number % 2 == 0 else reversed(BACKENDS):  # neither is always the first
                command = [sys.executable, str(SCRIPT), f"--backend={backend}", f"--seed={seed}", f"--steps={arguments.steps}"]
                command += [f"--every={arguments.every}", f"--width={arguments.width}", f"--out={out}"]
                cluster.run(command, env={**quiet, **added[backend]}, timeout=RUN_PATIENCE_S)
                runs.append(json.loads(out.read_text()))
                console.print(f"{backend}, seed {seed}: {result_text(runs[-1], arguments.target)}")
    about = {"access_mbit": arguments.access, "uplink_mbit": arguments.uplink, "racks": RACKS, "congestion": cluster.congestion}
    return runs, {**about, "target": arguments.target, "checked": [str(path) for path in checked]}


# ---- what was found ------------------------------------------------------------------------------------------------------------


def steps_to(run: Run, target: float) -> int | None:
    """The steps after which the test accuracy was first at least `target`; None if it never was."""
    tests = zip(run["tested_steps"], run["test_accuracy"], strict=True)
    return next((step for step, accuracy in tests if accuracy >= target), None)


def seconds_to(run: Run, target: float) -> float | None:
    """The same in seconds."""
    steps = steps_to(run, target)
    return None if steps is None else run["seconds"][steps]


def seconds_a_step(run: Run) -> float:
    return float(run["seconds"][-1] / (len(run["seconds"]) - 1))


def times_as_fast(runs: Sequence[Run], target: float) -> float | None:
    """Gloo's seconds to the target over dssync's, each the sum over seeds; None where a run did not reach it."""
    sums = []
    for backend in BACKENDS:
        found = [seconds_to(run, target) for run in runs if run["backend"] == backend]
        reached = [seconds for seconds in found if seconds is not None]
        if not found or len(reached) < len(found):
            return None
        sums.append(sum(reached))
    return sums[0] / sums[1]


def result_text(run: Run, target: float) -> str:
    steps, seconds = steps_to(run, target), seconds_to(run, target)
    reached = f"{100 * target:g} % " + (f"after {seconds:.1f} s, {steps} steps" if seconds is not None else "not reached")
    return f"{reached}; {seconds_a_step(run):.3f} s a step; {100 * run['test_accuracy'][-1]:.1f} % at the end"


# ---- showing -------------------------------------------------------------------------------------------------------------------


def table_of(runs: Sequence[Run], about: Run) -> Table:
    target, racks = about["target"], " + ".join(map(str, about["racks"]))
    rates = f"{about['access_mbit']:g}/{about['uplink_mbit']:g} Mbit/s, {about['congestion']}"
    table = new_table(f"To {100 * target:g} % test accuracy: {racks} workers, {rates}, {size_text(runs[0])}")
    for heading in ("seed", "backend", "time", "steps", "faster\nthan Gloo", "mean time\na step", "accuracy\nat the end"):
        table.add_column(heading, justify="left" if heading in ("seed", "backend") else "right", no_wrap=True)
    for seed in dict.fromkeys(run["seed"] for run in runs):
        members = sorted((run for run in runs if run["seed"] == seed), key=lambda run: BACKENDS.index(run["backend"]))
        for run in members:
            steps, seconds = steps_to(run, target), seconds_to(run, target)
            ratio = times_as_fast(members, target) if run["backend"] == "dssync" else None
            table.add_row(
                str(seed) if run is members[0] else "",
                run["backend"],
                "not reached" if seconds is None else f"{seconds:.1f} s",
                "" if steps is None else str(steps),
                "" if ratio is None else f"{ratio:.2f}x",
                f"{seconds_a_step(run):.3f} s",
                f"{100 * run['test_accuracy'][-1]:.1f} %",
            )
        table.add_section()
    return table


def size_text(run: Run) -> str:
    return f"{run['parameters_bytes'] / (1 << 20):.1f} MiB of parameters"


def verdict(runs: Sequence[Run], target: float) -> str:
    ratio = times_as_fast(runs, target)
    steps = " and ".join(f"{name} {mean(map(seconds_a_step, mine)):.3f} s" for name, mine in by_backend(runs))
    if ratio is None:
        return f"Some run did not reach the target. A step: {steps}."
    bar = "met" if ratio >= BAR else "MISSED"
    return f"All seeds: {ratio:.2f} times as fast as Gloo (at least {BAR:g} is wanted: {bar}; the paper: {PAPER}). A step: {steps}."


def by_backend(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    return [(name, mine) for name in BACKENDS if (mine := [run for run in runs if run["backend"] == name])]


def plot(runs: Sequence[Run], about: Run, path: Path) -> None:
    """Test accuracy by time, and by step."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    rates = f"access {about['access_mbit']:g} Mbit/s, uplinks {about['uplink_mbit']:g} Mbit/s"
    title = f"Handwritten digits, {' + '.join(map(str, about['racks']))} workers, {rates}, {size_text(runs[0])}"
    figure.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=11)
    by_time, by_step = figure.subplots(1, 2, sharey=True, width_ratios=[2, 1])
    draw(by_time, "Test accuracy of the averaged model, %, by time", "seconds", runs, about["target"], in_steps=False)
    draw(by_step, "The same by step", "step", runs, about["target"], in_steps=True)
    handles, labels = by_time.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=150)


def draw(axes: Axes, title: str, unit: str, runs: Sequence[Run], target: float, in_steps: bool) -> None:
    """A line a run, with a dot where it reaches the target."""
    decorate(axes, title)
    axes.set_xlabel(unit)
    for backend, mine in by_backend(runs):
        for index, run in enumerate(mine):
            label = LABELS[backend] if index == 0 else None
            x = run["tested_steps"] if in_steps else [run["seconds"][step] for step in run["tested_steps"]]
            axes.plot(x, [100 * value for value in run["test_accuracy"]], color=COLORS[backend], label=label, lw=1.3, alpha=0.8)
            reached = steps_to(run, target)
            if reached is not None:
                at = run["tested_steps"].index(reached)
                axes.plot(x[at], 100 * run["test_accuracy"][at], "o", color=COLORS[backend], ms=5)
    axes.axhline(100 * target, color="#222222", lw=1, ls="--", label=f"{100 * target:g} %")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 101)


def report(runs: Sequence[Run], about: Run, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    path = out / "time_to_accuracy"
    console.print(table_of(runs, about), verdict(runs, about["target"]), sep="\n", soft_wrap=True)
    for sync in next((run["syncs"] for run in runs if run["syncs"]), []):
        plan = f"{sync['plan']} plan, period {sync['period']}, crossings {sync['delay']} late, {sync['engine']} engine"
        console.print(f"dssync: {plan}; changed {sync['plan_changes']} times")
    tests = " and ".join(f"{name} {mean(run['seconds_a_test'] for run in mine):.2f} s" for name, mine in by_backend(runs))
    console.print(f"A test while training, the averaging for it included, would take {tests}.", soft_wrap=True)
    plot(runs, about, path.with_suffix(".png"))
    lines = ",\n".join(json.dumps(run) for run in runs)
    path.with_suffix(".json").write_text(f'{{"machine": {json.dumps({**machine(), **about})}, "runs": [\n{lines}\n]}}\n')
    console.print(f"{path}.json, {path}.png", soft_wrap=True)


# ---- the command ---------------------------------------------------------------------------------------------------------------


def _seeds(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=_seeds, default=[0, 1, 2], metavar="N,N", help="of weights and shuffles (default: 0,1,2)")
    parser.add_argument("--target", type=float, default=0.97, help="test accuracy (default: 0.97)")
    parser.add_argument("--steps", type=int, default=60, help="of each run (default: 60)")
    parser.add_argument("--every", type=int, default=2, help="steps from one test to the next (default: 2)")
    parser.add_argument("--width", type=int, default=1024, help="of the hidden layers (default: 1024, 12 MiB of parameters)")
    parser.add_argument("--access", type=float, default=500, help="rate of a worker's link in Mbit/s (default: 500)")
    parser.add_argument("--uplink", type=float, default=100, help="rate of a rack's uplink in Mbit/s (default: 100)")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of JSON and PNG (default: benchmarks/results)")
    arguments = parser.parse_args()

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    report(*measure(arguments), arguments.out)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ClusterError as error:
        sys.exit(f"time_to_accuracy: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
