"""`dssync simulate`: the time a step of plans beside that of exact exchanges, with stragglers and noise."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ._cli_common import add_plot_note, console, find_topology, link_name, make_plan, new_table, print_cluster, print_json
from ._explain import format_bytes, format_seconds
from ._units import parse_rate
from .plan import Plan
from .simulation import METHODS, Simulation, simulate
from .topology import Link, Topology

_SWEEP_FACTORS = tuple(2.0**power for power in range(-4, 5))  # of the uplinks' rates
_SWEEP_STEPS = 60

Progressed = Callable[[int], None]


def run_simulate(args: argparse.Namespace) -> int:
    if args.measured and not args.plot:
        raise ValueError("--measured draws into a picture: give --plot FILE.png too")
    topology, source = find_topology(args)
    measured = read_measured(args.measured) if args.measured else []
    wanted = _wanted(args)
    sweep = _sweep(topology) if args.plot else {}
    sweep_steps = min(args.steps, _SWEEP_STEPS)
    total = len(wanted) * (args.steps + sweep_steps * len(sweep))
    results: dict[str, tuple[Plan | None, Simulation]] = {}
    curves: dict[str, list[tuple[float, float]]] = {}
    with _ProgressBar(total, args.json) as advance:
        for name in wanted:
            results[name] = _run(name, topology, args.steps, args, advance)
            for uplink, other in sweep.items():
                _, simulation = _run(name, other, sweep_steps, args, advance)
                curves.setdefault(name, []).append((uplink, simulation.mean_step))
    if args.plot:
        from ._plots import plot_step_times

        plot_step_times(args.plot, curves, measured, _slowest_uplink(topology), _title(args, topology))
    if args.json:
        print_json(_as_json(args, topology, source, results, curves))
    else:
        _print(args, topology, source, results)
    return 0


def _wanted(args: argparse.Namespace) -> list[str]:
    """Plans as "auto plan", methods by their names, each once."""
    methods = [] if args.against == "none" else [name.strip() for name in args.against.split(",")]
    for name in methods:
        if name not in METHODS:
            raise ValueError(f"--against {name!r}, expected some of {', '.join(METHODS)}, or none")
    return list(dict.fromkeys([*(f"{plan} plan" for plan in args.plan or ["auto"]), *methods]))


def _run(
    name: str, topology: Topology, steps: int, args: argparse.Namespace, advance: Progressed
) -> tuple[Plan | None, Simulation]:
    plan = make_plan(name.removesuffix(" plan"), topology, args) if name.endswith(" plan") else None
    done = 0

    def progress(steps_done: int) -> None:
        nonlocal done
        advance(steps_done - done)
        done = steps_done

    simulation = simulate(
        topology,
        plan or name,
        model_bytes=args.model_size,
        steps=steps,
        compute=args.compute,
        noise=args.noise,
        straggler_probability=args.stragglers,
        straggler_factor=args.straggler_factor,
        seed=args.seed,
        progress=progress,
    )
    return plan, simulation


class _ProgressBar:
    """A bar on stderr where somebody sees it."""

    def __init__(self, total: int, quiet: bool) -> None:
        from rich.console import Console

        columns = (TextColumn("simulating"), BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeRemainingColumn())
        self.bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet or not sys.stderr.isatty())
        self.task = self.bar.add_task("simulating", total=total)

    def __enter__(self) -> Progressed:
        self.bar.start()
        return lambda steps: self.bar.advance(self.task, steps)

    def __exit__(self, *raised: object) -> None:
        self.bar.stop()


# ---- against the rate of the uplinks ----------------------------------------------------------------------------------------


def _slowest_uplink(topology: Topology) -> float:
    return min(rack.uplink.rate for rack in topology.racks)


def _sweep(topology: Topology) -> dict[float, Topology]:
    """The same cluster with slower and faster uplinks, by the rate of the slowest."""
    rate = _slowest_uplink(topology)
    if len(topology.racks) == 1 or math.isinf(rate):
        what = "there is one rack" if len(topology.racks) == 1 else "the uplinks' rates are not known (--uplink)"
        raise ValueError(f"the picture shows the time a step against the rate of the uplinks, and {what}")
    return {
        rate * factor: topology.with_links(
            uplinks=[Link(rack.uplink.rate * factor, rack.uplink.latency) for rack in topology.racks]
        )
        for factor in _SWEEP_FACTORS
    }


def read_measured(path: str) -> list[tuple[str, float, float]]:
    """(method, uplink in bit/s, seconds a step) of each point. Raises ValueError."""
    try:
        points = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(points, list):
            raise TypeError(f"a {type(points).__name__}")
        return [(str(point["method"]), parse_rate(point["uplink"]), float(point["seconds"])) for point in points]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f'{path}: {what}; expected a list of {{"method": "ring", "uplink": "100 Mbit/s", "seconds": 5.4}}'
        ) from None


def _title(args: argparse.Namespace, topology: Topology) -> str:
    compute = f", {format_seconds(args.compute)} of compute" if args.compute else ""
    return f"{topology.summary()}; {format_bytes(args.model_size)} a step{compute}"


# ---- what comes out ---------------------------------------------------------------------------------------------------------


def _print(args: argparse.Namespace, topology: Topology, source: str, results: dict[str, tuple[Plan | None, Simulation]]) -> None:
    out = console()
    print_cluster(out, topology, source)
    out.print(f"\n[bold]{args.steps:,} steps[/]: {'; '.join(_conditions(args))}")
    names = ("method", "time a step", "95 % within", "of it sync", "waiting", "busiest link", "in use", "speed")
    table = new_table(names, left=("method", "busiest link"))
    fastest = min(simulation.mean_step for _, simulation in results.values())
    reference = results["ring"][1].mean_step if "ring" in results else max(s.mean_step for _, s in results.values())
    for name, (plan, simulation) in results.items():
        table.add_row(
            _label(name, plan),
            format_seconds(simulation.mean_step),
            format_seconds(simulation.quantile(0.95)),
            format_seconds(simulation.mean_sync),
            format_seconds(simulation.mean_wait),
            escape(link_name(topology, simulation.busiest, simulation.busiest_index, idle=simulation.busiest_use == 0)),
            f"{100 * simulation.busiest_use:.0f} %" if simulation.busiest_use else "",
            f"{reference / simulation.mean_step:.2f}x" if simulation.mean_step > 0 else "",
            style="bold" if simulation.mean_step == fastest else "",
        )
    out.print(table)
    out.print(f"[dim]speed: steps a second against {'the ring' if 'ring' in results else 'the slowest'}[/]")
    if any(plan is not None and plan.kind == "hybrid" for plan, _ in results.values()):
        out.print("[dim]hybrid: gradients are averaged inside racks besides, while backward runs; that is not counted[/]")
    add_plot_note(out, args)


def _label(name: str, plan: Plan | None) -> str:
    return f"{name}: {plan.kind}" if plan and name == "auto plan" else name


def _conditions(args: argparse.Namespace) -> Iterable[str]:
    yield f"{format_bytes(args.model_size)} averaged"
    yield f"{format_seconds(args.compute)} of compute" if args.compute else "no compute"
    if args.noise:
        yield f"noise {args.noise:g}"
    if args.stragglers:
        yield f"{100 * args.stragglers:g} % stragglers, {args.straggler_factor:g} times slower"


def _as_json(
    args: argparse.Namespace,
    topology: Topology,
    source: str,
    results: dict[str, tuple[Plan | None, Simulation]],
    curves: dict[str, list[tuple[float, float]]],
) -> dict[str, Any]:
    return {
        "topology": {"source": source, "workers": topology.world_size, "hosts": len(topology.hosts), "racks": len(topology.racks)},
        "model_bytes": args.model_size,
        "compute_s": args.compute,
        "noise": args.noise,
        "stragglers": args.stragglers,
        "straggler_factor": args.straggler_factor,
        "seed": args.seed,
        "steps": args.steps,
        "results": [_result_json(name, plan, simulation) for name, (plan, simulation) in results.items()],
        "by_uplink": {
            name: [{"uplink_bit_s": uplink, "step_s": value} for uplink, value in curve] for name, curve in curves.items()
        },
    }


def _result_json(name: str, plan: Plan | None, simulation: Simulation) -> dict[str, Any]:
    return {
        "name": name,
        "plan": None if plan is None else {"kind": plan.kind, "period": plan.period, "delay": plan.delay},
        "mean_step_s": simulation.mean_step,
        "median_step_s": simulation.quantile(0.5),
        "p95_step_s": simulation.quantile(0.95),
        "mean_sync_s": simulation.mean_sync,
        "mean_wait_s": simulation.mean_wait,
        "total_s": simulation.total,
        "busiest": simulation.busiest,
        "busiest_index": simulation.busiest_index,
        "busiest_use": simulation.busiest_use,
    }
