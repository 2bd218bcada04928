"""The pictures of the command line. matplotlib is imported here only, and is not needed otherwise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch, PathPatch
    from matplotlib.path import Path
    from matplotlib.ticker import FuncFormatter, NullLocator
except ImportError as error:
    raise ImportError(f"--plot needs matplotlib ({error}); install it with: pip install 'dssync-pg[plot]'") from error

from ._explain import format_bytes, format_seconds
from ._units import format_rate

if TYPE_CHECKING:
    from .plan import Plan
    from .topology import Topology

_GROUP_COLORS = ("#3b6fb6", "#d1495b", "#2e933c", "#8e5ba6", "#e08e1b", "#17899c", "#a45a3c", "#6b7280")
_CROSSING, _INSIDE, _RACK, _GRID = "#e08e1b", "#3b6fb6", "#f1f3f6", "#d9dde3"
_METHOD_COLORS = {"ring": "#7a8594", "leaders": "#8e5ba6", "two-dimensional": "#17899c", "parameter-server": "#a45a3c"}
_PLAN_COLORS = ("#d1495b", "#3b6fb6", "#2e933c", "#e08e1b")
_MOST_ROUNDS = 16
_MOST_DOTS = 64  # workers that are drawn one by one
_MOST_LABELS = 24
_MOST_LEVEL_LABELS = 14  # more of them do not fit beside each other


def _save(figure: Figure, path: str) -> None:
    """Raises ValueError for a form that matplotlib does not know; OSError."""
    figure.savefig(path, dpi=150, facecolor="white")


def _strip(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


# ---- a plan -----------------------------------------------------------------------------------------------------------------


def plot_plan(path: str, topology: Topology, plan: Plan, model_bytes: int, compute_s: float) -> None:
    """Who averages with whom in each round over the racks, and what each link carries in a step."""
    rounds = min(plan.period, _MOST_ROUNDS)
    height = 0.55 * rounds + 1.1
    figure = Figure(figsize=(11, height + 4.2), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(height, 3.1))
    places = _places(topology)
    if topology.world_size <= _MOST_DOTS:
        _draw_racks(top, topology, places, rounds)
        for index in range(rounds):
            _draw_round(top, topology, plan, index, places)
    else:
        _draw_strips(top, topology, plan, rounds)
    _label_rounds(top, plan, rounds)
    step_s = compute_s + plan.cost(topology, model_bytes, compute_s).sync_s
    title = f"{plan.kind} plan, {topology.summary()}: {format_bytes(model_bytes)} averaged"
    figure.suptitle(title + (f", {format_seconds(step_s)} a step" if step_s else ""), fontsize=12)
    _draw_loads(bottom, topology, plan, model_bytes, step_s)
    _save(figure, path)


def _places(topology: Topology) -> list[float]:
    """Where each rank stands: racks apart, workers of one host close together."""
    place = [0.0] * topology.world_size
    x = 0.0
    for rack in topology.racks:
        for host in rack.hosts:
            for rank in host.ranks:
                place[rank] = x
                x += 1.0
            x += 0.35 if len(host.ranks) > 1 else 0.0
        x += 0.9
    return place


def _draw_racks(axes: Axes, topology: Topology, places: Sequence[float], rounds: int) -> None:
    for rack in topology.racks:
        left, right = places[rack.ranks[0]] - 0.55, max(places[rank] for rank in rack.ranks) + 0.55
        axes.axvspan(left, right, color=_RACK, zorder=0)
        axes.text((left + right) / 2, -0.8, rack.name, ha="center", va="center", fontsize=9, weight="bold")
    for rank, x in enumerate(places):
        if topology.world_size <= 32:
            axes.text(x, rounds - 0.28, str(rank), ha="center", va="top", fontsize=7, color="#666666")
    axes.set_xlim(min(places) - 1, max(places) + 1)
    axes.set_ylim(rounds - 0.1, -1.0)  # round 0 on top


def _draw_round(axes: Axes, topology: Topology, plan: Plan, index: int, places: Sequence[float]) -> None:
    """Dots on a line, and arcs between the members of a group; in a crossing these are whole racks."""
    y = index + 0.25
    color_of = itertools.cycle(_GROUP_COLORS)
    for group in plan.core.groups(index):
        xs = sorted(places[rank] for rank in group)
        color = _GRID if len(group) == 1 else next(color_of)
        if plan.is_crossing(index) and len(group) > 1:
            _draw_crossing(axes, [[places[rank] for rank in rack.ranks if rank in set(group)] for rack in topology.racks], y, color)
        else:
            for left, right in itertools.pairwise(xs):
                _draw_arc(axes, left, right, y, color)
        axes.scatter(xs, [y] * len(xs), s=34, color=color, zorder=3, linewidths=0)


def _draw_crossing(axes: Axes, racks: Sequence[Sequence[float]], y: float, color: str) -> None:
    """A bar for each rack that takes part, and arcs from one to the next."""
    bars = [(min(xs), max(xs)) for xs in racks if xs]
    for left, right in bars:
        shape = "round,pad=0,rounding_size=0.16"
        bar = FancyBboxPatch((left - 0.3, y - 0.16), right - left + 0.6, 0.32, boxstyle=shape, zorder=1)
        bar.set(facecolor=color, edgecolor="none", alpha=0.3)
        axes.add_patch(bar)
    for (_, left), (right, _) in itertools.pairwise(bars):
        _draw_arc(axes, left, right, y, color)


def _draw_arc(axes: Axes, left: float, right: float, y: float, color: str) -> None:
    rise = min(0.30 + 0.05 * (right - left), 0.72)
    points = [(left, y), (left + 0.15 * (right - left), y - rise), (right - 0.15 * (right - left), y - rise), (right, y)]
    curve = Path(points, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])
    axes.add_patch(PathPatch(curve, facecolor="none", edgecolor=color, linewidth=1.6, zorder=2))


def _draw_strips(axes: Axes, topology: Topology, plan: Plan, rounds: int) -> None:
    """Too many for dots: a cell a worker, rack after rack, its color that of its group."""
    order = [rank for rack in topology.racks for rank in rack.ranks]
    column = {rank: index for index, rank in enumerate(order)}
    for index in range(rounds):
        cells = [0] * len(order)
        for number, group in enumerate(plan.core.groups(index)):
            for rank in group:
                cells[column[rank]] = number % len(_GROUP_COLORS)
        edges = [0, *(i for i in range(1, len(cells)) if cells[i] != cells[i - 1]), len(cells)]
        spans = [(left, right - left) for left, right in itertools.pairwise(edges)]
        colors = [_GROUP_COLORS[cells[left]] for left in edges[:-1]]
        axes.broken_barh(spans, (index, 0.6), facecolors=colors, linewidths=0)
    end = 0
    for rack in topology.racks:
        middle, end = end + len(rack.ranks) / 2, end + len(rack.ranks)
        axes.axvline(end, color="white", linewidth=1.2)
        if len(topology.racks) <= _MOST_LABELS // 2:
            axes.text(middle, -0.25, rack.name, ha="center", va="bottom", fontsize=8, weight="bold")
    axes.set_xlim(0, len(order))
    axes.set_ylim(rounds, -0.9)


def _label_rounds(axes: Axes, plan: Plan, rounds: int) -> None:
    names = [f"round {index}" + ("\nacross racks" if plan.is_crossing(index) else "") for index in range(rounds)]
    axes.set_yticks([index + 0.25 for index in range(rounds)], names, fontsize=9)
    axes.xaxis.set_major_locator(NullLocator())
    axes.tick_params(left=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for index in range(rounds):
        if plan.is_crossing(index):
            axes.get_yticklabels()[index].set(color=_CROSSING, weight="bold")
    title = "Who averages with whom"
    if plan.period > rounds:
        title += f", rounds 0 to {rounds - 1} of {plan.period}"
    if plan.delay:
        title += f"; what crosses racks arrives {plan.delay} step{'' if plan.delay == 1 else 's'} later"
    axes.set_title(title, fontsize=10, loc="left")


# ---- loads ------------------------------------------------------------------------------------------------------------------


def _draw_loads(axes: Axes, topology: Topology, plan: Plan, model_bytes: int, step_s: float) -> None:
    """How long each link sends in a step: rounds inside racks below, crossings above them."""
    names, rates, picked = _shown_links(topology, plan, model_bytes)
    inside, crossing = [0.0] * len(names), [0.0] * len(names)
    for index in range(plan.period):
        nics, uplinks = plan.link_bytes(topology, model_bytes, index)
        both = [*nics, *uplinks]
        for bar, link in enumerate(picked):
            (crossing if plan.is_crossing(index) else inside)[bar] += both[link] / plan.period
    bytes_of = [a + b for a, b in zip(inside, crossing, strict=True)]
    timed = all(math.isfinite(rate) for rate in rates)
    scale = [8 / rate if timed else 1 / (1 << 20) for rate in rates]
    xs = range(len(names))
    lower = [value * each for value, each in zip(inside, scale, strict=True)]
    upper = [value * each for value, each in zip(crossing, scale, strict=True)]
    if any(inside):
        axes.bar(xs, lower, color=_INSIDE, width=0.72, label="rounds inside racks" if any(crossing) else "all rounds")
    if any(crossing):
        axes.bar(xs, upper, bottom=lower, color=_CROSSING, width=0.72, label="crossing rounds, also what they send inside racks")
    if len(names) <= _MOST_LABELS:
        for x, low, high, count in zip(xs, lower, upper, bytes_of, strict=True):
            upright = 90 if len(names) > _MOST_LEVEL_LABELS else 0
            axes.text(x, low + high, f" {format_bytes(count)}", ha="center", va="bottom", fontsize=7, rotation=upright)
        axes.set_xticks(
            list(xs), names, fontsize=8, rotation=0 if len(names) <= 10 else 40, ha="center" if len(names) <= 10 else "right"
        )
    else:
        axes.set_xlabel("busiest NIC of each rack, then uplinks" if len(topology.hosts) > _MOST_LABELS else "NICs, then uplinks")
    if timed:
        axes.axhline(step_s, color="#444444", linewidth=1, linestyle="--", label=f"a step: {format_seconds(step_s)}")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_seconds(value)))
    axes.set_ylabel("time to send a step's bytes" if timed else "MiB a step")
    axes.margins(y=0.22 if _MOST_LEVEL_LABELS < len(names) <= _MOST_LABELS else 0.1)
    axes.set_title("Load of each link in a step, the busier direction", fontsize=10, loc="left")
    if axes.get_legend_handles_labels()[0]:  # one worker sends nothing
        axes.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.2)
    _strip(axes)


def _shown_links(topology: Topology, plan: Plan, model_bytes: int) -> tuple[list[str], list[float], list[int]]:
    """Names, rates in bit/s and numbers (NICs, then uplinks) of the links to draw: of many hosts the busiest of each rack."""
    hosts = topology.hosts
    shown = list(range(len(hosts)))
    if len(hosts) > _MOST_LABELS:
        nics, _ = plan.link_bytes(topology, model_bytes)
        first = 0
        shown = []
        for rack in topology.racks:
            numbers = range(first, first + len(rack.hosts))
            shown.append(max(numbers, key=lambda host: nics[host] / hosts[host].nic.rate))
            first += len(rack.hosts)
    names = [f"NIC\n{hosts[host].name}" for host in shown]
    rates = [hosts[host].nic.rate for host in shown]
    picked = list(shown)
    if len(topology.racks) > 1:
        names += [f"uplink\n{rack.name}" for rack in topology.racks]
        rates += [rack.uplink.rate for rack in topology.racks]
        picked += range(len(hosts), len(hosts) + len(topology.racks))
    return names, rates, picked


# ---- time a step against the rate of the uplinks ------------------------------------------------------------------------------


def plot_step_times(
    path: str,
    curves: dict[str, list[tuple[float, float]]],
    measured: Sequence[tuple[str, float, float]],
    uplink: float,
    title: str,
) -> None:
    """curves: by method, (uplink in bit/s, seconds a step); measured: (method, uplink, seconds); uplink: the cluster's own."""
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axes = figure.subplots()
    color_of = _colors([*curves, *(name for name, _, _ in measured)])
    for name, curve in curves.items():
        is_plan = name.endswith(" plan")
        axes.plot(
            *zip(*curve, strict=True),
            color=color_of[name],
            linewidth=2.4 if is_plan else 1.6,
            label=name,
            zorder=3 if is_plan else 2,
        )
    drawn: set[str] = set()
    for name, rate, seconds in measured:
        label = None if name in drawn else f"{name}, measured"
        drawn.add(name)
        axes.scatter([rate], [seconds], color=color_of[name], s=46, edgecolor="black", linewidths=0.8, zorder=4, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.axvline(uplink, color="#444444", linewidth=1, linestyle=":", zorder=1)
    axes.text(uplink, 0.01, f" {format_rate(uplink)}, as given", transform=axes.get_xaxis_transform(), fontsize=8, va="bottom")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_rate(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_seconds(value)))
    axes.set_xlabel("rate of the slowest uplink")
    axes.set_ylabel("time a step")
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(True, which="major", color=_GRID, linewidth=0.8)
    axes.legend(fontsize=9, frameon=False)
    _strip(axes)
    _save(figure, path)


def _colors(names: Sequence[str]) -> dict[str, str]:
    """ "striped" and "striped plan" are the same."""
    colors: dict[str, str] = {}
    of_plans = itertools.cycle(_PLAN_COLORS)
    for name in names:
        key = name.removesuffix(" plan")
        if key in _METHOD_COLORS and not name.endswith(" plan"):
            colors[name] = _METHOD_COLORS[key]
        else:
            other = colors.get(f"{key} plan") or colors.get(key)
            colors[name] = colors.get(name) or other or next(of_plans)
    return colors
