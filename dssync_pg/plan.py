"""Who averages with whom, as a plain object over the C core (csrc/core/plan.c)."""

from __future__ import annotations

from collections.abc import Sequence

from . import _C

_SHOWN_ROUNDS = 16
_SHOWN_WIDTH = 100


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
        world_size: int,
        plan: str = "auto",
        group_size: int | str = "auto",
        max_period: int = 8,
        seed: int = 0,
    ) -> Plan:
        """A plan by its kind.

        plan: "grid" (mixed radix: with N = f1 * f2 * ... * fk, all ranks agree exactly after k rounds), "random" (seeded shuffles
        cut into groups, unequal ones where the size does not divide N) or "auto" (grid where its groups stay small, else random).
        group_size: wanted workers a group; "auto": pairs while 3 rounds suffice, else the smallest size that needs at most 3.
        max_period: most rounds of a period. seed: of the shuffles.
        Raises ValueError when there is no such plan for this world size, or it would never mix all ranks.
        """
        return cls(_C.Plan.create(plan, world_size, 0 if group_size == "auto" else int(group_size), max_period, seed))

    @classmethod
    def from_rounds(cls, rounds: Sequence[Sequence[Sequence[int]]], seed: int = 0) -> Plan:
        """A plan by hand: `rounds[r]` lists the groups of round r, as in [[[0, 1], [2, 3]], [[0, 3], [1, 2]]].

        Raises ValueError when a rank stands in no group of a round or in two, or when the rounds together never mix all ranks.
        """
        if not rounds or not rounds[0]:
            raise ValueError("a plan needs at least one round with at least one group")
        world_size = max((rank for groups in rounds for group in groups for rank in group), default=-1) + 1
        return cls(_C.Plan.explicit(world_size, rounds, seed))

    @classmethod
    def from_bytes(cls, data: bytes) -> Plan:
        """The inverse of `to_bytes`. Raises ValueError on damaged bytes and on plans that are not valid."""
        return cls(_C.Plan.deserialize(data))

    def to_bytes(self) -> bytes:
        """A portable form with a hash at its end."""
        return self.core.serialize()

    @property
    def kind(self) -> str:
        """grid, random or explicit."""
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

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.core.hash == other.core.hash and self.to_bytes() == other.to_bytes()

    def __hash__(self) -> int:
        return hash(self.core.hash)

    def __reduce__(self) -> tuple[object, tuple[bytes]]:
        return (Plan.from_bytes, (self.to_bytes(),))

    def summary(self) -> str:
        """One line: kind, period, group size, contraction."""
        return f"{self.kind} plan, period {self.period}, groups of up to {self.max_group_size}, contraction {self.contraction:.3g}"

    def __repr__(self) -> str:
        return f"<Plan of {self.world_size} ranks: {self.summary()}>"

    def __str__(self) -> str:
        lines = [f"{self.world_size} ranks, {self.summary()}"]
        for index in range(min(self.period, _SHOWN_ROUNDS)):
            lines.append(f"  round {index}: {_groups_line(self.core.groups(index))}")
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
