"""Why a plan is as it is, in words and numbers: what `Plan.explain` returns."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from . import _C
from ._layout import MIN_STRIPE_BYTES
from ._units import format_rate

if TYPE_CHECKING:
    from .plan import Cost, Plan
    from .topology import Topology

NEARLY = 1.05
"""Times of a step that count as equal; as csrc/core/plan_cheapest.c has it."""


def format_bytes(count: float) -> str:
    """Three digits: for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.3g} {unit}"


def format_seconds(seconds: float) -> str:
    """Three digits: for people."""
    return f"{seconds:.3g} s" if seconds >= 0.1 or seconds == 0 else f"{seconds * 1e3:.3g} ms"


def describe(plan: Plan, model_bytes: int) -> list[str]:
    """What is said without a topology."""
    lines = [f"{plan.kind} plan for {_count(plan.world_size, 'worker')}" + _in_racks(plan)]
    crossings = sum(map(plan.is_crossing, range(plan.period)))
    rounds = f"rounds: {plan.period}, in groups of up to {plan.max_group_size}"
    if crossings and plan.kind == "hybrid":
        rounds += f"; in {plan.period - crossings} nobody averages, {_crossings(crossings)}"
    elif crossings:
        rounds += f"; {plan.period - crossings} stay inside racks, {_crossings(crossings)}"
    lines.append(rounds)
    if plan.kind == "hybrid":
        lines.append("gradients are averaged exactly inside racks besides, which is not counted here")
    if crossings:
        lines.append(f"{_crossing_stripes(plan, model_bytes)}; {_delay(plan)}")
    lines.append(f"contraction: {_contraction(plan.contraction)}")
    lines.append(f"longest wait for a global average: {_wait(plan.longest_wait)}")
    return lines


def explain(plan: Plan, topology: Topology | None, model_bytes: int, compute_s: float, candidates: dict[str, Plan]) -> str:
    """candidates: what "auto" weighs on the topology, by kind."""
    lines = describe(plan, model_bytes)
    if topology is not None:
        cost = plan.cost(topology, model_bytes, compute_s)
        lines[-2] = f"contraction: {_contraction(cost.contraction)}"
        lines[2:2] = _time(plan, cost, topology, model_bytes, compute_s)
        lines += _beside(plan, cost, topology, model_bytes, compute_s, candidates)
    return "\n".join([lines[0], *(f"  {line}" for line in lines[1:])])


def _time(plan: Plan, cost: Cost, topology: Topology, model_bytes: int, compute_s: float) -> list[str]:
    step = f"time: averaging {format_bytes(model_bytes)} adds {format_seconds(cost.sync_s)} to a step"
    step += f" of {format_seconds(compute_s)} of compute" if compute_s else ""
    if any(map(plan.is_crossing, range(plan.period))) and plan.delay:
        step += f" ({format_seconds(cost.foreground_s)} waited for, {format_seconds(cost.background_s)} in the background)"
    lines = [step]
    if cost.bound_s:
        busiest, rate = link_name(cost, topology)
        lines.append(
            f"busiest link: {busiest}, {format_bytes(cost.busiest_bytes)} a step at {format_rate(rate)} take "
            f"{format_seconds(cost.bound_s)}"
        )
    lines.append(f"sent: {format_bytes(cost.sent_bytes)} by a worker a step")
    return lines


def link_name(cost: Cost, topology: Topology) -> tuple[str, float]:
    """The busiest link and its rate in bit/s."""
    if cost.busiest == "uplink":
        rack = topology.racks[cost.busiest_index]
        return f"uplink of rack {rack.name}", rack.uplink.rate
    host = topology.hosts[cost.busiest_index]
    if cost.busiest == "nic":
        return f"NIC of host {host.name}", host.nic.rate
    return f"memory of host {host.name}", topology.memory.rate


def _beside(
    plan: Plan, cost: Cost, topology: Topology, model_bytes: int, compute_s: float, candidates: dict[str, Plan]
) -> list[str]:
    """Each kind that "auto" weighs, and how this plan stands among them."""
    costs = {plan.kind: cost}
    for kind, other in candidates.items():
        costs.setdefault(kind, other.cost(topology, model_bytes, compute_s))
    lines = ["what auto weighs, and this plan:"]
    for kind, of in sorted(costs.items(), key=lambda item: item[1].sync_s):
        lines.append(
            f"  {kind:8} {format_seconds(of.sync_s):>8}, contraction {_number(of.contraction)}, global average "
            f"{_wait(of.longest_wait_steps)}, busiest {link_name(of, topology)[0]}"
        )
    lines.append(_verdict(plan, costs, compute_s))
    return lines


def _verdict(plan: Plan, costs: dict[str, Cost], compute_s: float) -> str:
    steps = {kind: compute_s + cost.sync_s for kind, cost in costs.items()}
    best = min(steps, key=lambda kind: steps[kind])
    if plan.kind == best:
        others = sorted(step for kind, step in steps.items() if kind != best)
        margin = (
            f": {others[0] / steps[best]:.3g} times as fast as the next" if others and others[0] > 1.01 * steps[best] > 0 else ""
        )
        return f"{plan.kind} has the shortest step{margin}"
    share = steps[plan.kind] / steps[best] - 1 if steps[best] else math.inf
    if steps[plan.kind] > NEARLY * steps[best]:
        return f"{plan.kind} is not what auto would take: a step is {share:.1%} longer than with {best}"
    why = "averages everyone each step" if plan.kind == "exact" else "brings the workers together sooner"
    return f"{plan.kind} {why}, and its step is only {share:.1%} longer than with {best}"


def _in_racks(plan: Plan) -> str:
    return f" in {plan.rack_count} racks" if plan.rack_count > 1 else ""


def _crossings(count: int) -> str:
    return f"{count} average{'s' if count == 1 else ''} whole racks with each other"


def _crossing_stripes(plan: Plan, model_bytes: int) -> str:
    """A model may be too small for as many stripes as the plan is made for: then some steps cross nothing."""
    count = _C.stripe_count(model_bytes, plan.stripe_count, MIN_STRIPE_BYTES)
    period = range(plan.period)
    steps = sum(any(plan.is_crossing(plan.round_at(step, stripe)) for stripe in range(count)) for step in period)
    when = f" in {steps} of {plan.period} steps" if steps < plan.period else ""
    if count == 1:
        return f"{'so small a' if plan.stripe_count > 1 else 'the'} model is one stripe, which crosses{when}"
    return f"of the {count} stripes of a step one crosses{when}"


def _delay(plan: Plan) -> str:
    later = f"its correction arrives {_count(plan.delay, 'step')} later"
    if not plan.delay:
        return "all wait for it"
    if any(map(plan.keeps_values, range(plan.period))):
        return f"workers keep their values until {later}, so that nobody waits for it"
    return f"racks take their mean at once, {later}, so that nobody waits for an uplink"


def _contraction(rho: float) -> str:
    if math.isnan(rho):
        return "not computed for so many workers"
    if rho == 0:
        return "0, a period brings all workers to the same values"
    return f"{rho:.3g}, of the workers' differences a period leaves at most that share"


def _number(rho: float) -> str:
    return "?" if math.isnan(rho) else f"{rho:.3g}"


def _wait(steps: int) -> str:
    return f"at most {_count(steps, 'step')}" if steps else "never exact"


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
