"""Divide-and-shuffle averaging of one optimizer's parameters, and the rule that says when each average is launched.

After each local optimizer step the parameters (with BatchNorm's running statistics and, where asked, optimizer state) are averaged
inside the groups of the plan's round; stripe s of step t takes round (t + s) mod P (DS-Sync, arXiv 2007.03298, section 3, and the
stripes of this project). Averages are matched by (sync, step), never by the order of calls.

Every rank launches exactly one average for each backward pass, at the earliest of: the optimizer's post-step hook; any collective,
p2p or barrier on a dssync group of this process; the next forward; the next backward; global_average; destroy. The later ones serve
a rank that skipped its step alone (a gradient scaler, a local "if finite"): the others already wait for it, and it must not first
enter something that waits for them.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import math
import operator
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import _C
from ._layout import MIN_STRIPE_BYTES, Named, Vector, layout_hash
from ._native import connected
from ._optimizer_state import has_second_moment, is_known, read_numbers, state_tensors, write_numbers, zeros_for

if TYPE_CHECKING:
    from ._backend import Group
    from ._contention import Contention
    from .plan import Plan

logger = logging.getLogger("dssync_pg")

SECOND_MOMENT_SLICES = 8
"""average_state="v" averages one of so many slices of the second moments a step: their bytes are an eighth of the parameters'."""

UNKNOWN_ORDER_PATIENCE_S = 1.0
"""How long a step waits before it takes another optimizer of the module, not yet seen stepping, for one that was skipped."""


OWN_STEP = "optimizer step"
SIBLING_STEP = "another optimizer's step"
STEP_IS_PAST = frozenset({OWN_STEP, "next forward", "next backward", "detach", "destroy"})
"""Launch reasons after which the optimizer does not step before the next backward."""


HYBRID_WANTS_DDP = (
    "plan=hybrid averages gradients inside racks while DDP reduces them: wrap the module in DistributedDataParallel, "
    "or use plan=striped"
)


class Phase(enum.Enum):
    """Where a sync stands between two backward passes."""

    IDLE = "idle"  # nothing is owed until the next backward
    DUE = "due"  # a backward has run: one average is owed
    LAUNCHED = "launched"  # the average was launched before the optimizer stepped, if it steps at all


@dataclass
class Family:
    """The syncs of one module: they share its backward passes, and learn from them in which order their optimizers step."""

    plain: bool  # not DDP: steps count even where no backward was seen
    syncs: list[Sync] = field(default_factory=list)
    stepped: list[Sync] = field(default_factory=list)  # since the last backward, in order


class _Layout:
    """What one launch averages: built once, and again when a tensor, a requires_grad flag or a storage changes."""

    def __init__(self, key: tuple[object, ...], vectors: list[list[Named]], scales: list[list[Named]], moments: list[Named],
                 placeholders: list[Tensor], stripe_count: int, extra: str) -> None:  # fmt: skip
        self.key = key
        self.placeholders = placeholders
        total = sum(item.tensor.numel() * item.tensor.element_size() for item in vectors[0])
        self.stripe_count = _C.stripe_count(total, stripe_count, MIN_STRIPE_BYTES)
        self.vectors = [Vector([item.tensor for item in vector], self.stripe_count) for vector in vectors]
        self.scales = [Vector([item.tensor for item in vector], self.stripe_count) for vector in scales]
        """Variances, then second moments: their corrections must not make them negative."""
        self.moments = Vector([item.tensor for item in moments], SECOND_MOMENT_SLICES)
        everything = [*vectors, *scales, moments]
        self.hash = layout_hash(everything, f"{extra} stripes={self.stripe_count}")
        self.names = [item.name for vector in everything for item in vector]
        striped = [*self.vectors, *self.scales]
        self.bytes = sum(vector.bytes for vector in striped) + self.moments.bytes // SECOND_MOMENT_SLICES

    def parts(self, plan: _C.Plan, step: int, exact: bool) -> list[tuple[int, list[Tensor], _C.Crossing]]:
        """(round, views, how it crosses) of everything averaged at `step`."""
        parts = []
        for stripe in range(self.stripe_count):
            round_ = _C.EXACT_ROUND if exact else plan.round_at(step, stripe)
            for vectors, crossing in (
                (self.vectors, _C.Crossing.DELAYED),
                (self.scales[:1], _C.Crossing.POSITIVE),
                (self.scales[1:], _C.Crossing.MOMENTS),
            ):
                parts.append((round_, [view for vector in vectors for view in vector.stripes[stripe]], crossing))
        if self.moments.numel:
            turn, which = divmod(step, SECOND_MOMENT_SLICES)  # slice j comes every 8 steps: its round advances with its own turns
            round_ = _C.EXACT_ROUND if exact else plan.round_at(turn, 0)
            parts.append((round_, self.moments.stripes[which], _C.Crossing.MOMENTS))
        return [part for part in parts if part[1]]


class Sync:
    """Keeps the replicas of one optimizer's parameters together. Made by `dssync_pg.attach`, or by itself for a DDP module."""

    def __init__(self, group: Group, module: nn.Module, optimizer: Optimizer, family: Family, names: dict[int, str],
                 buffers: list[Named], index: int) -> None:  # fmt: skip
        options = group.options
        if options.average_state != "none" and not is_known(optimizer):
            raise ValueError(
                f"dssync: average_state={options.average_state} knows the state of the optimizers that torch ships; "
                f"{type(optimizer).__name__} is not one of them. Use average_state=none."
            )
        if options.average_state == "v" and not has_second_moment(optimizer):
            logger.info("dssync: average_state=v: %s keeps no second moment; none is averaged", type(optimizer).__name__)
        self.index = index
        self.name = f"sync {index}"
        self.optimizer = optimizer
        self.phase = Phase.IDLE
        self.family = family
        self._group = group
        self._module = weakref.ref(module)
        self._names = names  # id of a parameter -> its name: what this sync may average
        self._buffers = buffers
        self._plan_object = group.plan
        self._plan = group.plan.core
        self._step = 0
        self._task = -1  # the autograd graph task that made this sync due
        self._follows: weakref.WeakSet[Sync] = weakref.WeakSet()  # syncs seen stepping before this one
        self._launched_by = ""
        self._owned: frozenset[int] = frozenset()
        self._layout_cache: _Layout | None = None
        self._inside_average = False
        self._replicas_equal = True  # the last average was exact and no step came after it
        self._closed = False
        self._suppressed = False
        self._only_suppressed_backward = False
        self._unstepped = False  # a backward pass since the last step was not followed by one
        self._accumulated_steps = 0
        self._launches: dict[str, int] = {}
        self._exact_steps = 0
        self._seconds = 0.0
        self._warned: set[str] = set()
        self._plans = 0
        self._past: dict[str, float] = {}  # what averagers of earlier plans have counted
        self._sensings = 0
        self._contention: Contention | None = None
        self._averager = group.make_averager(f"sync{index}")

    # ---- what people use --------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """How many averages were launched so far: t of the next one."""
        return self._step

    @property
    def plan(self) -> Plan:
        """Who averages with whom, at the moment."""
        return self._plan_object

    @property
    def bytes(self) -> int:
        """What is averaged each step."""
        return self._layout().bytes

    @property
    def module(self) -> nn.Module | None:
        """The module whose parameters are averaged; None once it is gone."""
        return self._module()

    @contextlib.contextmanager
    def global_average(self) -> Iterator[None]:
        """The exact mean of all ranks in, the rank's own weights back out.

        Collective: every rank enters it. Inside, parameters and BatchNorm statistics are the mean over all ranks (bitwise the same
        on each): evaluate and save there, and change nothing, since what is written to the parameters inside (load_state_dict(),
        say) is lost at its end. Costs one more copy of the model and one global all-reduce.
        """
        with averaged([self]):
            yield

    def consensus_distance(self) -> float:
        """sqrt(mean over ranks of ||x_i - mean x||^2) of the parameters, the same number on every rank. Collective, exact."""
        launch_due([self], "consensus_distance")
        vector = Vector([item.tensor for item in self._parameters()], 1)
        views = vector.stripes[0] if vector.numel else []
        means = [view.clone() for view in views]
        if means:
            self._exact(means, "consensus_distance")
        squares = [(view.double() - mean.double()).square().sum().cpu() for view, mean in zip(views, means, strict=False)]
        total = torch.stack(squares).sum().reshape(1) if squares else torch.zeros(1, dtype=torch.float64)
        self._exact([total], "consensus_distance")
        return math.sqrt(total.item())

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """For modules that are not DDP: backward passes inside accumulate gradients and make no average due (DDP has its own)."""
        before, self._suppressed = self._suppressed, True
        try:
            yield
        finally:
            self._suppressed = before

    def stats(self) -> dict[str, Any]:
        """Counters since the start, for people and logs. Keys:

        step: averages launched; exact_steps: of them exact; plan, period, group_size, contraction: the plan in use and its rho;
        stripes, bytes_averaged_per_step; launched_by: what launched the averages ("optimizer step", "next forward", ...); seconds:
        time this rank's program stood waiting for averages; delay, plan_changes: steps by which crossings are late, and plans made
        anew since links changed; averager: what the engine counted (bytes_sent, groups formed, ...).
        """
        layout = self._layout_cache
        return {
            "name": self.name,
            "step": self._step,
            "exact_steps": self._exact_steps,
            "plan": self._plan.kind,
            "period": self._plan.period,
            "group_size": self._plan.max_group_size,
            "contraction": self._plan.contraction(),
            "delay": self._plan.delay,
            "plan_changes": self._contention.changes if self._contention is not None else 0,
            "average_state": self._group.options.average_state,
            "engine": "gloo" if self._group.engine is None else "native",
            "peers": connected(self._group.engine),
            "stripes": layout.stripe_count if layout else None,
            "bytes_averaged_per_step": layout.bytes if layout else None,
            "launched_by": dict(self._launches),
            "seconds": self._seconds,
            "averager": self._counted(),
        }

    def _counted(self) -> dict[str, Any]:
        """What the averagers of all plans have counted."""
        now = self._averager.stats()
        return now | {key: now[key] + past for key, past in self._past.items()}

    def state_dict(self) -> dict[str, Any]:
        """Step and plan, to continue the same rounds after a restart. Local: starts no communication."""
        return {"step": self._step, "plan": self._plan.serialize()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`. Collective: ranks whose step or plan differ get an error, all of them, and nothing changes.

        Where plans follow the network (a known topology, replan_steps) the one in use stays, whichever was saved.
        """
        try:
            mine, problem = self._check_saved(state)
        except Exception as error:  # whatever it is: the other ranks wait to hear of it
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error).removeprefix("dssync: ")
            mine, problem = (-1, 0), f"the saved state cannot be read ({what}); without it averaging begins anew, at step 0"
        views = self._group.exchange((mine, problem))
        for rank, (_, text) in enumerate(views):
            if text is not None:
                raise ValueError(f"dssync: load_state_dict on rank {rank}: {text}")
        (first_step, first_plan), _ = views[0]
        for rank, ((step, plan), _) in enumerate(views):
            if (step, plan) != (first_step, first_plan):
                difference = f"rank 0 continues from step {first_step}, rank {rank} from step {step}"
                if step == first_step:
                    difference = f"rank 0 and rank {rank} saved different plans at step {step}"
                raise ValueError(f"dssync: load_state_dict: {difference}; load the same checkpoint on every rank")
        self._averager.settle(self._step, discard=True)  # they are about other weights
        self._step = mine[0]
        self._replicas_equal = False

    def _check_saved(self, state: dict[str, Any]) -> tuple[tuple[int, int], str | None]:
        """(step, hash of the plan), and why this rank cannot continue from them. Raises anything for a state that is damaged."""
        step, plan = operator.index(state["step"]), state["plan"]
        if not 0 <= step < 1 << 40:
            raise ValueError(f"step {step}")
        saved = _C.Plan.deserialize(plan)
        follows = self._contention is not None and saved.world_size == self._plan.world_size
        problem = None
        if plan != self._plan.serialize() and not follows:
            problem = (
                f"the saved plan ({saved.kind}, world size {saved.world_size}, period {saved.period}) is not the one in use "
                f"({self._plan.kind}, world size {self._plan.world_size}, period {self._plan.period}); "
                "start with the saved options and world size"
            )
        return (step, _C.hash64(plan)), problem

    def detach(self) -> None:
        """Back to plain data parallelism: parameters and optimizer state become the exact mean, gradients are all-reduced again.

        Collective. The state of an optimizer that torch does not ship stays this rank's own, with a warning.
        """
        from . import training

        if not self._closed:
            launch_due([self], "detach")
            self._settle(self._step)
            self._exact_in_place("detach")
            self._exact_state("detach")
            training.release(self)

    # ---- phases: called by training.py and by launch() ------------------------------------------------------------------

    def backward_ran(self, task: int) -> None:
        """A backward pass that is to be followed by an average went through this sync's parameters."""
        if self.phase is Phase.DUE and (task == -1 or task != self._task):
            launch([(self, "next backward")])
        self.phase, self._task = Phase.DUE, task
        self._only_suppressed_backward = False
        refresh_gate()

    def after_step(self) -> None:
        """The optimizer has stepped."""
        if self._closed:
            return
        if self._inside_average:
            raise RuntimeError(
                "dssync: optimizer.step() inside global_average(): the step would be lost when the local weights return"
            )
        self._replicas_equal = False
        self._warn_of_accumulation()
        order = self.family.stepped
        for other in order:
            if other is not self:
                self._follows.add(other)
        if self not in order:
            order.append(self)
        if self.phase is Phase.LAUNCHED:
            self.phase = Phase.IDLE
            if self._launched_by != SIBLING_STEP:
                self._warn(
                    "early",
                    f"{self._launched_by} between backward() and optimizer.step() launched the average before the local step. "
                    "Training stays correct but mixes one step later; move that call behind the step.",
                )
            return
        if self.phase is Phase.IDLE and not self._due_without_backward():
            return
        others = [sync for sync in self.family.syncs if sync is not self and sync.phase is Phase.DUE]
        skipped = [sync for sync in others if sync in self._follows]
        unknown = [sync for sync in others if sync not in self._follows and self not in sync._follows]
        self.phase = Phase.DUE
        launch([(sync, SIBLING_STEP) for sync in skipped] + [(self, OWN_STEP)], unknown)

    def _warn_of_accumulation(self) -> None:
        """Two steps in a row that had several backward passes each: not a scaler's skips but accumulation outside no_sync()."""
        self._accumulated_steps = self._accumulated_steps + 1 if self._unstepped else 0
        self._unstepped = False
        if self._accumulated_steps == 2:
            self._warn(
                "accumulation",
                "several backward passes come before each optimizer step, and each starts an average. Wrap all but the last in "
                "no_sync().",
            )

    def _due_without_backward(self) -> bool:
        """A step whose gradients were made without a backward that the hooks saw: averaged for plain modules only."""
        return self.family.plain and not self._only_suppressed_backward

    def suppressed_backward_ran(self) -> None:
        if self.phase is Phase.IDLE:
            self._only_suppressed_backward = True

    def sense_contention(self) -> None:
        """From now on plans are made anew when links change. Again where the sync has got other parameters."""
        if self._contention is not None:
            self._contention.close()
        self._sensings += 1
        name = f"{self.name}.{self._sensings}"  # no verdict of the time before is waiting there
        self._contention = self._group.sense_contention(name, self.plan, self.bytes)

    def use_plan(self, plan: Plan) -> None:
        """Averages by `plan` from the next step on. The same call at the same step on every rank.

        Raises RuntimeError behind detach(), ValueError for a plan that does not fit: nothing has changed then.
        """
        if self._closed:
            raise RuntimeError("dssync: use_plan() after detach(): gradients are all-reduced; attach() again first")
        if plan.world_size != self._plan.world_size:
            raise ValueError(f"dssync: use_plan: the plan is for {plan.world_size} ranks, the group has {self._plan.world_size}")
        if plan.kind == "hybrid" and self.family.plain:
            raise ValueError(f"dssync: use_plan: {HYBRID_WANTS_DDP}")
        if plan.core.hash == self._plan.hash:
            return
        self._settle(self._step)
        self._averager.shutdown()
        counted = self._counted()
        self._past = {key: counted[key] for key in ("launches", "bytes_sent", "seconds_waiting", "groups_formed")}
        self._plans += 1
        self._plan_object = plan
        self._plan = plan.core
        self._averager = self._group.make_averager(f"sync{self.index}.{self._plans}", plan)
        self._layout_cache = None

    def close(self, abort: bool = False) -> None:
        """Takes the averager down; every later use is an error. training.release() takes the hooks off."""
        self._closed = True
        self.phase = Phase.IDLE
        if self._contention is not None:
            self._contention.close()
        self._averager.shutdown(abort=abort)

    # ---- launching ------------------------------------------------------------------------------------------------------

    def begin(self, reason: str) -> Any:
        """Launches the average of this step and returns its Work."""
        layout = self._layout()
        step, self._step = self._step, self._step + 1
        exact = step < self._group.options.warmup_steps or self._group.is_exact()
        self._exact_steps += exact
        self._replicas_equal = exact
        self.phase = Phase.IDLE if reason in STEP_IS_PAST else Phase.LAUNCHED
        self._launched_by = reason
        self._unstepped |= reason in ("next forward", "next backward")
        self._launches[reason] = self._launches.get(reason, 0) + 1
        for placeholder in layout.placeholders:
            placeholder.zero_()
        if exact:
            self._settle(step)
        return self._averager.launch(step, layout.hash, layout.parts(self._plan, step, exact), f"step {step} of {self.name}")

    def _settle(self, step: int) -> None:
        """Adds the corrections of crossings launched up to `step`; waits for them."""
        began = time.perf_counter()
        self._averager.settle(step)
        self._seconds += time.perf_counter() - began

    def end(self, work: Any) -> None:
        """Waits for the Work of begin()."""
        began = time.perf_counter()
        work.wait()
        self._seconds += time.perf_counter() - began
        # Averages inside a rack and what is added to all of it change places freely: so late, a crossing has one more step to hide.
        if self._step > self._plan.delay:
            self._settle(self._step - 1 - self._plan.delay)
        plan = self._contention.step_done() if self._contention is not None else None
        if plan is not None:
            self.use_plan(plan)

    def _exact(self, views: Sequence[Tensor], what: str) -> None:
        """The exact mean over all ranks of `views`, in place."""
        text = f"{what} at step {self._step} of {self.name}"
        shapes = " ".join(f"{view.dtype}{tuple(view.shape)}" for view in views)
        self._averager.launch(self._step, _C.hash64(f"{what} {shapes}".encode()), [(_C.EXACT_ROUND, list(views))], text).wait()

    def _exact_in_place(self, what: str) -> None:
        views = self._model_views()
        if views:
            self._exact(views, what)
        self._replicas_equal = True

    def _exact_state(self, what: str) -> None:
        """The exact mean of the optimizer's state: replicas with equal gradients but momenta of their own would drift apart."""
        if not is_known(self.optimizer):
            self._warn("detach", f"the state of {type(self.optimizer).__name__} is not averaged by detach(); make a new optimizer")
            return
        tensors, params = [], []
        for group in self.optimizer.param_groups:
            for param in filter(self.owns, group["params"]):
                params.append(param)
                state = state_tensors(self.optimizer, group, param, "all")
                tensors += [zeros_for(spec, param) if tensor is None else tensor for spec, tensor in state]
        if tensors:
            self._exact(Vector(tensors, 1).stripes[0], what)
        if params:  # ranks may have skipped a step alone
            numbers = read_numbers(self.optimizer, params)
            self._exact([numbers], what)
            write_numbers(self.optimizer, params, numbers)

    def _model_views(self) -> list[Tensor]:
        vector = Vector([item.tensor for item in [*self._parameters(), *self._buffers]], 1)
        return vector.stripes[0] if vector.numel else []

    # ---- layout ---------------------------------------------------------------------------------------------------------

    def owns(self, param: Tensor) -> bool:
        """True if `param` is averaged, as of the last launch: its gradient stays local."""
        return id(param) in self._owned

    def _parameters(self) -> list[Named]:
        found: dict[int, Named] = {}
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                name = self._names.get(id(param))
                if name is not None and param.requires_grad and param.numel():
                    found.setdefault(id(param), Named(name, param))
        self._owned = frozenset(found)
        return list(found.values())

    def _layout(self) -> _Layout:
        mode = self._group.options.average_state
        parameters = self._parameters()
        wanted = {id(item.tensor): item for item in parameters}
        state: dict[str, list[Named]] = {}
        scale_keys: set[str] = set()
        missing: list[Tensor] = []
        cached = self._layout_cache
        if mode != "none":
            for group in self.optimizer.param_groups:
                for param in group["params"]:
                    item = wanted.pop(id(param), None)
                    if item is None:
                        continue
                    for spec, tensor in state_tensors(self.optimizer, group, param, mode):
                        if tensor is None:
                            tensor = zeros_for(spec, param)
                            missing.append(tensor)
                        state.setdefault(spec.key, []).append(Named(f"{item.name}.{spec.key}", tensor))
                        if spec.second_moment:
                            scale_keys.add(spec.key)
        tensors = [item.tensor for item in [*parameters, *self._buffers, *(i for vector in state.values() for i in vector)]]
        fresh = {id(tensor) for tensor in missing}
        key = tuple(0 if id(tensor) in fresh else (tensor.data_ptr(), tensor.numel()) for tensor in tensors)
        if cached is not None and cached.key == key:
            return cached
        moments = [item for vector in state.values() for item in vector] if mode == "v" else []
        kinds = [] if mode == "v" else list(state.items())
        buffers = [item for item in self._buffers if not item.name.endswith("running_var")]
        variances = [item for item in self._buffers if item.name.endswith("running_var")]
        vectors = [parameters, buffers, *(items for kind, items in kinds if kind not in scale_keys)]
        scales = [variances, *(items for kind, items in kinds if kind in scale_keys)]
        extra = f"{self.name} average_state={mode} plan={self._plan.hash}"
        self._layout_cache = _Layout(key, vectors, scales, moments, missing, self._plan.stripe_count, extra)
        return self._layout_cache

    def layout_summary(self) -> tuple[int, list[str]]:
        """(hash, names) of what is averaged, compared between ranks when the sync is made."""
        layout = self._layout()
        return layout.hash, layout.names

    def _warn(self, key: str, text: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            logger.warning("dssync: %s: %s", self.name, text)


# ---- the launch rule, over all syncs of the process ------------------------------------------------------------------------------

_live: weakref.WeakSet[Sync] = weakref.WeakSet()


def register(sync: Sync) -> None:
    """From now on `sync` takes part in the launch rule."""
    _live.add(sync)


def live() -> list[Sync]:
    """The open syncs of this process, in the order in which they were made."""
    return sorted((sync for sync in _live if not sync._closed), key=lambda sync: sync.index)


def refresh_gate() -> None:
    """Arms the gate, through which collectives launch what is due, exactly while something is due."""
    from ._backend import gate

    gate.armed = any(sync.phase is Phase.DUE for sync in _live)


def launch_due(syncs: Iterable[Sync], reason: str) -> None:
    """Launches those averages of `syncs` that are due, and waits for them."""
    launch([(sync, reason) for sync in syncs if sync.phase is Phase.DUE])


def launch(syncs: Sequence[tuple[Sync, str]], unknown: Sequence[Sync] = ()) -> None:
    """Launches the averages of `syncs`, each for its reason, then waits for all of them.

    unknown: syncs that are due and whose place in the order of steps was not seen yet. If the wait lasts, they are taken for
    skipped and launched too: on another rank they may come first, and it then waits for them before it comes here.
    """
    works = [(sync, sync.begin(reason)) for sync, reason in syncs]
    refresh_gate()
    if unknown:
        deadline = time.monotonic() + UNKNOWN_ORDER_PATIENCE_S
        while time.monotonic() < deadline and not all(work.is_completed() for _, work in works):
            time.sleep(0.0005)
        if not all(work.is_completed() for _, work in works):
            works += [(sync, sync.begin(SIBLING_STEP)) for sync in unknown if sync.phase is Phase.DUE]
            refresh_gate()
    for sync, work in works:
        sync.end(work)


@contextlib.contextmanager
def averaged(syncs: Sequence[Sync]) -> Iterator[None]:
    """global_average() of several syncs at once."""
    outer = [sync for sync in syncs if not sync._inside_average]
    launch_due(outer, "global_average")
    saved: list[tuple[Tensor, Tensor]] = []
    equal = {sync: sync._replicas_equal for sync in outer}
    try:
        for sync in outer:
            views = sync._model_views()
            saved += [(view, view.clone()) for view in views]
            sync._inside_average = True
            sync._exact_in_place("global_average")
        yield
    finally:
        with torch.no_grad():
            for view, local in saved:
                view.copy_(local)
        for sync in outer:
            sync._inside_average = False
            sync._replicas_equal = equal[sync]
