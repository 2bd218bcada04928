"""The averager: right means in the plan's groups, and errors that name who was waited for, on every rank, without a hang."""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Sequence
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from harness import die, rank_store, run_ranks
from torch import Tensor
from torch.distributed import PrefixStore, Store

from dssync_pg import _C
from dssync_pg._native import make_engine

pytestmark = pytest.mark.usefixtures("engine")

EVERYONE = _C.EXACT_ROUND
PAIRS = [[[0, 1], [2, 3]], [[0, 2], [1, 3]]]
"""Two rounds on 4 ranks."""


def make_gloo(store: Store, rank: int, size: int, timeout: timedelta) -> dist.Backend:
    return dist.ProcessGroupGloo(store, rank, size, timeout)


@functools.cache
def engine_of(rank: int, size: int) -> _C.Engine:
    """The one engine of this rank, as a process group has it."""
    engine = make_engine(rank_store(), rank, size, timedelta(seconds=60), "test", "auto")
    assert isinstance(engine, _C.Engine), engine
    return engine


def is_native() -> bool:
    return os.environ["DSSYNC_ENGINE"] == "native"


def make_averager(rank: int, plan: _C.Plan, name: str = "test", seconds: float = 60.0, **of_gloo: int) -> _C.Averager:
    """An averager on the engine that the test is run for."""
    timeout = timedelta(seconds=seconds)
    if is_native():
        return _C.NativeAverager(name, engine_of(rank, plan.world_size), plan, timeout)
    return _C.GlooAverager(name, rank_store(), rank, plan, make_gloo, timeout, **of_gloo)


def error_of(work: dist.Work) -> str:
    try:
        work.wait()
    except dist.DistBackendError as error:
        return str(error)
    return ""


def values(dtype: torch.dtype, count: int, rank: int, salt: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * salt + rank)
    return torch.randn(count, generator=generator, dtype=torch.float64).to(dtype)


def mean_over(members: Sequence[int], dtype: torch.dtype, count: int, salt: int = 0) -> Tensor:
    return torch.stack([values(dtype, count, member, salt).double() for member in members]).mean(0)


def assert_mean(got: Tensor, members: Sequence[int], count: int, salt: int = 0) -> None:
    # Gloo sums in the accumulator's precision, in an order of its own; the result is rounded once.
    eps = torch.finfo(got.dtype).eps
    expected = mean_over(members, got.dtype, count, salt)
    torch.testing.assert_close(got.double(), expected, rtol=eps, atol=4 * torch.finfo(torch.float32).eps if eps > 1e-10 else 1e-15)


# ---- means -----------------------------------------------------------------------------------------------------------------

MIXED = [
    (torch.float32, 1000),
    (torch.bfloat16, 77),
    (torch.float64, 33),
    (torch.float16, 500),
    (torch.float32, 0),
    (torch.float32, 1),
]


def launch_steps(rank, size, steps, bucket_bytes):
    """Mixed dtypes, a stripe for each round in every step, and one part over everyone."""
    plan = _C.Plan.create("auto", size, seed=3)
    averager = make_averager(rank, plan, bucket_bytes=bucket_bytes)
    results = []
    for step in range(steps):
        parts, expected = [], []
        for stripe in range(plan.period + 1):
            round_ = plan.round_at(step, stripe) if stripe < plan.period else EVERYONE
            tensors = [values(dtype, count, rank, salt=step * 100 + stripe) for dtype, count in MIXED]
            parts.append((round_, tensors))
            expected.append((plan.group_of_rank(round_, rank), tensors, step * 100 + stripe))
        averager.launch(step, 42, parts, f"step {step} of the test").wait()
        results += expected
    averager.shutdown()
    return results


@pytest.mark.parametrize(
    ("world_size", "bucket_bytes"), [(1, 4096), (2, 64), (3, 1 << 20), (4, 4096), (5, 4096), (7, 1 << 20), (8, 4096)]
)
def test_each_group_gets_its_mean_bit_for_bit_alike(world_size, bucket_bytes):
    results = run_ranks(world_size, launch_steps, 3, bucket_bytes, init=False)
    seen = {}
    for result in results:
        for members, tensors, salt in result:
            for (dtype, count), tensor in zip(MIXED, tensors, strict=True):
                assert tensor.dtype == dtype and tensor.numel() == count
                assert_mean(tensor, members, count, salt)
                first = seen.setdefault((salt, tuple(members), dtype, count), tensor)
                assert torch.equal(first, tensor), "members hold different bits"


def odd_layouts(rank, size):
    plan = _C.Plan.create("auto", size)
    averager = make_averager(rank, plan, bucket_bytes=128)
    whole = values(torch.float32, 200, rank).view(10, 20)
    strided = whole[:, ::2]
    transposed = values(torch.float16, 60, rank).view(5, 12).t()
    channels_last = values(torch.float64, 2 * 3 * 4 * 5, rank).view(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    parameter = torch.nn.Parameter(values(torch.float32, 50, rank))
    square = (parameter * parameter).sum()  # saves the parameter for backward
    tensors = [strided, transposed, channels_last, parameter]
    versions = [tensor._version for tensor in tensors]
    averager.launch(0, 0, [(EVERYONE, tensors)], "step 0").wait()
    assert [tensor._version for tensor in tensors] == versions
    square.backward()  # would raise, had the version changed
    averager.shutdown()
    return whole, transposed, channels_last, parameter.detach()


def test_tensors_that_are_not_contiguous():
    for rank, (whole, transposed, channels_last, parameter) in enumerate(run_ranks(3, odd_layouts, init=False)):
        everyone = range(3)
        torch.testing.assert_close(
            whole[:, ::2].double(), mean_over(everyone, torch.float32, 200).view(10, 20)[:, ::2], rtol=1e-6, atol=1e-6
        )
        assert torch.equal(whole[:, 1::2], values(torch.float32, 200, rank).view(10, 20)[:, 1::2]), "gaps were written"
        assert_mean(transposed.t().reshape(-1), everyone, 60)
        assert_mean(channels_last.contiguous().view(-1), everyone, 120)
        assert_mean(parameter, everyone, 50)


def refused(rank, size):
    averager = make_averager(rank, _C.Plan.create("auto", size))
    texts = []
    for tensor in (torch.ones(3, dtype=torch.int32), torch.ones(1).expand(4), torch.eye(2).to_sparse()):
        with pytest.raises(ValueError, match="averaged") as error:
            averager.launch(0, 0, [(EVERYONE, [tensor])], "step 0")
        texts.append(str(error.value))
    with pytest.raises(ValueError, match="asks for round 99 of a plan of 1 rounds"):
        averager.launch(0, 0, [(99, [torch.ones(3)])], "step 0")
    averager.launch(0, 0, [(EVERYONE, [torch.ones(3)])], "step 0").wait()  # it lives on
    return texts


def test_what_cannot_be_averaged_is_refused_at_once():
    for integer, expanded, sparse in run_ranks(2, refused, init=False):
        assert "got int32" in integer and "share memory" in expanded and "Sparse" in sparse


def in_opposite_order(rank, size):
    plan = _C.Plan.create("auto", size)
    averagers = [make_averager(rank, plan, name=f"sync {i}") for i in range(2)]
    works = []
    for step in range(5):
        for index in (0, 1) if rank == 0 else (1, 0):
            tensor = torch.full((10,), float(rank + index))
            works.append((index, tensor, averagers[index].launch(step, 0, [(0, [tensor])], f"step {step} of sync {index}")))
    for index, tensor, work in works:
        work.wait()
        assert tensor.tolist() == [0.5 + index] * 10
    return True


def test_two_averagers_in_opposite_order_do_not_block_one_another():
    assert run_ranks(2, in_opposite_order, init=False) == [True, True]


def launch_alone(rank, size):
    """Rank 1 launches only once it knows that rank 0's launch has returned."""
    averager = make_averager(rank, _C.Plan.create("auto", size))
    tensor = torch.full((10,), float(rank))
    signal = rank_store()
    if rank == 1:
        signal.wait(["returned"])
    work = averager.launch(0, 0, [(0, [tensor])], "step 0")
    signal.set("returned", "1")
    work.wait()
    return tensor.tolist()


def test_launch_does_not_wait_for_other_ranks():
    assert run_ranks(2, launch_alone, init=False) == [[0.5] * 10] * 2


def many_rounds(rank, size, max_groups):
    """Every way to pair 4 ranks, and everyone: more rounds than the cache may hold."""
    rounds = [[[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0, 3], [1, 2]], [[0, 1, 2], [3]], [[0], [1, 2, 3]]]
    plan = _C.Plan.explicit(4, rounds)
    averager = make_averager(rank, plan, max_groups=max_groups)
    cached = []
    for step in range(12):
        parts = [(plan.round_at(step, stripe), [values(torch.float32, 10, rank, salt=step)]) for stripe in range(2)]
        parts.append((EVERYONE, [values(torch.float32, 10, rank, salt=step)]))
        averager.launch(step, 0, parts, f"step {step}").wait()
        for round_, (tensor,) in parts:
            assert_mean(tensor, plan.group_of_rank(round_, rank), 10, salt=step)
        cached.append(averager.stats()["groups_cached"])
    formed = averager.stats()["groups_formed"]
    averager.shutdown()
    return max(cached), formed


def test_the_group_cache_is_bounded_and_forgets_alike_on_all_ranks(engine):
    for cached, formed in run_ranks(4, many_rounds, 2, init=False):
        assert (cached, formed) == (0, 0) if engine == "native" else cached <= 2 and formed > 6
    for cached, formed in run_ranks(4, many_rounds, 16, init=False):
        assert cached == formed <= (0 if engine == "native" else 6)


def one_step_again_and_again(rank, size):
    averager = make_averager(rank, _C.Plan.create("auto", size))
    tensors = [values(torch.float32, 100, rank, salt=turn) for turn in range(50)]
    works = []
    for turn, tensor in enumerate(tensors):
        works.append(averager.launch(5, 0, [(EVERYONE, [tensor])], f"average {turn} at step 5"))
        if turn % 7 == rank:
            works[-1].wait()
    for work in works:
        work.wait()
    averager.shutdown()
    return tensors


def test_a_step_may_be_launched_many_times():
    for tensors in run_ranks(3, one_step_again_and_again, init=False):
        for turn, tensor in enumerate(tensors):
            assert_mean(tensor, range(3), 100, salt=turn)


def figures(rank, size):
    plan = _C.Plan.create("grid", size)
    averager = make_averager(rank, plan)
    for step in range(3):
        averager.launch(step, 0, [(0, [torch.ones(1000)]), (EVERYONE, [torch.ones(10, dtype=torch.float16)])], "a step").wait()
    stats = averager.stats()
    averager.shutdown()
    return stats


def test_stats(engine):
    for stats in run_ranks(4, figures, init=False):
        pairs, everyone = 2 * (1 / 2) * 4000, 2 * (3 / 4) * (20 if engine == "native" else 40)  # over Gloo, half types are widened
        assert stats["launches"] == 3 and stats["last_step"] == 2 and stats["error"] is None
        assert stats["bytes_sent"] == 3 * (pairs + everyone)
        assert stats["groups_formed"] == stats["groups_cached"] == (0 if engine == "native" else 2)
        assert 0 < stats["seconds_waiting"] < 60


# ---- errors ----------------------------------------------------------------------------------------------------------------


def slip(rank, size, kind):
    plan = _C.Plan.create("auto", size)
    averager = make_averager(rank, plan)
    averager.launch(16, 0, [(0, [torch.ones(4)])], "step 16 of sync 0").wait()
    if is_native() and kind == "step":
        averager.set_timeout(timedelta(seconds=2))
    odd = rank == 1
    step, count, dtype, layout = 17, 1024, torch.float32, 7
    if odd:
        step += kind == "step"
        count = 512 if kind == "size" else count
        dtype = torch.bfloat16 if kind == "dtype" else dtype
        layout = 8 if kind == "layout" else layout
    tensor = torch.full((count,), float(rank), dtype=dtype)
    text = error_of(averager.launch(step, layout, [(0, [tensor])], f"step {step} of sync 0"))
    untouched = tensor.tolist() == [float(rank)] * count
    with pytest.raises(dist.DistBackendError) as again:
        averager.launch(step + 1, layout, [(0, [torch.ones(4)])], "step 18 of sync 0")
    return text, untouched, str(again.value) == text, averager.stats()["error"] == text


FIRST_FAILURE = " The first failure of this group was: "


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("step", ["rank 0 averages step 17, 1024 x float32", "rank 1 averages step 18, 1024 x float32"]),
        ("size", ["rank 0 averages step 17, 1024 x float32", "rank 1 averages step 17, 512 x float32"]),
        ("dtype", ["rank 0 averages step 17, 1024 x float32", "rank 1 averages step 17, 1024 x bfloat16"]),
        ("layout", ["rank 0 averages step 17, 1024 x float32 in 1 tensor, layout", "rank 1 averages step 17, 1024 x float32"]),
    ],
)
def test_a_slip_is_an_error_on_every_member_and_nothing_is_averaged(engine, kind, said):
    if engine == "native":
        check_native_slip(kind)
        return
    for rank, (text, untouched, sticks, told) in enumerate(run_ranks(2, slip, kind, init=False, timeout=50)):
        assert f"failed on rank {rank} of 2, phase header of the group [0, 1] of round 0" in text
        assert all(part in text for part in said) and "Nothing was averaged" in text
        assert untouched and sticks and told


def check_native_slip(kind):
    """Steps are keys there: nobody else has them, and that is a time-out."""
    calls = {"size": ("1024 x float32", "512 x float32"), "dtype": ("1024 x float32", "1024 x bfloat16")}
    for rank, (text, untouched, sticks, told) in enumerate(run_ranks(2, slip, kind, init=False, timeout=50)):
        own, *first = text.split(FIRST_FAILURE)
        for at, part in [(rank, own), *((1 - rank, part) for part in first)]:
            step = 17 + (at if kind == "step" else 0)
            theirs, mine = (f"average of {call}" for call in calls.get(kind, ("1024 x float32",) * 2)[:: 1 if at else -1])
            assert f"dssync: step {step} of sync 0 ({mine} over 2 ranks) failed on rank {at} of 2, phase start: " in part
            if kind == "step":
                assert f"timed out after 2.0 s: rank {1 - at} (" in part or f"rank {1 - at} gave up: " in part
                assert "has not launched step 1" in part and f"(but {theirs} over 2 ranks, which this rank has not)" in part
                continue
            assert f"rank {at} has {mine} over 2 ranks, rank {1 - at} has {theirs} over 2 ranks" in part
            assert "Nothing may be used of it" in part
            assert ("(sizes, dtypes, order in memory or names of the tensors differ)" in part) == (kind == "layout")
        assert untouched and sticks and told


def slip_elsewhere(rank, size):
    signal = rank_store()
    averager = make_averager(rank, _C.Plan.explicit(4, PAIRS))
    count = 5 if rank == 0 else 6
    texts = [error_of(averager.launch(0, 0, [(0, [torch.ones(count)])], "step 0"))]
    try:
        texts.append(error_of(averager.launch(1, 0, [(1, [torch.ones(count)])], "step 1")))
    except dist.DistBackendError as error:
        texts.append(str(error))
    signal.set(str(rank), "knows")
    signal.wait([str(other) for other in range(size)])  # a rank that has gone could tell nobody why
    return texts


def test_a_failure_reaches_those_who_wait_for_the_failed_at_once(engine):
    """Ranks 0 and 1 fail in step 0; ranks 2 and 3 learn it from the store, or from them, long before the time-out."""
    cause = "the ranks did not call the same thing" if engine == "native" else "do not average the same thing"
    results = run_ranks(4, slip_elsewhere, init=False, timeout=50)
    for texts in results[:2]:
        assert cause in texts[0] and texts[1] == texts[0]
    for texts in results[2:]:
        first = next(text for text in texts if text)  # in step 0 where this rank was slow
        assert "failed on rank" in first and ", phase " in first and "gave up" in first and cause in first


def never_launches(rank, size):
    averager = make_averager(rank, _C.Plan.explicit(4, PAIRS), name="sync 0")
    signal = rank_store()
    averager.launch(16, 0, [(0, [torch.ones(4)])], "step 16 of sync 0").wait()
    averager.set_timeout(timedelta(seconds=4))
    if rank == 1:
        signal.wait(["0", "2", "3"])
        return ""
    rounds = [(1, [torch.ones(4)]), (0, [torch.ones(4)])]
    text = error_of(averager.launch(17, 0, rounds, "step 17 of sync 0"))
    signal.set(str(rank), "1")
    return text


def test_a_time_out_names_who_has_not_launched(engine):
    """Rank 3 waits for it to form a group, rank 0 in a header, rank 2 for rank 3. The first to give up tells the others.

    On the native engine nobody waits for who waits: rank 2 has what it needs.
    """
    texts = run_ranks(4, never_launches, init=False)
    if engine == "native":
        assert texts[2] == ""
        for rank in (0, 3):
            assert (
                f"dssync: step 17 of sync 0 (average of 4 x float32 over 2 ranks) failed on rank {rank} of 4, phase start: "
                in texts[rank]
            )
            assert re.search(
                r"timed out after 4\.0 s: rank 1 \(127\.0\.0\.1:\d+, shm\) has not launched step 17 of sync 0", texts[rank]
            )
            assert "`timeout=`" in texts[rank]
        return
    assert "step 17 of sync 0 failed on rank 3 of 4, phase forming the group [1, 3] of round 1: " in texts[3]
    for rank in (0, 2, 3):
        assert f"dssync: step 17 of sync 0 failed on rank {rank} of 4, phase " in texts[rank]
    assert "timed out after 4 s" in texts[2] or "lost its connection" in texts[2]  # rank 3, which gives up, closes theirs
    for rank in (0, 3):
        assert "timed out after 4 s" in texts[rank] and "`timeout=`" in texts[rank]
        assert "rank 1 has not launched step 17 of sync 0 (its last known step is 16)" in texts[rank]


def killed(rank, size, where):
    averager = make_averager(rank, _C.Plan.create("grid", size))
    tensor = torch.ones(8 << 20)
    averager.launch(0, 0, [(EVERYONE, [tensor])], "step 0").wait()
    if rank == 1 and where == "before":
        die()
    work = averager.launch(1, 0, [(EVERYONE, [tensor])] * 4, "step 1")
    if rank == 1:
        die()
    start = time.monotonic()
    return error_of(work), time.monotonic() - start


@pytest.mark.parametrize("where", ["before", "during"])
def test_a_killed_rank_is_an_error_on_all_others(engine, where):
    outcomes = run_ranks(3, killed, where, init=False, check=False)
    assert outcomes[1].exitcode == -9
    for rank in (0, 2):
        text, seconds = outcomes[rank].value
        assert outcomes[rank].ok and seconds < (5 if engine == "native" else 40)
        if engine == "native":
            assert f"dssync: step 1 (average of 33554432 x float32 over 3 ranks) failed on rank {rank} of 3, phase " in text
            assert re.search(r"rank 1 \(127\.0\.0\.1:\d+, shm\) is gone: its process has ended", text)
            continue
        assert f"step 1 failed on rank {rank} of 3" in text and "the group [0, 1, 2] of all ranks" in text


def leaves(rank, size):
    averager = make_averager(rank, _C.Plan.create("auto", size))
    signal = rank_store()
    if rank == 1:
        averager.shutdown(abort=True)
        signal.wait(["done"])
        return ""
    text = error_of(averager.launch(0, 0, [(0, [torch.ones(4)])], "step 0"))
    signal.set("done", "1")
    return text


def test_a_rank_that_left_is_not_waited_for(engine):
    text, _ = run_ranks(2, leaves, init=False, timeout=50)
    if engine == "native":
        assert "failed on rank 0 of 2, phase start: rank 1: the averager has been shut down" in text
    else:
        assert "phase forming the group [0, 1] of round 0: rank 1 has left" in text


# ---- the end ---------------------------------------------------------------------------------------------------------------


def shut_down(rank, size, abort):
    """Rank 0 launches what nobody joins; it gets an error, and shutdown() returns soon."""
    averager = make_averager(rank, _C.Plan.create("auto", size))
    averager.launch(0, 0, [(0, [torch.ones(4)])], "step 0").wait()
    signal = rank_store()
    if rank == 1:
        signal.wait(["done"])
        return None
    pending = averager.launch(1, 0, [(0, [torch.ones(4)])], "step 1")
    start = time.monotonic()
    averager.shutdown(abort=abort)
    seconds = time.monotonic() - start
    with pytest.raises(dist.DistBackendError, match="step 2 was not done: the averager has been shut down"):
        averager.launch(2, 0, [(0, [torch.ones(4)])], "step 2")
    averager.shutdown()  # again: nothing
    text = error_of(pending)
    signal.set("done", "1")
    return text, seconds


@pytest.mark.parametrize("abort", [False, True])
def test_shutdown_with_a_launch_pending(engine, abort):
    (text, seconds), _ = run_ranks(2, shut_down, abort, init=False, timeout=50)
    if engine == "native":
        assert text == (
            "dssync: step 1 (average of 4 x float32 over 2 ranks) failed on rank 0 of 2, phase start: "
            "rank 0: the averager has been shut down."
        )
    else:
        assert text == "dssync: step 1 was not done: the averager has been shut down"
    assert seconds < 20  # two seconds, and what a busy machine adds; the time-out is 60


def finish_first(rank, size):
    averager = make_averager(rank, _C.Plan.create("auto", size))
    tensors = [torch.full((100,), float(rank)) for _ in range(20)]
    works = [averager.launch(step, 0, [(0, [tensor])], f"step {step}") for step, tensor in enumerate(tensors)]
    works[-1].get_future().add_done_callback(lambda _: time.sleep(0.1))  # runs while that work completes: it takes longer
    averager.shutdown()
    return all(work.is_completed() for work in works), [tensor[0].item() for tensor in tensors]


def test_shutdown_finishes_what_was_launched():
    assert run_ranks(2, finish_first, init=False) == [(True, [0.5] * 20)] * 2


kept: list[object] = []
"""Lives until the interpreter ends."""


def dropped(rank, size):
    """Averagers nobody shuts down, one with a launch that nobody joins; then the interpreter ends."""
    averager = make_averager(rank, _C.Plan.create("auto", size))
    averager.launch(0, 0, [(0, [torch.ones(4)])], "step 0").wait()
    if rank == 0:
        kept.append(averager.launch(1, 0, [(0, [torch.ones(4)])], "step 1"))
    kept.append(averager)
    return averager.stats()["last_step"]


def test_no_hang_at_exit_with_a_launch_pending():
    outcomes = run_ranks(2, dropped, init=False, interpreter_exit=True, timeout=50, check=False)
    assert [outcome.exitcode for outcome in outcomes] == [0, 0] and [outcome.value for outcome in outcomes] == [1, 0]


def wrong(rank, size):
    plan = _C.Plan.create("auto", 4)
    with pytest.raises(ValueError, match="rank 4 is not in the plan's world of 4"):
        _C.GlooAverager("x", PrefixStore("x", rank_store()), 4, plan, make_gloo, timedelta(seconds=1))
    with pytest.raises(ValueError, match="above 0"):
        _C.GlooAverager("x", PrefixStore("x", rank_store()), 0, plan, make_gloo, timedelta(seconds=1), max_groups=0)
    with pytest.raises(ValueError, match="a plan for 4 ranks on an engine of 1"):
        _C.NativeAverager("x", engine_of(0, 1), plan, timedelta(seconds=1))
    return True


def test_wrong_arguments(engine):
    assert run_ranks(1, wrong, init=False) == [True]
