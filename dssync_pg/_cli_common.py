"""What the subcommands share: values as people write them, the cluster that is meant, texts. Imports neither torch nor rich."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ._units import parse_latency, parse_rate

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from .plan import Plan
    from .topology import Topology

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([kKMGT]?)(i?)[bB]?\s*")
_MOST_WORKERS = 1 << 24  # of a plan
_SIZE_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


# ---- values of options ------------------------------------------------------------------------------------------------------


def whole(text: str, least: int, most: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(f"{text!r}, expected an integer from {least} to {most}")
    return number


def positive(text: str) -> int:
    """Of workers, hosts, racks."""
    return whole(text, 1, 1 << 24)


def period(text: str) -> int:
    return whole(text, 1, 1024)


def steps(text: str) -> int:
    return whole(text, 1, 10_000_000)


def seed(text: str) -> int:
    return whole(text, 0, (1 << 64) - 1)


def size(text: str) -> int:
    """Bytes: "32 MiB", "1.5GB", 1000000."""
    found = _SIZE.fullmatch(text)
    count = int(float(found[1]) * (1024 if found[3] else 1000) ** _SIZE_POWERS[found[2].lower()]) if found else 0
    if not 1 <= count < 1 << 60:
        raise argparse.ArgumentTypeError(f'{text!r}, expected a size as "32 MiB", "1.5 GB" or in bytes')
    return count


def rate(text: str) -> float:
    """Bits a second: "500 Mbit/s", 1e8."""
    try:
        return parse_rate(_number_or_text(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def seconds(text: str) -> float:
    """ "200 ms", 0.2."""
    try:
        return parse_latency(_number_or_text(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def group_size(text: str) -> int | str:
    return text if text == "auto" else positive(text)


def delay(text: str) -> int | str:
    """Steps; a crossing may also be waited for."""
    return 0 if text == "0" else group_size(text)


def share(text: str) -> float:
    """0.01, "1%"."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f'{text!r}, expected a share from 0 to 1, or as "1%"')
    return value


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


# ---- the cluster ------------------------------------------------------------------------------------------------------------


def find_topology(args: argparse.Namespace) -> tuple[Topology, str]:
    """The cluster that the arguments mean, and in words where it is from. Raises ValueError."""
    from .topology import Topology

    shape = [f"--{name}" for name in ("racks", "hosts", "workers") if getattr(args, name) is not None]
    path = args.topology or ("" if shape else topology_variable())
    if path and shape:
        raise ValueError(f"{shape[0]} and the file {path}: the racks are those of the file; give one or the other")
    if path:
        topology, source = Topology.load(path), f"file {path}"
    elif shape:
        topology, source = _by_shape(args), "command line"
    elif "SLURM_JOB_ID" in os.environ:
        topology, source = Topology.from_slurm(), "the Slurm job"
    else:
        raise ValueError("no cluster is given: name a topology file, or say --racks, --hosts and --workers")
    return _with_links(topology, args), source


def topology_variable() -> str:
    """The file that DSSYNC_TOPOLOGY names, "" for none."""
    name = os.environ.get("DSSYNC_TOPOLOGY", "")
    return "" if name in ("auto", "flat") else name


def _by_shape(args: argparse.Namespace) -> Topology:
    from .topology import Host, Rack, Topology

    hosts = _hosts_of_racks(args)
    workers = args.workers or 1
    racks = []
    number = 0
    for index, count in enumerate(hosts):
        numbers = range(number, number + count)
        racks.append(Rack(f"rack{index}", tuple(Host(f"host{i}", tuple(range(i * workers, (i + 1) * workers))) for i in numbers)))
        number += count
    return Topology(racks)


def _hosts_of_racks(args: argparse.Namespace) -> list[int]:
    try:
        counts = [positive(part) for part in (args.hosts or "1").split(",")]
    except argparse.ArgumentTypeError:
        raise ValueError(f"--hosts {args.hosts!r}, expected a number of hosts, or one for each rack as 4,4,2") from None
    if len(counts) > 1 and args.racks not in (None, len(counts)):
        raise ValueError(f"--racks {args.racks} and --hosts {args.hosts}: hosts of {len(counts)} racks")
    repeated = (args.racks or 1) if len(counts) == 1 else 1
    workers = sum(counts) * repeated * (args.workers or 1)
    if workers > _MOST_WORKERS:
        raise ValueError(f"a cluster of {workers:,} workers, expected at most {_MOST_WORKERS:,}")
    return counts * repeated


def _with_links(topology: Topology, args: argparse.Namespace) -> Topology:
    from .topology import Link

    nics = [
        Link(host.nic.rate if args.nic is None else args.nic, host.nic.latency if args.latency is None else args.latency)
        for host in topology.hosts
    ]
    uplinks = [Link(rack.uplink.rate if args.uplink is None else args.uplink, rack.uplink.latency) for rack in topology.racks]
    return topology.with_links(nics=list(nics), uplinks=list(uplinks))


def make_plan(kind: str, topology: Topology, args: argparse.Namespace) -> Plan:
    """As the options say. Raises ValueError."""
    from .plan import Plan

    return Plan.create(
        None,
        kind,
        args.group_size,
        args.max_period,
        args.seed,
        topology=topology,
        model_bytes=args.model_size,
        compute_s=args.compute,
        delay=args.delay,
    )


def explain(plan: Plan, topology: Topology, args: argparse.Namespace) -> str:
    """Beside what "auto" weighs with these options."""
    return plan.explain(
        topology, args.model_size, args.compute, group_size=args.group_size, max_period=args.max_period, delay=args.delay
    )


def link_name(topology: Topology, kind: str, index: int, idle: bool) -> str:
    """ "uplink of rack1"; "" where nothing takes time."""
    if idle:
        return ""
    if kind == "uplink":
        return f"uplink of {topology.racks[index].name}"
    return f"{'NIC' if kind == 'nic' else 'memory'} of {topology.hosts[index].name}"


# ---- texts ------------------------------------------------------------------------------------------------------------------


def console() -> Console:
    from rich.console import Console

    out = Console(highlight=False)
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = 132  # a file or a pipe, which has none
    return out


def new_table(names: Sequence[str], left: Sequence[str]) -> Table:
    """Without lines; numbers to the right."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(name, justify="left" if name in left else "right")
    return table


def print_cluster(out: Console, topology: Topology, source: str) -> None:
    from rich.markup import escape

    out.print(f"[bold]cluster[/], from {escape(source)}")
    out.print(str(topology), markup=False)
    links = [topology.memory, *(host.nic for host in topology.hosts), *(rack.uplink for rack in topology.racks)]
    if all(math.isinf(link.rate) for link in links):
        out.print("[yellow]no rate of any link is known, so that bytes take no time: --nic and --uplink give them, or a file[/]")


def add_plot_note(out: Console, args: argparse.Namespace) -> None:
    if args.plot:
        out.print(f"\npicture: {args.plot}", markup=False)


def print_json(value: Any) -> None:
    """NaN and infinity, which JSON does not know, become null."""
    json.dump(_finite(value), sys.stdout, indent=1)
    print()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
