"""The exchanges of a probe: timed flows between hosts, many at once, and pings.

Only the two ends of a flow talk while it runs, and neither knows the rate beforehand. So each piece that they average begins with
their wishes: to stop, and to grow. Both see the same averages, hence do the same.
"""

from __future__ import annotations

import math
import secrets
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeAlias

import torch

from . import _C
from ._probe_racks import Pair, Round

Exchange: TypeAlias = Callable[[Any], list[Any]]
"""Gives every rank's value (what JSON knows), by rank, to every rank."""

Profile: TypeAlias = list[float]
"""Of a flow: how long it lasted, and the bytes sent until each sixteenth of that."""

WIRE_OVERHEAD = 1514 / 1448
"""DSS_WIRE_OVERHEAD of csrc/include/dssync.h."""
_WARM_UP = 0.3
"""The share of a flow that does not count: TCP finds its rate, pieces grow."""
_PIECE_S = 0.010
"""Pieces grow until one takes so long: then the time between two is nothing beside it."""
_FIRST_BYTES, _MEMORY_FIRST_BYTES = 64 << 10, 4 << 20
_MEMORY_S, _MEMORY_BYTES = 0.1, 1 << 30
_LEAST_PIECES = 4
_PROFILE = 16
_ALIKE = 0.5
_MOST_LANES = 4
_PINGS = 30
_STOP, _GROW = 0, 1  # where in a piece the wishes are
_SEQUENCES = 1 << 16  # of a flow


def timed_flow(average: Callable[[torch.Tensor], None], seconds: float, most_bytes: float, first_bytes: int) -> Profile:
    """One end of a flow.

    average: of a piece with the other end's.
    """
    elements, took = first_bytes // 4, math.inf
    piece = torch.empty(elements).fill_(0)  # pages and all: zeros() would leave them to the first exchange
    marks = [(time.monotonic(), 0)]
    while True:
        elapsed, sent = marks[-1][0] - marks[0][0], marks[-1][1]
        piece[_STOP] = (elapsed > seconds and len(marks) >= _LEAST_PIECES) or sent + 8 * elements > most_bytes
        piece[_GROW] = took < _PIECE_S and elapsed < _WARM_UP * seconds and 64 * elements < most_bytes
        average(piece)
        now = time.monotonic()
        took = now - marks[-1][0]
        marks.append((now, sent + 4 * elements))
        if piece[_STOP] > 0:  # either wants to
            break
        if piece[_GROW] == 1:  # both want to
            elements, took = 2 * elements, math.inf
            piece = torch.empty(elements).fill_(0)
    start, (end, sent) = marks[0][0], marks[-1]
    profile, at = [end - start], 0
    for number in range(_PROFILE + 1):  # evenly within a piece
        moment = start + (end - start) * number / _PROFILE
        while at < len(marks) - 2 and marks[at + 1][0] < moment:
            at += 1
        (since, before), (until, after) = marks[at], marks[at + 1]
        profile.append(before + (after - before) * (moment - since) / max(until - since, 1e-9))
    return profile


def rates_of(profiles: Sequence[Profile]) -> list[float]:
    """Bits a second, once warm, of flows that began at once.

    Flows that last about equally long count over the same time: what one of them misses then is what another got.
    """
    rates = []
    for own in profiles:
        end = min(other[0] for other in profiles if other[0] >= _ALIKE * own[0])
        begin = _WARM_UP * end
        rates.append(8 * (_bytes_at(own, end) - _bytes_at(own, begin)) / max(end - begin, 1e-9))
    return rates


def _bytes_at(profile: Profile, elapsed: float) -> float:
    place = min(_PROFILE * elapsed / max(profile[0], 1e-9), _PROFILE - 1e-9)
    before, after = profile[1 + int(place)], profile[2 + int(place)]
    return before + (after - before) * (place - int(place))


class Flows:
    """One rank's part in the exchanges of a probe; every method is collective.

    A host's lanes are its first ranks, as many on every host: lane k of one exchanges with lane k of another, since one connection
    may not fill a fast NIC.
    """

    def __init__(self, engine: _C.Engine, rank: int, timeout: timedelta, exchange: Exchange) -> None:
        self._engine, self._rank, self._timeout, self._exchange = engine, rank, timeout, exchange
        self.hosts = [[at for at, first in enumerate(engine.hosts) if first == host] for host in sorted(set(engine.hosts))]
        """The ranks of each host."""
        greetings = exchange([secrets.randbits(30), socket.gethostname()])
        self._sequence = int(greetings[0][0]) << 32  # no other probe on this engine has used it
        self.names = _names([greetings[host[0]][1] for host in self.hosts])
        self._lanes = [[host[lane] for host in self.hosts] for lane in range(min(_MOST_LANES, *map(len, self.hosts)))]
        self.sent_of = [0.0] * len(self.hosts)
        """Bytes on the wire, of each host."""
        self.measured: list[Round] = []
        """The rates, in bits a second on the wire, of each round of the last run()."""

    def run(self, rounds: Sequence[Sequence[Pair]], seconds: float, most_bytes: float) -> None:
        """Rounds one after the other, in each a flow between the hosts of each pair, so long or until a host has sent so much."""
        mine = [self._round(pairs, seconds, most_bytes) for pairs in rounds]
        of_rank: list[list[Profile]] = self._exchange(mine)
        self.measured = []
        for number, pairs in enumerate(rounds):
            ends = [[of_rank[lane[host]][number] for lane in self._lanes for host in pair] for pair in pairs]
            found = rates_of([end for flow in ends for end in flow])
            rates: Round = {}
            for index, pair in enumerate(pairs):
                width = len(ends[index])
                rates[pair[0], pair[1]] = WIRE_OVERHEAD * sum(found[index * width : (index + 1) * width]) / 2
                for host in pair:
                    self.sent_of[host] += WIRE_OVERHEAD * sum(end[-1] for end in ends[index]) / 2
            self.measured.append(rates)

    def latencies(self, labels: Sequence[int]) -> tuple[float, float]:
        """Seconds of the smallest exchange between hosts of one rack, and of two: medians; 0 where there are none.

        labels: the rack of each host.
        """
        order = sorted(range(len(labels)), key=lambda host: labels[host])
        near = [pair for pair in zip(order[::2], order[1::2], strict=False) if labels[pair[0]] == labels[pair[1]]]
        far = [pair for pair in zip(order, order[len(order) // 2 :], strict=False) if labels[pair[0]] != labels[pair[1]]]
        return self._latency(self._ranks(near, self._lanes[0])), self._latency(self._ranks(far, self._lanes[0]))

    def memory(self) -> tuple[float, float]:
        """Bits a second and seconds of latency between the workers of one host, all in pairs at once; (0, 0) where each is alone.

        What one worker writes counts once, so each pair counts twice.
        """
        of_host = [list(zip(host[::2], host[1::2], strict=False)) for host in self.hosts]
        pairs = [pair for pairs in of_host for pair in pairs]
        if not pairs:
            return 0.0, 0.0
        profiles = self._exchange(self._flow(pairs, _MEMORY_S, _MEMORY_BYTES, _MEMORY_FIRST_BYTES))
        rate = statistics.median(2 * sum(rates_of([profiles[a] for a, _ in pairs])) for pairs in of_host if pairs)
        return rate, self._latency(pairs) / 2

    # ---- inside

    def _ranks(self, pairs: Sequence[Pair], lane: Sequence[int]) -> list[Pair]:
        return [(min(lane[a], lane[b]), max(lane[a], lane[b])) for a, b in pairs]

    def _round(self, pairs: Sequence[Pair], seconds: float, most_bytes: float) -> Profile:
        ranks = [pair for lane in self._lanes for pair in self._ranks(pairs, lane)]
        return self._flow(ranks, seconds, most_bytes / len(self._lanes), _FIRST_BYTES)

    def _flow(self, pairs: Sequence[Pair], seconds: float, most_bytes: float, first_bytes: int) -> Profile:
        """Between ranks; empty where this one has no part."""
        pair, sequence = self._begin(pairs)
        if pair is None:
            return []

        def average(piece: torch.Tensor) -> None:
            nonlocal sequence
            sequence += 1
            self._engine.average(piece, pair, sequence, self._timeout)

        return timed_flow(average, seconds, most_bytes, first_bytes)

    def _latency(self, pairs: Sequence[Pair]) -> float:
        pair, sequence = self._begin(pairs)
        times = []
        value = torch.zeros(1)
        for ping in range(_PINGS if pair is not None else 0):
            start = time.monotonic()
            self._engine.average(value, pair or (), sequence + 1 + ping, self._timeout)
            times.append(time.monotonic() - start)
        found = [each for each in self._exchange(statistics.median(times) if times else None) if each is not None]
        return statistics.median(found) if found else 0.0

    def _begin(self, pairs: Sequence[Pair]) -> tuple[Pair | None, int]:
        """The pair that this rank is in. All pairs begin at once, or the first would run alone."""
        self._sequence += _SEQUENCES
        pair = next((pair for pair in pairs if self._rank in pair), None)
        if pair is not None and len(pairs) > 1:
            members = sorted(rank for pair in pairs for rank in pair)
            self._engine.average(torch.zeros(1), members, self._sequence, self._timeout)
        return pair, self._sequence


def _names(names: Sequence[str]) -> list[str]:
    """Hosts' own names, where they tell them apart."""
    usable = len(set(names)) == len(names) and not any(set("[]") & set(name) for name in names)
    return list(names) if usable else [f"host{number}" for number in range(len(names))]
