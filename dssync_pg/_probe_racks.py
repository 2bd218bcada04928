"""Which hosts share an uplink, and how fast links are, from the rates of flows that ran at the same time. Pure: no network here.

A round is a set of flows between disjoint pairs of hosts, all at once. A flow alone is as fast as the slower of its two NICs; what
it loses beside others, it loses on a link that it shares with them. So racks are a partition of the hosts under which every loss is
explained: the flow crosses, and one of the two uplinks that it takes has no more room for it, as far as was ever seen. The
partition with the fewest racks that explains the losses is searched by descent from several starts, all next steps at once.

What a search knows decides which pairs to try next: the hypothesis at hand is tested where it could fail, with every host crossing
(a host that is in truth at home gets too much then) and with every host at home (one that is in truth away loses).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Pair: TypeAlias = tuple[int, int]
Round: TypeAlias = dict[Pair, float]
"""Bits a second of flows between hosts that ran at the same time."""

LOST = 0.12
"""Of its rate a flow may miss so much by chance."""
_FULL = 0.85
"""A link that carries this share of the most it was ever seen to carry is full; a flow of this share of the best is as good."""
_RACK_COST = 1.0
_RACK_SHARE = 0.15
"""What another rack has to explain, in whole flows lost, and as a share of a host's losses: or chance would make racks."""
_GUESS_COST = 0.1
"""The same for racks that are only worth a test."""
_DOUBT = 0.03
_ENOUGH_ROUNDS = 28
"""So long racks are tested that leave this share of the losses unexplained."""
_EXPLAINED = 0.6
"""Of the losses racks have to explain, or they are none."""
_FEW = 24
_STARTS, _STARTS_OF_MANY = 4, 1


@dataclasses.dataclass(frozen=True)
class Fit:
    """What rounds tell."""

    labels: tuple[int, ...]
    """The rack of each host, numbered by first appearance."""
    nics: tuple[float, ...]
    """Bits a second, of each host."""
    uplinks: tuple[float, ...]
    """Bits a second, of each rack; infinite where never seen full."""
    lost: float
    """The share of all flows' rates that was lost beside others."""
    unexplained: float
    """The share of that which these racks do not explain."""

    @property
    def rack_count(self) -> int:
        return len(self.uplinks)


def fit(rounds: Sequence[Round], host_count: int, hint: Sequence[int] = (), guess: bool = False) -> Fit:
    """The racks and rates that explain the rounds.

    hint: labels that are likely. guess: racks that need not be there but are worth a test.
    """
    flat = (0,) * host_count
    if not any(rounds):
        return Fit(flat, (math.inf,) * host_count, (math.inf,), 0.0, 0.0)
    nics = nic_rates(rounds, host_count)
    flows = _Flows(rounds, nics)
    total = flows.total
    penalty = _GUESS_COST if guess else _RACK_COST + _RACK_SHARE * total / host_count
    labels = flat
    if total > penalty:
        labels = _search(flows, host_count, penalty, hint)
    left = flows.unexplained(torch.tensor([labels])).item()
    if left > (1 - _EXPLAINED) * total and not guess:
        labels, left = flat, total
    uplinks = tuple(flows.uplink(labels, rack) for rack in range(max(labels) + 1))
    return Fit(labels, tuple(nics), uplinks, flows.share, left / total if total else 0.0)


def nic_rates(rounds: Iterable[Round], host_count: int) -> list[float]:
    """Of each host the middle of its best flows; infinite for one without any."""
    seen: list[list[float]] = [[] for _ in range(host_count)]
    for (a, b), rate in itertools.chain.from_iterable(flows.items() for flows in rounds):
        seen[a].append(rate)
        seen[b].append(rate)
    return [statistics.median(r for r in rates if r >= _FULL * max(rates)) if rates else math.inf for rates in seen]


class _Flows:
    """Rounds as arrays [round, flow]; labels come as [candidate, host]."""

    def __init__(self, rounds: Sequence[Round], nics: Sequence[float]) -> None:
        width = max(map(len, rounds), default=0)
        rows = [[*flows.items(), *[((0, 0), 0.0)] * (width - len(flows))] for flows in rounds]
        self.a = torch.tensor([[pair[0] for pair, _ in row] for row in rows], dtype=torch.long).reshape(len(rows), width)
        self.b = torch.tensor([[pair[1] for pair, _ in row] for row in rows], dtype=torch.long).reshape(len(rows), width)
        self.rate = torch.tensor([[rate for _, rate in row] for row in rows], dtype=torch.float64).reshape(len(rows), width)
        alone = torch.tensor(nics, dtype=torch.float64)
        self.fair = torch.minimum(alone[self.a], alone[self.b])
        lost = torch.where(self.a != self.b, 1 - self.rate / self.fair, 0.0).clamp(min=0)
        self.loss = (lost - LOST).clamp(min=0)
        self.share = lost.mean().item() if lost.numel() else 0.0
        self.total = self.loss.sum().item()

    def crossing(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Racks of both ends and whether they differ, [candidate, round, flow]; the load of uplinks [candidate, round, rack]."""
        a, b = labels[:, self.a], labels[:, self.b]
        crosses = a != b
        rate = self.rate * crosses
        load = torch.zeros(*a.shape[:2], int(labels.max()) + 1, dtype=torch.float64)
        load.scatter_add_(2, a, rate).scatter_add_(2, b, rate)
        return a, b, crosses, load

    def unexplained(self, labels: Tensor) -> Tensor:
        """Losses that the racks of each candidate do not explain, in whole flows."""
        a, b, crosses, load = self.crossing(labels)
        room = load.amax(1, keepdim=True) - load
        room = torch.minimum(room.gather(2, a), room.gather(2, b)) / self.fair - LOST
        return torch.where(crosses, torch.minimum(self.loss, room.clamp(min=0)), self.loss).sum((1, 2))

    def uplink(self, labels: Sequence[int], rack: int) -> float:
        """The upper quartile of its loads where flows lost on it, or, at times, on their other uplink when it was nearly full."""
        a, b, crosses, load = (of[0] for of in self.crossing(torch.tensor([labels])))
        lossy = (((a == rack) | (b == rack)) & crosses & (self.loss > 0)).any(1)
        loads = load[:, rack][lossy].tolist()
        full = sorted(each for each in loads if each >= _FULL * max(loads))
        return full[(3 * len(full) - 3) // 4] if full else math.inf


def _search(flows: _Flows, host_count: int, penalty: float, hint: Sequence[int]) -> tuple[int, ...]:
    def costs(candidates: Sequence[tuple[int, ...]]) -> list[float]:
        racks = torch.tensor([max(labels) for labels in candidates])
        return (flows.unexplained(torch.tensor(candidates)) + penalty * racks).tolist()

    starts = list(dict.fromkeys(_numbered(start) for start in _starts(flows, host_count, hint)))
    best_first = sorted(zip(costs(starts), starts, strict=True))[: _STARTS if host_count <= _FEW else _STARTS_OF_MANY]
    found: list[tuple[float, tuple[int, ...]]] = []
    for cost, labels in best_first:
        while True:
            moves = list(dict.fromkeys(map(_numbered, _neighbours(labels))))
            best, following = min(zip(costs(moves), moves, strict=True), default=(cost, labels))
            if best >= cost - 1e-9:
                break
            cost, labels = best, following
        found.append((cost, labels))
    return min(found)[1]


def _starts(flows: _Flows, host_count: int, hint: Sequence[int]) -> Iterator[Sequence[int]]:
    yield [0] * host_count
    if hint:
        yield hint
    for racks in range(2, min(host_count // 2, 16) + 1):
        yield [host * racks // host_count for host in range(host_count)]
    yield from _dendrogram(flows, host_count)
    chance = random.Random(0)
    for racks in (2, 2, 2, 2, 3, 3, 4, 4):
        yield [chance.randrange(racks) for _ in range(host_count)]


def _dendrogram(flows: _Flows, host_count: int) -> Iterator[list[int]]:
    """Racks joined one by one, those first between which flows lost least; pairs never tried count as middling."""
    loss = torch.zeros(host_count, host_count, dtype=torch.float64)
    times = torch.zeros(host_count, host_count, dtype=torch.float64)
    for a, b in ((flows.a, flows.b), (flows.b, flows.a)):
        loss.index_put_((a, b), flows.loss, accumulate=True)
        times.index_put_((a, b), (flows.a != flows.b).double(), accumulate=True)
    middling = flows.total / max(1.0, times.sum().item() / 2)
    apart = torch.where(times > 0, loss / times.clamp(min=1), middling)
    member = torch.eye(host_count, dtype=torch.float64)
    for count in range(host_count, 2, -1):
        sizes = member.sum(1)
        mean = (member @ apart @ member.T) / (sizes[:, None] * sizes)
        mean += torch.tril(torch.full((count, count), math.inf, dtype=torch.float64))
        into, gone = divmod(int(mean.argmin()), count)
        member[into] += member[gone]
        member = torch.cat([member[:gone], member[gone + 1 :]])
        yield member.argmax(0).tolist()


def _neighbours(labels: tuple[int, ...]) -> Iterator[list[int]]:
    """One host elsewhere, or in a rack of its own; two racks joined; two hosts exchanged."""
    count = max(labels) + 1
    for host, rack in itertools.product(range(len(labels)), range(count + 1)):
        if labels[host] != rack:
            yield [*labels[:host], rack, *labels[host + 1 :]]
    for into, gone in itertools.combinations(range(count), 2):
        yield [into if rack == gone else rack for rack in labels]
    if len(labels) <= _FEW:
        for a, b in itertools.combinations(range(len(labels)), 2):
            if labels[a] != labels[b]:
                swapped = list(labels)
                swapped[a], swapped[b] = labels[b], labels[a]
                yield swapped


def _numbered(labels: Sequence[int]) -> tuple[int, ...]:
    """By first appearance, so that equal partitions are equal."""
    numbers: dict[int, int] = {}
    return tuple(numbers.setdefault(label, len(numbers)) for label in labels)


# ---- which pairs next --------------------------------------------------------------------------------------------------------


class Search:
    """Says which hosts exchange with which next, and when enough is known."""

    def __init__(self, host_count: int) -> None:
        self.host_count = host_count
        self.rounds: list[Round] = []
        self.fit = fit([], host_count)
        self.settled = host_count < 2
        self._chance = random.Random(host_count)
        self._opening = self._make_opening()
        self._tested = False
        self._guess = self.fit.labels

    def next_rounds(self, count: int) -> list[list[Pair]]:
        """Pairs of disjoint hosts for so many rounds, or a few less."""
        if self._opening:
            first, self._opening = self._opening[:count], self._opening[count:]
            return first
        self._tested = True
        designs = (self._across, self._at_home, self._across, self._by_chance)
        return [designs[index % len(designs)]() for index in range(count)]

    def add(self, rounds: Sequence[Round]) -> None:
        """What was measured. Settled are racks that stood a test made for them, and none where nothing was lost."""
        self.rounds += rounds
        if self._opening:
            return
        before, self.fit = self.fit.labels, fit(self.rounds, self.host_count, self._guess)
        self.settled = self._tested and before == self.fit.labels and (self.fit.unexplained < _DOUBT or self.fit.rack_count == 1)
        self.settled |= len(self.rounds) >= _ENOUGH_ROUNDS
        self._guess = self.fit.labels
        if self.fit.rack_count == 1:
            self._guess = fit(self.rounds, self.host_count, self._guess, guess=True).labels

    def _make_opening(self) -> list[list[Pair]]:
        count = self.host_count
        if count < 4:  # nothing can run beside anything
            return [[pair] for pair in itertools.combinations(range(count), 2)] * 2
        half = count // 2
        neighbours = [(host, host + 1) for host in range(0, count - 1, 2)]
        halves = [(host, host + half) for host in range(half)]
        order = [*range(count), *([-1] if count % 2 else [])]
        self._chance.shuffle(order)
        tournament = []
        for _ in range(min(len(order) - 1, 16)):
            pairs = [(order[i], order[-1 - i]) for i in range(len(order) // 2)]
            tournament.append([(min(pair), max(pair)) for pair in pairs if -1 not in pair])
            order[1:] = [order[-1], *order[1:-1]]
        return [neighbours, halves, *tournament]

    def _paired(self, order: Sequence[int], distance: int) -> list[Pair]:
        pairs = zip(order[:distance], order[distance : 2 * distance], strict=True)
        return [(min(pair), max(pair)) for pair in pairs]

    def _shuffled(self) -> list[int]:
        order = list(range(self.host_count))
        self._chance.shuffle(order)
        return order

    def _by_chance(self) -> list[Pair]:
        return self._paired(self._shuffled(), self.host_count // 2)

    def _across(self) -> list[Pair]:
        """As many as can be between racks."""
        if max(self._guess) == 0:
            return self._by_chance()
        order = sorted(self._shuffled(), key=lambda host: self._guess[host])  # sorted() keeps the chance within a rack
        if self.host_count % 2:  # one of the largest rack stays out
            largest = max(self._guess, key=self._guess.count)
            order.remove(next(host for host in order if self._guess[host] == largest))
        return self._paired(order, len(order) // 2)

    def _at_home(self) -> list[Pair]:
        """All inside racks, but for what is left over of odd ones, which stays out."""
        if max(self._guess) == 0:
            return self._by_chance()
        pairs = []
        for rack in range(max(self._guess) + 1):
            hosts = [host for host in self._shuffled() if self._guess[host] == rack]
            pairs += self._paired(hosts, len(hosts) // 2)
        return pairs or self._by_chance()
