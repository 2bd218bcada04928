"""Links that become slower and recover while training runs: when the plan changes, and what a step takes then.

    python benchmarks/contention.py                  # an uplink, a host's NIC, noise; as root, about ten minutes
    python benchmarks/contention.py uplink

On the emulated cluster (cluster.py: 8 workers, 2 racks, NICs of 500 Mbit/s, uplinks of 100 Mbit/s), a model is averaged step after
step by the plan that `auto` makes. At step 70 a link is cut; 110 steps later it recovers. Beside it: a run planned for the cut link
from the start, on a cluster that is so from the start. `noise`: computing takes a log-normal time, now and then twice as long, and
no link changes: 20 windows of 50 steps in which the plan should stay.

Writes contention.json and contention.png into --out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from cluster import Cluster
from rich.console import Console
from rich.table import Table

from dssync_pg import Topology

WORKER = Path(__file__).with_name("contention_worker.py")
RACKS, ACCESS, UPLINK = [4, 4], 500.0, 100.0
CUT_AT, HEAL_AT, STEPS = 70, 180, 320
WINDOW = 50
console = Console()


def topology_file(folder: Path, uplinks: list[float], nics: list[float]) -> Path:
    topology = Topology.uniform(racks=len(RACKS), hosts_per_rack=RACKS[0], nic=ACCESS * 1e6, uplink=UPLINK * 1e6)
    path = folder / "topology.toml"
    topology.with_links([rate * 1e6 for rate in nics], [rate * 1e6 for rate in uplinks]).save(path)
    return path


def run(cluster: Cluster, mib: float, steps: int, changes: dict[int, Any], what: str, compute: float = 0.0) -> list[dict[str, Any]]:
    """What each step took on rank 0; `changes` are made as it reaches these steps."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log = folder / "steps.jsonl"
        topology = topology_file(folder, cluster.uplinks, cluster.nics)
        command = [sys.executable, str(WORKER), f"--steps={steps}", f"--mib={mib}", f"--topology={topology}", f"--log={log}"]
        job = cluster.start([*command, f"--compute={compute}"])
        lines: list[dict[str, Any]] = []
        with console.status(what) as status:
            ended = False
            while not ended:
                ended = job.join(0.2)
                text = log.read_text() if log.exists() else ""
                lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
                for step in [step for step in changes if len(lines) >= step]:
                    changes.pop(step)(cluster)
                status.update(f"{what}: step {len(lines)} of {steps}")
        job.wait()
        return lines


def first_plan(lines: list[dict[str, Any]], begin: int) -> int | None:
    """The first step from `begin` on whose plan is another than that of the step before."""
    plans = [(line["kind"], line["period"], line["delay"]) for line in lines if "step" in line]
    return next((step for step in range(begin, len(plans)) if plans[step] != plans[step - 1]), None)


def mean_step(lines: list[dict[str, Any]], begin: int, end: int) -> float:
    """Over whole steps of rank 0. Single ones are longer and shorter in turns; all take as long in the mean."""
    return statistics.fmean(line["step_s"] for line in lines[begin:end]) if begin < end else math.nan


def measure_cut(link: str, mib: float, cut: float) -> dict[str, Any]:
    """A link is cut to so many Mbit/s while training runs, and recovers."""

    def set_rate(rate: float) -> Any:
        return lambda cluster: cluster.set_uplink(1, rate) if link == "uplink" else cluster.set_nic(0, rate)

    with Cluster(RACKS, ACCESS, UPLINK) as cluster:
        cluster.check()
        healthy = UPLINK if link == "uplink" else ACCESS
        lines = run(cluster, mib, STEPS, {CUT_AT: set_rate(cut), HEAL_AT: set_rate(healthy)}, f"{link} cut to {cut:g} Mbit/s")
        set_rate(cut)(cluster)
        reference = run(cluster, mib, 60, {}, f"{link} of {cut:g} Mbit/s from the start")
    changed, healed = first_plan(lines, CUT_AT), first_plan(lines, HEAL_AT)
    steps = [line for line in lines if "step" in line]
    return {
        "link": link,
        "mbit": cut,
        "steps": steps,
        "reference_steps": reference[:-1],
        "changed_after": None if changed is None or changed >= HEAL_AT else changed - CUT_AT,
        "healed_after": None if healed is None else healed - HEAL_AT,
        "before_s": mean_step(steps, 20, CUT_AT),
        "cut_s": mean_step(steps, CUT_AT + 10, min(changed or HEAL_AT, HEAL_AT)),
        "replanned_s": mean_step(steps, (changed if changed is not None and changed < HEAL_AT else CUT_AT + 10) + 5, HEAL_AT),
        "reference_s": mean_step(reference[:-1], 10, 60),
        "healed_s": mean_step(steps, (healed or STEPS - 20) + 5, STEPS),
        "plans": [f"{key[0]}, period {key[1]}, delay {key[2]}"
                  for key, _ in itertools.groupby((line["kind"], line["period"], line["delay"]) for line in steps)],
    }  # fmt: skip


def measure_noise(mib: float, windows: int) -> dict[str, Any]:
    with Cluster(RACKS, ACCESS, UPLINK) as cluster:
        cluster.check()
        lines = run(cluster, mib, (windows + 1) * WINDOW, {}, "noise", compute=0.05)
    return {"windows": windows, "plan_changes": lines[-1]["plan_changes"], "steps": lines[:-1]}


def show(results: dict[str, Any]) -> None:
    table = Table(title="A link is cut while training runs, and recovers")
    for column in ("link", "before", "cut", "new plan after", "then", "planned for it", "ratio", "back after", "then"):
        table.add_column(column, justify="right")
    for result in results["cuts"]:
        after = "the same is best" if result["changed_after"] is None else f"{result['changed_after']} steps"
        healed = "none" if result["healed_after"] is None else f"{result['healed_after']} steps"
        seconds = [f"{result[key]:.3f} s" for key in ("before_s", "cut_s", "replanned_s", "reference_s", "healed_s")]
        ratio = f"{result['replanned_s'] / result['reference_s']:.2f}"
        name = f"{result['link']} -> {result['mbit']:g} Mbit/s"
        table.add_row(name, seconds[0], seconds[1], after, seconds[2], seconds[3], ratio, healed, seconds[4])
    console.print(table)
    for result in results["cuts"]:
        console.print(f"{result['link']}: {' -> '.join(result['plans'])}")
    if results["noise"] is not None:
        noise = results["noise"]
        console.print(f"noise: {noise['plan_changes']} changes of plan in {noise['windows']} windows")


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(results["cuts"]), 1, figsize=(9, 3.2 * len(results["cuts"])), squeeze=False)
    for axis, result in zip(axes[:, 0], results["cuts"], strict=True):
        seconds = [line["step_s"] for line in result["steps"]]
        smooth = [statistics.fmean(seconds[max(0, i - 6) : i + 1]) for i in range(len(seconds))]
        axis.plot(smooth, label="mean of 7 steps")
        axis.axhline(result["reference_s"], color="grey", linestyle=":", label="planned for the cut from the start")
        for step, text in ((CUT_AT, "cut"), (HEAL_AT, "recovers")):
            axis.axvline(step, color="tab:red", linewidth=1)
            axis.annotate(text, (step, axis.get_ylim()[1]), xytext=(3, -10), textcoords="offset points", color="tab:red")
        for begin, after in ((CUT_AT, result["changed_after"]), (HEAL_AT, result["healed_after"])):
            if after is not None:
                axis.axvline(begin + after, color="tab:green", linewidth=1)
                axis.annotate(
                    "new plan", (begin + after, axis.get_ylim()[1]), xytext=(3, -22), textcoords="offset points", color="tab:green"
                )
        axis.set(title=f"{result['link']} cut to {result['mbit']:g} Mbit/s", xlabel="step", ylabel="seconds a step", ylim=(0, None))
        axis.legend(loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = ["uplink", "nic", "noise", []]  # none at all is checked against them, too
    parser.add_argument("what", nargs="*", choices=choices, metavar="{uplink,nic,noise}", help="default: all three")
    parser.add_argument("--mib", type=float, default=8, help="size of the model (default: 8)")
    parser.add_argument("--windows", type=int, default=20, help="of noise (default: 20)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"), help="folder for the results")
    args = parser.parse_args()
    what = args.what or ["uplink", "nic", "noise"]
    cuts = [measure_cut(link, args.mib, mbit) for link, mbit in (("uplink", 40.0), ("nic", 100.0)) if link in what]
    results = {"cuts": cuts, "noise": measure_noise(args.mib, args.windows) if "noise" in what else None}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "contention.json").write_text(json.dumps(results) + "\n")
    show(results)
    if cuts:
        plot(results, args.out / "contention.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
