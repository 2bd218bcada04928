"""Table and plots of accuracy.py: the difference to full all-reduce with its 95 % interval, and the learning-rate sweeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from accuracy_simulation import METHODS
from rich.console import Console
from rich.table import Table
from scipy import stats

if TYPE_CHECKING:
    from accuracy import Cell, Study

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TASKS = {"digits": "handwritten digits", "chars": "characters"}
OPTIMIZERS = {"sgd": "SGD with momentum", "adamw": "AdamW"}
SHARDS = {"iid": "IID shards", "sorted": "label-sorted shards"}
UNITS = {"accuracy": "points", "loss": "nats"}
COLORS = {
    "full": "#222222",
    "none": "#1b6ca8",
    "v": "#7a3e9d",
    "all": "#1b8a5a",
    "warmup": "#d08a00",
    "striped": "#00798c",
    "striped_0": "#66b2b2",
    "striped_all": "#0b4f6c",
    "striped_whole": "#8fb8de",
    "leaders": "#c2577a",
    "hybrid": "#8f5d2e",
    "hybrid_all": "#c79a63",
    "shuffled": "#b03030",
    "solo": "#888888",
}


@dataclass(frozen=True)
class Interval:
    """A paired difference to full all-reduce: its mean and the 95 % interval (t distribution over the seeds)."""

    mean: float
    low: float
    high: float

    @staticmethod
    def of(differences: Sequence[float]) -> Interval:
        values = np.asarray(differences, dtype=float)
        half = float(stats.t.ppf(0.975, len(values) - 1)) * values.std(ddof=1) / math.sqrt(len(values))
        return Interval(float(values.mean()), float(values.mean()) - half, float(values.mean()) + half)

    def text(self, digits: int) -> str:
        return f"{self.mean:+.{digits}f} ({self.low:+.{digits}f} to {self.high:+.{digits}f})"


@dataclass(frozen=True)
class Row:
    """A line of the table. Differences are signed so that negative is worse than full all-reduce."""

    cell: Cell
    title: str
    rate: float
    seeds: int
    score: float
    difference: Interval | None  # at its own best learning rate
    unchanged: Interval | None  # at the best learning rate of full all-reduce


Found = Sequence[dict[str, float] | None]


def _difference(cell: Cell, runs: Found, baseline: Found) -> Interval:
    sign = 1 if cell.score == "accuracy" else -1
    pairs = zip(runs, baseline, strict=False)  # the controls have fewer seeds
    return Interval.of([sign * (run[cell.score] - full[cell.score]) for run, full in pairs if run and full])


def rows_of(study: Study) -> list[Row]:
    """The table; settings whose runs are not all done are left out."""
    rows = []
    for cell in study.rows:
        full = next(other for other in study.rows if other.setting == cell.setting and other.method == "full")
        own, base = study.best(cell), study.best(full)
        if own is None or base is None:
            continue
        runs = [study.results.known.get(run) for run in study.evaluation(cell, own)]
        baseline = [study.results.known.get(run) for run in study.evaluation(full, base)]
        same = [study.results.known.get(run) for run in study.evaluation(cell, base)]
        if not all(runs) or not all(baseline):
            continue
        scores = [run[cell.score] for run in runs if run]
        rows.append(
            Row(
                cell,
                METHODS[cell.method].title,
                cell.at(own, 0).lr,
                len(runs),
                float(np.mean(scores)),
                _difference(cell, runs, baseline) if cell.method != "full" else None,
                _difference(cell, same, baseline) if cell.unchanged and all(same) else None,
            )
        )
        if cell.method == "full" and cell.task == "digits":
            saved = [{**run, cell.score: run[f"rank0_{cell.score}"]} for run in baseline if run]
            mean = float(np.mean([run[cell.score] for run in saved]))
            title = "full, with rank 0's BatchNorm statistics"  # what a checkpoint of DDP holds
            rows.append(Row(cell, title, cell.at(own, 0).lr, len(saved), mean, _difference(cell, saved, baseline), None))
    return rows


def _cells_of(row: Row) -> list[str]:
    digits, cell = (2, row.cell) if row.cell.score == "accuracy" else (3, row.cell)
    unit = " %" if cell.score == "accuracy" else ""
    return [
        row.title,
        f"{row.rate:.3g}",
        f"{row.score:.{digits}f}{unit}",
        row.difference.text(digits) if row.difference else "",
        row.unchanged.text(digits) if row.unchanged else "",
        str(row.seeds),
    ]


def _settings(rows: list[Row]) -> dict[tuple[str, str, str], list[Row]]:
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault(row.cell.setting, []).append(row)
    return found


def _title(setting: tuple[str, str, str]) -> str:
    task, optimizer, shards = setting
    return ", ".join((TASKS[task], OPTIMIZERS[optimizer], SHARDS[shards]))


def _headers(setting: tuple[str, str, str]) -> list[str]:
    score, unit = ("test accuracy", "points") if setting[0] == "digits" else ("test loss, nats", "nats")
    return [
        "method",
        "best learning rate",
        score,
        f"difference to full, {unit} (95 %)",
        "the same at full's learning rate",
        "seeds",
    ]


def markdown(rows: list[Row]) -> str:
    """All settings as Markdown tables."""
    parts = [
        "Differences are paired by seed and signed so that negative is worse than full all-reduce. 8 simulated workers; "
        "full all-reduce is judged, as dssync is, with BatchNorm statistics averaged over the workers."
    ]
    for setting, members in _settings(rows).items():
        lines = [f"**{_title(setting)}**", "", "| " + " | ".join(_headers(setting)) + " |", "| --- | --: | --: | --: | --: | --: |"]
        lines += ["| " + " | ".join(_cells_of(row)) + " |" for row in members]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _print(rows: list[Row]) -> None:
    for setting, members in _settings(rows).items():
        table = Table(title=_title(setting))
        for index, header in enumerate(_headers(setting)):
            table.add_column(header, justify="right" if index else "left")
        for row in members:
            table.add_row(*_cells_of(row))
        Console().print(table)


def _plot_differences(rows: list[Row], path: Path) -> None:
    """A forest plot a setting: paired differences with their 95 % intervals, the controls clipped at the left edge."""
    settings = _settings([row for row in rows if row.difference])
    figure, axes = plt.subplots(math.ceil(len(settings) / 2), 2, figsize=(10, 2.8 * math.ceil(len(settings) / 2)), squeeze=False)
    for axis in axes.flat[len(settings) :]:
        axis.set_visible(False)
    for axis, (setting, members) in zip(axes.flat, settings.items(), strict=False):
        intervals = [(row, row.difference) for row in members if row.difference]
        kept = [i for row, i in intervals if row.cell.method not in ("shuffled", "solo")] or [i for _, i in intervals]
        left = min(-0.05 if setting[0] == "digits" else -0.002, *(i.low for i in kept), *(i.mean for i in kept)) * 1.25
        right = max(abs(left) * 0.25, *(i.high for i in kept), 0) * 1.1
        for y, (row, interval) in enumerate(reversed(intervals)):
            color = COLORS[row.cell.method]
            if interval.mean < left:
                digits = 1 if setting[0] == "digits" else 2
                axis.annotate(f"◄ {interval.mean:.{digits}f}", (left, y), color=color, va="center", fontsize=8)
                continue
            axis.plot([max(interval.low, left), min(interval.high, right)], [y, y], color=color, lw=2)
            axis.plot(interval.mean, y, "o", color=color)
        axis.axvline(0, color="#222222", lw=0.8)
        if setting[0] == "digits":
            axis.axvline(-0.5, color="#b03030", lw=0.8, ls=":")
        axis.set_xlim(left, right)
        axis.set_ylim(-0.6, len(intervals) - 0.4)
        axis.set_yticks(range(len(intervals)), [row.title for row, _ in reversed(intervals)], fontsize=7)
        axis.set_title(_title(setting), fontsize=9)
        axis.set_xlabel(f"difference to full all-reduce, {UNITS[members[0].cell.score]} (right is better)", fontsize=8)
        axis.tick_params(axis="x", labelsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _plot_sweeps(studies: list[Study], path: Path) -> None:
    """Test loss by learning rate, sweep seeds, one line a method; the axis is cut where methods fail."""
    settings = list(dict.fromkeys((cell.setting, number) for number, study in enumerate(studies) for cell in study.rows))
    figure, axes = plt.subplots(math.ceil(len(settings) / 2), 2, figsize=(14, 2.6 * math.ceil(len(settings) / 2)), squeeze=False)
    for axis in axes.flat[len(settings) :]:
        axis.set_visible(False)
    for axis, (setting, number) in zip(axes.flat, settings, strict=False):
        best = []
        for cell in (cell for cell in studies[number].rows if cell.setting == setting):
            sweep = {cell.at(e, 0).lr: score for e, score in studies[number].sweep(cell).items() if score < 1e6}
            if sweep:
                style = {"ms": 3, "color": COLORS[cell.method], "label": METHODS[cell.method].title}
                axis.plot(list(sweep), list(sweep.values()), "o-", **style)
                best.append(min(sweep.values()))
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda rate, _: f"{rate:.3g}")
        axis.tick_params(labelsize=7)
        if best:
            axis.set_ylim(min(best) - 0.02, min(best) + 0.3)
        axis.set_title(_title(setting), fontsize=9)
        axis.set_xlabel("learning rate", fontsize=8)
        axis.set_ylabel("test loss, nats", fontsize=8)
        axis.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def write_report(studies: list[Study], out: Path) -> None:
    """accuracy.md, accuracy.png and accuracy_rates.png in `out`, and the table on the terminal."""
    rows = [row for study in studies for row in rows_of(study)]
    if not rows:
        print("no setting is finished yet")
        return
    _print(rows)
    (out / "accuracy.md").write_text(markdown(rows))
    _plot_differences(rows, out / "accuracy.png")
    _plot_sweeps(studies, out / "accuracy_rates.png")
