"""Senses that links have become slower or faster, and plans anew while training runs.

The engine counts, for each peer, what came and in how much time, waiting for the peer not counted. Each rank takes the rate of
every step; every M steps it puts the medians of the latest ones into the store. A thread of rank 0 compares them with what the same
flows gave when the plan began: a host whose flows inside its rack are all slower has a slower NIC, a rack whose workers' flows to
other racks are slower has a slower uplink. Where that is clear, and the planner would plan differently, rank 0 publishes the new
plan, and every rank takes it at the same step. Nobody waits: a verdict that is not ready at the step at which it is published is
taken a window later.

Rates are compared with themselves and not with what was probed, so that neither protocol nor processor is mistaken for contention;
and only transfers count, so that a rank that computes longer is not taken for a slow link.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch._C._distributed_c10d import PrefixStore, Store

from . import _C
from ._units import format_rate
from .plan import Plan

if TYPE_CHECKING:
    from .topology import Topology

logger = logging.getLogger("dssync_pg")

LATEST_STEPS = 25
"""A report is about so many of the latest steps."""

FEWEST_STEPS = 12
"""Fewer say nothing."""

SMALLEST_BYTES = 1 << 16
"""From a peer in a step: the time of less is latency."""

CLEAR = 0.8
"""A rate that is below this part of what it was, or above its inverse, has changed; noise stays inside."""

STEADY = 0.25
"""The halves of a flow's window may differ by so much if it is to be what later ones are compared with."""

_NO_CHANGE = b"-"

Rates = dict[tuple[int, int], float]
"""(rank, peer) -> bytes a second that came from the peer."""


class Meter:
    """The rates of this rank's flows, step by step."""

    def __init__(self, engine: _C.Engine) -> None:
        self._engine = engine
        self._before = engine.transfers()
        self._rates: dict[int, deque[float]] = {}

    def take(self) -> None:
        """Once a step."""
        bytes_now, time_now = self._engine.transfers()
        bytes_before, time_before = self._before
        for peer, received in enumerate(bytes_now):
            nanoseconds = time_now[peer] - time_before[peer]
            if received - bytes_before[peer] >= SMALLEST_BYTES and nanoseconds > 0:
                rate = (received - bytes_before[peer]) / nanoseconds * 1e9
                self._rates.setdefault(peer, deque(maxlen=LATEST_STEPS)).append(rate)
        self._before = (bytes_now, time_now)

    def forget(self) -> None:
        """Another plan makes other flows."""
        self._rates.clear()

    def report(self) -> dict[str, list[float]]:
        """By peer: the median rate, and how far its halves are apart; what JSON knows."""
        found = {}
        for peer, rates in self._rates.items():
            if len(rates) >= FEWEST_STEPS:
                half = len(rates) // 2
                first, second = statistics.median(list(rates)[:half]), statistics.median(list(rates)[half:])
                found[str(peer)] = [statistics.median(rates), abs(first - second) / max(first, second)]
        return found


@dataclass
class Judge:
    """Rank 0's mind: what it believes of the links, and what that means for the plan. No threads, no store."""

    topology: Topology
    """As it was at the start: links are never thought to be faster."""
    plan: Plan
    make: Callable[[Topology], Plan]
    model_bytes: int
    believed: Topology = field(init=False)
    baseline: Rates = field(default_factory=dict)
    """What flows gave when this plan began, on the links that are believed in."""

    def __post_init__(self) -> None:
        self.believed = self.topology

    def judge(self, reports: Sequence[Mapping[str, Sequence[float]]]) -> tuple[Plan, str] | None:
        """The plan to change to and what to say of it; None: all stays. `reports`: of every rank, by rank."""
        rates: Rates = {}
        factors: Rates = {}
        for rank, report in enumerate(reports):
            for peer, (rate, spread) in report.items():
                flow = rank, int(peer)
                rates[flow] = rate
                if flow in self.baseline:
                    factors[flow] = rate / self.baseline[flow]
                elif spread <= STEADY:
                    self.baseline[flow] = rate
        now = self._links(factors)
        changes = list(_changes(self.believed, now))
        if not changes:
            return None
        plan = self.make(now)
        if plan == self.plan:
            return None
        seconds = plan.cost(now, self.model_bytes).sync_s
        text = f"{', '.join(changes)}: {_difference(self.plan, plan)}, predicted {seconds:.2f} s a step"
        # A plan of the same kind has about the same flows, and the link may recover before they have been seen to be steady.
        self.baseline = rates if plan.kind == self.plan.kind else {}
        self.believed, self.plan = now, plan
        return plan, text

    def _links(self, factors: Rates) -> Topology:
        """The topology under which every flow is so many times as fast as on the links believed in."""
        hosts, racks = self.topology.host_of, self.topology.rack_of
        inside: dict[int, list[float]] = {}
        crossing: dict[int, dict[int, float]] = {}
        for (rank, peer), factor in factors.items():
            if racks[rank] != racks[peer]:
                best = crossing.setdefault(racks[rank], {})
                best[rank] = max(best.get(rank, 0.0), factor)
            elif hosts[rank] != hosts[peer]:
                inside.setdefault(hosts[rank], []).append(factor)
                inside.setdefault(hosts[peer], []).append(factor)
        # One fast flow shows that the NIC is not what holds the others up; one slow worker, that the uplink is not.
        nic_factors = [max(inside.get(host, [1.0])) for host in range(len(self.topology.hosts))]
        uplink_factors = [statistics.median(crossing.get(rack, {0: 1.0}).values()) for rack in range(len(self.topology.racks))]
        return self.topology.with_links(
            list(map(_scaled, _nics(self.believed), _nics(self.topology), nic_factors)),
            list(map(_scaled, _uplinks(self.believed), _uplinks(self.topology), uplink_factors)),
        )


def _nics(topology: Topology) -> list[Any]:
    return [host.nic for host in topology.hosts]


def _uplinks(topology: Topology) -> list[Any]:
    return [rack.uplink for rack in topology.racks]


def _scaled(link: Any, nominal: Any, factor: float) -> Any:
    if CLEAR < factor < 1 / CLEAR:
        return link
    return type(link)(min(link.rate * factor, nominal.rate), link.latency)


def _changes(before: Topology, after: Topology) -> list[str]:
    found = []
    for rack, (old, new) in enumerate(zip(_uplinks(before), _uplinks(after), strict=True)):
        if old.rate != new.rate:
            found.append(f"rack {rack} uplink {format_rate(old.rate)} -> {format_rate(new.rate)}")
    for host, (old, new) in zip(before.hosts, zip(_nics(before), _nics(after), strict=True), strict=True):
        if old.rate != new.rate:
            found.append(f"host {host.name} NIC {format_rate(old.rate)} -> {format_rate(new.rate)}")
    return found


def _difference(before: Plan, after: Plan) -> str:
    if before.kind != after.kind:
        return f"plan {before.kind} -> {after.kind}, period {before.period} -> {after.period}"
    if before.period != after.period:
        return f"period {before.period} -> {after.period}"
    if before.delay != after.delay:
        return f"delay {before.delay} -> {after.delay}"
    return "other groups"


class Contention:
    """One sync's sensing, on every rank: step_done() once a step."""

    def __init__(self, rank: int, world_size: int, every: int, store: Store, thread_store: Store | None, engine: _C.Engine,
                 judge: Judge) -> None:  # fmt: skip
        """store, thread_store: connections of its own, to the same place, the second for rank 0 alone, as is `judge`."""
        self._rank, self._world_size, self._every = rank, world_size, every
        self._publish_at, self._switch_at = every * 2 // 5, every * 7 // 10
        self._store = store
        self._meter = Meter(engine)
        self._judge = judge
        self._closed = threading.Event()
        self._windows: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._verdicts: queue.SimpleQueue[tuple[Plan, str]] = queue.SimpleQueue()
        self._said = ""
        self._steps = 0  # of its own: those of the sync may jump, to the step of a checkpoint
        self.changes = 0
        """Plans that were taken so far."""
        self._thread: threading.Thread | None = None
        if thread_store is not None:
            self._thread = threading.Thread(target=self._decide, args=(thread_store,), name="dssync contention", daemon=True)
            self._thread.start()

    def step_done(self) -> Plan | None:
        """One more average has been done. The plan to use from the next one on, the same on every rank; None: as before."""
        self._meter.take()
        self._steps += 1
        window, phase = divmod(self._steps, self._every)
        if window == 0:
            return None
        if phase == 0:
            self._store.set(f"report/{window}/{self._rank}", json.dumps(self._meter.report()))
            if self._rank == 0:
                self._windows.put(window)
        elif phase == self._publish_at and self._rank == 0:
            self._publish(window)
        elif phase == self._switch_at:
            verdict = self._store.get(f"verdict/{window}")
            if verdict != _NO_CHANGE:
                self._meter.forget()
                self.changes += 1
                if self._rank == 0:
                    logger.info("dssync: %s", self._said)
                return Plan.from_bytes(bytes.fromhex(verdict.decode()))
        return None

    def _publish(self, window: int) -> None:
        verdict = _NO_CHANGE.decode()
        with contextlib.suppress(queue.Empty):
            plan, self._said = self._verdicts.get_nowait()
            verdict = plan.to_bytes().hex()
        self._store.set(f"verdict/{window}", verdict)
        if window > 2:
            self._store.delete_key(f"verdict/{window - 2}")  # nobody is so far behind: they average with those who are not

    def _decide(self, store: Store) -> None:
        while not self._closed.is_set():
            try:
                window = self._windows.get(timeout=0.2)
            except queue.Empty:
                continue
            try:
                reports = self._gather(store, window)
                verdict = self._judge.judge(reports) if reports is not None else None
            except Exception as error:  # the store has gone, or will be soon: training says so itself
                if not self._closed.is_set():
                    logger.warning("dssync: contention is not sensed any more: %s", error)
                return
            if verdict is not None:
                self._verdicts.put(verdict)

    def _gather(self, store: Store, window: int) -> list[Any] | None:
        keys = [f"report/{window}/{rank}" for rank in range(self._world_size)]
        while not store.check(keys):
            if self._closed.is_set():
                return None
            time.sleep(0.02)
        reports = [json.loads(value) for value in store.multi_get(keys)]
        for key in keys:
            store.delete_key(key)
        return reports

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(timeout=5)


def place(store: Store, name: str) -> Store:
    """The part of `store` that the sensing of the sync `name` has to itself."""
    return PrefixStore(f"dssync/contention/{name}", store)
