"""Where the workers are and how fast the links between them: racks, hosts, NICs, as plain objects over csrc/core/topology.c."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from . import _C
from ._slurm import SlurmJob, rack_of_address
from ._units import format_latency, format_rate, parse_latency, parse_rate, shortest_latency, shortest_rate

MAX_WORLD_SIZE = 1 << 24

_SHOWN_RACKS = 16
_SHOWN_RANGES = 8


class TopologyError(ValueError):
    """A topology that cannot be. Of a file, the text begins with FILE:LINE."""


class Contradiction(TopologyError):
    """Which part of the racks is wrong, so that the reader of a file can name its line."""

    def __init__(self, text: str, rack: int, host: int | None = None, key: str = "name") -> None:
        super().__init__(text)
        self.rack, self.host, self.key = rack, host, key


@dataclasses.dataclass(frozen=True, slots=True)
class Link:
    """One link, both directions at once."""

    rate: float = math.inf
    """Bits a second on the wire, headers included. Infinite: not known, and so never a bottleneck."""
    latency: float = 0.0
    """Seconds that it adds to a message that crosses it."""

    @staticmethod
    def of(value: LinkLike) -> Link:
        """A Link, a rate (bit/s, or text as "500 Mbit/s"), a pair of rate and latency ("50 us"), or None for what is not known.

        Raises ValueError saying what was expected.
        """
        if isinstance(value, Link):
            return value
        if value is None:
            return Link()
        rate, latency = value if isinstance(value, tuple) else (value, 0.0)
        return Link(parse_rate(rate), parse_latency(latency))

    def __str__(self) -> str:
        return format_rate(self.rate) + (f" and {format_latency(self.latency)}" if self.latency else "")


LinkLike: TypeAlias = "Link | float | str | tuple[float | str, float | str] | None"


@dataclasses.dataclass(frozen=True, slots=True)
class Host:
    """A machine and the workers on it, which share its NIC."""

    name: str
    ranks: tuple[int, ...]
    nic: Link = Link()


@dataclasses.dataclass(frozen=True, slots=True)
class Rack:
    """Hosts that share an uplink."""

    name: str
    hosts: tuple[Host, ...]
    uplink: Link = Link()

    @property
    def ranks(self) -> list[int]:
        return sorted(rank for host in self.hosts for rank in host.ranks)


class Topology:
    """Cluster > racks > hosts > workers, with the rates and latencies of NICs and uplinks. Immutable.

    Compares equal, hashes, pickles and prints. Rates are bits a second; what is not known is infinite and never a bottleneck.

    A file is TOML, or JSON of the same shape:

        nic = "500 Mbit/s"           # of every host that does not say otherwise; also nic_latency, uplink, uplink_latency, workers
        world_size = 14              # optional: what the hosts must add up to
        memory = "40 Gbit/s"         # between workers of one host; memory_latency

        [[rack]]
        name = "left"                # optional, as all names
        uplink = "100 Mbit/s"        # of the rack, shared by its hosts
        uplink_latency = "200 us"

        [[rack.host]]
        name = "node[01-03]"         # three hosts, as Slurm writes them
        workers = 4                  # on each; 1 where nothing is said

        [[rack]]                     # nic, nic_latency and workers may stand here too, for the hosts of the rack
        uplink = 1e8                 # numbers are bit/s and seconds

        [[rack.host]]
        count = 2                    # so many equal hosts (in [[rack]]: racks)
        nic = "100 Mbit/s"

    Ranks count through the hosts in the order of the file, as torchrun assigns them, unless all hosts give theirs: ranks = [0, 4].
    """

    __slots__ = ("core", "host_of", "memory", "rack_of", "racks")

    racks: tuple[Rack, ...]
    memory: Link
    """Between workers of one host, shared by them."""
    host_of: tuple[int, ...]
    """The number of each rank's host, counted through all racks."""
    rack_of: tuple[int, ...]
    """The number of each rank's rack."""
    core: _C.Topology
    """The handle of the C core."""

    def __init__(self, racks: Iterable[Rack], memory: LinkLike = None) -> None:
        """Raises TopologyError where a rank is missing or in two places, a name occurs twice, or something is empty."""
        racks = tuple(racks)
        world_size = _check(racks)
        host_of, rack_of = [0] * world_size, [0] * world_size
        hosts = [(host, index) for index, rack in enumerate(racks) for host in rack.hosts]
        for number, (host, rack_index) in enumerate(hosts):
            for rank in host.ranks:
                host_of[rank], rack_of[rank] = number, rack_index
        memory = Link.of(memory)
        core = _make_core(
            host_of, [index for _, index in hosts], [host.nic for host, _ in hosts], [r.uplink for r in racks], memory
        )
        for name, value in zip(self.__slots__, (core, tuple(host_of), memory, tuple(rack_of), racks), strict=True):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Topology cannot be changed ({name!r})")

    # ---- makers ---------------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | os.PathLike[str], world_size: int | None = None) -> Topology:
        """What a file says; see above for its form. world_size: the job's, which the file's must be.

        Raises TopologyError with file, line and what was expected.
        """
        from ._topology_file import read

        return read(path, world_size)

    @classmethod
    def from_json(cls, text: str, world_size: int | None = None) -> Topology:
        """The inverse of `to_json`."""
        from ._topology_file import parse

        return parse(text, "<json>", world_size, is_json=True)

    @classmethod
    def from_toml(cls, text: str, world_size: int | None = None) -> Topology:
        """The inverse of `to_toml`."""
        from ._topology_file import parse

        return parse(text, "<toml>", world_size, is_json=False)

    @classmethod
    def flat(cls, world_size: int, workers_per_host: int = 1, nic: LinkLike = None, memory: LinkLike = None) -> Topology:
        """One rack; hosts hold workers_per_host ranks in a row, the last one what is left."""
        _check_counts(world_size=world_size, workers_per_host=workers_per_host)
        firsts = range(0, world_size, workers_per_host)
        link = Link.of(nic)
        hosts = (
            Host(f"host{index}", tuple(range(first, min(first + workers_per_host, world_size))), link)
            for index, first in enumerate(firsts)
        )
        return cls([Rack("rack0", tuple(hosts))], memory)

    @classmethod
    def uniform(
        cls,
        racks: int,
        hosts_per_rack: int,
        workers_per_host: int = 1,
        nic: LinkLike = None,
        uplink: LinkLike = None,
        memory: LinkLike = None,
    ) -> Topology:
        """Equal racks of equal hosts; ranks in a row."""
        _check_counts(racks=racks, hosts_per_rack=hosts_per_rack, workers_per_host=workers_per_host)
        if racks * hosts_per_rack * workers_per_host > MAX_WORLD_SIZE:
            raise TopologyError(f"a topology of more than {MAX_WORLD_SIZE} workers")
        host_numbers, ranks = itertools.count(), itertools.count()
        nic, uplink = Link.of(nic), Link.of(uplink)

        def host() -> Host:
            return Host(f"host{next(host_numbers)}", tuple(itertools.islice(ranks, workers_per_host)), nic)

        return cls([Rack(f"rack{i}", tuple(host() for _ in range(hosts_per_rack)), uplink) for i in range(racks)], memory)

    @classmethod
    def from_slurm(cls, environ: Mapping[str, str] | None = None, workers_per_host: int | None = None) -> Topology:
        """The hosts of a Slurm job, in one rack: which switch a node hangs on, Slurm tells only the node itself.

        workers_per_host: where torchrun starts them, so that Slurm's number of tasks is not that of the workers.
        Raises TopologyError outside of a job, and for values that are not understood.
        """
        try:
            job = SlurmJob.read(os.environ if environ is None else environ, workers_per_host)
        except ValueError as error:
            raise TopologyError(str(error)) from None
        return cls([Rack("rack0", tuple(Host(name, ranks) for name, ranks in job.ranks_of_hosts()))])

    @classmethod
    def from_slurm_addresses(cls, addresses: Sequence[tuple[str, str]]) -> Topology:
        """Of each rank the host and its SLURM_TOPOLOGY_ADDR, gathered from all: hosts of one leaf switch are a rack.

        See `slurm_address` for a rank's own.
        """
        racks: dict[str, dict[str, list[int]]] = {}
        for rank, (host, address) in enumerate(addresses):
            racks.setdefault(rack_of_address(host, address), {}).setdefault(host, []).append(rank)
        return cls(
            Rack(switches or "no switch", tuple(Host(name, tuple(ranks)) for name, ranks in hosts.items()))
            for switches, hosts in racks.items()
        )

    def with_links(
        self,
        nics: LinkLike | Sequence[LinkLike] = None,
        uplinks: LinkLike | Sequence[LinkLike] = None,
        memory: LinkLike = None,
    ) -> Topology:
        """The same places with other links: one for all hosts (racks), or a list with one for each. None keeps what is there."""
        nic_of = iter(_spread(nics, [host.nic for host in self.hosts], "NICs", "hosts"))
        uplink_of = _spread(uplinks, [rack.uplink for rack in self.racks], "uplinks", "racks")
        racks = (
            Rack(rack.name, tuple(dataclasses.replace(host, nic=next(nic_of)) for host in rack.hosts), uplink)
            for rack, uplink in zip(self.racks, uplink_of, strict=True)
        )
        return Topology(racks, self.memory if memory is None else memory)

    # ---- what is in it --------------------------------------------------------------------------------------------------

    @property
    def world_size(self) -> int:
        """The number of workers, N."""
        return len(self.host_of)

    @property
    def hosts(self) -> list[Host]:
        """All hosts, rack after rack."""
        return [host for rack in self.racks for host in rack.hosts]

    # ---- texts ----------------------------------------------------------------------------------------------------------

    def to_json(self, indent: int | None = None) -> str:
        """As a file that `load` takes; equal topologies give equal text."""
        return json.dumps(self._tables(), indent=indent)

    def to_toml(self) -> str:
        """As a file that `load` takes, a line a host."""
        tables = self._tables()
        lines = [f"{key} = {_quoted(tables[key])}" for key in tables if key != "rack"]
        for rack in self._rack_tables():
            hosts = rack.pop("host")
            lines += ["", "[[rack]]", *(f"{key} = {_quoted(value)}" for key, value in rack.items())]
            assert isinstance(hosts, list)
            rows = (", ".join(f"{key} = {_quoted(value)}" for key, value in host.items()) for host in hosts)
            lines += ["host = [", *(f"    {{ {row} }}," for row in rows), "]"]
        return "\n".join(lines) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a file for `load`: JSON where its name ends in .json, else TOML."""
        text = self.to_json(indent=1) + "\n" if Path(path).suffix == ".json" else self.to_toml()
        Path(path).write_text(text, encoding="utf-8")

    def _tables(self) -> dict[str, object]:
        return {"world_size": self.world_size, **_link_keys("memory", self.memory), "rack": list(self._rack_tables())}

    def _rack_tables(self) -> Iterator[dict[str, object]]:
        for rack in self.racks:
            hosts = [{"name": host.name, "ranks": list(host.ranks), **_link_keys("nic", host.nic)} for host in rack.hosts]
            yield {"name": rack.name, **_link_keys("uplink", rack.uplink), "host": hosts}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Topology) and self.racks == other.racks and self.memory == other.memory

    def __hash__(self) -> int:
        return hash((self.racks, self.memory))

    def __reduce__(self) -> tuple[object, tuple[tuple[Rack, ...], Link]]:
        return (Topology, (self.racks, self.memory))

    def summary(self) -> str:
        """One line: how many workers, hosts, racks."""
        return f"{_plural(self.world_size, 'worker')} on {_plural(len(self.hosts), 'host')} in {_plural(len(self.racks), 'rack')}"

    def __repr__(self) -> str:
        return f"<Topology of {self.summary()}>"

    def __str__(self) -> str:
        memory = "" if self.memory == Link() else f"; memory {self.memory}"
        lines = [self.summary() + memory]
        runs = [list(run) for _, run in itertools.groupby(self.racks, _rack_shape)]
        for run in runs[:_SHOWN_RACKS]:
            lines += _rack_lines(run)
        if len(runs) > _SHOWN_RACKS:
            lines.append(f"  and {_plural(sum(map(len, runs[_SHOWN_RACKS:])), 'more rack')}")
        return "\n".join(lines)


def slurm_address(environ: Mapping[str, str] | None = None) -> tuple[str, str] | None:
    """This process's own entry for `Topology.from_slurm_addresses`; None where Slurm tells no switch."""
    environ = os.environ if environ is None else environ
    address = environ.get("SLURM_TOPOLOGY_ADDR", "")
    # Without a topology plugin the address is the node alone.
    levels = environ.get("SLURM_TOPOLOGY_ADDR_PATTERN", "").count(".")
    host = environ.get("SLURMD_NODENAME") or address.split(".", levels)[-1]
    return (host, address) if host and rack_of_address(host, address) else None


def _check(racks: Sequence[Rack]) -> int:
    """How many workers there are. Raises Contradiction."""
    rack_names: set[str] = set()
    rack_of: dict[str, str] = {}
    host_of: dict[int, str] = {}
    for index, rack in enumerate(racks):
        if rack.name in rack_names:
            raise Contradiction(f"the rack name {rack.name!r} occurs twice", index)
        rack_names.add(rack.name)
        if not rack.hosts:
            raise Contradiction(f"rack {rack.name!r} has no host, expected at least one", index)
        for number, host in enumerate(rack.hosts):
            if host.name in rack_of:
                where = f"in rack {rack_of[host.name]!r} and in rack {rack.name!r}"
                raise Contradiction(f"the host name {host.name!r} occurs twice, {where}", index, number)
            if "[" in host.name or "]" in host.name:
                raise Contradiction(f"the host name {host.name!r} is a list of names in a file, expected one", index, number)
            rack_of[host.name] = rack.name
            if not host.ranks:
                raise Contradiction(f"host {host.name!r} has no worker, expected at least one", index, number, "ranks")
            for rank in host.ranks:
                if rank in host_of:
                    where = f"on host {host_of[rank]!r} and on host {host.name!r}"
                    raise Contradiction(f"rank {rank} occurs twice, {where}", index, number, "ranks")
                host_of[rank] = host.name
    if not host_of:
        raise TopologyError("there is no rack, expected at least one with a host")
    _check_no_gap(racks, host_of)
    return len(host_of)


def _check_no_gap(racks: Sequence[Rack], host_of: Mapping[int, str]) -> None:
    world_size = len(host_of)
    missing = next((rank for rank in range(world_size) if rank not in host_of), None)
    if missing is None:
        return
    beyond = next(rank for rank in host_of if not 0 <= rank < world_size)  # as many as are missing
    rack, host = next(
        (index, number) for index, rack in enumerate(racks) for number, host in enumerate(rack.hosts) if beyond in host.ranks
    )
    text = f"host {host_of[beyond]!r} has rank {beyond} and no host has rank {missing}"
    raise Contradiction(f"{text}, expected ranks 0 to {world_size - 1} of {_plural(world_size, 'worker')}", rack, host, "ranks")


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_WORLD_SIZE:
            raise TopologyError(f"{name} is {count!r}, expected an integer from 1 to {MAX_WORLD_SIZE}")


def _make_core(host_of: list[int], rack_of: list[int], nics: list[Link], uplinks: list[Link], memory: Link) -> _C.Topology:
    def pair(link: Link) -> tuple[float, float]:
        return (link.rate / 8, link.latency)

    try:
        return _C.Topology(host_of, rack_of, [pair(nic) for nic in nics], [pair(uplink) for uplink in uplinks], pair(memory))
    except ValueError as error:
        raise TopologyError(str(error)) from None


def _spread(links: LinkLike | Sequence[LinkLike], kept: list[Link], what: str, of: str) -> list[Link]:
    each: Sequence[Any] = links if isinstance(links, list) else [links] * len(kept)
    if len(each) != len(kept):
        raise TopologyError(f"{len(each)} {what} for {len(kept)} {of}")
    return [old if new is None else Link.of(new) for old, new in zip(kept, each, strict=True)]


def _link_keys(name: str, link: Link) -> dict[str, object]:
    """What is not known is left out."""
    keys: dict[str, object] = {}
    if not math.isinf(link.rate):
        keys[name] = shortest_rate(link.rate)
    if link.latency:
        keys[f"{name}_latency"] = shortest_latency(link.latency)
    return keys


def _quoted(value: object) -> str:
    """JSON is TOML too, but for the surrogates that it would escape to."""
    return json.dumps(value, ensure_ascii=False)


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _host_shape(host: Host) -> tuple[object, ...]:
    return (len(host.ranks), host.nic)


def _rack_shape(rack: Rack) -> tuple[object, ...]:
    return (rack.uplink, *map(_host_shape, rack.hosts))


def _rack_lines(run: Sequence[Rack]) -> Iterator[str]:
    """Of racks in a row that differ in nothing but names and ranks."""
    names = run[0].name if len(run) == 1 else f"{run[0].name} to {run[-1].name}, {len(run):,} alike"
    ranks = _ranges(sorted(rank for rack in run for rank in rack.ranks))
    yield f"  {names}: {ranks}, uplink {run[0].uplink}"
    for _, group in itertools.groupby(run[0].hosts, _host_shape):
        hosts = list(group)
        several = f"{hosts[0].name} to {hosts[-1].name}, {_plural(len(hosts), 'host')}"
        where = f"{_plural(len(hosts), 'host')}" if len(run) > 1 else several if len(hosts) > 1 else hosts[0].name
        here = "" if len(run) > 1 else ": " + _ranges(sorted(rank for host in hosts for rank in host.ranks))
        each = " each" if len(hosts) > 1 else ""
        yield f"    {where}{here}, {_plural(len(hosts[0].ranks), 'worker')}{each}, NIC {hosts[0].nic}"


def _ranges(ranks: Sequence[int]) -> str:
    """ "ranks 0-3 8" """
    runs = [list(run) for _, run in itertools.groupby(enumerate(ranks), lambda pair: pair[1] - pair[0])]
    texts = [f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs]
    if len(texts) > _SHOWN_RANGES:
        texts[_SHOWN_RANGES:] = ["..."]
    return f"rank{'' if len(ranks) == 1 else 's'} {' '.join(texts)}"
