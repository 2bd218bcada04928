"""Is divide-and-shuffle training as accurate as full all-reduce? Simulated workers, real data, paired seeds.

    python benchmarks/accuracy.py                       # everything: about an hour on two cores
    python benchmarks/accuracy.py --task digits --seeds 8
    python benchmarks/accuracy.py --quick --out /tmp/x  # under a minute

Every method is run at its own best learning rate: that of the lowest test loss over the sweep seeds (accuracy on 599 digits is too
coarse to choose by), on a grid of factor 2 that grows while its best point lies at its edge. The comparison then takes other seeds
(other splits, initial parameters and batches), the same for all methods, and gives the 95 % interval (paired t) of the difference
to full all-reduce. Each finished run is a line of accuracy.jsonl in the output folder, so that an interrupted table continues where
it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import os
import time
from dataclasses import dataclass
from pathlib import Path

from accuracy_tasks import Recipe, Run

RECIPES = {
    "digits": Recipe("digits", workers=8, steps=270, batch=16),
    "chars": Recipe("chars", workers=8, steps=600, batch=4),
}
QUICK = {
    "digits": Recipe("digits", workers=8, steps=60, batch=16),
    "chars": Recipe("chars", workers=8, steps=60, batch=4),
}
FIRST_RATE = {"sgd": 0.1, "adamw": 0.004}  # the grid: these times powers of two
FIRST_GRID = {("digits", "sgd"): (-1, 0, 1), ("digits", "adamw"): (0, 1), ("chars", "sgd"): (2, 3), ("chars", "adamw"): (2, 3)}
FIRST_EVALUATION_SEED = 1000  # sweep seeds count from 0
MORE_SEEDS = {("digits", "adamw", "sorted"): 3}  # times: 8 seeds there left intervals of +-0.6 points; decided after seeing them
CONTROLS = ("shuffled", "solo")
RACKS = ("striped", "striped_0", "striped_whole", "leaders", "hybrid")  # two racks of four; label-sorted: at most one label in both
RACKS_STATE = ("striped_all", "hybrid_all")
MALLOC = {  # without these glibc gives every large tensor back to the system and faults it in again: a fifth of the time
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
}


@dataclass(frozen=True)
class Cell:
    """One row of the table: a method in a setting."""

    task: str
    optimizer: str
    shards: str
    method: str

    @property
    def setting(self) -> tuple[str, str, str]:
        return self.task, self.optimizer, self.shards

    @property
    def score(self) -> str:
        """What decides: accuracy (higher is better) or loss (lower is better)."""
        return "accuracy" if self.task == "digits" else "loss"

    @property
    def unchanged(self) -> bool:
        """Whether it also runs at the learning rate of full all-reduce."""
        return self.method in ("none", "v", "all", *RACKS, *RACKS_STATE)

    def at(self, exponent: int, seed: int) -> Run:
        rate = FIRST_RATE[self.optimizer] * 2.0**exponent
        return Run(self.task, self.optimizer, self.shards, self.method, rate, seed)


def cells(tasks: list[str], quick: bool = False) -> list[Cell]:
    """Every row; the controls where the shards are IID."""
    found = []
    for task in tasks:
        for shards in ("iid", "sorted") if task == "digits" and not quick else ("iid",):
            for optimizer in ("sgd", "adamw"):
                methods = ["full", "none", "v", "all", "warmup", *RACKS, *RACKS_STATE, *CONTROLS]
                if quick:
                    methods = ["full", "none", "hybrid", "solo"]
                # SGD keeps no second moments; Adam gained nothing from a warm-up
                left_out = {"v" if optimizer == "sgd" else "warmup"}
                if shards != "iid" or (task == "chars" and optimizer == "adamw"):
                    left_out |= {*CONTROLS}
                if (task, optimizer, shards) in (("digits", "sgd", "iid"), ("chars", "adamw", "iid")):
                    left_out |= {*RACKS_STATE}
                if task == "chars" or shards != "iid":
                    left_out |= {"striped_whole"}
                methods = [method for method in methods if method not in left_out]
                found += [Cell(task, optimizer, shards, method) for method in methods]
    return found


class Results:
    """Finished runs, in memory and as lines of a file."""

    def __init__(self, path: Path, recipes: dict[str, Recipe]) -> None:
        self.path, self.recipes = path, recipes
        self.known: dict[Run, dict[str, float]] = {}
        self.marks = {task: _mark(recipe) for task, recipe in recipes.items()}
        text = path.read_text() if path.exists() else ""
        if text and not text.endswith("\n"):  # ended in mid-write: the next line must not continue this one
            path.write_text(text + "\n")
        for line in text.splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # cut short in the same way
            run = Run(**{field.name: entry[field.name] for field in dataclasses.fields(Run)})
            if entry["recipe"] == self.marks.get(run.task):
                self.known[run] = entry["result"]

    def add(self, run: Run, result: dict[str, float]) -> None:
        self.known[run] = result
        entry = {**dataclasses.asdict(run), "recipe": self.marks[run.task], "result": result}
        with self.path.open("a") as file:
            file.write(json.dumps(entry, separators=(",", ":")) + "\n")


def _mark(recipe: Recipe) -> str:
    return hashlib.sha256(repr(recipe).encode()).hexdigest()[:8]


class Study:
    """What has to be run, given what has been: the grid, its growth, then the comparison. No state of its own."""

    def __init__(self, rows: list[Cell], results: Results, sweep_seeds: int, seeds: int, grow: bool = True) -> None:
        self.rows, self.results, self.sweep_seeds, self.seeds, self.grow = rows, results, sweep_seeds, seeds, grow

    def sweep(self, cell: Cell) -> dict[int, float]:
        """Mean test loss of every grid point (by its exponent) whose sweep seeds are all done."""
        found = {}
        for exponent in range(-12, 13):
            runs = [self.results.known.get(cell.at(exponent, seed)) for seed in range(self.sweep_seeds)]
            if all(runs):
                found[exponent] = sum(run["loss"] for run in runs if run) / len(runs)
        return found

    def _exponents(self, cell: Cell) -> tuple[set[int], int | None]:
        """The grid points that decide, and the best of them as far as is known."""
        sweep, first = self.sweep(cell), set(FIRST_GRID[cell.task, cell.optimizer])
        if not first <= set(sweep):
            return first, None
        best = min(sweep, key=lambda exponent: sweep[exponent])
        return {best - 1, best, best + 1} if self.grow else first, best

    def best(self, cell: Cell) -> int | None:
        """The exponent of the best learning rate, None while the sweep is not done."""
        needed, best = self._exponents(cell)
        return best if needed <= set(self.sweep(cell)) else None

    def evaluation(self, cell: Cell, exponent: int) -> list[Run]:
        more = 1 if cell.method in (*CONTROLS, *RACKS, *RACKS_STATE) else MORE_SEEDS.get(cell.setting, 1)
        count = min(self.seeds, 8) if cell.method in CONTROLS else self.seeds * more
        return [cell.at(exponent, FIRST_EVALUATION_SEED + seed) for seed in range(count)]

    def _wanted(self, cell: Cell) -> list[Run]:
        """The sweep of a row; once that is done, its comparison."""
        best = self.best(cell)
        if best is None:
            return [cell.at(exponent, seed) for exponent in sorted(self._exponents(cell)[0]) for seed in range(self.sweep_seeds)]
        return self.evaluation(cell, best)

    def _unchanged(self, cell: Cell) -> list[Run]:
        """The comparison at the learning rate of full all-reduce: what a user gets who changes nothing."""
        same = self.best(Cell(*cell.setting, "full"))
        return self.evaluation(cell, same) if cell.unchanged and same is not None else []

    def missing(self) -> list[Run]:
        """The next wave, most telling first: the methods, then the controls, then the unchanged learning rates."""
        methods = [run for cell in self.rows if cell.method not in CONTROLS for run in self._wanted(cell)]
        controls = [run for cell in self.rows if cell.method in CONTROLS for run in self._wanted(cell)]
        unchanged = [run for cell in self.rows for run in self._unchanged(cell)]
        waves = ([run for run in dict.fromkeys(wave) if run not in self.results.known] for wave in (methods, controls, unchanged))
        return next((wave for wave in waves if wave), [])


def _simulate(work: tuple[Run, Recipe]) -> tuple[Run, dict[str, float]]:
    import torch
    from accuracy_simulation import simulate

    torch.set_num_threads(1)
    return work[0], simulate(work[0], work[1])


def run_all(study: Study, jobs: int) -> None:
    """Run what is missing until nothing is; every finished run is kept at once."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    os.environ.update(MALLOC)  # read by each worker process when it starts
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with multiprocessing.get_context("spawn").Pool(jobs) as pool, Progress(*columns) as progress:
        wave = 0
        while missing := study.missing():
            wave += 1
            bar = progress.add_task(f"wave {wave}", total=len(missing))
            works = [(run, study.results.recipes[run.task]) for run in missing]
            for run, result in pool.imap_unordered(_simulate, works):
                study.results.add(run, result)
                progress.advance(bar)


def predict(study: Study) -> str:
    """What the table will take, by a quarter of one run of each task (after a few steps that only warm up)."""
    text = []
    for task in dict.fromkeys(cell.task for cell in study.rows):
        rows, recipe = [cell for cell in study.rows if cell.task == task], study.results.recipes[task]
        for steps in (3, recipe.steps // 4):
            result = _simulate((rows[0].at(0, 0), dataclasses.replace(recipe, steps=steps)))[1]
        seconds = 4 * result["cpu_seconds"]
        runs = sum((len(FIRST_GRID[task, c.optimizer]) + 1) * study.sweep_seeds + 1.2 * len(study.evaluation(c, 0)) for c in rows)
        text.append(f"{task}: {seconds:.1f} s a run, about {runs:.0f} runs, {seconds * runs / 60:.0f} core minutes")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--task", choices=("digits", "chars", "all"), default="all")
    parser.add_argument("--quick", action="store_true", help="a small part, in under a minute; its numbers mean little")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one core each (default 2)")
    parser.add_argument("--seeds", type=int, default=8, help="paired seeds of the comparison (default 8)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of runs, table and plots")
    parser.add_argument("--report", action="store_true", help="only write table and plots from the runs there are")
    arguments = parser.parse_args()

    tasks = ["digits", "chars"] if arguments.task == "all" else [arguments.task]
    if arguments.quick and arguments.task == "all":
        tasks = ["digits"]
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = Results(arguments.out / "accuracy.jsonl", QUICK if arguments.quick else RECIPES)
    studies = []
    for task in tasks:
        rows = cells([task], arguments.quick)
        sweep_seeds = 2 if task == "digits" else 3
        if arguments.quick:
            studies.append(Study(rows, results, sweep_seeds=1, seeds=2, grow=False))
        else:
            studies.append(Study(rows, results, sweep_seeds, arguments.seeds))
    started, before = time.perf_counter(), len(results.known)
    if not arguments.report:
        for study in studies:
            if not arguments.quick:
                print(predict(study), flush=True)
            run_all(study, arguments.jobs)
    from accuracy_report import write_report

    write_report(studies, arguments.out)
    done = len(results.known) - before
    if done:
        print(f"{done} runs in {(time.perf_counter() - started) / 60:.1f} minutes with {arguments.jobs} processes")


if __name__ == "__main__":
    main()
