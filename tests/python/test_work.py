"""What a call gives back: futures, order, errors, the profiler's titles; the gate before calls; and the end of a group."""

from __future__ import annotations

import os
import pickle
import re
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from harness import die, rank_store, run_ranks
from torch.distributed import PrefixStore, ReduceOp
from torch.profiler import ProfilerActivity, profile

from dssync_pg import _C
from dssync_pg._native import make_engine

pytestmark = pytest.mark.usefixtures("engine")


def make_group(rank, size, gate=None, averager=None, on_shutdown=lambda abort: None, seconds=60.0, label="test group"):
    """A bare backend, without what dssync_pg/_backend.py adds."""
    timeout = timedelta(seconds=seconds)
    inner = dist.ProcessGroupGloo(PrefixStore("inner", rank_store()), rank, size, timeout)
    gate = gate or _C.LaunchGate(lambda operation: None)
    engine = make_engine(rank_store(), rank, size, timeout, label, "auto") if os.environ["DSSYNC_ENGINE"] == "native" else None
    assert not isinstance(engine, str), engine
    return _C.ProcessGroupDssync(rank, size, inner, engine, gate, averager, 1024, lambda what: None, on_shutdown, label, timeout)


# ---- works -----------------------------------------------------------------------------------------------------------------


def inspect_work(rank, size):
    tensor = torch.full((4,), float(rank))
    work = dist.all_reduce(tensor, async_op=True)
    assert work is not None
    future = work.get_future()
    done = []
    chained = future.then(lambda f: done.append(f.value()) or f.value()[0] * 10)
    ten_times = chained.wait()
    assert work.wait()
    assert work.is_completed() and work.is_success() and work.exception() is None
    assert future.done() and future.value()[0] is tensor and done == [[tensor]]
    assert work.result()[0] is tensor
    nested = dist.all_gather([torch.zeros(4) for _ in range(size)], tensor, async_op=True)
    assert nested is not None
    gathered = nested.get_future().wait()
    return ten_times.tolist(), len(gathered), work.wait()


def test_futures_and_results():
    for ten_times, gathered, again in run_ranks(2, inspect_work):
        assert ten_times == [10.0] * 4 and gathered == 2 and again


def averaged_future(rank, size):
    tensor = torch.full((1000,), float(rank))
    work = dist.all_reduce(tensor, op=ReduceOp.AVG, async_op=True)
    assert work is not None
    (value,) = work.get_future().wait()
    scattered = torch.zeros(2)
    other = dist.reduce_scatter_tensor(scattered, torch.ones(2 * size), async_op=True)
    assert other is not None
    (got,) = other.get_future().wait()  # plain Gloo has none
    return value is tensor and value[0].item() == 0.5, got is scattered and got.tolist() == [2.0, 2.0]


def test_averages_and_reduce_scatters_have_futures():
    assert run_ranks(2, averaged_future) == [(True, True)] * 2


def ddp_gradients(rank, size):
    from dssync_pg import Options

    group = dist.new_group(backend="dssync", pg_options=Options(all_reduce="exact"))
    gradients = []
    for custom in (False, True):
        torch.manual_seed(0)
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 3), process_group=group)
        if custom:
            model.register_comm_hook(None, hook_on(group))
        model(torch.full((2, 8), rank + 1.0)).sum().backward()
        gradients.append(model.module.weight.grad.clone())
    return gradients


def hook_on(group):
    def average(state, bucket):
        work = dist.all_reduce(bucket.buffer().div_(2), group=group, async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    return average


def test_ddp_takes_the_futures():
    for plain, custom in run_ranks(2, ddp_gradients):
        expected = torch.full((3, 8), (2 * 1.0 + 2 * 2.0) / 2)
        torch.testing.assert_close(plain, expected)
        torch.testing.assert_close(custom, expected)


def receive(rank, size):
    if rank == 0:
        tensor = torch.zeros(3)
        work = dist.irecv(tensor)
        assert work is not None
        with pytest.raises(RuntimeError, match=r"recv from any source .* has no future"):
            work.get_future()
        work.wait()
        return work.source_rank(), tensor.tolist()
    if rank == 2:
        dist.send(torch.ones(3), 0)
    return None


def test_receive_from_any_source_tells_the_source():
    assert run_ranks(3, receive)[0] == (2, [1.0] * 3)


def impatient(rank, size):
    """Rank 1 joins only when rank 0 has given up waiting once; the call itself is unharmed."""
    signal = rank_store()
    tensor = torch.ones(4)
    if rank == 1:
        signal.wait(["gave up"])
        dist.all_reduce(tensor)
        return ""
    work = dist.all_reduce(tensor, async_op=True)
    assert work is not None
    with pytest.raises(RuntimeError) as error:
        work.wait(timedelta(milliseconds=50))
    signal.set("gave up", "1")
    work.wait()
    assert tensor.tolist() == [2.0] * 4
    return str(error.value)


def test_wait_with_a_time_out():
    text = run_ranks(2, impatient)[0]
    assert "all_reduce #" in text and "timed out after 0.05 s" in text and "rank 0 of 2 (default group), float32[4]" in text


def count(rank, size):
    pg = make_group(rank, size)
    before = pg._get_sequence_number_for_group()
    numbers = [pg.allreduce([torch.ones(1)]).wait() and pg._get_sequence_number_for_group() - before for _ in range(3)]
    return numbers


def test_sequence_numbers_count_calls():
    assert run_ranks(2, count, init=False) == [[1, 2, 3]] * 2


# ---- the profiler ----------------------------------------------------------------------------------------------------------

TITLES = {"broadcast", "all_reduce", "reduce", "all_gather", "gather", "scatter", "reduce_scatter", "all_to_all", "barrier"}


def names(profiler):
    return sorted(event.key for event in profiler.key_averages() if event.key.startswith("dssync:"))


def recorded_titles(rank, size):
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        tensor = torch.ones(4 * size)
        chunks = list(torch.ones(4 * size).chunk(size))
        dist.broadcast(tensor, 0)
        dist.all_reduce(tensor)
        dist.all_reduce(torch.ones(1000), op=ReduceOp.AVG)
        dist.reduce(tensor, 0)
        dist.all_gather(chunks, torch.ones(4))
        dist.gather(torch.ones(4), chunks if rank == 0 else None)
        dist.scatter(torch.ones(4), chunks if rank == 0 else None)
        dist.reduce_scatter(torch.ones(4), chunks)
        dist.all_to_all_single(torch.ones(size), torch.ones(size))
        dist.barrier()
        if rank == 0:
            dist.send(torch.ones(1), 1)
        else:
            dist.recv(torch.ones(1), 0)
    return names(profiler)


def test_every_call_has_a_title_in_the_profiler():
    for rank, titles in enumerate(run_ranks(2, recorded_titles)):
        assert titles == sorted(f"dssync:{name}" for name in [*TITLES, "send" if rank == 0 else "recv"])


# ---- errors ----------------------------------------------------------------------------------------------------------------


def refused(rank, size):
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))  # torch's own functions check before they call
    with pytest.raises(RuntimeError) as error:
        backend.allreduce_coalesced([torch.ones(2), torch.ones(2, dtype=torch.int32)])
    with pytest.raises(RuntimeError) as unsupported:
        dist.all_reduce(torch.ones(2, dtype=torch.int16))
    return str(error.value), str(unsupported.value)


def test_refused_arguments_keep_the_words_of_gloo():
    for rank, (mixed, int16) in enumerate(run_ranks(2, refused)):
        assert f"dssync: all_reduce_coalesced #1 failed on rank {rank} of 2 (default group), 2 tensors, first float32[2]" in mixed
        assert "ProcessGroupGloo::allreduce_coalesced: tensors must all have the same type" in mixed
        assert "dssync: all_reduce #2 failed" in int16 and "int16[2], phase transfer: Invalid scalar type" in int16


def peer_dies(rank, size):
    tensor = torch.ones(1 << 20)
    dist.all_reduce(tensor)
    if rank == 1:
        die()
    start = time.monotonic()
    work = dist.all_reduce(tensor, async_op=True)
    assert work is not None
    with pytest.raises(RuntimeError) as error:
        work.wait()
    assert not work.is_success() and str(work.exception()) == str(error.value)
    with pytest.raises(RuntimeError):
        work.get_future().wait()
    return str(error.value), time.monotonic() - start


def test_a_dead_peer_is_an_error_that_says_what_was_going_on(engine):
    outcomes = run_ranks(2, peer_dies, check=False)
    text, seconds = outcomes[0].value
    if engine == "native":
        assert "dssync: all_reduce call 1 of the default group (all_reduce sum of 1048576 x float32 over 2 ranks) failed" in text
        assert re.search(r"on rank 0 of 2, phase transfer: rank 1 \(127\.0\.0\.1:\d+, shm\) is gone: its process has ended", text)
        assert seconds < 5  # the C tests look closer, where no interpreter and store are in between
        return
    assert "dssync: all_reduce #" in text and "on rank 0 of 2 (default group), float32[1048576], phase transfer: " in text
    assert text.endswith("A peer ended or lost its connection: the first error in its log says why.") and seconds < 20


def peer_is_late(rank, size):
    signal = rank_store()
    if rank == 1:
        signal.wait(["0"])
        return ""
    with pytest.raises(RuntimeError) as error:
        dist.all_reduce(torch.ones(4))
    signal.set("0", "1")
    return str(error.value)


def test_a_time_out_says_what_to_look_for(engine):
    text = run_ranks(2, peer_is_late, pg_timeout=2)[0]
    if engine == "native":
        assert "phase start: timed out after 2.0 s: rank 1 (" in text and "has not launched all_reduce call 0" in text
    else:
        assert "phase transfer: " in text
    assert "imed out" in text and "took another branch; the timeout of the process group (`timeout=`)" in text


# ---- the gate --------------------------------------------------------------------------------------------------------------


def through_the_gate(rank, size):
    calls = []

    def callback(operation):
        calls.append(operation)
        if operation == "barrier":
            pg.allreduce([torch.ones(1)]).wait()  # passes unasked: we are inside

    gate = _C.LaunchGate(callback)
    pg = make_group(rank, size, gate)
    assert not gate.armed and gate.exact_depth == 0
    pg.allreduce([torch.ones(1)]).wait()
    assert calls == []
    gate.armed = True
    small, lists = [torch.ones(2)], [[torch.ones(2) for _ in range(size)]]
    works = [
        pg.broadcast(small, dist.BroadcastOptions()),
        pg.allreduce(small),
        pg.reduce(small, dist.ReduceOptions()),
        pg.allgather(lists, small),
        pg._allgather_base(torch.ones(2 * size), torch.ones(2)),
        pg.reduce_scatter(small, lists),
        pg._reduce_scatter_base(torch.ones(2), torch.ones(2 * size)),
        pg.alltoall_base(torch.ones(size), torch.ones(size), [], []),
        pg.send(small, 1, 0) if rank == 0 else pg.recv(small, 0, 0),
        pg.barrier(),
    ]
    for work in works:
        work.wait()
    pg.monitored_barrier(timedelta(seconds=10), False)
    during = list(calls)

    class Reducing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            gradient = gradient.clone()  # sum() hands down an expanded one
            pg.allreduce([gradient]).wait()
            return gradient

    Reducing.apply(torch.ones(2, requires_grad=True)).sum().backward()
    inside_backward = calls[len(during) :]
    gate.armed = False
    pg.allreduce(small).wait()
    assert len(calls) == len(during)
    return during, inside_backward


def test_the_gate_calls_before_every_call_but_in_backward_and_in_itself():
    for rank, (during, inside_backward) in enumerate(run_ranks(2, through_the_gate, init=False)):
        assert during == [
            "broadcast",
            "all_reduce",
            "reduce",
            "all_gather",
            "all_gather_into_tensor",
            "reduce_scatter",
            "reduce_scatter_tensor",
            "all_to_all_single",
            "send" if rank == 0 else "recv",
            "barrier",
            "monitored_barrier",
        ]
        assert inside_backward == []


def failing_gate(rank, size):
    def callback(operation):
        raise KeyError("not today")

    gate = _C.LaunchGate(callback)
    pg = make_group(rank, size, gate)
    gate.armed = True
    with pytest.raises(KeyError, match="not today"):
        pg.allreduce([torch.ones(1)])
    gate.armed = False
    pg.allreduce([torch.ones(1)]).wait()
    return True


def test_an_error_in_the_gate_keeps_its_type():
    assert run_ranks(2, failing_gate, init=False) == [True, True]


# ---- the end ---------------------------------------------------------------------------------------------------------------


def shut_down(rank, size):
    calls = []

    def on_shutdown(abort):
        assert not abort
        calls.append(pg.allreduce([torch.ones(1)]).wait())  # the group still works

    pg = make_group(rank, size, on_shutdown=on_shutdown)
    pg.shutdown()
    pg.shutdown()
    with pytest.raises(dist.DistBackendError, match=r"all_reduce on rank \d of 2 \(test group\) after the process group was shut"):
        pg.allreduce([torch.ones(1)])
    with pytest.raises(RuntimeError, match=r"process group \(test group\) has been shut down"):
        _ = pg.inner
    assert pg.averager is None
    return calls


def test_shutdown_calls_once_and_then_every_call_is_an_error():
    assert run_ranks(2, shut_down, init=False) == [[True], [True]]


def pending_at_the_end(rank, size, how):
    """Rank 0 has an all_reduce and a receive that nobody answers, when its group ends in the way asked for."""
    dist.barrier()
    signal = rank_store()
    if rank == 0:
        kept.append(dist.all_reduce(torch.ones(4), async_op=True))
        kept.append(dist.all_reduce(torch.ones(1000), op=ReduceOp.AVG, async_op=True))
        kept.append(dist.irecv(torch.ones(4), 1))
    start = time.monotonic()
    if how == "destroy" and rank == 0:
        dist.destroy_process_group()
    if how == "abort" and rank == 0:
        dist.distributed_c10d._abort_process_group()
    seconds = time.monotonic() - start
    signal.set(str(rank), "1")
    signal.wait(["0", "1"])
    return seconds


kept: list[object] = []


@pytest.mark.parametrize("how", ["destroy", "abort", "nothing"])
def test_no_hang_at_the_end_with_calls_pending(how):
    outcomes = run_ranks(2, pending_at_the_end, how, pg_timeout=300, timeout=100, interpreter_exit=True, check=False)
    assert [outcome.exitcode for outcome in outcomes] == [0, 0], [str(outcome) for outcome in outcomes]
    assert all(outcome.value < 50 for outcome in outcomes)


def errors_travel(rank, size):
    """Pickled through a future's callback, as torch's elastic agent does."""
    try:
        dist.all_reduce(torch.ones(2, dtype=torch.int16))
    except RuntimeError as error:
        return pickle.loads(pickle.dumps(error)).args[0]
    return ""


def test_errors_can_be_pickled():
    assert all("Invalid scalar type" in text for text in run_ranks(2, errors_travel))


# ---- fully sharded training ------------------------------------------------------------------------------------------------


def sharded_gradients(rank, size):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = torch.nn.Linear(6, 4)
    reference = torch.nn.Linear(6, 4)
    reference.load_state_dict(model.state_dict())
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (size,)))
    inputs = torch.arange(12.0 * size).view(size, 2, 6)
    (model(inputs[rank]).pow(2).sum()).backward()
    sum(reference(part).pow(2).sum() / size for part in inputs).backward()
    return model.weight.grad.full_tensor(), reference.weight.grad


def test_fsdp2_runs_on_it_and_its_averages_are_exact():
    for sharded, reference in run_ranks(2, sharded_gradients):
        torch.testing.assert_close(sharded, reference)
