"""One rank of plans.py: measures every series of a case in turn, and lets rank 0 write what was found.

A series is a way to take steps: torch's own exchanges, exact ones of dssync, or steps of an optimizer that averages by a plan. In
each repetition every series has its turn of several steps, in an order that rotates. What a plan exchanges in the background is
under way before the clock of a turn starts, so that a turn shows steps as a long training has them; link counters run from before
that until all is over.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from cluster import link_bytes
from torch import nn

import dssync_pg
from dssync_pg import Options, Plan, Topology

PR_SET_PDEATHSIG = 1
TIMEOUT = timedelta(minutes=5)
PIECES = 4  # of the composed exchange that overlaps its phases
LEAST_STEPS = 2

Group: TypeAlias = Any
Record: TypeAlias = dict[str, Any]


def _nothing(*_: object) -> None:
    pass


@dataclass
class Series:
    name: str
    step: Callable[[], object]
    steps: int = 1
    """A turn, besides `warmup`."""
    warmup: int = 0
    begin: Callable[[int], object] = _nothing
    """Before a turn, with its number; not timed, and so is what follows."""
    end: Callable[[], object] = _nothing
    check: Callable[[], object] = _nothing
    """That the last turn did what it should."""
    plan: Plan | None = None
    ends: list[torch.Tensor] = field(default_factory=list)
    """Of each turn [ranks, steps + 1]: when each rank had ended the step before the first, the first, ..."""
    sent: dict[str, list[int]] = field(default_factory=dict)
    """Bytes up and down each link in all turns."""


# ---- what is measured ----------------------------------------------------------------------------------------------------------


class Bench:
    def __init__(self, spec: Record) -> None:
        self.spec = spec
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.bed = os.environ.get("CLUSTER_NAME")
        self.bytes = round(spec["mib"] * (1 << 20))
        self.series: list[Series] = []
        self.topology: Topology | None = None

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def write(self, record: Record) -> None:
        if self.rank == 0:
            with Path(self.spec["out"]).open("a") as out:
                print(json.dumps({"case": self.spec["case"], **record}), file=out)

    def find_topology(self) -> None:
        """By the probe, or what the spec says; rank 0's file is what groups read."""
        if "topology" in self.spec:
            self.topology = Topology.from_json(self.spec["topology"])
            report = None
        else:
            from dssync_pg._backend import group_of
            from dssync_pg.probe import probe

            pg = dist.new_group(timeout=TIMEOUT, backend="dssync", pg_options=Options(topology="flat", transport="tcp"))
            group = group_of(pg, torch.device("cpu"))
            if group is None or group.engine is None:
                raise RuntimeError("the probe needs the native engine")
            self.topology, report = probe(group.engine, self.rank, self.size, TIMEOUT, group.exchange)
            dist.destroy_process_group(pg)
            self.say(str(report))
        if self.rank == 0:
            self.topology.save(self._file())
        dist.barrier()
        self.write({"series": "topology", "topology": self.topology.to_json(), "probe": report and str(report)})

    def _file(self) -> str:
        return str(Path(self.spec["out"]).with_suffix(".topology.json"))

    def options(self, **more: Any) -> Options:
        return Options(topology=self._file() if self.topology is not None else "flat", replan_steps="never", **more)

    def measure(self) -> None:
        """All series in turn."""
        for repetition in range(self.spec["repetitions"]):
            for turn in range(len(self.series)):
                series = self.series[(repetition + turn) % len(self.series)]
                self._turn(series, repetition)
        for series in self.series:
            self.write(_record(series))

    def _turn(self, series: Series, repetition: int) -> None:
        series.begin(repetition)
        dist.barrier()  # nothing of what came before is still on its way
        before = self._links()
        dist.barrier()
        for _ in range(series.warmup):
            series.step()
        ends = [time.perf_counter()]  # one clock for all ranks: they are on one machine
        for _ in range(series.steps):
            series.step()
            ends.append(time.perf_counter())
        series.end()
        dist.barrier()
        for link, counted in self._links().items():
            sums = series.sent.setdefault(link, [0, 0])
            for way in (0, 1):
                sums[way] += counted[way] - before[link][way]
        series.check()
        mine = torch.tensor(ends, dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine)
        series.ends.append(torch.stack(everyone))
        self.say(f"{self.spec['case']}, turn {repetition}: {series.name} {mean_step(series.ends[-1]):.3f} s a step")

    def _links(self) -> dict[str, tuple[int, int]]:
        if self.bed is None or self.rank != 0:
            return {}
        return {name: (link.up, link.down) for name, link in link_bytes(self.bed).items()}

    # ---- exchanges of one tensor

    def add_exchange(self, name: str, exchange: Callable[[torch.Tensor], object], steps: int = 2) -> None:
        """`exchange` sums a tensor over all ranks."""
        tensor = torch.empty(self.bytes // 4)
        expected = sum(range(1, self.size + 1)) * self.size ** (steps - 1)

        def check() -> None:
            if tensor.min() != expected or tensor.max() != expected:
                raise AssertionError(f"{name} gives {tensor.min()} to {tensor.max()}, not {expected}")

        self.series.append(Series(name, lambda: exchange(tensor), steps, begin=lambda _: tensor.fill_(self.rank + 1), check=check))

    def add_gloo(self) -> None:
        self.add_exchange("gloo ring", dist.all_reduce)

    def add_composed(self) -> None:
        """The hierarchical all-reduces that can be made of torch's groups."""
        racks: list[list[int]] = self.spec["racks"]
        mine = next(rack for rack in racks if self.rank in rack)
        inside = [_gloo(rack) for rack in racks][racks.index(mine)]
        leaders = _gloo([rack[0] for rack in racks])

        def by_leaders(tensor: torch.Tensor) -> None:
            dist.reduce(tensor, mine[0], group=inside)
            if self.rank == mine[0]:
                dist.all_reduce(tensor, group=leaders)
            dist.broadcast(tensor, mine[0], group=inside)

        self.add_exchange("composed: leaders", by_leaders)
        if len({len(rack) for rack in racks}) > 1:
            return
        columns = [list(column) for column in zip(*racks, strict=True)]
        across = [_gloo(column) for column in columns][mine.index(self.rank)]

        def two_dimensional(tensor: torch.Tensor, pieces: int) -> None:
            parts = tensor.chunk(pieces)
            shards = [torch.empty(len(part) // len(mine)) for part in parts]
            works = [dist.reduce_scatter_tensor(s, p, group=inside, async_op=True) for s, p in zip(shards, parts, strict=True)]
            for steps in (
                lambda shard, _: dist.all_reduce(shard, group=across, async_op=True),
                lambda shard, part: dist.all_gather_into_tensor(part, shard, group=inside, async_op=True),
            ):
                following = []
                for work, shard, part in zip(works, shards, parts, strict=True):
                    work.wait()
                    following.append(steps(shard, part))
                works = following
            for work in works:
                work.wait()

        self.add_exchange("composed: two-dimensional", lambda tensor: two_dimensional(tensor, 1))
        self.add_exchange(f"composed: two-dimensional, {PIECES} pieces", lambda tensor: two_dimensional(tensor, PIECES))

    # ---- steps of plans

    def add_plans(self, kinds: Sequence[str], all_reduce: bool) -> None:
        """Each through one sync of one group, as a change of plans while training runs does it."""
        assert self.topology is not None
        pg = dist.new_group(timeout=TIMEOUT, backend="dssync", pg_options=self.options(plan="exact", auto_attach=False))
        if all_reduce:
            self.add_exchange("dssync all_reduce", lambda tensor: dist.all_reduce(tensor, group=pg))
        made: dict[Plan, list[str]] = {}
        for kind in kinds:
            try:
                plan = Plan.create(plan=kind, topology=self.topology, model_bytes=self.bytes)
            except ValueError as error:
                self.say(f"no {kind} plan: {error}")
                continue
            made.setdefault(plan, []).append(kind)
        model, optimizer = _parameters(self.bytes)
        ddp = nn.parallel.DistributedDataParallel(model, process_group=pg, init_sync=False)  # hybrid wants it
        sync = dssync_pg.attach(ddp, optimizer, group=pg)
        for plan, names in made.items():
            self.series.append(self._plan_series(names, plan, model, optimizer, sync))

    def _plan_series(self, names: list[str], plan: Plan, model: nn.Module, optimizer: Any, sync: Any) -> Series:
        def step() -> None:
            sync.backward_ran(-1)  # as if it had: no gradients are reduced
            optimizer.step()

        series = Series(f"plan {' = '.join(names)}", step, plan=plan)
        series.steps = -(-max(LEAST_STEPS, self.spec.get("steps", 0)) // plan.period) * plan.period
        series.warmup = plan.delay + 1 if plan.delay else 0

        def begin(_: int) -> None:
            sync.use_plan(plan)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(self.rank)

        def check() -> None:
            values = torch.stack([torch.stack([p.detach().min(), p.detach().max(), p.detach().mean()]) for p in model.parameters()])
            least, most, mean = values[:, 0].min(), values[:, 1].max(), values[:, 2].mean()
            dist.all_reduce(mean)
            expected = (self.size - 1) / 2
            equal = 0 < plan.longest_wait <= series.steps + series.warmup
            if abs(mean / self.size - expected) > 1e-3 or (equal and max(most - expected, expected - least) > 1e-3):
                raise AssertionError(f"{series.name}: {least} to {most} with mean {mean / self.size}, not {expected}")

        series.begin, series.check = begin, check
        series.end = lambda: sync._settle(sync.step)  # the crossings of this turn must not run into the next
        return series

    # ---- steps with compute

    def add_stragglers(self) -> None:
        """Steps that compute for a random time, under a plan, under its part inside racks alone, and with the ring."""
        assert self.topology is not None
        racks: list[list[int]] = self.spec["racks"]
        self.add_plans(["auto"], False)
        planned = self.series.pop()
        plan = planned.plan
        assert plan is not None
        if plan.rack_count == 1:
            raise RuntimeError(f"the {plan.kind} plan that was chosen has no crossing")
        groups = []
        for rack in racks:
            options = Options(topology="flat", replan_steps="never", plan=Plan.from_rounds(rounds_inside(plan, rack)))
            groups.append(dist.new_group(rack, timeout=TIMEOUT, backend="dssync", pg_options=options))
        mine = next(number for number, rack in enumerate(racks) if self.rank in rack)
        model, optimizer = _parameters(self.bytes)
        sync = dssync_pg.attach(model, optimizer, group=groups[mine])
        tensor = torch.zeros(self.bytes // 4)
        inside = Series("racks alone", optimizer.step, end=lambda: sync._settle(sync.step))
        ring = Series("gloo ring", lambda: dist.all_reduce(tensor))
        for series in (planned, inside, ring):
            series.steps = self.spec["ring_steps"] if series is ring else self.spec["steps"]
            series.warmup = 0 if series is ring else plan.delay + 1
            self.series.append(self._computing(series))

    def _computing(self, series: Series) -> Series:
        """The same compute times in a turn of every series."""
        begin, step = series.begin, series.step
        times: list[float] = []

        def begin_turn(repetition: int) -> None:
            begin(repetition)
            times[:] = compute_times(f"{self.rank} {repetition}", series.warmup + series.steps, self.spec)[::-1]

        def step_after_compute() -> None:
            time.sleep(times.pop())  # asleep: there are fewer cores than workers
            step()

        series.begin, series.step = begin_turn, step_after_compute
        return series

    # ---- training

    def add_training(self) -> None:
        """DDP with its overlap over Gloo, and over dssync."""
        if "topology" not in self.spec and self.bed is not None:
            self.find_topology()
        pg = dist.new_group(timeout=TIMEOUT, backend="dssync", pg_options=self.options())
        for name, group in (("DDP, gloo", None), ("DDP, dssync", pg)):
            torch.manual_seed(0)
            width, depth = self.spec["width"], self.spec["depth"]
            layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
            model = nn.parallel.DistributedDataParallel(nn.Sequential(*layers), process_group=group)
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
            batch = torch.randn(self.spec["batch"], width)
            step = _training_step(model, optimizer, batch)
            for _ in range(3):  # DDP has made its buckets, and dssync has found the optimizer
                step()
            syncs = dssync_pg.get_syncs(model)
            series = Series(name, step, self.spec["steps"], warmup=1, plan=syncs[0].plan if syncs else None)
            series.end = _settle_all(syncs)
            self.series.append(series)
            self.say(f"{name}: {series.plan.summary() if series.plan else 'all-reduced gradients'}")


def _training_step(model: nn.Module, optimizer: Any, batch: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    return step


def _settle_all(syncs: Sequence[Any]) -> Callable[[], None]:
    def settle() -> None:
        for sync in syncs:
            sync._settle(sync.step)

    return settle


def _parameters(size_bytes: int) -> tuple[nn.Module, Any]:
    """A model whose steps are nothing but averages."""
    model = nn.ParameterList([nn.Parameter(part.clone()) for part in torch.zeros(size_bytes // 4).split(1 << 20)])
    for parameter in model:
        parameter.grad = torch.zeros_like(parameter)
    return model, torch.optim.SGD(model.parameters(), lr=0.0)


def _gloo(ranks: Sequence[int]) -> Group:
    return dist.new_group(list(ranks), timeout=TIMEOUT, backend="gloo")


def compute_times(seed: str, count: int, spec: Record) -> list[float]:
    """Log-normal around `compute`, and now and then so many times longer."""
    chance = random.Random(seed)
    return [
        spec["compute"]
        * chance.lognormvariate(0, spec["noise"])
        * (spec["straggler_factor"] if chance.random() < spec["straggler_probability"] else 1)
        for _ in range(count)
    ]


def rounds_inside(plan: Plan, rack: Sequence[int]) -> list[list[list[int]]]:
    """What a plan does inside one rack: its rounds with whole racks in place of crossings, ranks counted from 0."""
    number = {rank: place for place, rank in enumerate(rack)}
    rounds = []
    for index, groups in enumerate(plan.rounds):
        parts = [sorted(number[rank] for rank in group if rank in number) for group in groups]
        rounds.append([list(range(len(rack)))] if plan.is_crossing(index) else [part for part in parts if part])
    return rounds


# ---- samples -------------------------------------------------------------------------------------------------------------------


def mean_step(ends: torch.Tensor) -> float:
    """ends [ranks, steps + 1]: from the slowest rank's start to the slowest rank's end, a step."""
    last = ends.max(dim=0).values
    return float((last[-1] - last[0]) / (len(last) - 1))


def median_step(turns: Sequence[torch.Tensor]) -> float:
    """The median over steps of what the slowest rank took for it."""
    return float(torch.cat([turn.diff(dim=1).max(dim=0).values for turn in turns]).quantile(0.5))


def _record(series: Series) -> Record:
    means = [mean_step(turn) for turn in series.ends]
    steps = len(series.ends) * (series.steps + series.warmup)
    return {
        "series": series.name,
        "plan": series.plan.to_bytes().hex() if series.plan else None,
        "seconds": float(torch.tensor(means, dtype=torch.float64).quantile(0.5)),
        "median_step_seconds": median_step(series.ends),
        "turns": means,
        "steps": series.steps,
        "link_bytes": {link: [way / steps for way in sums] for link, sums in series.sent.items()},
    }


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no rank outlives the command
    spec: Record = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    logging.getLogger("dssync_pg").setLevel(logging.WARNING)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    bench = Bench(spec)
    if spec["what"] == "training":
        bench.add_training()
    else:
        bench.find_topology()
        if spec["what"] == "stragglers":
            bench.add_stragglers()
        else:
            if "gloo" in spec["series"]:
                bench.add_gloo()
            if "composed" in spec["series"]:
                bench.add_composed()
            bench.add_plans(spec["plans"], "all_reduce" in spec["series"])
    bench.measure()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
