"""One rank of all_reduce.py: measures every series on the same tensors, in turn, and lets rank 0 write what was found.

In each repetition every series has its turn, in an order that rotates, so that what else happens on the machine hits all alike. A
barrier of a Gloo group of its own comes before each turn. A sample's time is that of the slowest rank, its CPU time the sum over
the ranks' processes.
"""

from __future__ import annotations

import ctypes
import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from cluster import LinkBytes, link_bytes

import dssync_pg

PR_SET_PDEATHSIG = 1
SERIES: dict[str, dict[str, Any]] = {
    "gloo": {},
    "dssync-gloo": {"engine": "gloo"},
    "native-tcp": {"engine": "native", "transport": "tcp"},
    "native-shm": {"engine": "native", "transport": "shm"},
    "native": {"engine": "native"},
}
"""The options of dssync for each; "gloo" is torch's own."""
SAMPLE_S = 0.1  # so many calls a sample that Gloo takes this long
FEWEST_CALLS = 4  # of less than a second: a single call measures how differently the ranks leave the barrier before it
MAX_CALLS = 100
TIMEOUT = timedelta(minutes=2)
"""Of one call; who is not in a group waits longer, for all of its measurements."""

Group: TypeAlias = Any
Call: TypeAlias = Callable[[], object]
Record: TypeAlias = dict[str, Any]


def make_group(series: str, ranks: Sequence[int]) -> Group:
    """A group of `series`, on all ranks of the job at once."""
    if series == "gloo":
        return dist.new_group(list(ranks), TIMEOUT, backend="gloo")
    return dist.new_group(list(ranks), TIMEOUT, backend="dssync", pg_options=dssync_pg.Options(**SERIES[series]))


class Bench:
    """A rank's part in all measurements among `ranks`; in several groups at once where `groups` says so."""

    def __init__(self, spec: Record, ranks: Sequence[int], groups: Sequence[Sequence[int]]) -> None:
        self.spec, self.ranks = spec, list(ranks)
        self.rank = dist.get_rank()
        self.control = dist.new_group(self.ranks, backend="gloo")
        self.mine: dict[str, Group] = {}
        self.size = next((len(group) for group in groups if self.rank in group), 1)
        for series in spec["series"]:
            made = {tuple(group): make_group(series, group) for group in groups}
            self.mine[series] = next((made[tuple(group)] for group in groups if self.rank in group), None)

    def measure(self, calls: dict[str, Call], about: Record) -> None:
        """Records the times of one call of each series, which have all been called before."""
        count = self._count(calls["gloo"])
        repetitions, names = self.spec["repetitions"], list(calls)
        seconds, cpu_seconds = torch.zeros(2, len(names), repetitions, dtype=torch.float64)
        links: dict[str, list[dict[str, LinkBytes]]] = {name: [] for name in names}
        for repetition in range(repetitions):
            for turn in range(len(names)):
                index = (repetition + turn) % len(names)
                call = calls[names[index]]
                links[names[index]] += self._links()
                dist.barrier(group=self.control)
                cpu_start, start = time.process_time(), time.perf_counter()
                for _ in range(count):
                    call()
                end, cpu_end = time.perf_counter(), time.process_time()
                seconds[index, repetition] = (end - start) / count
                cpu_seconds[index, repetition] = (cpu_end - cpu_start) / count
                links[names[index]] += self._links()
        dist.all_reduce(seconds, dist.ReduceOp.MAX, group=self.control)
        dist.all_reduce(cpu_seconds, dist.ReduceOp.SUM, group=self.control)
        if self.rank != self.ranks[0]:
            return
        for index, name in enumerate(names):
            record = {**about, "series": name, "calls": count, "samples": seconds[index].tolist()}
            record |= {"seconds": _median(seconds[index]), "cpu_seconds": _median(cpu_seconds[index])}
            if links[name]:
                record["busiest_link_bytes"] = _busiest(links[name]) / repetitions / count
            _write(self.spec, record)
        times = ", ".join(f"{name} {_median(seconds[index]) * 1e3:.3g}" for index, name in enumerate(names))
        print(" ".join(str(value) for value in about.values()), f"({count} calls): {times} ms", flush=True)

    def tensors(self, operation: str, dtype: str, size_bytes: int, about: Record) -> None:
        """Measures `operation` on tensors of so many bytes, after seeing that every series gives the right values."""
        tensor = torch.empty(size_bytes // getattr(torch, dtype).itemsize, dtype=getattr(torch, dtype))
        calls: dict[str, Call] = {}
        for series, group in self.mine.items():
            average = operation == "average" and series != "gloo"  # Gloo knows no average; its sum is what it would build on
            op = dist.ReduceOp.AVG if average else dist.ReduceOp.SUM
            calls[series] = _call(tensor, op, group) if self.size > 1 else _nothing
            tensor.fill_(self.rank + 1)
            calls[series]()
            members = dist.get_process_group_ranks(group) if self.size > 1 else [self.rank]
            expected = sum(rank + 1 for rank in members) / (len(members) if average else 1)
            if (tensor != expected).any():
                raise AssertionError(f"{series}: {operation} of {dtype} gives {tensor[tensor != expected][0]}, not {expected}")
        tensor.zero_()  # sums of sums stay in range
        self.measure(calls, about)

    def barriers(self, about: Record) -> None:
        calls = {series: _barrier(group) for series, group in self.mine.items()}
        for call in calls.values():
            call()
        self.measure(calls, about)

    def _count(self, call: Call) -> int:
        """How often to call for a sample of SAMPLE_S; the same on all ranks."""
        times = []
        for _ in range(3):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        slowest = torch.tensor(sorted(times)[1], dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group=self.control)
        fewest = FEWEST_CALLS if slowest.item() < 1 and "CLUSTER_NAME" not in os.environ else 1
        return max(fewest, min(MAX_CALLS, math.ceil(SAMPLE_S / slowest.item())))

    def _links(self) -> list[dict[str, LinkBytes]]:
        if "CLUSTER_NAME" not in os.environ:
            return []
        dist.barrier(group=self.control)
        return [link_bytes(os.environ["CLUSTER_NAME"])] if self.rank == self.ranks[0] else []


def _call(tensor: torch.Tensor, op: Any, group: Group) -> Call:
    return lambda: dist.all_reduce(tensor, op, group=group)


def _barrier(group: Group) -> Call:
    return lambda: dist.barrier(group=group)


def _nothing() -> None:
    """The part of a rank that is in no group."""


def _median(samples: torch.Tensor) -> float:
    return samples.quantile(0.5).item()


def _busiest(counters: list[dict[str, LinkBytes]]) -> int:
    """The bytes of the link and direction that carried most, from pairs of counters before and after."""
    sums: dict[tuple[str, str], int] = {}
    for before, after in zip(counters[::2], counters[1::2], strict=True):
        for link in after:
            for way in ("up", "down"):
                sums[link, way] = sums.get((link, way), 0) + getattr(after[link], way) - getattr(before[link], way)
    return max(sums.values())


def _write(spec: Record, record: Record) -> None:
    with Path(spec["out"]).open("a") as out:
        print(json.dumps(record), file=out)


def on_host(spec: Record) -> None:
    for size in spec["ranks"]:
        bench = Bench(spec, range(size), [range(size)])
        if bench.rank < size:
            for operation in spec["operations"]:
                about = {"operation": operation, "ranks": size}
                if operation == "barrier":
                    bench.barriers(about)
                elif operation == "all_reduce" or size == 2:
                    for dtype in spec["dtypes"]:
                        for size_bytes in spec["sizes"][str(size)]:
                            bench.tensors(operation, dtype, size_bytes, {**about, "dtype": dtype, "bytes": size_bytes})
        dist.barrier()


def on_cluster(spec: Record) -> None:
    everyone = range(dist.get_world_size())
    for case, groups in spec["cases"].items():
        bench = Bench(spec, everyone, groups)
        for size_bytes in spec["sizes"]:
            bench.tensors("average", "float32", size_bytes, {"case": case, "bytes": size_bytes})


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no rank outlives the command
    spec: Record = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    logging.getLogger("dssync_pg").setLevel(logging.WARNING)
    dist.init_process_group("gloo", timeout=timedelta(hours=1))
    (on_cluster if "cases" in spec else on_host)(spec)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
