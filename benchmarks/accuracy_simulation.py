"""N workers in one process: divide-and-shuffle training as the backend does it, without the processes.

A step is what dssync_pg does to an unmodified DDP script: each worker takes its own optimizer step on its own gradient, then
parameters, BatchNorm's running statistics and, where asked, optimizer state are averaged inside the groups of the plan's round.
Where whole racks cross late, all workers of a rack add the same correction some steps later, the mean of the racks less their own
of the values at the crossing. Until then they keep their values where the plan says so; else, and of second moments, they take the
rack's mean at once.
tests/python/test_accuracy.py holds this against real ranks over backend="dssync".
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accuracy_tasks import DATA, MODELS, Data, Recipe, Run
from torch import Tensor, nn

from dssync_pg import _C, Plan, Topology

MIN_STRIPE_BYTES = 1 << 20
CUT = 1 << 10  # the plans around racks are made for 32 MiB: these small models are cut in as many stripes
V_SLICES = 8  # average_state="v": this part of the second moments takes its turn at every step


@dataclass(frozen=True)
class Method:
    """How the workers agree."""

    title: str
    gradients: str = "local"  # "all": all-reduced exactly; "groups": averaged in the shuffled groups; "racks": in them; "local"
    parameters: bool = True  # averaged in the shuffled groups after each step
    average_state: str = "none"  # none | v | all
    warmup: float = 0.0  # part of the steps averaged over everyone
    plan: str = "auto"  # striped, leaders and hybrid: for two racks
    delay: int | str = "auto"  # tau
    min_stripe_bytes: int = MIN_STRIPE_BYTES

    def plan_for(self, workers: int) -> Plan:
        """The plan that the backend would make."""
        if self.plan == "auto":
            return Plan.create(workers)
        racks = Topology.uniform(2, workers // 2, nic="500 Mbit/s", uplink="100 Mbit/s")
        return Plan.create(plan=self.plan, topology=racks, delay=self.delay)


METHODS = {
    "full": Method("full all-reduce of gradients", gradients="all", parameters=False),
    "none": Method("dssync"),
    "v": Method("dssync, average_state=v", average_state="v"),
    "all": Method("dssync, average_state=all", average_state="all"),
    "warmup": Method("dssync, exact for the first 5 %", warmup=0.05),
    "striped": Method("striped", plan="striped", min_stripe_bytes=CUT),
    "striped_0": Method("striped, delay 0", plan="striped", delay=0, min_stripe_bytes=CUT),
    "striped_all": Method("striped, average_state=all", plan="striped", average_state="all", min_stripe_bytes=CUT),
    "striped_whole": Method("striped, in one stripe", plan="striped"),
    "leaders": Method("leaders", plan="leaders", min_stripe_bytes=CUT),
    "hybrid": Method("hybrid", gradients="racks", plan="hybrid", min_stripe_bytes=CUT),
    "hybrid_all": Method("hybrid, average_state=all", gradients="racks", average_state="all", plan="hybrid", min_stripe_bytes=CUT),
    "shuffled": Method("control: gradients in shuffled groups", gradients="groups", parameters=False),
    "solo": Method("control: no averaging", parameters=False),
}


@dataclass
class Vector:
    """A list of tensors, read as one flat array a worker."""

    tensors: list[Tensor]
    scale: bool = False  # variances and second moments: a correction must not make them negative
    moment: bool = False  # second moments: racks always take their mean at once


@dataclass
class Part:
    """A view [workers, n] of what is averaged: row i is worker i's."""

    rows: Tensor
    scale: bool = False
    moment: bool = False


@dataclass
class Crossing:
    """Of one part: what the mean of its rack lacked of the average over the racks."""

    step: int
    part: Part
    correction: Tensor


class Averager:
    """Averages rows of stacked tensors in the groups of a plan."""

    def __init__(self, workers: int, plan: Plan, warmup_steps: int = 0) -> None:
        self.workers, self.warmup_steps, self.plan = workers, warmup_steps, plan
        self._exact = self._average_of([range(workers)])
        self._rounds = [self._average_of(groups) for groups in plan.rounds]
        ranks_of: dict[int, list[int]] = {}
        for rank, rack in enumerate(plan.rack_of):
            ranks_of.setdefault(rack, []).append(rank)
        self._racks = self._average_of(ranks_of.values())
        self._crossings: list[Crossing] = []

    def _average_of(self, groups: Iterable[Sequence[int]]) -> Tensor:
        matrix = torch.zeros(self.workers, self.workers)
        for group in groups:
            matrix[torch.tensor(group).unsqueeze(1), torch.tensor(group)] = 1 / len(group)
        return matrix

    def rows(self, vector: Vector) -> list[Part]:
        return [Part(tensor.detach().view(self.workers, -1), vector.scale, vector.moment) for tensor in vector.tensors]

    def average(self, parts: list[Part], step: int, turn: int, stripe: int = 0) -> None:
        """Average in place: in the groups of round (turn + stripe) mod P; over everyone while the warm-up lasts."""
        number = self.plan.round_at(turn, stripe)
        exact = step < self.warmup_steps
        late = self.plan.delay > 0 and self.plan.is_crossing(number) and not exact
        matrix = self._exact if exact else self._rounds[number]
        for part in parts:
            if not late:
                part.rows.copy_(matrix @ part.rows)
                continue
            self._crossings.append(Crossing(step, part, (matrix - self._racks) @ part.rows))
            if part.moment or not self.plan.keeps_values(number):
                part.rows.copy_(self._racks @ part.rows)

    def average_in_racks(self, parts: list[Part]) -> None:
        for part in parts:
            part.rows.copy_(self._racks @ part.rows)

    def settle(self, step: int) -> None:
        """Behind the averages of `step`: the corrections of crossings that began `delay` steps before."""
        while self._crossings and self._crossings[0].step <= step - self.plan.delay:
            crossing = self._crossings.pop(0)
            rows = crossing.part.rows
            corrected = rows + crossing.correction
            rows.copy_(corrected.maximum(rows / 4) if crossing.part.scale else corrected)

    def cut(self, vector: Vector, count: int) -> list[list[Part]]:
        """`count` slices of a vector."""
        parts = self.rows(vector)
        total = sum(part.rows.shape[1] for part in parts)
        bounds = [_C.stripe_begin(total, count, number) for number in range(count + 1)]
        slices: list[list[Part]] = [[] for _ in range(count)]
        offset = 0
        for part in parts:
            size = part.rows.shape[1]
            for number, (first, last) in enumerate(itertools.pairwise(bounds)):
                low, high = max(first - offset, 0), min(last - offset, size)
                if low < high:
                    slices[number].append(Part(part.rows[:, low:high], vector.scale, vector.moment))
            offset += size
        return slices

    def stripes(self, vectors: list[Vector], min_stripe_bytes: int) -> list[list[Part]]:
        """All vectors cut alike, in as many stripes as the first one's size asks for: stripes[s] lists their parts of stripe s."""
        size = sum(part.rows.shape[1] * part.rows.element_size() for part in self.rows(vectors[0]))
        count = _C.stripe_count(size, self.plan.stripe_count, min_stripe_bytes)
        return [[part for stripe in same for part in stripe] for same in zip(*(self.cut(v, count) for v in vectors), strict=True)]


def make_optimizer(name: str, parameters: Iterator[nn.Parameter], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=recipe.momentum, weight_decay=recipe.sgd_decay)
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=recipe.adamw_decay)


def learning_rate(lr: float, step: int, recipe: Recipe) -> float:
    """A linear ramp, then a half cosine down to 0."""
    ramp = max(1, round(recipe.ramp * recipe.steps))
    if step < ramp:
        return lr * (step + 1) / ramp
    return lr * 0.5 * (1 + math.cos(math.pi * (step - ramp) / (recipe.steps - ramp)))


def batches(data: Data, recipe: Recipe, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches [workers, batch, ...]; each worker shuffles its shard anew every epoch and drops what does not fill a batch."""
    generators = [torch.Generator().manual_seed(seed * 1000 + worker) for worker in range(recipe.workers)]
    while True:
        shuffled = (shard[torch.randperm(len(shard), generator=g)] for shard, g in zip(data.shards, generators, strict=True))
        orders = torch.stack(list(shuffled))
        for begin in range(0, orders.shape[1] - recipe.batch + 1, recipe.batch):
            chosen = orders[:, begin : begin + recipe.batch]
            yield data.train[chosen], data.targets[chosen]


def loss_of(model: nn.Module, samples: Tensor, targets: Tensor) -> Tensor:
    """The sum over the replicas of each one's mean loss: every replica gets the gradient of its own."""
    logits = model(model.stack(samples))
    workers = len(logits)
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="sum") * workers / targets.numel()


class Workers:
    """N replicas, their optimizer, and how they agree."""

    def __init__(self, method: Method, optimizer: str, lr: float, seed: int, recipe: Recipe, plan: Plan | None = None) -> None:
        self.method, self.recipe, self.steps_done = method, recipe, 0
        self.min_stripe_bytes = method.min_stripe_bytes
        torch.manual_seed(seed)
        self.single = MODELS[recipe.task]()
        self.model = MODELS[recipe.task](recipe.workers)
        self._start_from(self.single)
        self.parameters = list(self.model.parameters())
        self.optimizer = make_optimizer(optimizer, self.model.parameters(), lr, recipe)
        plan = plan or method.plan_for(recipe.workers)
        self.averager = Averager(recipe.workers, plan, math.ceil(method.warmup * recipe.steps))
        self._stripes: list[list[Part]] = []  # views of what is averaged; made after the first step, which makes the state
        self._moments: list[list[Part]] = []

    def _start_from(self, single: nn.Module) -> None:
        values = single.state_dict()
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                value = values[name]
                tensor.copy_(value.repeat(self.recipe.workers, *[1] * (value.dim() - 1)) if value.dim() else value)

    def _state(self, name: str) -> list[Tensor]:
        return [self.optimizer.state[p][name] for p in self.parameters if name in self.optimizer.state[p]]

    def step(self, samples: Tensor, targets: Tensor) -> None:
        """One optimizer step of each worker on its own batch, and what the method does about agreement."""
        self.optimizer.zero_grad()
        loss_of(self.model, samples, targets).backward()
        gradients = self.averager.rows(Vector([p.grad for p in self.parameters if p.grad is not None]))
        if self.method.gradients == "all":
            for part in gradients:
                part.rows.copy_(part.rows.mean(0).expand_as(part.rows))
        elif self.method.gradients == "racks":
            self.averager.average_in_racks(gradients)
        elif self.method.gradients == "groups":
            self.averager.average(gradients, self.steps_done, self.steps_done)
        self.optimizer.step()
        if self.method.parameters:
            self._average(self.steps_done)
        self.steps_done += 1

    def _vectors(self) -> list[Vector]:
        buffers = {name: buffer for name, buffer in self.model.named_buffers() if buffer.is_floating_point()}
        found = [Vector(self.parameters)]
        for scale in (False, True):
            found.append(Vector([buffers[name] for name in buffers if name.endswith("running_var") == scale], scale))
        if self.method.average_state == "all":
            found += [Vector(self._state(name)) for name in ("momentum_buffer", "exp_avg")]
            found += [Vector(self._state("exp_avg_sq"), scale=True, moment=True)]
        return [vector for vector in found if vector.tensors]

    def _average(self, step: int) -> None:
        if not self._stripes:
            self._stripes = self.averager.stripes(self._vectors(), self.min_stripe_bytes)
            if self.method.average_state == "v":
                self._moments = self.averager.cut(Vector(self._state("exp_avg_sq"), scale=True, moment=True), V_SLICES)
        for number, stripe in enumerate(self._stripes):
            self.averager.average(stripe, step, step, number)
        if self._moments:
            self.averager.average(self._moments[step % V_SLICES], step, step // V_SLICES)
        self.averager.settle(step)

    def mean_model(self, statistics_of: int | None = None) -> nn.Module:
        """The exact mean of the parameters and running statistics; `statistics_of`: those of one worker instead."""
        single, workers = self.single.state_dict(), self.recipe.workers
        local = {name for name, _ in self.model.named_buffers()} if statistics_of is not None else set()
        for name, tensor in self.model.state_dict().items():
            if tensor.dim():
                rows = tensor.view(workers, -1)
                single[name].copy_((rows[statistics_of] if name in local else rows.mean(0)).view_as(single[name]))
        return self.single

    def consensus_distance(self) -> float:
        """sqrt(mean_i ||x_i - mean x||^2) of the parameters."""
        rows = torch.cat([part.rows for part in self.averager.rows(Vector(self.parameters))], 1)
        return float((rows - rows.mean(0)).square().sum(1).mean().sqrt())


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, replicas: int = 1) -> tuple[float, float]:
    """Accuracy in percent and loss in nats on the test set; several replicas share it out, each judged on a part of its own."""
    model.eval()
    size = len(data.test) // replicas
    samples, targets = (t[: size * replicas].unflatten(0, (size, replicas)).transpose(0, 1) for t in (data.test, data.test_targets))
    logits = model(model.stack(samples))
    targets = targets.reshape(replicas, -1)
    accuracy = 100 * (logits.argmax(-1) == targets).double().mean().item()
    loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]).double(), targets.reshape(-1)).item()
    model.train()
    return accuracy, loss


def simulate(run: Run, recipe: Recipe) -> dict[str, float]:
    """Train, then judge the mean of the replicas. A run that blows up gets what a guess among the classes would."""
    started, cpu_started = time.perf_counter(), time.process_time()
    data = DATA[run.task](run.seed, recipe.workers, run.shards)
    workers = Workers(METHODS[run.method], run.optimizer, run.lr, run.seed, recipe)
    consensus = 0.0
    for step, (samples, targets) in zip(range(recipe.steps), batches(data, recipe, run.seed), strict=False):
        for group in workers.optimizer.param_groups:
            group["lr"] = learning_rate(run.lr, step, recipe)
        workers.step(samples, targets)
        if step == recipe.steps // 2:
            consensus = workers.consensus_distance()
    own_accuracy, own_loss = evaluate(workers.model, data, recipe.workers)
    first_accuracy, first_loss = evaluate(workers.mean_model(statistics_of=0), data)
    accuracy, loss = evaluate(workers.mean_model(), data)
    result = {
        "accuracy": accuracy,
        "loss": loss,
        "own_accuracy": own_accuracy,
        "own_loss": own_loss,
        "rank0_accuracy": first_accuracy,
        "rank0_loss": first_loss,
        "consensus": consensus,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
    }
    return {name: round(value, 5) if math.isfinite(value) else 1e9 for name, value in result.items()}
