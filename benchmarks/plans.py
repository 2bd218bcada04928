"""What do plans gain on racks behind a slow uplink, and do the cost model and the simulator foretell it? Emulated clusters; root.

    sudo python benchmarks/plans.py sync         # torch's Gloo, exchanges composed from its groups, exact all_reduce, every plan
    sudo python benchmarks/plans.py model        # measured against predicted: 2 and 3 racks, unequal ones, N = 6, three rates
    sudo python benchmarks/plans.py stragglers   # steps that compute for a random time, with and without crossings
    sudo python benchmarks/plans.py uplinks      # time a step against the uplink's rate
    sudo python benchmarks/plans.py flat         # networks without a bottleneck: DDP over Gloo and over dssync

A step of `sync`, `model` and `uplinks` is one average of the parameters and nothing else, the worst case for every plan. Each case
is one job, in which all series have their turns (plans_worker.py). Topologies are what the probe finds in that job; predictions
know nothing but them. "bound" is what the links really carried a step, headers included, on the busiest of them, over its rate.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, TypeAlias

from all_reduce import HERE, MIB, machine, new_table, time_text
from cluster import Cluster, ClusterError, Job, ShapingError, WorkersFailed
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from dssync_pg import Plan, Topology, simulate

WORKER = HERE / "plans_worker.py"
TIMEOUT_S = 340  # of a case
CHECKS = 3
# torch would warn that the addresses have no names, and its newer releases that collectives have new ones.
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore::FutureWarning"}
SIMULATED_STEPS = 64
KINDS = ["auto", "striped", "hybrid", "leaders", "grid", "exact"]
MODEL_CASES: list[tuple[list[int], float]] = [
    ([4, 4], 100),
    ([4, 4], 50),
    ([4, 4], 200),
    ([3, 3, 2], 100),
    ([2, 2, 2], 100),
    ([5, 3], 100),
]
UPLINKS = [20.0, 50.0, 100.0, 200.0, 400.0]
RING, ALL_REDUCE, RACKS_ALONE = "gloo ring", "dssync all_reduce", "racks alone"
DDP_GLOO, DDP_DSSYNC = "DDP, gloo", "DDP, dssync"
UNFORETOLD = (RACKS_ALONE, DDP_GLOO, DDP_DSSYNC)  # no plan of all workers; compute that is not known
SIMULATED = {RING: "ring", "composed: leaders": "leaders", "composed: two-dimensional": "two-dimensional"}
PLAN_COLORS = {
    "striped": "#d1495b",
    "hybrid": "#1b6ca8",
    "leaders": "#d08a00",
    "grid": "#5a9367",
    "random": "#5a9367",
    "exact": "#7b4b94",
}
GREY = "#7a8594"
BAR = 0.15
"""How far predictions may be off."""

Record: TypeAlias = dict[str, Any]

console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)  # tables in a log are not folded


# ---- running -------------------------------------------------------------------------------------------------------------------


def case_text(racks: Sequence[int], access: float, uplink: float) -> str:
    if len(racks) == 1:
        return f"{racks[0]} workers, {access:g} Mbit/s"
    return f"racks of {', '.join(map(str, racks))}, uplink {uplink:g} Mbit/s"


def ranks_of(racks: Sequence[int]) -> list[list[int]]:
    """[2, 3] -> [[0, 1], [2, 3, 4]]"""
    starts = [sum(racks[:index]) for index in range(len(racks) + 1)]
    return [list(range(first, last)) for first, last in pairwise(starts)]


def run_case(racks: Sequence[int], access: float, uplink: float, spec: Record, arguments: argparse.Namespace) -> list[Record]:
    """What the workers of one emulated cluster have found, and the rates of its links."""
    case = case_text(racks, access, uplink)
    with Cluster(racks, access, uplink, arguments.congestion) as cluster:
        check(cluster)
        full = {**spec, "case": case, "racks": ranks_of(racks)}
        if arguments.nominal:
            full["topology"] = nominal(racks, access, uplink).to_json()
        records = collect(full, lambda text: cluster.run([sys.executable, str(WORKER), text], env=QUIET, timeout=arguments.timeout))
        rates = {f"worker {rank}": mbit for rank, mbit in enumerate(cluster.nics)}
        rates |= {f"uplink {rack}": mbit for rack, mbit in enumerate(cluster.uplinks)}
    return complete(records, rates, round(spec["mib"] * MIB), uplink=uplink, compute=spec)


def nominal(racks: Sequence[int], access: float, uplink: float) -> Topology:
    """What a file would say of a cluster."""
    lines = [f'nic = "{access} Mbit/s"', f'uplink = "{uplink} Mbit/s"']
    for count in racks:
        lines += ["[[rack]]", "[[rack.host]]", f"count = {count}"]
    return Topology.from_toml("\n".join(lines) + "\n")


def check(cluster: Cluster) -> None:
    """On a machine that is busy for a moment a rate may look wrong once."""
    for left in reversed(range(CHECKS)):
        try:
            for measured in cluster.check():
                console.print(f"cluster: {measured}")
            return
        except ShapingError as error:
            if not left:
                raise
            console.print(f"cluster: {error}; once more")


def run_host(text: str, size: int) -> None:
    """All ranks on this machine, without an emulated network."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"OMP_NUM_THREADS": "1", **os.environ, "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **QUIET}
    command = [sys.executable, str(WORKER), text]
    job = Job([(command, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(size)], None)
    try:
        job.wait(TIMEOUT_S)
    finally:
        job.stop()


def collect(spec: Record, run: Any) -> list[Record]:
    with tempfile.TemporaryDirectory(prefix="dssync-bench-") as folder:
        out = Path(folder, "records.jsonl")
        run(json.dumps({**spec, "out": str(out)}))
        return [json.loads(line) for line in out.read_text().splitlines()]


# ---- what the numbers mean -----------------------------------------------------------------------------------------------------


def wire_bound(link_bytes: Mapping[str, Sequence[float]], rates: Mapping[str, float]) -> tuple[float, str]:
    """Seconds that the busier direction of the busiest link takes for its bytes, and that link. rates: Mbit/s."""
    return max(((max(ways) * 8 / (rates[link] * 1e6), link) for link, ways in link_bytes.items()), default=(0.0, ""))


def predict(series: str, plan: Plan | None, topology: Topology, model_bytes: int, compute: Record) -> Record:
    """Seconds a step by the cost model, its bound, and seconds a step by the simulator; what is known of them."""
    noise = {key: compute[key] for key in ("compute", "noise", "straggler_probability", "straggler_factor") if key in compute}
    steps = 1000 if noise else SIMULATED_STEPS
    what: Plan | str | None = SIMULATED.get(series, plan)
    if series == ALL_REDUCE:
        what = plan = Plan.create(topology.world_size, "exact")
    found: Record = {}
    if plan is not None:
        cost = plan.cost(topology, model_bytes)
        found["plan_bound_seconds"] = cost.bound_s
        if not noise:  # of which the cost model knows nothing
            found["cost_seconds"] = cost.sync_s
    if what is not None:
        found["simulated_seconds"] = simulate(topology, what, model_bytes=model_bytes, steps=steps, **noise).mean_step
    return found


def complete(records: list[Record], rates: Mapping[str, float], model_bytes: int, uplink: float, compute: Record) -> list[Record]:
    """The records with bounds and predictions."""
    topology = None
    for record in records:
        if record["series"] == "topology":
            topology = Topology.from_json(record["topology"])
            continue
        plan = Plan.from_bytes(bytes.fromhex(record["plan"])) if record["plan"] else None
        record["uplink_mbit"] = uplink
        record["kind"] = plan.kind if plan is not None else None
        if plan is not None:
            record |= {"period": plan.period, "delay": plan.delay}
        record["bound_seconds"], record["busiest"] = wire_bound(record["link_bytes"], rates)
        if topology is not None and record["series"] not in UNFORETOLD:
            record |= predict(record["series"], plan, topology, model_bytes, compute)
    return records


def error_of(record: Record, field: str) -> float | None:
    """Of the prediction, as a part of what was measured."""
    return float(record[field] / record["seconds"] - 1) if field in record else None


def measured(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record["series"] != "topology"]


# ---- showing -------------------------------------------------------------------------------------------------------------------


def prediction_text(record: Record, field: str) -> str:
    error = error_of(record, field)
    return "" if error is None else f"{time_text(record[field])} {100 * error:+.0f} %"


def series_text(record: Record) -> str:
    if not record["kind"]:
        return str(record["series"])
    kind = "" if record["kind"] in record["series"] else f"{record['kind']}, "
    delay = f", {record['delay']} late" if record["delay"] else ""
    return f"{record['series']} ({kind}P={record['period']}{delay})"


def steps_tables(records: Sequence[Record]) -> list[Table]:
    tables = []
    for case, rows in groupby(records, key=lambda record: record["case"]):
        members = measured(list(rows))
        gloo = next((record["seconds"] for record in members if record["series"] in (RING, DDP_GLOO)), None)
        table = new_table(case)
        for heading in (
            "",
            "time a step",
            "median",
            "faster\nthan Gloo",
            "bound",
            "time /\nbound",
            "plan's\nbound",
            "cost model",
            "simulator",
        ):
            table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
        for record in members:
            bound = record["bound_seconds"]
            table.add_row(
                series_text(record),
                time_text(record["seconds"]),
                time_text(record["median_step_seconds"]),
                f"{gloo / record['seconds']:.2f}x" if gloo else "",
                time_text(bound) if bound else "",
                f"{record['seconds'] / bound:.3f}" if bound else "",
                time_text(record["plan_bound_seconds"]) if "plan_bound_seconds" in record else "",
                prediction_text(record, "cost_seconds"),
                prediction_text(record, "simulated_seconds"),
            )
        tables.append(table)
    return tables


def verdicts(records: Sequence[Record]) -> list[str]:
    """What the bars of plans are about, where the series are there."""
    lines = []
    for case, rows in groupby(measured(records), key=lambda record: record["case"]):
        found = {record["series"]: record for record in rows}
        plans = [record for record in found.values() if record["kind"]]
        auto = next((record for record in plans if "auto" in record["series"].removeprefix("plan ").split(" = ")), None)
        composed = [record["seconds"] for name, record in found.items() if name.startswith("composed")]
        if auto and auto["bound_seconds"] and RACKS_ALONE not in found:
            text = f"auto {auto['seconds'] / auto['bound_seconds']:.2f}x its bound"
            text += f", {found[RING]['seconds'] / auto['seconds']:.1f}x as fast as the ring" if RING in found else ""
            text += f", {min(composed) / auto['seconds']:.1f}x as the best composed exchange" if composed else ""
            rivals = [record for record in plans if record["kind"] != "hybrid"]  # which also averages gradients, not measured here
            best = min([auto, *rivals], key=lambda record: float(record["seconds"]))
            if best is not auto:
                text += f"; {best['series']} takes {best['seconds'] / auto['seconds']:.2f} of its time"
            lines.append(f"{case}: {text}")
        if ALL_REDUCE in found and RING in found:
            lines.append(
                f"{case}: exact all_reduce {found[RING]['seconds'] / found[ALL_REDUCE]['seconds']:.2f}x as fast as the ring"
            )
        if DDP_GLOO in found and DDP_DSSYNC in found:
            ratio = found[DDP_GLOO]["seconds"] / found[DDP_DSSYNC]["seconds"]
            lines.append(f"{case}: DDP over dssync {ratio:.2f}x as fast as over Gloo ({found[DDP_DSSYNC]['kind']} plan)")
        if RACKS_ALONE in found and auto:
            ratio = auto["seconds"] / found[RACKS_ALONE]["seconds"]
            lines.append(f"{case}: with the crossing {ratio:.3f}x the time without it")
    for field, name in (("cost_seconds", "cost model"), ("simulated_seconds", "simulator")):
        errors = [(abs(error_of(record, field) or 0), record) for record in records if record.get("kind") and field in record]
        if errors:
            worst, record = max(errors, key=lambda pair: pair[0])
            within = sum(error <= BAR for error, _ in errors)
            text = f"within {BAR:.0%} for {within} of {len(errors)} plans and topologies"
            lines.append(f"{name}: {text}, worst {worst:.0%} ({record['series']}, {record['case']})")
    return lines


def tidy(axes: Axes, title: str) -> None:
    axes.tick_params(labelsize=8)
    axes.grid(color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=10)


def plot_bars(records: Sequence[Record], path: Path) -> None:
    """Time a step, a field a case; a mark at each bound, a ring at what the simulator says."""
    cases = [list(rows) for _, rows in groupby(measured(records), key=lambda record: record["case"])]
    height = 0.8 + 0.36 * max(map(len, cases))
    figure = Figure(figsize=(6 * len(cases), height), layout="constrained")
    for axes, members in zip(figure.subplots(1, len(cases), squeeze=False).flat, cases, strict=True):
        places = range(len(members))
        seconds = [record["seconds"] for record in members]
        axes.barh(places, seconds, color=[PLAN_COLORS.get(record["kind"], GREY) for record in members], height=0.62)
        for place, record in zip(places, members, strict=True):
            end = max(record["seconds"], record.get("simulated_seconds", 0.0))
            axes.text(end, place, f"  {time_text(record['seconds'])}", va="center", fontsize=8)
            if record["bound_seconds"]:
                axes.plot([record["bound_seconds"]] * 2, [place - 0.4, place + 0.4], color="#222222", lw=1.4)
            if "simulated_seconds" in record:
                axes.plot(record["simulated_seconds"], place, "o", mfc="none", mec="#222222", ms=5)
        axes.set_yticks(places, [series_text(record) for record in members])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.2 * max(seconds))
        axes.set_xlabel("seconds a step (line: bound; circle: simulator)", fontsize=8)
        tidy(axes, members[0]["case"])
    figure.savefig(path, dpi=120)


def plot_model(records: Sequence[Record], path: Path) -> None:
    """Predicted against measured."""
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    fields = (("cost_seconds", "cost model"), ("simulated_seconds", "simulator"))
    plans = [record for record in records if record.get("kind")]
    for axes, (field, name) in zip(figure.subplots(1, 2, sharey=True), fields, strict=True):
        seconds = [record["seconds"] for record in plans]
        ends = [0.8 * min(seconds), 1.25 * max(seconds)]
        axes.fill_between(ends, [(1 - BAR) * end for end in ends], [(1 + BAR) * end for end in ends], color="#e9edf1", lw=0)
        axes.plot(ends, ends, color="#222222", lw=1)
        for kind in dict.fromkeys(record["kind"] for record in plans):
            points = [(record["seconds"], record[field]) for record in plans if record["kind"] == kind and field in record]
            axes.plot(*zip(*points, strict=True), "o", ms=4, color=PLAN_COLORS.get(kind, GREY), label=kind)
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
        axes.tick_params(which="minor", labelsize=7)
        axes.set_xlabel("measured, seconds a step", fontsize=9)
        tidy(axes, f"{name}; grey: within {BAR:.0%}")
    figure.axes[0].set_ylabel("predicted", fontsize=9)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def plot_uplinks(records: Sequence[Record], access: float, model_bytes: int, path: Path) -> None:
    """Time a step against the uplink's rate: points measured, lines predicted for links that a file would describe."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    rates = [20 * 1.06**step for step in range(math.ceil(math.log(access / 20, 1.06)) + 1)]
    exact = Plan.create(8, "exact")
    curves: dict[str, list[float]] = {RING: [], ALL_REDUCE: [], "plan auto": []}
    for rate in rates:
        topology = nominal([4, 4], access, rate)
        curves[RING].append(simulate(topology, "ring", model_bytes=model_bytes, steps=SIMULATED_STEPS).mean_step)
        curves[ALL_REDUCE].append(exact.cost(topology, model_bytes).sync_s)
        plan = Plan.create(plan="auto", topology=topology, model_bytes=model_bytes)
        curves["plan auto"].append(plan.cost(topology, model_bytes).sync_s)
    colors = {RING: GREY, ALL_REDUCE: PLAN_COLORS["exact"], "plan auto": PLAN_COLORS["striped"]}
    for name, curve in curves.items():
        axes.plot(rates, curve, color=colors[name], lw=1.2)
        points = [(r["uplink_mbit"], r["seconds"]) for r in measured(records) if r["series"].startswith(name)]
        if points:
            axes.plot(*zip(*points, strict=True), "o", ms=5, color=colors[name], label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(UPLINKS, [f"{rate:g}" for rate in UPLINKS])
    axes.xaxis.set_minor_formatter(lambda *_: "")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("uplink, Mbit/s", fontsize=9)
    axes.set_ylabel("seconds a step", fontsize=9)
    axes.legend(frameon=False, fontsize=9)
    tidy(axes, f"{model_bytes // MIB} MiB, 2 racks of 4, access {access:g} Mbit/s; lines: predicted")
    figure.savefig(path, dpi=120)


def report(records: list[Record], about: Record, arguments: argparse.Namespace) -> None:
    for table in steps_tables(records):
        console.print(table)
    for line in verdicts(records):
        console.print(line)
    for record in records:
        if record["series"] == "topology" and record["probe"]:
            console.print(f"{record['case']}: {record['probe']}")
    if not measured(records):
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"plans_{arguments.what}"
    if arguments.what == "model":
        plot_model(records, path.with_suffix(".png"))
    elif arguments.what == "uplinks":
        plot_uplinks(records, arguments.access, round(arguments.mib * MIB), path.with_suffix(".png"))
    else:
        plot_bars(records, path.with_suffix(".png"))
    lines = ",\n".join(json.dumps(record) for record in records)
    path.with_suffix(".json").write_text(f'{{"machine": {json.dumps({**machine(), **about})}, "records": [\n{lines}\n]}}\n')
    console.print(f"{path}.json, {path}.png", soft_wrap=True)


# ---- the command ---------------------------------------------------------------------------------------------------------------

Case: TypeAlias = tuple[list[int], float, float, Record]  # racks, access, uplink, spec of the workers


def cases_of(arguments: argparse.Namespace) -> list[Case]:
    """What a subcommand measures; a case of no racks is on this machine itself."""
    common: Record = {"what": "steps", "mib": arguments.mib, "repetitions": arguments.repetitions, "series": [], "plans": []}
    access, uplink, racks = arguments.access, arguments.uplink, [4, 4]
    if arguments.what == "sync":
        return [(racks, access, uplink, {**common, "series": ["gloo", "composed", "all_reduce"], "plans": KINDS})]
    if arguments.what == "model":
        kinds = ["auto", "hybrid", "leaders", "grid", "exact"]
        return [(racks, access, uplink, {**common, "plans": kinds}) for racks, uplink in MODEL_CASES]
    if arguments.what == "uplinks":
        spec = {**common, "series": ["gloo", "all_reduce"], "plans": ["auto"]}
        return [(racks, access, uplink, spec) for uplink in UPLINKS]
    if arguments.what == "stragglers":
        noise = {"compute": arguments.compute, "noise": 0.3, "straggler_probability": 0.05, "straggler_factor": 2.0}
        return [(racks, access, uplink, {**common, "what": "stragglers", "steps": 24, "ring_steps": 6, **noise})]
    training = {**common, "what": "training", "steps": 6, "width": 1024, "depth": 4, "batch": 32, "mib": 16}
    return [([8], 500, uplink, training), ([8], 100, uplink, training), ([], 0, 0, training)]


def measure(arguments: argparse.Namespace) -> tuple[list[Record], int]:
    """All records, and how many cases failed."""
    records, failed = [], 0
    cases = cases_of(arguments)
    for number, (racks, access, uplink, spec) in enumerate(cases):
        if arguments.only and number + 1 not in arguments.only:
            continue
        try:
            if racks:
                console.print(f"case {number + 1} of {len(cases)}: {case_text(racks, access, uplink)}")
                records += run_case(racks, access, uplink, spec, arguments)
            else:
                full = {**spec, "case": "8 workers, one machine", "racks": ranks_of([8])}
                console.print(f"case {number + 1} of {len(cases)}: {full['case']}")
                records += complete(collect(full, lambda text: run_host(text, 8)), {}, 0, uplink=0, compute={})
        except (WorkersFailed, ShapingError) as error:
            console.print(f"case {number + 1} failed: {error}")
            failed += 1
        except KeyboardInterrupt:  # what was found until now is shown
            console.print(f"case {number + 1} was interrupted")
            return records, failed + 1
    return records, failed


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sync", "model", "stragglers", "uplinks", "flat"))
    parser.add_argument("--mib", type=float, help="float32 parameters (default: 32 for sync, else 16; not of flat)")
    parser.add_argument("--repetitions", type=int, help="turns of each series (default: 2; sync 3)")
    parser.add_argument("--only", type=lambda text: [int(part) for part in text.split(",")], help="cases by number: 1,3")
    parser.add_argument("--access", type=float, default=500, help="rate of a worker's link in Mbit/s (default: 500)")
    parser.add_argument("--uplink", type=float, default=100, help="rate of a rack's uplink where cases do not say (default: 100)")
    parser.add_argument("--compute", type=float, default=0.5, help="stragglers: median seconds of a step's compute (default: 0.5)")
    parser.add_argument("--nominal", action="store_true", help="the topology as the cluster was asked for, instead of a probe")
    parser.add_argument("--congestion", choices=("reno", "bbr"), default="reno", help="of TCP (default: reno)")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, help="seconds that a case may take (default: 340)")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of JSON and PNG (default: benchmarks/results)")
    arguments = parser.parse_args()
    arguments.mib = arguments.mib or (32 if arguments.what == "sync" else 16)
    arguments.repetitions = arguments.repetitions or (3 if arguments.what == "sync" else 2)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    records, failed = measure(arguments)
    about = {"access_mbit": arguments.access, "mib": arguments.mib, "congestion_on_links": arguments.congestion}
    report(records, about, arguments)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ClusterError as error:
        sys.exit(f"plans: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
