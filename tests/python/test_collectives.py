"""Every collective gives what plain Gloo gives in the same processes; AVG gives what a formula gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from dssync_pg import Options

pytestmark = pytest.mark.usefixtures("engine")

INTEGERS = [torch.uint8, torch.int8, torch.int32, torch.int64]
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
DTYPES = [*INTEGERS, *FLOATS, torch.bool, torch.complex64, torch.complex128]
"""What Gloo takes."""


def sample(dtype: torch.dtype, *shape: int, seed: int) -> Tensor:
    """Values that depend on the seed only. Integers stay small enough that a product over four ranks fits into uint8."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    if dtype in FLOATS or dtype.is_complex:
        values = torch.randn(shape, generator=generator, dtype=wide, device="cpu")
    else:
        values = torch.randint(0, 3, shape, generator=generator, device="cpu")
    return values.to(torch.get_default_device(), dtype)


# ---- each operation: (group, rank, size, dtype) -> tensors, equal on gloo and on dssync ---------------------------------------


def reducing(op: ReduceOp.RedOpType) -> Callable[..., list[Tensor]]:
    def all_reduce(group: ProcessGroup, rank: int, size: int, dtype: torch.dtype) -> list[Tensor]:
        tensor = sample(dtype, 3, 5, seed=rank)
        dist.all_reduce(tensor, op=op, group=group)
        return [tensor]

    return all_reduce


def all_reduce_empty(group: ProcessGroup, rank: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    tensor = torch.empty(0, dtype=dtype)
    dist.all_reduce(tensor, group=group)
    return [tensor]


def all_reduce_transposed(group: ProcessGroup, rank: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    tensor = sample(dtype, 3, 5, seed=rank).t()
    dist.all_reduce(tensor, group=group)
    return [tensor]


def all_reduce_coalesced(group: ProcessGroup, rank: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    tensors = [sample(dtype, 4, seed=rank), sample(dtype, 2, 3, seed=rank + 10)]
    dist.all_reduce_coalesced(tensors, group=group)
    return tensors


def broadcast(group: ProcessGroup, rank: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    tensor = sample(dtype, 7, seed=rank)
    dist.broadcast(tensor, src=size - 1, group=group)
    return [tensor]


def reduce(group: ProcessGroup, rank: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    tensor = sample(dtype, 7, seed=rank)
    dist.reduce(tensor, dst=1, group=group)
    return [tensor] if rank == 1 else []


def all_gather(group: ProcessGroup, rank: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    outputs = [torch.zeros(2, 3, dtype=dtype) for _ in range(size)]
    dist.all_gather(outputs, sample(dtype, 2, 3, seed=rank), group=group)
    return outputs


def all_gather_into_tensor(group: ProcessGroup, rank: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    output = torch.zeros(2 * size, 3, dtype=dtype)
    dist.all_gather_into_tensor(output, sample(dtype, 2, 3, seed=rank), group=group)
    return [output]


def all_gather_coalesced(group: ProcessGroup, rank: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    outputs = [[torch.zeros(n, dtype=dtype) for n in (3, 5)] for _ in range(size)]
    dist.all_gather_coalesced(outputs, [sample(dtype, n, seed=rank) for n in (3, 5)], group=group)
    return [tensor for tensors in outputs for tensor in tensors]


def gather(group: ProcessGroup, rank: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    outputs = [torch.zeros(4, dtype=dtype) for _ in range(size)] if rank == 0 else None
    dist.gather(sample(dtype, 4, seed=rank), outputs, dst=0, group=group)
    return outputs or []


def scatter(group: ProcessGroup, rank: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    output = torch.zeros(4, dtype=dtype)
    inputs = [sample(dtype, 4, seed=i) for i in range(size)] if rank == 1 else None
    dist.scatter(output, inputs, src=1, group=group)
    return [output]


def reduce_scatter(group: ProcessGroup, rank: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    output = torch.zeros(2, 3, dtype=dtype)
    inputs = [sample(dtype, 2, 3, seed=10 * rank + i) for i in range(size)]
    before = [tensor.clone() for tensor in inputs]
    dist.reduce_scatter(output, inputs, group=group)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True)), "inputs changed"
    return [output]


def reduce_scatter_tensor(group: ProcessGroup, rank: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    output = torch.zeros(2, 3, dtype=dtype)
    dist.reduce_scatter_tensor(output, sample(dtype, 2 * size, 3, seed=rank), group=group)
    return [output]


def all_to_all(group: ProcessGroup, rank: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    outputs = [torch.zeros(rank + 1, dtype=dtype) for _ in range(size)]
    dist.all_to_all(outputs, [sample(dtype, i + 1, seed=rank) for i in range(size)], group=group)
    return outputs


def all_to_all_single(group: ProcessGroup, rank: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    sent, received = [i + 1 for i in range(size)], [rank + 1] * size
    output = torch.zeros(sum(received), 2, dtype=dtype)
    dist.all_to_all_single(output, sample(dtype, sum(sent), 2, seed=rank), received, sent, group=group)
    return [output]


def send_and_receive(group: ProcessGroup, rank: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    received = torch.zeros(5, dtype=dtype)
    works = [
        dist.isend(sample(dtype, 5, seed=rank), (rank + 1) % size, group=group, tag=3),
        dist.irecv(received, (rank - 1) % size, group=group, tag=3),
    ]
    for work in works:
        work.wait()
    return [received]


def batched_send_and_receive(group: ProcessGroup, rank: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    received = torch.zeros(5, dtype=dtype)
    ops = [
        dist.P2POp(dist.isend, sample(dtype, 5, seed=rank), (rank + 1) % size, group),
        dist.P2POp(dist.irecv, received, (rank - 1) % size, group),
    ]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    return [received]


def receive_from_any(group: ProcessGroup, rank: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    if rank != 0:
        dist.send(sample(dtype, 5, seed=rank), 0, group=group)
        return []
    received: dict[int, Tensor] = {}
    for _ in range(size - 1):
        tensor = torch.zeros(5, dtype=dtype)
        received[dist.recv(tensor, group=group)] = tensor
    assert sorted(received) == list(range(1, size))
    return [received[source] for source in sorted(received)]


def objects(group: ProcessGroup, rank: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    gathered: list[object] = [None] * size
    dist.all_gather_object(gathered, {"rank": rank, "dtype": str(dtype)}, group=group)
    told: list[object] = [f"from {rank}"]
    dist.broadcast_object_list(told, src=1, group=group)
    assert gathered == [{"rank": i, "dtype": str(dtype)} for i in range(size)] and told == ["from 1"]
    return []


SUMMING = [
    reducing(ReduceOp.SUM),
    all_reduce_empty,
    all_reduce_transposed,
    all_reduce_coalesced,
    reduce,
    reduce_scatter,
    reduce_scatter_tensor,
]
MOVING = [
    broadcast,
    all_gather,
    all_gather_into_tensor,
    all_gather_coalesced,
    gather,
    scatter,
    all_to_all,
    all_to_all_single,
    send_and_receive,
    batched_send_and_receive,
    receive_from_any,
    objects,
]
REDUCTIONS = {
    ReduceOp.PRODUCT: [*INTEGERS, *FLOATS],
    ReduceOp.MIN: [*INTEGERS, *FLOATS],
    ReduceOp.MAX: [*INTEGERS, *FLOATS],
    ReduceOp.BAND: INTEGERS,
    ReduceOp.BOR: INTEGERS,
    ReduceOp.BXOR: INTEGERS,
}


def differences_from_gloo(rank: int, size: int) -> tuple[list[str], set[str]]:
    """Every operation on every dtype, on the default dssync group and on gloo: what differs, and what both refuse."""
    gloo = dist.new_group(backend="gloo")
    cases = [(operation, operation.__name__, dtype) for operation in [*SUMMING, *MOVING] for dtype in DTYPES]
    cases += [(reducing(op), f"all_reduce {op}", dtype) for op, dtypes in REDUCTIONS.items() for dtype in dtypes]
    different: list[str] = []
    refused: set[str] = set()
    for operation, name, dtype in cases:
        results = []
        for group in (gloo, dist.group.WORLD):
            try:
                results.append(operation(group, rank, size, dtype))
            except Exception as error:
                results.append(type(error).__name__)
        expected, got = results
        rough = 1e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-5
        same = type(expected) is type(got) and (
            expected == got
            if isinstance(expected, str)
            # close: Gloo itself does not always add in the same order
            else all(torch.allclose(a, b, rtol=rough, atol=rough) for a, b in zip(expected, got, strict=True))
        )
        if not same:
            different.append(f"{name} of {dtype}: gloo {expected}, dssync {got}")
        refused.update([name] if isinstance(expected, str) else [])
    return different, refused


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_collective_equals_gloo_for_every_dtype(world_size):
    for different, refused in run_ranks(world_size, differences_from_gloo, timeout=120):
        assert different == []
        assert refused <= {"gather", "all_to_all"}  # complex dtypes; lists of unequal sizes


def sparse_sum(rank, size):
    gloo = dist.new_group(backend="gloo")
    results = []
    for group in (gloo, dist.group.WORLD):
        tensor = torch.sparse_coo_tensor([[rank, 4]], [float(rank + 1), 1.0], (5,))
        dist.all_reduce(tensor, group=group)
        results.append(tensor.to_dense())
    return results


def test_sparse_all_reduce_equals_gloo():
    for plain, ours in run_ranks(2, sparse_sum):
        assert torch.equal(plain, ours) and torch.equal(plain, torch.tensor([1.0, 2.0, 0.0, 0.0, 2.0]))


def barriers(rank, size):
    dist.barrier()  # dist.monitored_barrier refuses every backend whose name is not "gloo"
    work = dist.barrier(async_op=True)
    work.wait()
    return work.is_completed()


def test_barriers():
    assert run_ranks(3, barriers) == [True] * 3


def gaps(rank, size):
    """Gloo would overwrite the elements between those of a strided tensor; here they are left alone."""
    whole = torch.arange(12.0).view(3, 4) + 100 * rank
    dist.all_reduce(whole[:, ::2])
    gathered = torch.zeros(size, 6)
    dist.all_gather_into_tensor(gathered[:, ::2], torch.full((1, 3), float(rank)))
    return whole, gathered


def test_elements_between_those_of_a_strided_tensor_are_left_alone():
    results = run_ranks(2, gaps)
    for rank, (whole, gathered) in enumerate(results):
        untouched = torch.arange(12.0).view(3, 4) + 100 * rank
        summed = 2 * torch.arange(12.0).view(3, 4) + 100
        assert torch.equal(whole[:, ::2], summed[:, ::2]) and torch.equal(whole[:, 1::2], untouched[:, 1::2])
        assert torch.equal(gathered[:, ::2], torch.tensor([[0.0] * 3, [1.0] * 3])) and not gathered[:, 1::2].any()


# ---- AVG where it is exact ---------------------------------------------------------------------------------------------------


def exact_averages(rank, size):
    """Every call that takes AVG, on a group made without Options: exact."""
    group = dist.new_group(backend="dssync")
    assert group is not None
    results = {}
    for dtype in [*FLOATS, torch.complex64]:
        tensor = sample(dtype, 600, seed=rank)
        dist.all_reduce(tensor, op=ReduceOp.AVG, group=group)
        scattered = torch.zeros(200, dtype=dtype)
        inputs = list(sample(dtype, 200 * size, seed=rank).chunk(size))
        dist.reduce_scatter(scattered, inputs, op=ReduceOp.AVG, group=group)
        scattered_tensor = torch.zeros(200, dtype=dtype)
        dist.reduce_scatter_tensor(scattered_tensor, sample(dtype, 200 * size, seed=rank), op=ReduceOp.AVG, group=group)
        reduced = sample(dtype, 600, seed=rank)
        dist.reduce(reduced, dst=0, op=ReduceOp.AVG, group=group)
        coalesced = [sample(dtype, 600, seed=rank), sample(dtype, 5, seed=rank)]
        dist.all_reduce_coalesced(coalesced, op=ReduceOp.AVG, group=group)
        results[dtype] = (tensor, scattered, scattered_tensor, reduced, coalesced)
    return results


def mean(dtype: torch.dtype, count: int, size: int) -> Tensor:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.stack([sample(dtype, count, seed=rank).to(wide) for rank in range(size)]).mean(0)


@pytest.mark.parametrize("world_size", [2, 3])
def test_avg_is_the_mean_over_all_ranks_on_groups_without_options(world_size):
    results = run_ranks(world_size, exact_averages)
    for rank, by_dtype in enumerate(results):
        for dtype, (tensor, scattered, scattered_tensor, reduced, coalesced) in by_dtype.items():

            def check(got, count, part=slice(None), dtype=dtype):
                expected = mean(dtype, count, world_size)[part].to(dtype)
                torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)

            check(tensor, 600)
            mine = slice(200 * rank, 200 * rank + 200)
            check(scattered, 200 * world_size, mine)
            check(scattered_tensor, 200 * world_size, mine)
            check(coalesced[0], 600)
            check(coalesced[1], 5)
            if rank == 0:
                check(reduced, 600)


def half_overflow(rank, size):
    """60000 + 60000 is infinite in float16, and 1 + 0.00390625 needs more bits than bfloat16 has."""
    big = torch.full((8,), 60000.0, dtype=torch.float16)
    dist.all_reduce(big, op=ReduceOp.AVG)
    fine = torch.tensor([1.0, 1.0078125][rank % 2] * torch.ones(8), dtype=torch.bfloat16)
    dist.all_reduce(fine, op=ReduceOp.AVG)
    return big, fine


def test_half_types_are_summed_in_float32():
    for big, fine in run_ranks(2, half_overflow):
        assert big.tolist() == [60000.0] * 8
        assert fine.tolist() == [1.0] * 8  # 1.00390625, halfway, rounds to even


def integer_average(rank, size):
    errors = []
    for call in (
        lambda: dist.all_reduce(torch.ones(4, dtype=torch.int64), op=ReduceOp.AVG),
        lambda: dist.reduce(torch.ones(4, dtype=torch.int32), dst=0, op=ReduceOp.AVG),
        lambda: dist.reduce_scatter_tensor(torch.ones(1, dtype=torch.int8), torch.ones(size, dtype=torch.int8), op=ReduceOp.AVG),
    ):
        try:
            call()
        except ValueError as error:
            errors.append(str(error))
    check = torch.ones(1)
    dist.all_reduce(check)  # the group lives on
    return errors, check.item()


def test_integer_avg_is_refused_by_name():
    for errors, total in run_ranks(2, integer_average):
        assert [error.split(" needs")[0] for error in errors] == [
            "dssync: all_reduce with ReduceOp.AVG",
            "dssync: reduce with ReduceOp.AVG",
            "dssync: reduce_scatter_tensor with ReduceOp.AVG",
        ]
        assert all("SUM and divide" in error for error in errors) and total == 2


# ---- which all_reduce(AVG) is averaged in groups ---------------------------------------------------------------------------


def group_means(rank, size, calls):
    """Bare AVG calls on the default group: (what came out, the members that the plan names, the period)."""
    from dssync_pg import _backend

    plan = _backend.live[0].plan.core
    out = []
    for call in range(calls):
        tensor = torch.full((300,), float(2**rank))
        dist.all_reduce(tensor, op=ReduceOp.AVG)
        out.append((tensor, plan.group_of_rank(plan.round_of_call(call), rank)))
    return out, plan.period


@pytest.mark.parametrize("world_size", [1, 2, 4, 5, 6])
def test_avg_on_the_default_group_is_the_mean_of_the_rounds_group(world_size):
    for out, period in run_ranks(world_size, group_means, 7):
        assert period >= 1
        for tensor, members in out:
            expected = sum(2.0**member for member in members) / len(members)
            torch.testing.assert_close(tensor, torch.full((300,), expected), rtol=1e-6, atol=0)


def period_of_averages(rank, size):
    from dssync_pg import _backend

    period = _backend.live[0].plan.core.period
    tensor = sample(torch.float64, 500, seed=rank)
    for _ in range(period):
        dist.all_reduce(tensor, op=ReduceOp.AVG)
    return tensor


@pytest.mark.parametrize("world_size", [2, 4, 6, 8])
def test_a_period_of_averages_of_one_tensor_is_the_mean_over_all(world_size):
    expected = mean(torch.float64, 500, world_size)
    for tensor in run_ranks(world_size, period_of_averages, pg_options=Options(plan="grid")):
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-12)


def what_is_exact(rank, size):
    """On 4 ranks in pairs; the value of a mean tells over whom it was taken."""
    import dssync_pg

    def mean_of(group=None, count=1000, dtype=torch.float32, op=ReduceOp.AVG):
        tensor = torch.full((count,), float(2**rank), dtype=dtype)
        dist.all_reduce(tensor, op=op, group=group)
        return tensor[0].item()

    plain = dist.new_group(backend="dssync")
    with_options = dist.new_group(backend="dssync", pg_options=Options())
    never = dist.new_group(backend="dssync", pg_options=Options(all_reduce="exact"))
    results = {
        "default": mean_of(),
        "below min_bytes": mean_of(count=255),
        "at min_bytes": mean_of(count=256),
        "sum": mean_of(op=ReduceOp.SUM),
        "max": mean_of(op=ReduceOp.MAX),
        "complex": mean_of(dtype=torch.complex64),
        "group without options": mean_of(plain),
        "group with options": mean_of(with_options),
        "group with all_reduce=exact": mean_of(never),
    }
    with dssync_pg.exact():
        results["inside exact()"] = mean_of()
    results["after exact()"] = mean_of()
    return results


def test_the_semantics_table():
    over_all, total, pairs = 3.75, 15.0, {1.5, 6.0, 2.5, 5.0, 4.5, 3.0}
    for rank, results in enumerate(run_ranks(4, what_is_exact)):
        exact = {
            "below min_bytes": over_all,
            "sum": total,
            "max": 8.0,
            "group without options": over_all,
            "group with all_reduce=exact": over_all,
            "inside exact()": over_all,
        }
        assert {name: results[name] for name in exact} == exact, f"rank {rank}"
        for name in results.keys() - exact.keys():
            assert results[name] in pairs, f"rank {rank}: {name}"


# ---- overlap and order -----------------------------------------------------------------------------------------------------


def out_of_order(rank, size):
    tensors = [torch.full((1000,), float(rank + i)) for i in range(6)]
    works = [dist.all_reduce(tensor, op=ReduceOp.AVG if i % 2 else ReduceOp.SUM, async_op=True) for i, tensor in enumerate(tensors)]
    for work in reversed(works):
        assert work is not None
        work.wait()
    return [tensor[0].item() for tensor in tensors]


def test_several_calls_in_flight_may_be_waited_for_in_any_order():
    # 2 ranks: the one group of the plan is everyone, so AVG is the mean of both.
    for values in run_ranks(2, out_of_order):
        assert values == [2 * i + 1.0 if i % 2 == 0 else i + 0.5 for i in range(6)]


# ---- devices ---------------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU at hand: staging through pinned memory goes untested")


def device_differences(rank: int, size: int) -> list[str]:
    """Every operation on device tensors against the same one on CPU tensors, both on dssync."""
    device = torch.device("cuda", rank % torch.cuda.device_count())
    different = []
    for operation in [*SUMMING, *MOVING]:
        expected = operation(dist.group.WORLD, rank, size, torch.float32)
        with device:  # factories make device tensors; sample() moves its own
            got = operation(dist.group.WORLD, rank, size, torch.float32)
        if not all(torch.allclose(a, b.cpu(), rtol=1e-6) for a, b in zip(expected, got, strict=True)):
            different.append(f"{operation.__name__}: cpu {expected}, {device} {got}")
    return different


@needs_gpu
def test_device_tensors_give_what_cpu_tensors_give():
    assert run_ranks(2, device_differences, timeout=120) == [[], []]


def ordered_by_streams(rank: int, size: int) -> list[float]:
    """Calls see what the caller's stream computes before them; after wait() the caller's stream sees their results."""
    device = torch.device("cuda", rank % torch.cuda.device_count())
    slow = torch.eye(4096, device=device)
    results = []
    for op in (ReduceOp.SUM, ReduceOp.AVG):
        with torch.cuda.stream(torch.cuda.Stream(device)):
            tensor = torch.zeros(1 << 20, device=device)
            for _ in range(50):
                slow = slow @ slow  # keeps the stream busy
            tensor += rank + slow[0, 0]
            work = dist.all_reduce(tensor, op=op, async_op=True)
            assert work is not None
            (value,) = work.get_future().wait()
            assert value is tensor
            work.wait()
            doubled = tensor * 2
            results.append(doubled.min().item())
            results.append(doubled.max().item())
    return results


@needs_gpu
def test_device_calls_are_ordered_with_the_callers_stream():
    assert run_ranks(2, ordered_by_streams, timeout=120) == [[6.0, 6.0, 3.0, 3.0]] * 2


def device_average(rank: int, size: int) -> list[Tensor]:
    from datetime import timedelta

    from harness import rank_store

    from dssync_pg import _C

    device = torch.device("cuda", rank % torch.cuda.device_count())
    plan = _C.Plan.create("auto", size)
    averager = _C.GlooAverager(
        "device", rank_store(), rank, plan, lambda *given: dist.ProcessGroupGloo(*given), timedelta(seconds=60), bucket_bytes=4096
    )
    tensors = [sample(dtype, 700, seed=rank).to(device) for dtype in FLOATS]
    tensors.append(sample(torch.float32, 20, 30, seed=rank).to(device).t())
    tensors.append(sample(torch.float32, 9, seed=rank))  # on the host
    averager.launch(0, 0, [(_C.EXACT_ROUND, tensors)], "step 0").wait()
    results = [tensor.cpu() for tensor in tensors]
    averager.shutdown()
    return results


@needs_gpu
def test_the_averager_takes_device_tensors():
    for *flat, transposed, on_host in run_ranks(2, device_average, init=False, timeout=120):
        for dtype, got in zip(FLOATS, flat, strict=True):
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(got.double(), mean(dtype, 700, 2), rtol=2 * eps, atol=max(eps, 1e-7))
        torch.testing.assert_close(transposed.t().reshape(-1).double(), mean(torch.float32, 600, 2), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(on_host.double(), mean(torch.float32, 9, 2), rtol=1e-6, atol=1e-6)
