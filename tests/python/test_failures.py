"""Ranks that die, stop, disagree or abort while others wait for them: an error that names them, at once, and nothing hangs."""

from __future__ import annotations

import os
import re
import signal
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import die, run_ranks
from torch.distributed import ReduceOp
from torch.distributed.distributed_c10d import _abort_process_group
from torch.distributed.distributed_c10d import _get_default_store as default_store

from dssync_pg import Options

PROMPT = 5.0
"""Seconds from a kill to the error. It takes milliseconds where processors are free and must take less than one second; the tests
share two processors with whatever else runs there."""

PEER = r"rank {} \(127\.0\.0\.1:\d+(, (shm|tcp))?\)"


@pytest.fixture(params=["shm", "tcp"], autouse=True)
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DSSYNC_ENGINE", "native")
    monkeypatch.setenv("DSSYNC_TRANSPORT", request.param)
    name: str = request.param
    return name


def start(operation: str) -> Any:
    """What this rank waits in."""
    if operation == "barrier":
        return dist.barrier(async_op=True)
    op = ReduceOp.AVG if operation == "average" else ReduceOp.SUM
    return dist.all_reduce(torch.ones(1 << 21), op=op, async_op=True)


def error_of(work: Any) -> str:
    try:
        work.wait()
    except dist.DistBackendError as error:
        return str(error)
    return ""


def meet(rank: int, size: int, place: str) -> None:
    """All ranks have come, and have done what they waited for before."""
    default_store().set(f"{place} {rank}", "1")
    default_store().wait([f"{place} {other}" for other in range(size)])


# ---- a process that ends ---------------------------------------------------------------------------------------------------


def killed(rank: int, size: int, operation: str) -> tuple[str, float]:
    """Rank 1 is killed once all others wait; gives back the error and the seconds from the kill to it."""
    store = default_store()
    others = [str(other) for other in range(size) if other != 1]
    start("barrier").wait()
    if rank == 1:
        store.wait(others)
        store.set("killed at", repr(time.monotonic()))  # one clock for all processes of a host
        die()
    if operation == "idle":
        store.set(str(rank), "idle")
        store.wait(["killed at"])
        work = start("barrier")
    else:
        work = start(operation)
        store.set(str(rank), "waiting")
    text = error_of(work)
    return text, time.monotonic() - float(store.get("killed at"))


@pytest.mark.parametrize("operation", ["all_reduce", "barrier", "average", "idle"])
def test_a_killed_rank_is_an_error_at_once_on_all_who_wait_for_it(operation):
    outcomes = run_ranks(4, killed, operation, pg_options=Options(plan="grid", group_size=4), check=False)
    assert outcomes[1].exitcode == -signal.SIGKILL
    name = {"average": r"all_reduce\(AVG\) call 0", "all_reduce": "all_reduce call 1"}.get(operation, "barrier call 1")
    for rank in (0, 2, 3):
        assert outcomes[rank].ok, outcomes[rank]
        text, seconds = outcomes[rank].value
        assert re.match(rf"dssync: {name}.* failed on rank {rank} of 4, phase (start|connect|transfer): ", text), text
        assert re.search(PEER.format(1) + " is gone: ", text), text
        assert seconds < PROMPT


def killed_while_connecting(rank: int, size: int) -> tuple[str, float]:
    """Rank 1 is stopped before anybody has called it, so that callers hang in the handshake, and then killed."""
    store = default_store()
    if rank == 1:
        store.set("pid", str(os.getpid()))
        time.sleep(60)
    pid = int(store.get("pid"))
    if rank == 0:
        os.kill(pid, signal.SIGSTOP)
        store.set("stopped", "1")
    store.wait(["stopped"])
    work = start("all_reduce")
    store.set(str(rank), "waiting")
    if rank == 0:
        store.wait(["2"])
        with pytest.raises(RuntimeError):  # they have called, and nobody answers
            work.wait(timedelta(seconds=0.3))
        store.set("killed at", repr(time.monotonic()))
        os.kill(pid, signal.SIGKILL)
    text = error_of(work)
    return text, time.monotonic() - float(store.get("killed at"))


def test_a_rank_killed_in_the_handshake_is_an_error_at_once():
    outcomes = run_ranks(3, killed_while_connecting, check=False)
    assert outcomes[1].exitcode == -signal.SIGKILL
    for rank in (0, 2):
        assert outcomes[rank].ok, outcomes[rank]
        text, seconds = outcomes[rank].value
        assert re.search(PEER.format(1) + " is gone: ", text), text
        assert seconds < PROMPT


# ---- a process that stops --------------------------------------------------------------------------------------------------


def stopped(rank: int, size: int, count: int) -> tuple[str, float, list[float]]:
    store = default_store()
    rest = dist.new_group([0, 2, 3], backend="dssync")
    dist.all_reduce(torch.ones(10))
    if rank == 1:
        store.set("pid", str(os.getpid()))
        time.sleep(60)
    pid = int(store.get("pid"))
    if rank == 0:
        os.kill(pid, signal.SIGSTOP)
        store.set("stopped", "1")
    store.wait(["stopped"])
    began = time.monotonic()
    work = dist.all_reduce(torch.ones(count), async_op=True)
    sums = []
    for turn in range(10):  # meanwhile, and after it
        tensor = torch.full((10_000,), float(turn))
        dist.all_reduce(tensor, group=rest)
        sums.append(tensor[0].item())
        if turn == 5:
            text = error_of(work)
            seconds = time.monotonic() - began
    if rank == 0:
        os.kill(pid, signal.SIGKILL)
    return text, seconds, sums


@pytest.mark.parametrize("count", [10_000, 1 << 21])
def test_a_stopped_rank_is_an_error_at_the_time_out_and_other_groups_go_on(transport, count):
    outcomes = run_ranks(4, stopped, count, pg_timeout=3, check=False)
    for rank in (0, 2, 3):
        assert outcomes[rank].ok, outcomes[rank]
        text, seconds, sums = outcomes[rank].value
        assert sums == [3.0 * turn for turn in range(10)]
        assert 2 < seconds < 3 + PROMPT
        assert f"failed on rank {rank} of 4, phase " in text
        assert re.search(r"timed out after 3\.0 s: .*" + PEER.format(1) + " has (not launched|stopped)", text), text


# ---- ranks that disagree ---------------------------------------------------------------------------------------------------


def disagree(rank: int, size: int, what: str) -> tuple[str, float]:
    other = dist.new_group(backend="dssync")
    dist.barrier()
    meet(rank, size, "the barrier")  # what fails later ends all that is under way in the group, on all ranks
    odd = rank == 1
    tensor = torch.ones(3000 if what == "size" and odd else 2000, dtype=torch.int32 if what == "dtype" and odd else torch.float32)
    if what == "kind" and odd:
        work = dist.barrier(async_op=True)
    elif what == "average" and odd:
        work = dist.all_reduce_coalesced([tensor], op=ReduceOp.AVG, async_op=True)
    else:
        work = dist.all_reduce(tensor, op=ReduceOp.MAX if what == "op" and odd else ReduceOp.SUM, async_op=True)
    text = error_of(work)
    check = torch.ones(1)
    dist.all_reduce(check, group=other)
    return text, check.item()


SAID = {
    "size": ["sum of 2000 x float32", "sum of 3000 x float32"],
    "dtype": ["sum of 2000 x float32", "sum of 2000 x int32"],
    "op": ["sum of 2000 x float32", "max of 2000 x float32"],
    "kind": ["sum of 2000 x float32", "barrier over 3 ranks"],
    "average": ["sum of 2000 x float32", "average of 2000 x float32"],
}


@pytest.mark.parametrize("what", SAID)
def test_different_calls_are_an_error_on_all_ranks_with_both_sides_values(what):
    for rank, (text, total) in enumerate(run_ranks(3, disagree, what)):
        assert total == 3.0  # the process lives, and its other groups go on
        assert f"failed on rank {rank} of 3, phase " in text
        assert "the ranks did not call the same thing: " in text and "rank 1 has " in text
        assert all(side in text for side in SAID[what]), text


def second_failure(rank: int, size: int) -> str:
    """Calls differ; later rank 2 waits in vain for an average, which has keys of its own."""
    store = default_store()
    first = error_of(dist.all_reduce(torch.ones(10 + rank // 2), async_op=True))
    assert "the ranks did not call the same thing" in first
    if rank != 2:
        store.wait(["given up"])
        return first
    text = error_of(start("average"))
    store.set("given up", "1")
    return text


def test_a_later_error_quotes_what_failed_first():
    text = run_ranks(3, second_failure, pg_timeout=3, pg_options=Options(plan="grid", group_size=3))[2]
    own, first = text.split(" The first failure of this group was: ")
    assert own.startswith("dssync: all_reduce(AVG) call 0") and "failed on rank 2 of 3" in own and "timed out after 3.0 s" in own
    assert "the ranks did not call the same thing" in first and "10 x float32" in first and "11 x float32" in first


# ---- a rank that gives up --------------------------------------------------------------------------------------------------


def aborts(rank: int, size: int) -> tuple[str, float]:
    """Rank 0 aborts when ranks 0 and 2 wait for rank 1."""
    store = default_store()
    dist.barrier()
    work = start("all_reduce") if rank != 1 else None
    meet(rank, size, "posted")
    if rank == 0:
        store.set("aborted at", repr(time.monotonic()))
        _abort_process_group()
    text = error_of(work) if work is not None else ""
    seconds = time.monotonic() - float(store.get("aborted at"))
    store.set(f"{rank} done", "1")
    store.wait([f"{other} done" for other in range(size)])
    return text, seconds


def test_abort_is_an_error_at_once_here_and_there():
    results = run_ranks(3, aborts)
    for rank in (0, 2):
        text, seconds = results[rank]
        assert f"failed on rank {rank} of 3, phase " in text and "shut down" in text, text
        assert seconds < PROMPT
    assert re.search(PEER.format(0) + " has shut down its process group", results[2][0])
