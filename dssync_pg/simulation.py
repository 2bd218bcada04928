"""What a training's steps would take on a cluster that is not at hand, by the simulator of the C core (csrc/core/simulate.c)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from . import _C
from .plan import Plan
from .topology import Topology

METHODS = ("ring", "leaders", "two-dimensional", "parameter-server")
"""The exact exchanges that plans are compared with; each waits for all workers. leaders reduces in each rack, goes round a ring of
one worker a rack and broadcasts; two-dimensional scatters in racks, all-reduces the shards between racks and gathers."""


@dataclasses.dataclass(frozen=True, slots=True)
class Simulation:
    """Times are seconds."""

    method: str
    """"plan" or one of METHODS."""
    total: float
    """Until the last worker had finished the last step."""
    mean_step: float
    mean_sync: float
    """From the end of a worker's compute to the end of its step; mean over workers and steps."""
    mean_wait: float
    """Of it, waiting for others of a group to be ready."""
    busiest: str
    """The link that was sending for most of the time: "memory", "nic" or "uplink"."""
    busiest_index: int
    """Its host or rack."""
    busiest_use: float
    """For which share of the time it was sending."""
    steps: tuple[float, ...] = dataclasses.field(repr=False)
    """Of each step, from the last worker's end of the one before to that of this one."""

    def quantile(self, share: float) -> float:
        """The time that the given share of the steps did not exceed: 0.5 is the median."""
        ordered = sorted(self.steps)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def simulate(
    topology: Topology,
    what: Plan | str,
    *,
    model_bytes: int = 32 << 20,
    steps: int = 200,
    compute: float = 0.0,
    noise: float = 0.0,
    straggler_probability: float = 0.0,
    straggler_factor: float = 2.0,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Simulation:
    """Runs the finish-time recurrence: a worker's step ends when the slowest of its groups is done with its averages.

    what: a plan, or one of METHODS. compute: median seconds of a step without synchronisation; noise: the standard deviation of its
    logarithm; stragglers take so many times longer, each worker in each step with the given probability. The same seed gives every
    method the same compute times. progress: called about a hundred times with the number of steps done.

    All flows of a step share the links that they use; what a delayed crossing sends in the background is not waited for until its
    correction is due. 10,000 workers and 1,000 steps take seconds.

    Raises ValueError for values that cannot be, and for a plan of another number of workers than the topology's.
    """
    is_plan = isinstance(what, Plan)
    if not is_plan and what not in METHODS:
        raise ValueError(f"a simulation of {what!r}, expected a Plan or one of {', '.join(METHODS)}")
    method = "plan" if is_plan else str(what)
    result = _C.simulate(
        method,
        what.core if isinstance(what, Plan) else None,
        topology.core,
        model_bytes,
        steps,
        seed,
        compute,
        noise,
        straggler_probability,
        straggler_factor,
        progress,
    )
    return Simulation(
        method=method,
        total=result["total_s"],
        mean_step=result["mean_step_s"],
        mean_sync=result["mean_sync_s"],
        mean_wait=result["mean_wait_s"],
        busiest=result["busiest"],
        busiest_index=result["busiest_index"],
        busiest_use=result["busiest_use"],
        steps=tuple(result["step_s"]),
    )
