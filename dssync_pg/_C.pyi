"""Types of the compiled extension: the C core's handles and the shim's classes. Translation only; see csrc/."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import Backend, Store, Work

EXACT_ROUND: int
RACK_ROUND: int
"""In place of a round's number: the group of all ranks."""
TORCH_VERSION: str
"""The torch this extension was built against, as "2.13.0"."""

# ---- C core -----------------------------------------------------------------------------------------------------------

class Topology:
    """A handle on a topology of the C core (csrc/core/topology.c). Immutable. A link is (bytes a second, seconds of latency)."""

    def __init__(
        self,
        hosts: Sequence[int],  # of each rank
        rack_of: Sequence[int],  # of each host
        nics: Sequence[tuple[float, float]],  # of each host
        uplinks: Sequence[tuple[float, float]],  # of each rack
        memory: tuple[float, float],
    ) -> None: ...
    @property
    def world_size(self) -> int: ...
    @property
    def host_count(self) -> int: ...
    @property
    def rack_count(self) -> int: ...
    @property
    def hosts(self) -> list[int]: ...
    @property
    def rack_of(self) -> list[int]: ...
    @property
    def nics(self) -> list[tuple[float, float]]: ...
    @property
    def uplinks(self) -> list[tuple[float, float]]: ...
    @property
    def memory(self) -> tuple[float, float]: ...
    def rack(self, rack: int) -> list[int]: ...  # its ranks, ascending

class Plan:
    """A handle on a plan of the C core (csrc/core/plan.c). Immutable. Errors are ValueError carrying the core's text."""

    @staticmethod
    def create(
        kind: str,  # auto|grid|random|exact|leaders|striped|hybrid
        world_size: int,
        group_size: int = 0,
        max_period: int = 0,
        seed: int = 0,
        topology: Topology | None = None,
        model_bytes: int = 0,
        compute_s: float = 0.0,
        delay: int | None = None,  # None: the smallest that hides a crossing
    ) -> Plan: ...
    @staticmethod
    def explicit(world_size: int, rounds: Sequence[Sequence[Sequence[int]]], seed: int = 0) -> Plan: ...
    @staticmethod
    def deserialize(data: bytes) -> Plan: ...
    def serialize(self) -> bytes: ...
    @property
    def kind(self) -> str: ...  # grid|random|exact|leaders|striped|hybrid|explicit
    @property
    def world_size(self) -> int: ...
    @property
    def period(self) -> int: ...
    @property
    def max_group_size(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def stripe_count(self) -> int: ...
    @property
    def delay(self) -> int: ...
    @property
    def rack_count(self) -> int: ...
    def is_crossing(self, round: int) -> bool: ...
    def keeps_values(self, round: int) -> bool: ...
    def rack_of(self, rank: int) -> int: ...
    def longest_wait(self) -> int: ...
    def cost(self, topology: Topology, model_bytes: int, compute_s: float = 0.0) -> dict[str, Any]: ...
    """The fields of dss_cost_t (csrc/include/dssync.h) by their names; busiest: memory|nic|uplink."""
    def link_bytes(self, topology: Topology, model_bytes: int, round: int | None = None) -> tuple[list[float], list[float]]: ...
    """Bytes on each host's NIC and on each rack's uplink, of a round with the whole model, or of a mean step."""
    @property
    def hash(self) -> int: ...
    def groups(self, round: int) -> list[list[int]]: ...
    def group_of_rank(self, round: int, rank: int) -> list[int]: ...
    def round_at(self, step: int, stripe: int) -> int: ...
    def round_of_call(self, call: int) -> int: ...
    def contraction(self) -> float: ...

def simulate(
    method: str,  # plan|ring|leaders|two-dimensional|parameter-server
    plan: Plan | None,  # for "plan" only
    topology: Topology,
    model_bytes: int,
    step_count: int,
    seed: int = 0,
    compute_s: float = 0.0,
    compute_sigma: float = 0.0,
    straggler_probability: float = 0.0,
    straggler_factor: float = 1.0,
    progress: Callable[[int], None] | None = None,  # gets the steps done, about a hundred times; what it raises ends up here
) -> dict[str, Any]:
    """total_s, mean_step_s, mean_sync_s, mean_wait_s, busiest (memory|nic|uplink), busiest_index, busiest_use, step_s (a list)."""

def stripe_count(total_bytes: int, period: int, min_stripe_bytes: int) -> int: ...
def stripe_begin(element_count: int, stripe_count: int, stripe: int) -> int: ...
def hash64(data: bytes, basis: int = 0) -> int: ...
def average(sources: Sequence[torch.Tensor], target: torch.Tensor) -> None:
    """target = mean of sources (same floating dtype and numel, contiguous CPU tensors), by the core's kernel."""

# ---- shim -------------------------------------------------------------------------------------------------------------

class LaunchGate:
    """One a process: lets a collective on any dssync group first launch the averages that are due.

    While armed, the entry of every collective, p2p and barrier of every ProcessGroupDssync of the process calls
    `callback(operation_name)` on the calling thread with the GIL held, except inside a backward pass and inside the callback
    itself.
    """

    def __init__(self, callback: Callable[[str], None]) -> None: ...
    armed: bool
    exact_depth: int  # > 0: every AVG is exact (inside dssync_pg.exact()), read by ProcessGroupDssync without the GIL

class Engine:
    """The native engine of one process group (csrc/include/dssync_engine.h). RuntimeError where it cannot be had."""

    def __init__(
        self,
        rank: int,
        size: int,
        transport: str,  # auto|shm|tcp
        interfaces: str,  # to listen on, divided by commas; "": the one from which `reach` is reached
        reach: str,  # a host; "": this one only
        store: Store,  # a connection of its own, for the first failure
        allgather: Callable[[bytes], list[bytes]],  # collective; called twice while this constructs
    ) -> None: ...
    @property
    def hosts(self) -> list[int]: ...  # the lowest rank on the host of each rank
    def average(self, tensor: torch.Tensor, members: Sequence[int], sequence: int, timeout: timedelta) -> None:
        """The mean over `members` (ascending ranks), in place; blocks. Sequence numbers are used once, the same on all members."""

    def set_racks(self, rack_of: Sequence[int]) -> None: ...  # before anything is posted; the same on all ranks
    def abort(self, reason: str) -> None: ...
    def transfers(self) -> tuple[list[int], list[int]]: ...  # by rank: payload bytes received, nanoseconds in which they came
    def stats(self) -> dict[str, int]: ...
    """bytes_sent and bytes_received (headers counted), operations, and peers by how they are connected: shm_peers, tcp_peers,
    unix_peers (of this host, without shared memory), lost_peers."""

class Crossing:
    """AWAITED: a crossing round is done when its launch is. DELAYED: the part between racks goes on, and settle() adds its
    correction. POSITIVE: the same, for values that must not become negative: a correction leaves at least a quarter of each.
    MOMENTS: also so, and a rack takes its mean at once where it else would keep its values."""

    AWAITED: Crossing
    DELAYED: Crossing
    POSITIVE: Crossing
    MOMENTS: Crossing

class Averager:
    """Averages lists of tensors in the groups of a plan.

    Launches are matched by name and step, those of one step by their order: every rank gives the same sequence of steps, rounds and
    shapes; a difference is an error on every member. The first error sticks: later launches fail with the same text.
    """

    def launch(
        self,
        step: int,
        layout: int,  # hash of what is averaged; equal on all ranks
        # (round or EXACT_ROUND or RACK_ROUND, dense tensors averaged in place[, how it crosses: AWAITED])
        parts: Sequence[tuple[int, Sequence[torch.Tensor]] | tuple[int, Sequence[torch.Tensor], Crossing]],
        what: str,  # for errors: "step 17 of sync 0"
        will_wait: bool = False,  # the caller waits right away: the engine's thread need not be woken
    ) -> Work: ...
    def settle(self, step: int, discard: bool = False) -> None:
        """Waits for the corrections of delayed crossings launched at `step` or before and adds them, or drops them. Native only."""

    def shutdown(self, abort: bool = False) -> None:
        """No launches any more: at once with `abort`, else after what was launched, within 2 s. The rest fails. Never raises."""

    def set_timeout(self, timeout: timedelta) -> None: ...
    def stats(self) -> dict[str, Any]: ...
    """launches, bytes_sent (payload bytes this rank put on the wire, counted as 2 (s-1)/s of what a group averages),
    seconds_waiting (native: from launch to done), groups_formed, groups_cached (native: none), last_step, error (str | None)."""

class GlooAverager(Averager):
    """Through inner groups of Gloo, formed when needed, one launch after the other, on its own thread (csrc/shim/gloo_averager)."""

    def __init__(
        self,
        name: str,  # also the prefix of its keys in the store
        store: Store,  # a connection of its own
        rank: int,
        plan: Plan,
        make_group: Callable[[Store, int, int, timedelta], Backend],  # (store, rank in group, group size, timeout); with the GIL
        timeout: timedelta,
        bucket_bytes: int = 25 << 20,
        max_groups: int = 16,
    ) -> None: ...

class NativeAverager(Averager):
    """On the native engine, any number of launches at once (csrc/shim/native_averager)."""

    def __init__(self, name: str, engine: Engine, plan: Plan, timeout: timedelta) -> None: ...

class ProcessGroupDssync(Backend):
    """The backend: AVG averages go to `averager` where there is one, all_reduces and barriers to `engine` where there is one, and
    all else to `inner` (Gloo); see csrc/shim/process_group."""

    def __init__(
        self,
        rank: int,
        size: int,
        inner: Backend,
        engine: Engine | None,
        gate: LaunchGate,
        averager: Averager | None,  # None: every call is exact
        min_bytes: int,
        on_first_average: Callable[[str], None],  # one INFO line, called once
        on_shutdown: Callable[[bool], None],  # (abort) called once, before anything is taken down; with abort it must not wait
        label: str,  # "default group", "group 3": for errors
        timeout: timedelta,
    ) -> None: ...
    @property
    def averager(self) -> Averager | None: ...
    @property
    def inner(self) -> Backend: ...
    def abandon(self) -> None: ...
    """At interpreter exit: no due launch, no waiting; pending work is left to a detached thread."""
