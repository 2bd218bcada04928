"""Binds syncs to modules and optimizers: `attach()` by hand, and by itself for DDP modules on an averaging dssync group.

A DDP module is attached at its first forward: a communication hook leaves its gradients local, the optimizer's post-step hook
launches the average. While an averaging group exists, three methods of DistributedDataParallel are wrapped (`_pre_forward`,
`join_hook`, `_sync_final_model`); modules pay nothing, torch.compile breaks its graph there and goes on, and the originals are back
once the last such group is destroyed. What would be wrong or approximate behind the user's back stays exact, with one WARNING that
names why.
"""

from __future__ import annotations

import functools
import gc
import logging
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim import Optimizer

from . import sync as _sync
from ._layout import Named, flat_view
from .sync import HYBRID_WANTS_DDP, Family, Phase, Sync

if TYPE_CHECKING:
    from ._backend import Group

logger = logging.getLogger("dssync_pg")

_COPY_KEEPERS = (
    "lookahead",
    "schedulefree",
    "fp16optimizer",
    "mixedprecision",
    "masterweight",
    "distributedfused",
    "zerooptimizer",
)
"""Parts of class names, lower case, of optimizers that keep parameters of their own beside the module's."""

_COPY_KEYS = frozenset(
    {"master_param", "master_params", "master", "slow_buffer", "slow_param", "slow_params", "cached_params", "z"}
)
"""Keys of optimizer state under which such optimizers are known to keep them."""


class Refused(ValueError):
    """This module or optimizer cannot be averaged; the text says why."""


class _Binding:
    """What is known of one module: its syncs, and for DDP the state of its communication hook."""

    def __init__(self, module: nn.Module, group: Group) -> None:
        self.group = group
        self.family = Family(plain=not isinstance(module, DDP))
        self.decided = False
        self.fruitless_searches = 0
        self.hook_registered = False
        self.ignored_buffers: set[str] = set()  # names added to DDP's parameters_to_ignore
        self.handles: list[Any] = []  # removable hooks on the module, for modules that are not DDP

    @property
    def syncs(self) -> list[Sync]:
        return self.family.syncs


_bindings: weakref.WeakKeyDictionary[nn.Module, _Binding] = weakref.WeakKeyDictionary()
_groups: list[Group] = []  # with auto_attach
_hooks_of: weakref.WeakKeyDictionary[Sync, list[Any]] = weakref.WeakKeyDictionary()


# ---- for people ----------------------------------------------------------------------------------------------------------------


def attach(model: nn.Module, optimizer: Optimizer, params: Iterable[Tensor] | None = None, *,
           group: dist.ProcessGroup | None = None) -> Sync:  # fmt: skip
    """Average `optimizer`'s parameters of `model` in groups after each of its steps. Collective.

    model: a DDP module on a dssync group (its gradients become local), or a plain module (rank 0's parameters and buffers are
    broadcast first; `sync.no_sync()` then accumulates). params: only these of the optimizer's parameters; default: all that are
    `model`'s. group: for plain modules; default: the default group.

    Returns the Sync; the existing one if `model` and `optimizer` are attached already. Raises ValueError, on every rank, where
    averaging would be wrong: no parameter in common, another sync's parameters, an optimizer that keeps copies of the parameters, a
    user's communication hook; RuntimeError, on every rank, where ranks differ.
    """
    module = getattr(model, "_orig_mod", model)
    if isinstance(module, DDP):
        if group is not None and group is not module.process_group:
            raise ValueError("dssync: group= differs from the DDP module's own process group; leave it out")
        pg = module.process_group
    else:
        if group is None and not dist.is_initialized():
            raise ValueError(
                'dssync: attach() needs a process group: call torch.distributed.init_process_group(backend="dssync") first'
            )
        pg = group if group is not None else dist.distributed_c10d._get_default_group()
    info = _group_of(pg, module)
    if info is None:
        raise ValueError(
            'dssync: attach() needs a group of backend "dssync" that averages: the default group, or one made with '
            'dssync_pg.Options (not all_reduce="exact")'
        )
    wanted = None if params is None else {id(param) for param in params}
    binding = _bindings.get(module)
    if binding is not None:
        for sync in binding.syncs:
            if sync.optimizer is optimizer and wanted is None:
                return sync
    return _attach(module, lambda: [optimizer], info, wanted)[0]


def get_syncs(model: nn.Module | None = None) -> tuple[Sync, ...]:
    """The syncs of `model` (DDP or plain, compiled or not), or of the whole process."""
    if model is None:
        return tuple(_sync.live())
    binding = _bindings.get(getattr(model, "_orig_mod", model))
    return tuple(binding.syncs) if binding is not None else ()


@contextmanager
def global_average(model: nn.Module) -> Iterator[None]:
    """`Sync.global_average()` for every sync of `model`; does nothing for a model that has none (its replicas are equal)."""
    with _sync.averaged(get_syncs(model)):
        yield


# ---- attaching -----------------------------------------------------------------------------------------------------------------


def _group_of(pg: dist.ProcessGroup, module: nn.Module) -> Group | None:
    from ._backend import group_of

    device = next((param.device for param in module.parameters()), torch.device("cpu"))
    return group_of(pg, device)


def _attach(module: nn.Module, find: Callable[[], Sequence[Optimizer]], group: Group, wanted: set[int] | None) -> list[Sync]:
    """Makes the syncs of the optimizers that `find` returns, after all ranks have agreed that they can be made, alike.

    Empty if no rank found an optimizer. Raises what stood in the way on this rank, or RuntimeError where ranks disagree.
    """
    made: list[Sync] = []
    problem: Exception | None = None
    where = _describe(module)
    binding = _bindings.get(module) or _Binding(module, group)
    try:
        optimizers = find()
        for optimizer in optimizers:
            _refuse(module, optimizer, binding)
        if group.plan.kind == "hybrid" and optimizers and not isinstance(module, DDP):
            raise ValueError(f"dssync: {HYBRID_WANTS_DDP}")
        for optimizer in optimizers:
            made.append(_make_sync(module, optimizer, group, binding, wanted))
        mine: tuple[str, Any] = ("attached", [sync.layout_summary() for sync in made])
    except Exception as error:  # told to the other ranks before it is raised here: they must not wait for this one
        problem = error
        mine = ("refused", f"{type(error).__name__}: {error}")
    views = group.exchange(mine)
    different = _difference(views)
    if problem is None and different is None:
        for sync in made:
            sync.use_plan(group.plan_for(sync.bytes))
        if made:
            _bindings[module] = binding
            _install(module, binding, made)
            for sync in made:
                _announce(sync, where)
                sync.sense_contention()
        return made
    for sync in made:
        if sync not in _hooks_of:
            binding.syncs.remove(sync)
            sync.close()
    if problem is not None and different is None:
        raise problem
    raise RuntimeError(f"dssync: cannot attach {where}: {different}") from problem


def _describe(module: nn.Module) -> str:
    return f"DDP({type(module.module).__name__})" if isinstance(module, DDP) else type(module).__name__


def _difference(views: Sequence[tuple[str, Any]]) -> str | None:
    """How the first rank that differs from rank 0 differs; None if all are alike."""
    for rank, (verdict, detail) in enumerate(views):
        if verdict != views[0][0]:
            texts = [f"rank {r}: {v if v == 'attached' else d}" for r, (v, d) in ((0, views[0]), (rank, (verdict, detail)))]
            return f"ranks disagree ({'; '.join(texts)}). Every rank must build the same model and optimizer."
        if verdict == "attached" and detail != views[0][1]:
            if len(detail) != len(views[0][1]):
                return f"rank 0 has {len(views[0][1])} optimizers for it, rank {rank} has {len(detail)}"
            for (ours, our_names), (theirs, their_names) in zip(views[0][1], detail, strict=False):
                if ours != theirs:
                    pair = next(((a, b) for a, b in zip(our_names, their_names, strict=False) if a != b), None)
                    if pair is None:
                        pair = (f"{len(our_names)} tensors", f"{len(their_names)} tensors")
                    return f"the layouts of rank 0 and rank {rank} differ: {pair[0]} against {pair[1]}"
    return None


def _make_sync(module: nn.Module, optimizer: Optimizer, group: Group, binding: _Binding, wanted: set[int] | None) -> Sync:
    names = _names(module, wanted)
    held = [param for entry in optimizer.param_groups for param in entry["params"]]
    if not any(id(param) in names for param in held):
        raise Refused(
            f"{type(optimizer).__name__} holds none of the module's parameters "
            "(does it step copies of them, as optimizers with fp32 masters do?)"
        )
    for param in held:
        if id(param) in names and param.numel():
            try:
                flat_view(param)
            except ValueError as error:
                raise Refused(f"parameter {names[id(param)]}: {error}") from None
    for sync in _sync.live():
        if sync.optimizer is optimizer and wanted is None and sync._group is group:
            sync._names.update(names)  # one sync per optimizer, also where it steps several modules
            sync._layout_cache = None
            if sync not in binding.syncs:
                binding.syncs.append(sync)
            return sync
        clash = next((names[id(p)] for p in held if id(p) in names and id(p) in sync._names and _holds(sync, p)), None)
        if clash is not None:
            raise Refused(
                f"parameter {clash} already belongs to {sync.name} ({type(sync.optimizer).__name__}): detach() that first"
            )
    buffers = [] if binding.syncs else _batch_norm_statistics(module)
    sync = Sync(group, module, optimizer, binding.family, names, buffers, group.next_sync_index())
    binding.syncs.append(sync)
    return sync


def _holds(sync: Sync, param: Tensor) -> bool:
    return any(param is held for entry in sync.optimizer.param_groups for held in entry["params"])


def _names(module: nn.Module, wanted: set[int] | None) -> dict[int, str]:
    """The parameters that may be averaged: id -> name. DDP's ignored ones are left out."""
    ignored = module.parameters_to_ignore if isinstance(module, DDP) else set()
    root = module.module if isinstance(module, DDP) else module
    return {id(p): name for name, p in root.named_parameters() if name not in ignored and (wanted is None or id(p) in wanted)}


def _batch_norms(module: nn.Module) -> list[tuple[str, _BatchNorm]]:
    root = module.module if isinstance(module, DDP) else module
    return [
        (name, child)
        for name, child in root.named_modules()
        if isinstance(child, _BatchNorm) and child.track_running_stats and child.running_mean is not None
    ]


def _batch_norm_statistics(module: nn.Module) -> list[Named]:
    """Running means and variances, averaged with the parameters (integer counters never are)."""
    ignored = module.parameters_to_ignore if isinstance(module, DDP) else set()
    found = []
    for name, child in _batch_norms(module):
        for key in ("running_mean", "running_var"):
            full = f"{name}.{key}" if name else key
            buffer = getattr(child, key)
            if full not in ignored and buffer is not None:
                found.append(Named(full, buffer))
    return found


def _install(module: nn.Module, binding: _Binding, made: Sequence[Sync]) -> None:
    """Puts the hooks on. Nothing can fail between here and the end of attach()."""
    if isinstance(module, DDP):
        if not binding.hook_registered:
            module.register_comm_hook(_HookState(module), _gradient_hook)
            binding.hook_registered = True
        _keep_batch_norm_statistics(module, binding)
    elif not binding.handles:
        from torch.distributed.utils import _sync_module_states

        _sync_module_states(module, binding.group.process_group(), 25 << 20, 0, set())
        binding.handles.append(module.register_forward_pre_hook(_ModuleHook(_before_plain_forward, {}.get)))
    target = module.module if isinstance(module, DDP) else module
    known = target in _warns_on_state_dict
    _warns_on_state_dict[target] = weakref.ref(binding)
    if not known:
        binding.handles.append(target.register_state_dict_pre_hook(_ModuleHook(_before_state_dict, getattr)))
    binding.decided = True
    for sync in made:
        if sync in _hooks_of:
            continue
        _sync.register(sync)
        _hooks_of[sync] = [sync.optimizer.register_step_post_hook(_StepHook(sync))]
        if binding.family.plain:
            _hooks_of[sync] += _watch_backward(sync)


def _announce(sync: Sync, where: str) -> None:
    plan, options = sync._plan, sync._group.options
    layout = sync._layout()
    crossing = f", crossings between racks {plan.delay} steps late" if plan.rack_count > 1 and plan.delay else ""
    gradients = "are averaged inside racks" if plan.kind == "hybrid" else "stay local"
    state = {"none": "optimizer state stays local", "v": "with second moments", "all": "with optimizer state"}
    logger.info(
        "dssync: %s attached to %s and %s: gradients %s; %.2f MiB are averaged after each step, %s, plan %s of %d rounds "
        "in groups of up to %d (world size %d)%s%s. auto_attach=False keeps it exact.",
        sync.name,
        where,
        type(sync.optimizer).__name__,
        gradients,
        layout.bytes / 2**20,
        state[options.average_state],
        plan.kind,
        plan.period,
        plan.max_group_size,
        plan.world_size,
        crossing,
        f", the first {options.warmup_steps} steps exactly" if options.warmup_steps else "",
    )


def release(sync: Sync, abort: bool = False) -> None:
    """Takes every hook of `sync` off; DDP's communication hook, which stays, all-reduces gradients exactly from now on.

    abort: what is under way is given up, not waited for.
    """
    for handle in _hooks_of.pop(sync, []):
        handle.remove()
    module = sync.module
    binding = _bindings.get(module) if module is not None else None
    if sync in sync.family.syncs:
        sync.family.syncs.remove(sync)
    if binding is not None and module is not None and not binding.syncs:
        for handle in binding.handles:
            handle.remove()
        binding.handles.clear()
        _warns_on_state_dict.pop(module.module if isinstance(module, DDP) else module, None)
        if isinstance(module, DDP):
            module.parameters_to_ignore = set(module.parameters_to_ignore) - binding.ignored_buffers
            binding.ignored_buffers = set()
            module._assign_modules_buffers()
    sync.close(abort)
    _sync.refresh_gate()


# ---- what stays exact ------------------------------------------------------------------------------------------------------------


def _refuse(module: nn.Module, optimizer: Optimizer, binding: _Binding) -> None:
    """Raises Refused, with the reason, for what must stay exact."""
    if isinstance(module, DDP):
        _refuse_ddp(module, binding)
    for name, param in module.named_parameters():
        if hasattr(param, "device_mesh") and hasattr(param, "placements"):
            raise Refused(f"parameter {name} is a DTensor")
    kind = type(optimizer).__name__
    for cls in type(optimizer).__mro__:
        if cls.__name__ == "ZeroRedundancyOptimizer":
            raise Refused("ZeroRedundancyOptimizer keeps each parameter's state on one rank and needs equal gradients")
        if _named_copy_keeper(cls.__name__):
            raise Refused(f"{kind} keeps copies of the parameters, which would not be averaged")
        if "lbfgs" in cls.__name__.lower():
            raise Refused(f"{kind} may run its closure a different number of times on each rank")
    if _keeps_copies(optimizer):
        raise Refused(f"{kind} keeps copies of the parameters in its state, which would not be averaged")


def _named_copy_keeper(name: str) -> bool:
    return any(part in name.lower().replace("_", "") for part in _COPY_KEEPERS)


def _refuse_ddp(ddp: DDP, binding: _Binding) -> None:
    if ddp.mixed_precision is not None:
        raise Refused("DDP mixed_precision steps fp32 copies of the parameters")
    if ddp._comm_hooks and not binding.hook_registered:
        raise Refused("the module has a communication hook of its own")
    if any(hasattr(param, "_in_backward_optimizers") for param in ddp.parameters()):
        raise Refused("its optimizer runs inside the backward pass")
    if getattr(ddp, "_use_python_reducer", False):
        raise Refused("DDP's Python reducer (compiled autograd) has no gradient buckets")
    if getattr(ddp, "_delay_all_reduce_params", None):
        raise Refused("delay_all_reduce_named_params is in use")


def _keeps_copies(optimizer: Optimizer) -> bool:
    return any(
        isinstance(key, str) and key in _COPY_KEYS for state in optimizer.state.values() if isinstance(state, dict) for key in state
    )


def _optimizers_of(ddp: DDP) -> list[Optimizer]:
    """Every optimizer alive that holds a parameter of `ddp`, in an order that is the same on every rank.

    Raises Refused if one of them is wrapped in something that keeps copies of the parameters.

    HACK: torch keeps no list of optimizers and has no hook for their creation, so the garbage collector's list is searched, once a
    module (about 0.1 s for 300,000 objects). type() and not isinstance(): the latter would wake lazy proxies.
    """
    mine = {id(param) for param in ddp.parameters()}
    kinds: dict[type, str] = {}
    found, wrappers = [], []
    for candidate in gc.get_objects():
        cls = type(candidate)
        kind = kinds.get(cls)
        if kind is None:
            kind = "optimizer" if issubclass(cls, Optimizer) else "wrapper" if _named_copy_keeper(cls.__name__) else "other"
            kinds[cls] = kind
        if kind == "wrapper" and hasattr(candidate, "__dict__"):
            wrappers.append(candidate)
        elif kind == "optimizer" and any(
            id(param) in mine for entry in candidate.__dict__.get("param_groups", ()) for param in entry["params"]
        ):
            found.append(candidate)
    for wrapper in wrappers:
        if any(value is optimizer for value in vars(wrapper).values() for optimizer in found):
            raise Refused(f"{type(wrapper).__name__} keeps copies of the parameters, which would not be averaged")
    return sorted(found, key=lambda optimizer: _position(ddp, optimizer))


def _position(ddp: DDP, optimizer: Optimizer) -> int:
    """Where the optimizer's first parameter stands in the module: an order that is the same on every rank."""
    held = {id(param) for entry in optimizer.param_groups for param in entry["params"]}
    return next(index for index, param in enumerate(ddp.parameters()) if id(param) in held)


# ---- hooks -----------------------------------------------------------------------------------------------------------------------


class _HookState:
    """State of the DDP communication hook: points at the module weakly, and is empty in copies and pickles of it."""

    def __init__(self, ddp: DDP | None = None) -> None:
        self.ddp = weakref.ref(ddp) if ddp is not None else None

    def __reduce__(self) -> tuple[type[_HookState], tuple[()]]:
        return (_HookState, ())


class _StepHook:
    """The optimizer's post-step hook; empty in copies and pickles of the optimizer."""

    def __init__(self, sync: Sync | None = None) -> None:
        self.sync = sync

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.sync is not None:
            _after_step(self.sync)

    def __reduce__(self) -> tuple[type[_StepHook], tuple[()]]:
        return (_StepHook, ())


@torch._disable_dynamo
def _after_step(sync: Sync) -> None:
    first = sync.step == 0
    sync.after_step()
    if first and _keeps_copies(sync.optimizer):
        logger.warning(
            "dssync: %s keeps copies of the parameters in its state, which are not averaged: gradients are all-reduced from now on",
            type(sync.optimizer).__name__,
        )
        sync.detach()


def _gradient_hook(state: _HookState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's communication hook: gradients that a sync owns stay local, all others are all-reduced as DDP would."""
    ddp = state.ddp() if state.ddp is not None else None
    binding = _bindings.get(ddp) if ddp is not None else None
    syncs = binding.syncs if binding is not None else []
    if binding is not None and bucket.is_last():
        task = torch._C._current_graph_task_id()
        binding.family.stepped.clear()
        for sync in syncs:
            if task != -1 or sync.family is binding.family:  # -1: join's shadow backward, once a sync and not once a module
                sync.backward_ran(task)
    pairs = list(zip(bucket.parameters(), bucket.gradients(), strict=False))
    foreign = [gradient for param, gradient in pairs if not any(sync.owns(param) for sync in syncs)]
    if binding is not None and any(sync.plan.kind == "hybrid" for sync in syncs):
        own = [gradient for param, gradient in pairs if any(sync.owns(param) for sync in syncs)]
        futures = [binding.group.average_in_rack(own)] if own else []
        futures += [_all_reduced(foreign, bucket, ddp)] if foreign else []
        return torch.futures.collect_all(futures).then(lambda _: bucket.buffer())
    if foreign:
        return _all_reduced(foreign, bucket, ddp)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


# DDP checks a hook's annotations and does not resolve those that are text.
_gradient_hook.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}


def _all_reduced(gradients: Sequence[Tensor], bucket: dist.GradBucket, ddp: DDP | None) -> torch.futures.Future[Tensor]:
    """The mean of `gradients` over all ranks, in place, as DDP's own reduction computes it (divide, then SUM)."""
    pg = ddp.process_group if ddp is not None else dist.distributed_c10d._get_default_group()
    flat = torch.cat([grad.reshape(-1) for grad in gradients]).div_(pg.size())

    def spread(future: torch.futures.Future[list[Tensor]]) -> Tensor:
        for grad, reduced in zip(gradients, future.value()[0].split([grad.numel() for grad in gradients]), strict=False):
            grad.copy_(reduced.view_as(grad))
        return bucket.buffer()

    reduced: torch.futures.Future[Tensor] = dist.all_reduce(flat, group=pg, async_op=True).get_future().then(spread)
    return reduced


def _watch_backward(sync: Sync) -> list[Any]:
    """For modules that are not DDP: the first gradient of a backward pass makes the average of this step due."""
    reference = weakref.ref(sync)

    def grad_accumulated(_: Tensor) -> None:
        found = reference()
        if found is None or found._closed:
            return
        if found._suppressed:
            found.suppressed_backward_ran()
            return
        task = torch._C._current_graph_task_id()
        if found.phase is not Phase.DUE or found._task != task:
            found.family.stepped.clear()
            found.backward_ran(task)

    return [item.tensor.register_post_accumulate_grad_hook(grad_accumulated) for item in sync._parameters()]


class _ModuleHook:
    """A hook on a module that does nothing in copies (EMA) and pickles of it, which load without this package.

    HACK: it pickles as a builtin of the same arity that changes nothing, `getattr` or `{}.get`, since an object of this package
    would make every torch.save(module) depend on it.
    """

    def __init__(self, function: Callable[..., Any], inert: Callable[..., Any]) -> None:
        self.function, self.inert = function, inert

    def __call__(self, *args: Any) -> None:
        self.function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return (functools.partial, (self.inert,))


@torch._disable_dynamo
def _before_plain_forward(module: nn.Module, args: Any) -> None:
    binding = _bindings.get(module)
    if binding is not None:
        _sync.launch_due(binding.syncs, "next forward")


# Weak on both sides: the inner module of a DDP module may outlive it and be wrapped again.
_warns_on_state_dict: weakref.WeakKeyDictionary[nn.Module, weakref.ref[_Binding]] = weakref.WeakKeyDictionary()


def _before_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    reference = _warns_on_state_dict.get(module)
    binding = reference() if reference is not None else None
    for sync in binding.syncs if binding is not None else []:
        if not sync._replicas_equal and not sync._inside_average:
            sync._warn(
                "state_dict",
                "state_dict() holds this rank's own weights, which differ from the other ranks' between averages. Save and "
                "evaluate inside `with dssync_pg.global_average(model):`.",
            )


def _keep_batch_norm_statistics(ddp: DDP, binding: _Binding) -> None:
    """DDP would broadcast rank 0's running statistics over the averaged ones at each forward: leave them out of its broadcast.

    The batch counters go with them; every rank counts its own, and a broadcast of them alone would be a global barrier a step.
    """
    if binding.ignored_buffers:
        return
    for name, _ in _batch_norms(ddp):
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            full = f"{name}.{key}" if name else key
            if full not in ddp.parameters_to_ignore:
                binding.ignored_buffers.add(full)
    ddp.parameters_to_ignore = set(ddp.parameters_to_ignore) | binding.ignored_buffers
    ddp._assign_modules_buffers()


# ---- auto-attach -----------------------------------------------------------------------------------------------------------------

_SEARCHES = 3
"""Forwards of a DDP module in which its optimizer is looked for; the steps of all but the last are exact either way."""


def _auto_attach(ddp: DDP) -> None:
    binding = _bindings.get(ddp)
    if binding is None:
        group = _group_of(ddp.process_group, ddp)
        if group is None or not group.options.auto_attach:
            return
        binding = _bindings[ddp] = _Binding(ddp, group)
    if binding.decided:
        return
    try:
        made = _attach(ddp, lambda: _optimizers_of(ddp), binding.group, None)
        if not made:
            binding.fruitless_searches += 1
            if binding.fruitless_searches < _SEARCHES:
                return
            raise Refused("no torch optimizer holds its parameters (does yours step copies of them, as fp32 masters do?)")
    except Refused as reason:
        binding.decided = True
        logger.warning("dssync: %s stays exact (all-reduced gradients): %s", _describe(ddp), reason)
        return
    _warn_of_barriers(ddp, _describe(ddp))


def _warn_of_barriers(ddp: DDP, where: str) -> None:
    if ddp.find_unused_parameters and not ddp.static_graph:
        logger.warning("dssync: %s: find_unused_parameters=True all-reduces a bitmap over all ranks in every backward", where)
    if any(isinstance(child, nn.SyncBatchNorm) for child in ddp.modules()):
        logger.warning("dssync: %s: SyncBatchNorm all-reduces over all ranks in every forward and backward", where)


@torch._disable_dynamo
def _before_ddp_forward(ddp: DDP) -> None:
    binding = _bindings.get(ddp)
    if binding is not None and binding.decided:
        _sync.launch_due(binding.syncs, "next forward")
    elif torch.is_grad_enabled():
        _auto_attach(ddp)


def _wrap_pre_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    def _pre_forward(self: DDP, *inputs: Any, **kwargs: Any) -> Any:
        _before_ddp_forward(self)
        return original(self, *inputs, **kwargs)

    return _pre_forward


def _wrap_join_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    def join_hook(self: DDP, **kwargs: Any) -> Any:
        _auto_attach(self)  # a rank may join before its first forward: it must be attached like the others
        return original(self, **kwargs)

    return join_hook


def _wrap_sync_final_model(original: Callable[..., Any]) -> Callable[..., Any]:
    def _sync_final_model(self: DDP, is_last_joiner: bool) -> Any:
        binding = _bindings.get(self)
        if binding is None or not binding.syncs:
            return original(self, is_last_joiner)
        _sync.launch_due(binding.syncs, "next forward")
        for sync in binding.syncs:
            sync._settle(sync.step)  # else corrections would move equal replicas apart again
            sync._exact_in_place("the end of join")
        ignored = self.parameters_to_ignore
        self.parameters_to_ignore = set(ignored) - binding.ignored_buffers
        try:
            return original(self, is_last_joiner)
        finally:
            self.parameters_to_ignore = ignored

    return _sync_final_model


_WRAPPERS = {"_pre_forward": _wrap_pre_forward, "join_hook": _wrap_join_hook, "_sync_final_model": _wrap_sync_final_model}
_wrapped: dict[str, Callable[..., Any]] = {}


def enable(group: Group) -> None:
    """`group` averages: its DDP modules are attached by themselves (with auto_attach) or may be attached by hand."""
    _groups.append(group)
    for name, wrap in _WRAPPERS.items():
        if name not in _wrapped:
            original = getattr(DDP, name)
            _wrapped[name] = functools.wraps(original)(wrap(original))
            setattr(DDP, name, _wrapped[name])


def disable(group: Group, abort: bool) -> None:
    """`group` is being destroyed: what is due is launched (unless it is aborted or an exception is on its way), hooks come off."""
    syncs = [sync for sync in _sync.live() if sync._group is group]
    try:
        if not abort and sys.exc_info()[0] is None:
            _sync.launch_due(syncs, "destroy")
    finally:
        for sync in syncs:
            release(sync, abort)
        if group in _groups:
            _groups.remove(group)
        if not _groups:
            for name, wrapper in list(_wrapped.items()):
                if getattr(DDP, name) is wrapper:  # else somebody wrapped ours, which does nothing more without groups
                    setattr(DDP, name, _wrapped.pop(name).__wrapped__)  # type: ignore[attr-defined]
