"""Runs the distributed tests that torch ships over gloo and over dssync, and compares them test by test.

What `make conformance` runs. Every test that passes on gloo must pass on dssync, or stand in conformance_differences.txt with its
reason; the command fails on any other difference, and on a reason that is no longer needed. dssync runs with auto_attach off and
exact all_reduce, since these tests are about exact results. Which tests, and how they are started: conformance_worker.py.

A test that fails is run once more at the end, alone: some measure time. Both runs count as one, and the report names those that
needed the second. Only a run of all tests on both backends writes the report, benchmarks/results/conformance.{md,json}.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import queue
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

HERE = Path(__file__).parent
WORKER = HERE / "conformance_worker.py"
DIFFERENCES = HERE / "conformance_differences.txt"
REPORT = HERE / "results" / "conformance"
SCRATCH = HERE.parent / "build" / "conformance"
BACKENDS = ("gloo", "dssync")
STATUSES = ("passed", "failed", "skipped")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DSSYNC_AUTO_ATTACH": "0", "DSSYNC_ALL_REDUCE": "exact"}

Result = dict[str, Any]  # what conformance_worker.py writes for a test, and `tries`
Results = dict[str, Result]  # by test

console = Console(highlight=False)


class WorkerDied(Exception):
    """The process that runs tests ended by itself; stderr says why."""


# ---- running -------------------------------------------------------------------------------------------------------------------


class Worker:
    """A process that runs tests over one backend, one after the other."""

    def __init__(self, backend: str, limit_s: float) -> None:
        logs = SCRATCH / backend
        logs.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), backend, str(limit_s), str(logs)],
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is ours to pass on: a worker ends with its stdin
        )
        self.tests: list[str] = self._read()["tests"]

    def run(self, test: str) -> Result:
        assert self.process.stdin
        self.process.stdin.write(f"{test}\n")
        self.process.stdin.flush()
        return self._read()

    def end(self) -> None:
        """Ends the process, and with it what it is running."""
        self.process.kill()
        self.process.wait()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise WorkerDied(f"the worker ended with exit code {self.process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found


class Backend:
    """Runs tests over one backend in several workers, and keeps the results on disk as they come."""

    def __init__(self, name: str, jobs: int, limit_s: float, resume: bool) -> None:
        self.name = name
        self.workers = [Worker(name, limit_s)]
        self.tests = self.workers[0].tests
        self.kept = SCRATCH / f"{name}.jsonl"
        if not resume:
            self.kept.unlink(missing_ok=True)
        self.results: Results = {}
        if self.kept.exists():
            self.results = {result["test"]: result for result in map(json.loads, self.kept.read_text().splitlines())}
        self._more = (jobs - 1, limit_s)

    def run(self, tests: Iterable[str], progress: Progress) -> Results:
        """The results of `tests`; those that an earlier run left are taken over."""
        tests = list(tests)
        bar = progress.add_task(self.name, total=len(tests))
        missing = [test for test in tests if test not in self.results]
        progress.advance(bar, len(tests) - len(missing))
        if len(missing) > 1:
            count, limit_s = self._more
            self.workers += [Worker(self.name, limit_s) for _ in range(count)]
        self._run(missing, self.workers, progress, bar)
        again = [test for test in tests if self.results[test]["status"] == "failed" and self.results[test]["tries"] == 1]
        progress.update(bar, total=len(tests) + len(again), description=f"{self.name}, failed ones again" if again else self.name)
        self._run(again, self.workers[:1], progress, bar)
        return {test: self.results[test] for test in tests}

    def end(self) -> None:
        for worker in self.workers:
            worker.end()

    def _run(self, tests: list[str], workers: list[Worker], progress: Progress, bar: Any) -> None:
        waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
        for test in tests:
            waiting.put(test)
        done: queue.SimpleQueue[Result | Exception] = queue.SimpleQueue()

        def work(worker: Worker) -> None:
            try:
                while True:
                    done.put(worker.run(waiting.get_nowait()))
            except queue.Empty:
                pass
            except Exception as error:
                done.put(error)

        threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in workers]
        for thread in threads:
            thread.start()
        for _ in tests:
            result = done.get()
            if isinstance(result, Exception):
                raise result
            result["tries"] = self.results.get(result["test"], {"tries": 0})["tries"] + 1
            self.results[result["test"]] = result
            with self.kept.open("a") as kept:
                print(json.dumps(result), file=kept)
            if result["status"] == "failed":
                progress.console.print(f"[red]{self.name} {result['test']}[/]: {escape(result['reason'])}", soft_wrap=True)
            progress.advance(bar)
        for thread in threads:
            thread.join()


# ---- comparing -----------------------------------------------------------------------------------------------------------------


def read_differences() -> dict[str, str]:
    """The reason for each test that is known to differ."""
    lines = [line for line in DIFFERENCES.read_text().splitlines() if line.strip() and not line.startswith("#")]
    return {test.strip(): reason.strip() for test, reason in (line.split(":", 1) for line in lines)}


def compare(gloo: Results, dssync: Results, listed: dict[str, str]) -> tuple[list[str], list[str], list[str]]:
    """Tests that pass on gloo and not on dssync: the listed, the unlisted; and those listed that do not differ so any more."""
    worse = [test for test in gloo if gloo[test]["status"] == "passed" != dssync[test]["status"]]
    stale = [test for test in listed if test in gloo and test not in worse]
    return [test for test in worse if test in listed], [test for test in worse if test not in listed], stale


def count(results: Results) -> Counter[str]:
    return Counter(result["status"] for result in results.values())


def rows(results: dict[str, Results]) -> Iterator[list[str]]:
    """Of the table of counts, a backend each."""
    for backend, found in results.items():
        seconds = sum(result["seconds"] for result in found.values())
        yield [backend, *(str(count(found)[status]) for status in STATUSES), f"{seconds:.0f} s"]


def show(results: dict[str, Results], listed: dict[str, str]) -> bool:
    """Prints the counts and the differences by name. Returns whether all is as it should be."""
    table = Table("", "ran and passed", "failed", "skipped", "sum of times")
    for row in rows(results):
        table.add_row(*row)
    console.print(table)
    if set(results) != set(BACKENDS):
        return not any(count(found)["failed"] for found in results.values())
    gloo, dssync = results["gloo"], results["dssync"]
    known, unknown, stale = compare(gloo, dssync, listed)
    for test in gloo:
        before, after = gloo[test]["status"], dssync[test]["status"]
        if test in unknown:
            console.print(f"[red]difference[/] {test}: {before} on gloo, {after} on dssync: {escape(dssync[test]['reason'])}")
        elif test in known:
            console.print(f"known difference {test}: {escape(listed[test])}")
        elif before != after:
            console.print(f"better on dssync {test}: {before} on gloo, {after} on dssync")
    for test in stale:
        console.print(f"[red]no difference any more[/], to be taken out of {DIFFERENCES.name}: {test}")
    if unknown:
        console.print(f"What the tests printed: {SCRATCH / 'dssync'}/<test>.log")
    return not unknown and not stale


# ---- the report ----------------------------------------------------------------------------------------------------------------


def write_report(results: dict[str, Results], listed: dict[str, str], jobs: int) -> None:
    gloo, dssync = (results[backend] for backend in BACKENDS)
    versions = {"torch": importlib.metadata.version("torch"), "python": platform.python_version()}
    REPORT.parent.mkdir(exist_ok=True)
    tests = [json.dumps({"test": test, **{backend: results[backend][test]["status"] for backend in BACKENDS}}) for test in gloo]
    counts = json.dumps({backend: dict(count(results[backend])) for backend in BACKENDS})
    body = ",\n".join(tests)
    REPORT.with_suffix(".json").write_text(f'{{"versions": {json.dumps(versions)}, "counts": {counts}, "tests": [\n{body}\n]}}\n')

    known, unknown, _ = compare(gloo, dssync, listed)
    text = [
        "# torch's distributed tests on gloo and on dssync",
        "",
        f"`make conformance`, torch {versions['torch']}, Python {versions['python']}, {os.cpu_count()} cores, {jobs} at a time.",
        "Four ranks a test; dssync with auto_attach off and exact all_reduce.",
        "",
        "| | ran and passed | failed | skipped | sum of the tests' times |",
        "| --- | --- | --- | --- | --- |",
        *(f"| {' | '.join(row)} |" for row in rows(results)),
        "",
    ]
    reasons = {test: listed.get(test, f"UNEXPLAINED: {dssync[test]['reason']}") for test in known + unknown}
    sections = {
        "Pass on gloo, not on dssync": [f"`{test}`: {reason}" for test, reason in reasons.items()],
        "Pass on dssync, not on gloo": [
            f"`{test}`: on gloo {gloo[test]['reason']}"
            for test in gloo
            if dssync[test]["status"] == "passed" != gloo[test]["status"]
        ],
        "Fail on both": [
            f"`{test}`: {gloo[test]['reason']}" for test in gloo if gloo[test]["status"] == dssync[test]["status"] == "failed"
        ],
        "Passed at the second try": [
            f"`{test}` on {backend}"
            for backend in BACKENDS
            for test, result in results[backend].items()
            if result["tries"] > 1 and result["status"] == "passed"
        ],
        "Skipped by torch on both, by reason": [
            f"{number}: {reason}"
            for reason, number in Counter(
                gloo[test]["reason"] for test in gloo if gloo[test]["status"] == dssync[test]["status"] == "skipped"
            ).most_common()
        ],
    }
    for title, lines in sections.items():
        text += [f"## {title}", "", *(f"- {line}" for line in lines or ["none"]), ""]
    REPORT.with_suffix(".md").write_text("\n".join(text).rstrip() + "\n")
    console.print(f"Report: {REPORT.with_suffix('.md')}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("-k", metavar="TEXT", default="", help="only tests whose name contains this; several with commas")
    parser.add_argument("--backend", choices=BACKENDS, help="only this one: nothing is compared")
    parser.add_argument("--resume", action="store_true", help="keep the results that the last run left, and run what is missing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="tests run at the same time (default: one a core)")
    parser.add_argument("--limit", type=float, default=200, help="seconds that one test may take (default: %(default)s)")
    arguments = parser.parse_args()

    results: dict[str, Results] = {}
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn(columns[0]), *columns[1:], console=console) as progress:
        for name in [arguments.backend] if arguments.backend else BACKENDS:
            backend = Backend(name, arguments.jobs, arguments.limit, arguments.resume)
            try:
                wanted = [test for test in backend.tests if any(part in test for part in arguments.k.split(","))]
                results[name] = backend.run(wanted, progress)
            finally:
                backend.end()
    listed = read_differences()
    as_it_should_be = show(results, listed)
    if not arguments.backend and not arguments.k:
        write_report(results, listed, arguments.jobs)
    return 0 if as_it_should_be else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except WorkerDied as error:
        sys.exit(f"conformance: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
