"""`dssync plan`: the plans that a cluster can have, what each costs, and the rounds of one."""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import Any

from rich.markup import escape
from rich.table import Table

from ._cli_common import add_plot_note, console, explain, find_topology, link_name, make_plan, new_table, print_cluster, print_json
from ._explain import format_bytes, format_seconds
from .plan import Cost, Plan
from .topology import Topology

KINDS = ("exact", "grid", "random", "leaders", "striped", "hybrid")
_SHOWN_ROUNDS = 16
_GROUPS_WIDTH = 90


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A plan and its cost."""

    plan: Plan
    cost: Cost

    @staticmethod
    def make(kind: str, topology: Topology, args: argparse.Namespace) -> Candidate:
        """Raises ValueError."""
        plan = make_plan(kind, topology, args)
        return Candidate(plan, plan.cost(topology, args.model_size, args.compute))


def run_plan(args: argparse.Namespace) -> int:
    topology, source = find_topology(args)
    shown = Candidate.make(args.plan, topology, args)
    candidates: dict[str, Candidate | str] = {}  # by kind; a text says why there is none
    for kind in KINDS:
        try:
            candidates[kind] = Candidate.make(kind, topology, args)
        except ValueError as error:
            candidates[kind] = str(error).removeprefix("dssync: ")
    if args.plot:
        from ._plots import plot_plan

        plot_plan(args.plot, topology, shown.plan, args.model_size, args.compute)
    if args.json:
        print_json(_as_json(args, topology, source, shown, candidates))
    else:
        _print(args, topology, source, shown, candidates)
    return 0


# ---- for people -------------------------------------------------------------------------------------------------------------


def _print(
    args: argparse.Namespace, topology: Topology, source: str, shown: Candidate, candidates: dict[str, Candidate | str]
) -> None:
    out = console()
    print_cluster(out, topology, source)
    out.print(f"\n[bold]plans[/] for {format_bytes(args.model_size)} averaged after {format_seconds(args.compute)} of compute")
    out.print(_candidate_table(args, topology, shown, candidates))
    for kind, problem in candidates.items():
        if isinstance(problem, str):
            out.print(f"no {kind} plan: {problem}", style="dim", markup=False)
    out.print("\n[bold]why[/]" + ("" if args.plan != "auto" else ": what auto takes here"))
    for line in explain(shown.plan, topology, args).splitlines():
        if not line.startswith("    ") and "auto weighs" not in line:  # which stands in the table
            out.print(line, markup=False)
    out.print("\n[bold]who averages with whom[/]")
    out.print(_round_table(shown.plan))
    add_plot_note(out, args)


def _candidate_table(
    args: argparse.Namespace, topology: Topology, shown: Candidate, candidates: dict[str, Candidate | str]
) -> Table:
    names = ("plan", "time a step", "of it sync", "busiest link", "bytes on it", "rounds", "delay", "contraction", "all agree in")
    table = new_table(names, left=("plan", "busiest link"))
    for kind, candidate in candidates.items():
        if isinstance(candidate, str):
            continue
        cost = candidate.cost
        is_shown = candidate.plan == shown.plan
        table.add_row(
            f"{kind} *" if is_shown else kind,
            format_seconds(args.compute + cost.sync_s),
            format_seconds(cost.sync_s),
            escape(link_name(topology, cost.busiest, cost.busiest_index, idle=cost.bound_s == 0)),
            format_bytes(cost.busiest_bytes) if cost.bound_s else "",
            str(candidate.plan.period),
            str(candidate.plan.delay or ""),
            "" if math.isnan(cost.contraction) else f"{cost.contraction:.3g}",
            _steps(cost.longest_wait_steps),
            style="bold" if is_shown else "",
        )
    return table


def _steps(count: int) -> str:
    return f"{count} step{'' if count == 1 else 's'}" if count else "never exactly"


def _round_table(plan: Plan) -> Table:
    table = new_table(("round", "", "groups"), left=("", "groups"))
    for index in range(min(plan.period, _SHOWN_ROUNDS)):
        crossing = "[yellow]across racks[/]" if plan.is_crossing(index) else ""
        table.add_row(str(index), crossing, groups_text(plan.core.groups(index), _GROUPS_WIDTH))
    if plan.period > _SHOWN_ROUNDS:
        table.add_row("", "", f"and {plan.period - _SHOWN_ROUNDS} more rounds")
    return table


def groups_text(groups: list[list[int]], width: int) -> str:
    """ "{0-3} {4 6}", as many as fit, those of one worker left out."""
    text = ""
    alone = sum(len(group) == 1 for group in groups)
    several = [group for group in groups if len(group) > 1]
    for index, group in enumerate(several):
        group_text = "{" + " ".join(_runs(group)) + "}"
        if text and len(text) + len(group_text) > width:
            text += f" and {len(several) - index:,} more"
            break
        text += (" " if text else "") + group_text
    if alone:
        text += f"{', ' if text else ''}{alone:,} alone"
    return text


def _runs(ranks: list[int]) -> list[str]:
    """Ascending ranks; three or more in a row are a range."""
    texts: list[str] = []
    begin = 0
    for i in range(1, len(ranks) + 1):
        if i < len(ranks) and ranks[i] == ranks[i - 1] + 1:
            continue
        run = ranks[begin:i]
        texts += [f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run)
        begin = i
    return texts if len(texts) <= 12 else [*texts[:12], "..."]


# ---- for programs -----------------------------------------------------------------------------------------------------------


def _as_json(
    args: argparse.Namespace, topology: Topology, source: str, shown: Candidate, candidates: dict[str, Candidate | str]
) -> dict[str, Any]:
    plan = shown.plan
    nics, uplinks = plan.link_bytes(topology, args.model_size)
    return {
        "topology": {
            "source": source,
            "workers": topology.world_size,
            "hosts": len(topology.hosts),
            "racks": [rack.ranks for rack in topology.racks],
        },
        "model_bytes": args.model_size,
        "compute_s": args.compute,
        "plan": {
            **_plan_json(shown, args.compute),
            "crossing_rounds": [index for index in range(plan.period) if plan.is_crossing(index)],
            "rounds": plan.rounds,
            "nic_bytes": nics,
            "uplink_bytes": uplinks,
            "explanation": explain(plan, topology, args),
        },
        "candidates": [
            {"kind": kind, "problem": candidate}
            if isinstance(candidate, str)
            else {**_plan_json(candidate, args.compute), "shown": candidate.plan == plan}
            for kind, candidate in candidates.items()
        ],
    }


def _plan_json(candidate: Candidate, compute: float) -> dict[str, Any]:
    plan = candidate.plan
    return {
        "kind": plan.kind,
        "period": plan.period,
        "stripes": plan.stripe_count,
        "delay": plan.delay,
        "max_group_size": plan.max_group_size,
        "step_s": compute + candidate.cost.sync_s,
        **dataclasses.asdict(candidate.cost),
    }
