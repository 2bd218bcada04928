"""Makes the process groups: what torch calls for `backend="dssync"`, and what is kept of them in this process.

Every group carries an inner Gloo group, and, unless options say otherwise, a native engine, which takes all_reduces and barriers
off it. A group that averages (the default group, or one made with explicit
Options, unless all_reduce="exact") also has a plan, and averagers.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import logging
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from . import _C
from ._agreement import agree_on_options, agree_on_plan, exchange, meeting_place
from ._contention import Contention, Judge
from ._contention import place as contention_place
from ._native import describe_engine, gloo_devices, host_of, make_engine
from ._topology_source import find as find_topology
from .options import Options
from .plan import Plan
from .topology import Topology

logger = logging.getLogger("dssync_pg")


def _launch_due(operation: str) -> None:
    """What the gate calls while an average is due: training is loaded by then, since it armed the gate."""
    from .sync import launch_due, live

    launch_due(live(), operation)


gate = _C.LaunchGate(_launch_due)
"""The process's one gate, through which collectives launch averages that are due."""

live: list[Group] = []
"""The groups of this process that average, in the order in which they were made."""

_open: set[_C.ProcessGroupDssync] = set()
"""Every backend that was not shut down. Held here because torch holds only the C++ object, and exit must find them."""

_averagers: weakref.WeakSet[_C.Averager] = weakref.WeakSet()

_exact_lock = threading.Lock()

_PLANNED_BYTES = 32 << 20
"""What a group's own plan is made for; each sync has one for its own size."""


class Group:
    """A group of this process that averages."""

    def __init__(
        self,
        label: str,
        name: str,
        options: Options,
        plan: Plan,
        rank: int,
        timeout: timedelta,
        store: Store,
        engine: _C.Engine | None,
        topology: Topology | None,
    ) -> None:
        self.label = label
        """For people: "default group", "group 3"."""
        self.name = name
        """torch's own name of the group."""
        self.options = options
        self.plan = plan
        self.rank = rank
        self.world_size = plan.world_size
        self.timeout = timeout
        self.store = store
        self.engine = engine
        """What carries averages; None: groups of Gloo do."""
        self.topology = topology
        """What the plan was made for; None: nothing is known of the network."""
        self.backend: _C.ProcessGroupDssync | None = None
        """None once the group is shut down."""
        self._rack_averager: _C.Averager | None = None
        self._rack_calls = 0
        self._meetings = 0
        self._syncs = 0

    def process_group(self) -> dist.ProcessGroup:
        """torch's group around this one."""
        resolve: Any = torch.distributed.distributed_c10d._resolve_process_group  # its type changes with torch
        found: dist.ProcessGroup = resolve(self.name)
        return found

    def is_exact(self) -> bool:
        """Whether averages take all ranks at the moment: inside `dssync_pg.exact()`."""
        return gate.exact_depth > 0

    def make_averager(self, name: str, plan: Plan | None = None) -> _C.Averager:
        """An averager over `plan` (default: this group's), with keys of its own; `name` is the same on every rank."""
        averager: _C.Averager
        core = (plan or self.plan).core
        if self.engine is not None:
            averager = _C.NativeAverager(name, self.engine, core, self.timeout)
        else:
            averager = _C.GlooAverager(name, _own_connection(self.store), self.rank, core, _make_gloo, self.timeout)
        _averagers.add(averager)
        return averager

    def average_in_rack(self, tensors: list[torch.Tensor]) -> torch.futures.Future[Any]:
        """The mean over the ranks of this rank's rack, in place. The same calls, in the same order, on all of them."""
        if self._rack_averager is None:
            self._rack_averager = self.make_averager("gradients in racks")
        call, self._rack_calls = self._rack_calls, self._rack_calls + 1
        sizes = " ".join(f"{tensor.dtype}{tuple(tensor.shape)}" for tensor in tensors)
        layout = _C.hash64(sizes.encode())
        work = self._rack_averager.launch(call, layout, [(_C.RACK_ROUND, tensors)], f"gradients {call} of the rack")
        return work.get_future()

    def plan_for(self, model_bytes: int) -> Plan:
        """The plan for averages of so many bytes: where the network is known, what is best depends on them. Collective."""
        if self.topology is None or isinstance(self.options.plan, Plan):
            return self.plan
        self._meetings += 1
        place = meeting_place(self.store, f"plan/{self._meetings}")
        return agree_on_plan(
            place,
            self.rank,
            self.world_size,
            self.timeout,
            self.label,
            lambda: make_plan(self.options, self.world_size, self.topology, model_bytes),
        )

    def sense_contention(self, name: str, plan: Plan, model_bytes: int) -> Contention | None:
        """For averages of so many bytes by `plan`; None where nothing could be learnt or changed."""
        topology, every = self.topology, self.options.replan_steps
        if topology is None or self.engine is None or not isinstance(every, int) or isinstance(self.options.plan, Plan):
            return None
        judge = Judge(topology, plan, lambda now: make_plan(self.options, self.world_size, now, model_bytes), model_bytes)
        store = contention_place(_own_connection(self.store), name)
        thread_store = contention_place(_own_connection(self.store), name) if self.rank == 0 else None
        return Contention(self.rank, self.world_size, every, store, thread_store, self.engine, judge)

    def next_sync_index(self) -> int:
        """Numbers the syncs of this group, the same on every rank as long as all make them in the same order."""
        self._syncs += 1
        return self._syncs - 1

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's `value` (what JSON knows; tuples come back as lists), by rank. Collective."""
        place = meeting_place(self.store, f"exchange/{self._meetings}")
        self._meetings += 1
        what = f"exchange {self._meetings} of the {self.label}"
        return exchange(place, self.rank, self.world_size, self.timeout, what, value)


def group_of(process_group: dist.ProcessGroup, device: torch.device) -> Group | None:
    """The averaging dssync group that serves tensors on `device` in torch's `process_group`; None if that is another backend's."""
    try:
        backend: Any = process_group._get_backend(device)
    except RuntimeError:  # no backend for this device
        return None
    backend = getattr(backend, "wrapped_pg", backend)  # TORCH_DISTRIBUTED_DEBUG=DETAIL wraps every backend
    return next((group for group in live if group.backend is backend), None)


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Inside, every collective of every dssync group of this process is exact, and averages after a step take all ranks.

    Enter it on every rank or on none. Nests; process-wide, not thread by thread.
    """
    with _exact_lock:
        gate.exact_depth += 1
    try:
        yield
    finally:
        with _exact_lock:
            gate.exact_depth -= 1


def create(dist_backend_opts: Any, pg_options: Any) -> _C.ProcessGroupDssync:
    """The creator that torch calls, on every rank of the new group.

    Raises TypeError for pg_options that are not Options; ValueError, on every rank, for options that are not valid or differ
    between ranks; TimeoutError when ranks do not come.
    """
    store, timeout = dist_backend_opts.store, dist_backend_opts.timeout
    rank, world_size = dist_backend_opts.group_rank, dist_backend_opts.group_size
    is_default = not dist_backend_opts.global_ranks_in_group
    label = "default group" if is_default else f"group {dist_backend_opts.group_id}"
    _speak_up(rank)

    options = _options_from(pg_options)
    wanted = is_default or pg_options is not None
    averages = wanted and isinstance(options, Options) and options.all_reduce == "avg"
    options = agree_on_options(meeting_place(store, "options"), rank, world_size, timeout, label, options, averages)

    try:
        inner = _make_gloo(PrefixStore("dssync/exact", store), rank, world_size, timeout)
    except RuntimeError as error:  # Gloo's texts name neither ranks nor groups
        what = f"the making of the {label}: rank {rank} of {world_size} could not connect its Gloo group to the others"
        error.args = (f"dssync: {what}: {error}. Has another rank failed meanwhile?",)
        raise
    inner._set_sequence_number_for_group()
    engine = _choose_engine(store, rank, world_size, timeout, label, options, say=wanted)
    topology = _topology_inside(dist_backend_opts.global_ranks_in_group, options)
    if wanted and topology is None:
        topology = _find_topology(store, rank, world_size, timeout, label, options, engine if is_default else None)
    racks = topology.rack_of if topology is not None else None
    if engine is not None and racks is not None:
        engine.set_racks(racks)
    elif engine is not None and isinstance(options.plan, Plan) and options.plan.world_size == world_size:
        with contextlib.suppress(ValueError):  # hosts in two of its racks: then its crossings are waited for
            engine.set_racks(options.plan.rack_of)
    if is_default:
        _world.topology, _world.option = topology, options.topology
    plan = group = None
    if averages:
        place = meeting_place(store, "plan")
        plan = agree_on_plan(
            place, rank, world_size, timeout, label, lambda: make_plan(options, world_size, topology, _PLANNED_BYTES)
        )
        group = Group(label, dist_backend_opts.group_id, options, plan, rank, timeout, store, engine, topology)

    def tell_first_average(what: str) -> None:
        assert plan is not None
        logger.info(
            "dssync: %s on the %s is averaged inside groups, not over all ranks (%s). "
            'dssync_pg.exact() or Options(all_reduce="exact") makes it exact.',
            what,
            label,
            plan.summary(),
        )

    itself: list[_C.ProcessGroupDssync] = []  # emptied by forget(), which the backend holds: no cycle is left behind

    def forget(abort: bool) -> None:
        try:
            if group is not None:
                _close(group, abort)
        finally:
            _open.discard(itself.pop())

    backend = _C.ProcessGroupDssync(
        rank,
        world_size,
        inner,
        engine,
        gate,
        group.make_averager("all_reduce") if group is not None else None,
        options.min_bytes,
        tell_first_average,
        forget,
        label,
        timeout,
    )
    itself.append(backend)
    _open.add(backend)
    if group is not None:
        group.backend = backend
        live.append(group)
        from . import training  # late: it loads DDP, which a script may never use

        training.enable(group)
    return backend


def _close(group: Group, abort: bool) -> None:
    """The group is being shut down: training lets go of it while its connections still stand; with `abort`, without a wait."""
    from . import training

    try:
        training.disable(group, abort)
    finally:
        if group._rack_averager is not None:
            group._rack_averager.shutdown(abort=abort)
        live.remove(group)
        group.backend = None
        group.engine = None


def make_plan(options: Options, world_size: int, topology: Topology | None, model_bytes: int) -> Plan:
    """What the options ask for. Raises ValueError where there is no such plan."""
    if isinstance(options.plan, Plan):
        theirs = list(topology.rack_of) if topology is not None and options.plan.rack_count > 1 else options.plan.rack_of
        if options.plan.rack_of != theirs:
            raise ValueError(f"the plan is for ranks in racks {options.plan.rack_of}, the topology has them in racks {theirs}")
        return options.plan
    return Plan.create(
        world_size,
        options.plan,
        options.group_size,
        options.max_period,
        options.seed,
        topology=topology,
        model_bytes=model_bytes,
    )


def _find_topology(
    store: Store, rank: int, world_size: int, timeout: timedelta, label: str, options: Options, engine: _C.Engine | None
) -> Topology | None:
    """What is known of the network, the same on every rank; None: nothing. Raises TopologyError on every rank for a wrong file.

    engine: what may measure; None: nothing is measured. Groups beside the default one may be made in parallel, and many.
    """
    meetings = 0

    def gather(value: Any) -> list[Any]:
        nonlocal meetings
        meetings += 1
        place = meeting_place(store, f"topology/{meetings}")
        return exchange(place, rank, world_size, timeout, f"the topology of the {label}", value)

    if world_size == 1 or options.topology == "flat":
        return None
    file = "" if options.topology == "auto" else options.topology
    topology, source = find_topology(file, rank, world_size, gather)
    if rank == 0 and topology is not None:
        logger.info("dssync: the topology of the %s is from %s: %d racks.", label, source, len(topology.racks))
    if topology is None and file == "" and engine is not None and _is_worth_a_probe(store, options, engine):
        from .probe import probe  # late: most groups need none

        topology, _ = probe(engine, rank, world_size, timeout, gather)
    return topology


def _is_worth_a_probe(store: Store, options: Options, engine: _C.Engine) -> bool:
    """Whether there is a network between ranks, and a plan that could mind it."""
    if len(set(engine.hosts)) < 2 or host_of(store) in ("", "localhost", "127.0.0.1", "::1"):
        return False
    return options.all_reduce == "avg" and options.plan in ("auto", "leaders", "striped", "hybrid")


class _World:
    """What is known of the default group's network."""

    topology: Topology | None = None
    option = ""
    """That of the default group."""


_world = _World()


def _topology_inside(ranks: list[int], options: Options) -> Topology | None:
    """That of a part of the world, unless its options name another; None: not known."""
    world = _world.topology
    if world is None or not ranks or max(ranks) >= world.world_size or options.topology not in ("auto", _world.option):
        return None
    numbers = {rank: number for number, rank in enumerate(ranks)}
    racks = []
    for rack in world.racks:
        inside = [(host, tuple(numbers[rank] for rank in sorted(host.ranks) if rank in numbers)) for host in rack.hosts]
        hosts = tuple(dataclasses.replace(host, ranks=members) for host, members in inside if members)
        if hosts:
            racks.append(dataclasses.replace(rack, hosts=hosts))
    return Topology(racks, world.memory)


def _choose_engine(
    store: Store, rank: int, world_size: int, timeout: timedelta, label: str, options: Options, say: bool
) -> _C.Engine | None:
    """The native engine, or None for Gloo; the same on every rank. Raises RuntimeError where native was asked for and cannot be."""
    if world_size == 1:
        return None
    if options.engine == "gloo":
        if rank == 0 and say:
            logger.info("dssync: the %s runs over Gloo (engine=gloo).", label)
        return None
    engine = make_engine(_own_connection(store), rank, world_size, timeout, label, options.transport)
    if isinstance(engine, str):
        if options.engine == "native" or options.transport == "shm":
            raise RuntimeError(f"dssync: the {label} has no native engine: {engine}")
        if rank == 0:
            logger.warning("dssync: the %s runs over Gloo, slower: the native engine cannot be had (%s)", label, engine)
        return None
    if rank == 0 and say:
        logger.info("dssync: the %s runs on the %s.", label, describe_engine(engine, options.transport))
    return engine


def _options_from(pg_options: Any) -> Options | Exception:
    try:
        if pg_options is None or isinstance(pg_options, Options):
            return pg_options or Options()
        raise TypeError(
            f"dssync: pg_options must be dssync_pg.Options, got {type(pg_options).__module__}.{type(pg_options).__name__}"
        )
    except (TypeError, ValueError) as error:
        return error


def _make_gloo(store: Store, rank: int, world_size: int, timeout: timedelta) -> dist.ProcessGroupGloo:
    devices = gloo_devices()
    if not devices:
        return dist.ProcessGroupGloo(store, rank, world_size, timeout)
    options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices, options._threads, options._timeout = devices, 2 * len(devices), timeout
    return dist.ProcessGroupGloo(store, rank, world_size, options)


def _own_connection(store: Store) -> Store:
    """A second connection to the same store, for a thread that waits on it: one connection serves one request at a time."""
    try:
        return store.clone()  # type: ignore[attr-defined, no-any-return]
    except (AttributeError, RuntimeError, NotImplementedError):
        return store  # a store of the user's own making


class _LastResort(logging.StreamHandler[Any]):
    """Writes to stderr while the program has not set up logging."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            self.stream = sys.stderr  # as it is now: programs and tests replace it
            super().emit(record)


def _speak_up(rank: int) -> None:
    """Makes rank 0's INFO lines visible where the program has not set up logging.

    Python would drop them, and they say that results are averages inside groups: nobody should have to look for that.
    `logging.getLogger("dssync_pg").setLevel(logging.WARNING)` silences them.
    """
    if logger.hasHandlers():
        return
    handler = _LastResort()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logger.addHandler(handler)
    if rank == 0 and logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


def _forget_all() -> None:
    """In a forked child: threads and connections are its parent's, and its own exit must not wait for them."""
    _averagers.clear()
    _open.clear()


os.register_at_fork(after_in_child=_forget_all)


@atexit.register
def _abandon_all() -> None:
    """No thread of ours may run on into an interpreter that is being taken down."""
    for averager in list(_averagers):
        averager.shutdown(abort=True)
    for backend in list(_open):
        backend.abandon()
