"""What Slurm tells a job of its hosts: host lists as `scontrol show hostnames` expands them, tasks of each, switches above."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

_T = TypeVar("_T")

_MAX_HOSTS = 1 << 20

# Of the step where there is one: a job may run on fewer hosts than it has.
_SOURCES = (("SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE"), ("SLURM_JOB_NODELIST", "SLURM_TASKS_PER_NODE"))


def expand_hosts(text: str) -> list[str]:
    """ "node[08-10,12],gpu1" is node08, node09, node10, node12, gpu1. Raises ValueError saying what is not understood."""
    names: list[str] = []
    for part in re.split(r",(?![^\[]*\])", text.strip()):
        pieces = re.split(r"\[([^\[\]]*)\]", part)  # plain, ranges, plain, ...
        if not part or any("[" in plain or "]" in plain for plain in pieces[::2]):
            raise ValueError(f'{text!r} is no list of hosts, expected one as "node[01-04],gpu1"')
        choices = [list(_expand_ranges(piece, text)) if index % 2 else [piece] for index, piece in enumerate(pieces)]
        if len(names) + math.prod(map(len, choices)) > _MAX_HOSTS:
            raise ValueError(f"{text!r} lists more than {_MAX_HOSTS} hosts")
        names += map("".join, itertools.product(*choices))
    return names


def _expand_ranges(ranges: str, text: str) -> Iterator[str]:
    for item in ranges.split(","):
        found = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", item.strip())
        if not found or int(found[2] or found[1]) < int(found[1]):
            raise ValueError(f'{item!r} in {text!r} is no range of numbers, expected one as "01-04"')
        first, last = int(found[1]), int(found[2] or found[1])
        if last - first >= _MAX_HOSTS:
            raise ValueError(f"{text!r} lists more than {_MAX_HOSTS} hosts")
        for number in range(first, last + 1):
            yield f"{number:0{len(found[1])}d}"


def expand_tasks(text: str) -> list[int]:
    """ "4(x2),1" is 4, 4, 1."""
    tasks: list[int] = []
    for item in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,9})\s*(?:\(x(\d{1,7})\))?\s*", item)
        if not found or not int(found[1]) or int(found[2] or 1) > _MAX_HOSTS:
            raise ValueError(f'{item!r} in {text!r} is no number of tasks, expected one as "4" or "4(x2)"')
        tasks += [int(found[1])] * int(found[2] or 1)
    return tasks


def rack_of_address(host: str, address: str) -> str:
    """The switches above a host by its SLURM_TOPOLOGY_ADDR, from the top down: "s0.s1" of "s0.s1.node5"; "" for none."""
    if address == host:
        return ""
    return address.removesuffix("." + host) if address.endswith("." + host) else address.rpartition(".")[0]


def _naming(variable: str, read: Callable[[], _T]) -> _T:
    try:
        return read()
    except ValueError as error:
        raise ValueError(f"{variable}: {error}") from None


@dataclasses.dataclass(frozen=True)
class SlurmJob:
    """The hosts of a job or step, and how many workers each has."""

    hosts: list[str]
    workers: list[int]
    cyclic: bool
    """Ranks are dealt out to the hosts in turn, instead of filling one after the other."""

    @classmethod
    def read(cls, environ: Mapping[str, str], workers_per_host: int | None) -> SlurmJob:
        """Raises ValueError naming the variable."""
        nodes = next((pair for pair in _SOURCES if environ.get(pair[0])), None)
        if nodes is None:
            raise ValueError("SLURM_JOB_NODELIST is not set: this is no Slurm job")
        hosts = _naming(nodes[0], lambda: expand_hosts(environ[nodes[0]]))
        if workers_per_host is not None:
            return cls(hosts, [workers_per_host] * len(hosts), cyclic=False)
        counts = next((name for name in (nodes[1], "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE") if environ.get(name)), None)
        workers = _naming(counts, lambda: expand_tasks(environ[counts])) if counts else [1]
        if len(workers) == 1:
            workers *= len(hosts)
        if len(workers) != len(hosts):
            raise ValueError(f"{counts}={environ[counts or '']!r} is of {len(workers)} hosts, {nodes[0]} of {len(hosts)}")
        distribution = environ.get("SLURM_DISTRIBUTION", "block").split(",")[0].split(":")[0]
        if distribution not in ("block", "cyclic"):
            raise ValueError(
                f"SLURM_DISTRIBUTION={environ['SLURM_DISTRIBUTION']!r}: expected block or cyclic; "
                "for other orders of ranks write a topology file"
            )
        return cls(hosts, workers, distribution == "cyclic")

    def ranks_of_hosts(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Each host and its ranks."""
        places = [(place, host) for host, count in enumerate(self.workers) for place in range(count)]
        if self.cyclic:
            places.sort()
        ranks: list[list[int]] = [[] for _ in self.hosts]
        for rank, (_, host) in enumerate(places):
            ranks[host].append(rank)
        return zip(self.hosts, map(tuple, ranks), strict=True)
