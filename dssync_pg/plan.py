"""Who averages with whom, as a plain object over the C core (csrc/core/plan.c)."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from . import _C, _explain

if TYPE_CHECKING:
    from .topology import Topology

_SHOWN_ROUNDS = 16
_SHOWN_WIDTH = 100


_MODEL_BYTES = 32 << 20
_MOST_WORKERS = 1 << 24  # as csrc/include/dssync.h has them
_MOST_ROUNDS = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """What a step costs under a plan, by the model of csrc/core/cost.c (bytes on each link over its rate, and latencies).

    Times are seconds; bytes on links count headers.
    """

    sync_s: float
    """By which averaging lengthens a step, when all workers run alike."""
    bound_s: float
    """Bytes on the busiest link over its rate: without compute no schedule of the plan is faster."""
    foreground_s: float
    """Of a step, what it waits for at once."""
    background_s: float
    """Of a delayed crossing, from its launch until its correction is there."""
    busiest: str
    """The link that bound_s is about: "memory", "nic" or "uplink"."""
    busiest_index: int
    """Its host or rack."""
    busiest_bytes: float
    """On it, a step, the busier direction."""
    sent_bytes: float
    """By a worker a step, the mean; without headers."""
    contraction: float
    """Of the plan; NaN above 4096 workers."""
    longest_wait_steps: int
    """Of the plan."""


class Plan:
    """A periodic list of rounds; each round divides all ranks into groups that average together. Immutable.

    Striped parameter vectors take the rounds in turn: stripe s of step t takes round (t + s) mod period. Compares equal, hashes,
    pickles and prints.
    """

    __slots__ = ("core",)

    core: _C.Plan
    """The handle of the C core."""

    def __init__(self, core: _C.Plan) -> None:
        object.__setattr__(self, "core", core)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Plan cannot be changed ({name!r})")

    @classmethod
    def create(
        cls,
        world_size: int | None = None,
        plan: str = "auto",
        group_size: int | str = "auto",
        max_period: int = 8,
        seed: int = 0,
        *,
        topology: Topology | None = None,
        model_bytes: int = _MODEL_BYTES,
        compute_s: float = 0.0,
        delay: int | str = "auto",
    ) -> Plan:
        """A plan by its kind.

        plan:
          "grid"     mixed radix: with N = f1 * f2 * ... * fk, all ranks agree exactly after k rounds
          "random"   seeded shuffles cut into groups, unequal ones where the size does not divide N
          "exact"    all ranks in one group, each step
          "leaders"  one worker a rack averages with those of the other racks, the others in their rack; leaders rotate
          "striped"  rounds inside racks, and one in which whole racks average with each other, for a stripe at a time, in the
                     background
          "hybrid"   the crossing rounds of "striped" alone, for gradients that are averaged exactly inside racks
          "auto"     with a topology whose rates are known the kind with the shortest step (see `explain`), "exact" where that is
                     as fast; else grid where its groups stay small, else random
        world_size: may be left out where there is a topology.
        group_size: wanted workers a group; "auto": pairs while 3 rounds suffice, else the smallest size that needs at most 3.
        max_period: most rounds of a period. seed: of the shuffles.
        topology: needed for leaders, striped and hybrid. model_bytes: averaged each step. compute_s: of a step without averaging; 0
        is the worst case. delay: steps until the correction of a crossing is applied; "auto": the fewest that hide it.
        Raises ValueError when there is no such plan for this world size, or it would never mix all ranks.
        """
        if not 0 <= compute_s < math.inf:
            raise ValueError(f"compute_s is {compute_s!r}, expected seconds, 0 or more")
        if world_size is None:
            if topology is None:
                raise ValueError("a plan needs a world_size or a topology")
            world_size = topology.world_size
        return cls(
            _C.Plan.create(
                plan,
                _whole("world_size", world_size, 1, _MOST_WORKERS),
                0 if group_size == "auto" else _whole("group_size", group_size, 1, _MOST_WORKERS, '"auto" or '),
                _whole("max_period", max_period, 1, _MOST_ROUNDS),
                _whole("seed", seed, 0, (1 << 64) - 1),
                None if topology is None else topology.core,
                max(1, _whole("model_bytes", model_bytes, 0, (1 << 60) - 1)),  # 0 would be the core's default
                compute_s,
                None if delay == "auto" else _whole("delay", delay, 0, _MOST_ROUNDS, '"auto" or '),
            )
        )

    @classmethod
    def candidates(
        cls,
        topology: Topology,
        group_size: int | str = "auto",
        max_period: int = 8,
        seed: int = 0,
        *,
        model_bytes: int = _MODEL_BYTES,
        compute_s: float = 0.0,
        delay: int | str = "auto",
    ) -> dict[str, Plan]:
        """The plans that "auto" weighs, by kind, as far as they exist for this topology; parameters as of `create`."""
        parameters: dict[str, Any] = {"topology": topology, "model_bytes": model_bytes, "compute_s": compute_s, "delay": delay}
        wanted: list[tuple[str, dict[str, Any]]] = [("auto", {})]  # without a topology: grid or random
        if 1 < len(topology.racks) < topology.world_size:  # where every rack is one worker, they are exact or average nobody
            wanted += [("leaders", parameters), ("striped", parameters)]
        plans = {"exact": cls.create(topology.world_size, "exact")}
        for kind, more in wanted:
            try:
                plan = cls.create(topology.world_size, kind, group_size, max_period, seed, **more)
            except ValueError:  # none within max_period
                continue
            plans[plan.kind] = plan
        return plans

    @classmethod
    def from_rounds(cls, rounds: Iterable[Iterable[Iterable[int]]], seed: int = 0) -> Plan:
        """A plan by hand: `rounds[r]` lists the groups of round r, as in [[[0, 1], [2, 3]], [[0, 3], [1, 2]]].

        Raises ValueError when a rank stands in no group of a round or in two, or when the rounds together never mix all ranks.
        """
        checked = [
            [[_whole(f"a rank of round {index}", rank, 0, _MOST_WORKERS - 1) for rank in group] for group in groups]
            for index, groups in enumerate(rounds)
        ]
        if not checked or not checked[0]:
            raise ValueError("a plan needs at least one round with at least one group")
        world_size = max((rank for groups in checked for group in groups for rank in group), default=-1) + 1
        return cls(_C.Plan.explicit(world_size, checked, _whole("seed", seed, 0, (1 << 64) - 1)))

    @classmethod
    def from_bytes(cls, data: bytes) -> Plan:
        """The inverse of `to_bytes`. Raises ValueError on damaged bytes and on plans that are not valid."""
        return cls(_C.Plan.deserialize(data))

    def to_bytes(self) -> bytes:
        """A portable form with a hash at its end."""
        return self.core.serialize()

    @property
    def kind(self) -> str:
        """grid, random, exact, leaders, striped, hybrid, or explicit for rounds by hand."""
        return self.core.kind

    @property
    def world_size(self) -> int:
        """The number of ranks, N."""
        return self.core.world_size

    @property
    def period(self) -> int:
        """The number of rounds, P."""
        return self.core.period

    @property
    def max_group_size(self) -> int:
        """The size of the largest group of any round."""
        return self.core.max_group_size

    @property
    def stripe_count(self) -> int:
        """In how many stripes the plan is made for; of so many rounds in a row a striped plan crosses racks in one."""
        return self.core.stripe_count

    def is_crossing(self, round: int) -> bool:
        """Whether whole racks average with each other in this round, the part between racks in the background."""
        return self.core.is_crossing(round)

    def keeps_values(self, round: int) -> bool:
        """Whether workers keep their values in this crossing until its correction: their group's mean less their rack's.

        Both means are of the values at the crossing. So it is where the rounds between two crossings bring each rack to the same
        values; elsewhere the workers of a rack take its mean at once. False with delay 0.
        """
        return self.core.keeps_values(round)

    @property
    def delay(self) -> int:
        """tau: steps until the correction of a crossing is applied; 0: it is waited for."""
        return self.core.delay

    @property
    def rack_count(self) -> int:
        """1 for plans that know no racks."""
        return self.core.rack_count

    @property
    def rack_of(self) -> list[int]:
        """The rack of each rank; all 0 for plans that know no racks."""
        return [self.core.rack_of(rank) for rank in range(self.world_size)]

    @property
    def longest_wait(self) -> int:
        """Steps until every parameter was averaged over all ranks at the latest, delays included; 0: that never is exact."""
        return self.core.longest_wait()

    @property
    def seed(self) -> int:
        return self.core.seed

    @property
    def rounds(self) -> list[list[list[int]]]:
        """All groups of all rounds: rounds[r][g] are the members, ascending, of group g of round r."""
        return [self.core.groups(index) for index in range(self.period)]

    @property
    def contraction(self) -> float:
        """rho = ||W_P ... W_1 - J||_2: what one period leaves of the ranks' differences at worst. 0: nothing; 1: it never mixes."""
        return self.core.contraction()

    def group(self, round: int, rank: int) -> list[int]:
        """The ranks, ascending, that `rank` averages with in `round`, itself among them."""
        return self.core.group_of_rank(round, rank)

    def round_at(self, step: int, stripe: int = 0) -> int:
        """The round that `stripe` takes at `step`."""
        return self.core.round_at(step, stripe)

    def cost(self, topology: Topology, model_bytes: int = _MODEL_BYTES, compute_s: float = 0.0) -> Cost:
        """What a step costs on these links. Raises ValueError where the topology has other workers, or other racks."""
        return Cost(**self.core.cost(topology.core, model_bytes, compute_s))

    def link_bytes(
        self, topology: Topology, model_bytes: int = _MODEL_BYTES, round: int | None = None
    ) -> tuple[list[float], list[float]]:
        """Bytes on the NIC of each host and the uplink of each rack, the busier direction, headers included.

        Of a mean step, or of one round that all of the model takes.
        """
        return self.core.link_bytes(topology.core, model_bytes, round)

    def explain(
        self,
        topology: Topology | None = None,
        model_bytes: int = _MODEL_BYTES,
        compute_s: float = 0.0,
        *,
        group_size: int | str = "auto",
        max_period: int = 8,
        delay: int | str = "auto",
    ) -> str:
        """Several lines for people: what the plan does; with a topology also what a step costs and what "auto" weighs beside it.

        group_size, max_period, delay: as "auto" is given them, see `create`.
        """
        candidates = {}
        if topology is not None:
            candidates = self.candidates(
                topology, group_size, max_period, self.seed, model_bytes=model_bytes, compute_s=compute_s, delay=delay
            )
        return _explain.explain(self, topology, model_bytes, compute_s, candidates)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.core.hash == other.core.hash and self.to_bytes() == other.to_bytes()

    def __hash__(self) -> int:
        return hash(self.core.hash)

    def __reduce__(self) -> tuple[object, tuple[bytes]]:
        return (Plan.from_bytes, (self.to_bytes(),))

    def summary(self) -> str:
        """One line: kind, period, group size, delay of crossings, contraction."""
        delay = f", crossings {self.delay} late" if self.delay else ""
        return (
            f"{self.kind} plan, period {self.period}, groups of up to {self.max_group_size}{delay}, "
            f"contraction {self.contraction:.3g}"
        )

    def __repr__(self) -> str:
        return f"<Plan of {self.world_size} ranks: {self.summary()}>"

    def __str__(self) -> str:
        lines = [f"{self.world_size} ranks, {self.summary()}"]
        for index in range(min(self.period, _SHOWN_ROUNDS)):
            crossing = ", across racks" if self.is_crossing(index) else ""
            crossing += ", values kept" if self.keeps_values(index) else ""
            lines.append(f"  round {index}{crossing}: {_groups_line(self.core.groups(index))}")
        if self.period > _SHOWN_ROUNDS:
            lines.append(f"  and {self.period - _SHOWN_ROUNDS} more rounds")
        return "\n".join(lines)


def _groups_line(groups: list[list[int]]) -> str:
    """The groups of a round, as many as fit into a line."""
    line = ""
    for index, group in enumerate(groups):
        text = "{" + " ".join(map(str, group)) + "}"
        if line and len(line) + len(text) > _SHOWN_WIDTH:
            return f"{line} and {len(groups) - index} more groups"
        line += (" " if line else "") + text
    return line


def _whole(name: str, value: object, least: int, most: int, or_word: str = "") -> int:
    """Raises ValueError for what is no integer from `least` to `most`; the extension's own error would show a signature."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = least - 1
    if not least <= number <= most:
        raise ValueError(f"{name} is {value!r}, expected {or_word}an integer from {least} to {most}")
    return number
