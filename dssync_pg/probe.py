"""Measures where the workers are: hosts, racks, and the rates and latencies of links, with short exchanges on the native engine.

Hosts exchange in pairs, many pairs at once (_probe_flows.py); which rates fall beside which others tells what they share
(_probe_racks.py). Rank 0 alone decides which pairs are next and what was found, and publishes it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from . import _C
from ._probe_flows import Exchange, Flows
from ._probe_racks import Fit, Search
from ._units import format_rate
from .topology import Host, Link, Rack, Topology

logger = logging.getLogger("dssync_pg")

MAX_SECONDS = 10.0
MAX_BYTES = 256 << 20

_FLOW_S = 0.4
"""Longer than the 0.2 s that TCP waits after it has lost the last of its packets."""
_BATCH = 4
"""Rounds between two meetings of all ranks."""
_USUAL_ROUNDS = 24


@dataclasses.dataclass(frozen=True)
class ProbeReport:
    """What a probe took, and how sure it is."""

    seconds: float
    sent_bytes: int
    """By the host that sent most, headers counted."""
    rounds: int
    """In each of which all pairs exchanged at once."""
    certain: bool
    """False: a bound on time or bytes ended it before the racks had stood a test."""
    unexplained: float
    """The share of what flows lose beside others that the racks do not explain."""
    text: str
    """One line for people."""

    def __str__(self) -> str:
        return self.text


def probe(
    engine: _C.Engine,
    rank: int,
    world_size: int,
    timeout: timedelta,
    exchange: Exchange,
    *,
    max_seconds: float = MAX_SECONDS,
    max_bytes: int = MAX_BYTES,
) -> tuple[Topology, ProbeReport]:
    """The topology, the same on every rank, and what finding it took. Collective; nothing else should use the network meanwhile.

    exchange: gives every rank's value (what JSON knows), by rank, to every rank.
    max_seconds, max_bytes: about the most that it takes, and that a host sends. Fast links reach the one, slow ones the other.
    A flat network is one rack, and so are fewer than four hosts, since no two pairs of them can exchange at once.
    """
    assert world_size == len(engine.hosts)
    start = time.monotonic()
    flows = Flows(engine, rank, timeout, exchange)
    search = Search(len(flows.hosts)) if rank == 0 else None
    while True:
        orders = exchange(search and _orders(search, flows, time.monotonic() - start, max_seconds, max_bytes))[0]
        if not orders["rounds"]:
            break
        flows.run(orders["rounds"], orders["seconds"], orders["bytes"])
        if search is not None:
            search.add(flows.measured)
    memory = flows.memory()
    near, far = flows.latencies(exchange(search and search.fit.labels)[0])
    verdict = None
    if search is not None:
        topology = _topology(flows, search.fit, memory, near, far)
        report = _report(topology, search, flows, time.monotonic() - start)
        logger.info("dssync: %s.", report)
        verdict = {"topology": topology.to_json(), "report": dataclasses.asdict(report)}
    verdict = exchange(verdict)[0]
    return Topology.from_json(verdict["topology"]), ProbeReport(**verdict["report"])


def _orders(search: Search, flows: Flows, taken: float, max_seconds: float, max_bytes: int) -> dict[str, Any]:
    """What all do next: rank 0's choice. No rounds: it is over."""
    done, spent = len(search.rounds), max(flows.sent_of)
    late = done > 0 and (taken * (1 + _BATCH / done) > max_seconds or spent * (1 + 1 / done) > max_bytes)
    return {
        "rounds": [] if search.settled or late else search.next_rounds(_BATCH),
        "seconds": min(_FLOW_S, 0.8 * max_seconds / _USUAL_ROUNDS),
        "bytes": (max_bytes - spent) / max(8, _USUAL_ROUNDS - done),
    }


def _topology(flows: Flows, fit: Fit, memory: tuple[float, float], near: float, far: float) -> Topology:
    """near, far: seconds of a pair's smallest exchange, inside a rack and between two.

    The cost model counts it as two messages, each through two NICs (and two uplinks).
    """
    nic_latency = (near or far) / 4
    uplink_latency = max(0.0, far / 4 - nic_latency)
    racks = []
    for number, uplink in enumerate(fit.uplinks):
        here = [host for host, label in enumerate(fit.labels) if label == number]
        hosts = tuple(Host(flows.names[at], tuple(flows.hosts[at]), Link(fit.nics[at], nic_latency)) for at in here)
        racks.append(Rack(f"rack{number}", hosts, Link(uplink, uplink_latency if fit.rack_count > 1 else 0.0)))
    return Topology(racks, Link(*memory) if memory[0] else None)


def _report(topology: Topology, search: Search, flows: Flows, seconds: float) -> ProbeReport:
    sent = max(flows.sent_of)
    text = f"probed {_plural(len(flows.hosts), 'host')} in {seconds:.1f} s, {sent / 1e6:.0f} MB sent by the busiest: "
    text += describe(topology)
    if not search.settled:
        text += " (not certain: the probe has reached its bounds)"
    return ProbeReport(seconds, round(sent), len(search.rounds), search.settled, search.fit.unexplained, text)


def describe(topology: Topology) -> str:
    """As "2 racks of 4, NIC 500 Mbit/s, uplink 100 Mbit/s"."""
    racks = topology.racks
    parts = [f"{_plural(len(racks), 'rack')} of {_span([len(rack.hosts) for rack in racks], str)}"]
    parts.append("NIC " + _span([host.nic.rate for host in topology.hosts], format_rate))
    if len(racks) > 1:
        parts.append("uplink " + _span([rack.uplink.rate for rack in racks], format_rate))
    if not math.isinf(topology.memory.rate):
        parts.append("memory " + format_rate(topology.memory.rate))
    return ", ".join(parts)


def _span(values: Sequence[Any], text: Callable[[Any], str]) -> str:
    """One for all that are about equal."""
    low, high = min(values), max(values)
    return text(statistics.median_low(values)) if high < 1.1 * low or low == high else f"{text(low)} to {text(high)}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


# ---- `dssync probe` ------------------------------------------------------------------------------------------------------------


def run_from_command_line(args: argparse.Namespace) -> int:
    """Started on every rank; rank 0 prints, and writes the file. Raises ValueError where there is nothing to measure."""
    import torch
    import torch.distributed as dist

    from ._backend import group_of
    from .options import Options

    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        raise ValueError("start it on every host with torchrun: torchrun ... -m dssync_pg probe")
    if args.save and os.environ["RANK"] == "0":
        _refuse_unwritable(args.save)
    # What a job's own variables choose is for its training: no plan is needed here, but the engine is.
    options = Options(topology="flat", plan="auto", group_size="auto", max_period=8, all_reduce="avg", engine="auto")
    dist.init_process_group("dssync", pg_options=options)
    try:
        group = group_of(dist.distributed_c10d._get_default_group(), torch.device("cpu"))
        if group is None or group.engine is None:
            raise ValueError("the native engine measures, and these ranks have none: `dssync doctor` says why")
        topology, report = probe(group.engine, group.rank, group.world_size, group.timeout, group.exchange)
        if group.rank == 0:
            _show(topology, report, args)
    finally:
        dist.destroy_process_group()
    return 0


def _refuse_unwritable(path: str) -> None:
    """Raises OSError: before the network is measured for nothing."""
    is_new = not os.path.exists(path)
    with open(path, "ab"):
        pass
    if is_new:
        os.unlink(path)


def _show(topology: Topology, report: ProbeReport, args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps({"topology": json.loads(topology.to_json()), "report": dataclasses.asdict(report)}), flush=True)
    else:
        print(topology, flush=True)
    if args.save:
        topology.save(args.save)
    if args.save and not args.json:
        print(f"saved as {args.save}; DSSYNC_TOPOLOGY={args.save} makes training use it")
