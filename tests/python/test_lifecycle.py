"""Groups from their making to the end of the process: nothing hangs, nothing is left, and people are told what is approximate."""

import logging
import os
import re
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
from harness import die, rank_store, run_ranks, run_script
from torch.nn.parallel import DistributedDataParallel

from dssync_pg import Options, _backend, exact, get_syncs

pytestmark = pytest.mark.usefixtures("engine")


def pairs():
    return Options(plan="grid", group_size=2)  # on the engine that the test is run for


def averaged(rank):
    tensor = torch.full((1000,), float(rank))
    dist.all_reduce(tensor, op=dist.ReduceOp.AVG)
    return tensor[0].item()


def thread_count():
    return len(os.listdir("/proc/self/task"))


# ---- exact and approximate -------------------------------------------------------------------------------------------------------


def exact_inside(rank, world_size):
    inside = []
    with exact():
        inside.append(averaged(rank))
        with exact():
            inside.append(averaged(rank))
        inside.append(averaged(rank))
    try:
        with exact():
            raise KeyError
    except KeyError:
        pass
    return inside, averaged(rank)


def test_exact_nests_and_ends():
    results = run_ranks(4, exact_inside, pg_options=pairs())
    assert all(inside == [1.5] * 3 for inside, _ in results)
    assert [value for _, value in results] in ([0.5, 0.5, 2.5, 2.5], [1.0, 2.0, 1.0, 2.0])


def exact_by_option(rank, world_size):
    return averaged(rank), len(_backend.live)


def test_the_option_makes_everything_exact():
    assert run_ranks(4, exact_by_option, env={"DSSYNC_ALL_REDUCE": "exact"}) == [(1.5, 0)] * 4


# ---- what people are told --------------------------------------------------------------------------------------------------------


def average_twice(rank, world_size, setup=None):
    if setup == "basicConfig":
        logging.basicConfig(level=logging.INFO, format="ROOT %(message)s", stream=sys.stderr)
    averaged(rank)
    averaged(rank)


def average_silently(rank, world_size):
    logging.getLogger("dssync_pg").setLevel(logging.WARNING)
    dist.init_process_group("dssync")
    averaged(rank)


@pytest.mark.parametrize(("setup", "prefix"), [(None, "INFO "), ("basicConfig", "ROOT ")])
def test_the_first_average_is_told_once_on_rank_0(setup, prefix):
    outcomes = run_ranks(4, average_twice, setup, pg_options=pairs(), check=False)
    told = [[line for line in outcome.output.splitlines() if "averaged inside groups" in line] for outcome in outcomes]
    assert [len(lines) for lines in told] == [1, 0, 0, 0] if setup is None else [len(told[0])] == [1]
    assert told[0][0].startswith(f"{prefix}dssync: ")
    for part in ("default group", "grid plan, period 2, groups of up to 2", "exact()"):
        assert part in told[0][0]


def test_it_can_be_silenced():
    for outcome in run_ranks(2, average_silently, init=False, check=False):
        assert outcome.ok
        assert "dssync" not in outcome.output


# ---- making and destroying -------------------------------------------------------------------------------------------------------


def again_and_again(rank, world_size):
    threads = []
    for turn in range(4):
        dist.init_process_group("dssync", store=dist.PrefixStore(str(turn), rank_store()), rank=rank, world_size=world_size)
        other = dist.new_group(backend="dssync", pg_options=pairs())
        averaged(rank)
        dist.barrier(group=other)
        dist.destroy_process_group(other)
        assert len(_backend.live) == 1
        averaged(rank)
        dist.destroy_process_group()
        assert not _backend.live
        assert not _backend._open
        threads.append(thread_count())
    return threads


def test_groups_can_be_made_again_and_leave_no_thread():
    for threads in run_ranks(2, again_and_again, init=False):
        assert threads[1] == threads[2] == threads[3]


def same_store_again(rank, world_size):
    values = []
    for _ in range(2):
        dist.init_process_group("dssync")
        values.append(averaged(rank))
        dist.destroy_process_group()
    return values


def test_on_a_file_store():
    assert run_ranks(2, exact_by_option, store="file") == [(0.5, 1)] * 2


def test_a_world_of_one():
    assert run_ranks(1, exact_inside) == [([0.0] * 3, 0.0)]


# ---- endings ---------------------------------------------------------------------------------------------------------------------


def left_open(rank, world_size, pending):
    tensor = torch.full((1 << 16,), float(rank))
    averaged(rank)
    if pending == "exact, unmatched" and rank == 0:
        left_open.work = dist.all_reduce(tensor, async_op=True)  # the others never join
    if pending == "average, unmatched" and rank == 0:
        left_open.work = dist.all_reduce(tensor, op=dist.ReduceOp.AVG, async_op=True)
    if pending == "matched":
        left_open.work = dist.all_reduce(tensor, async_op=True)
    if pending == "recv" and rank == 0:
        left_open.work = dist.irecv(tensor, src=1)
    return threading.active_count()


@pytest.mark.parametrize("pending", ["nothing", "matched", "exact, unmatched", "average, unmatched", "recv"])
def test_the_interpreter_ends_without_destroy(pending):
    outcomes = run_ranks(2, left_open, pending, interpreter_exit=True, check=False, timeout=60, pg_timeout=120)
    for outcome in outcomes:
        assert outcome.ok, outcome


def exits_while_a_callback_runs(rank, world_size):
    if rank == 1:
        rank_store().wait(["posted"])
        dist.all_reduce(torch.ones(100))
        return
    began = threading.Event()

    def wanting_the_lock(future):
        began.set()
        for _ in range(300):
            time.sleep(0.001)

    work = dist.all_reduce(torch.ones(100), async_op=True)
    work.get_future().add_done_callback(wanting_the_lock)
    rank_store().set("posted", "1")
    assert began.wait(30)


def test_the_interpreter_ends_after_the_callbacks_of_what_is_complete():
    """A thread that wants Python's lock while the interpreter ends aborts the process."""
    outcomes = run_ranks(2, exits_while_a_callback_runs, interpreter_exit=True, check=False)
    assert [(outcome.exitcode, outcome.output.count("terminate called")) for outcome in outcomes] == [(0, 0)] * 2


def killed_in_mid_average(rank, world_size):
    averaged(rank)
    if rank == 1:
        die()
    averaged(rank)
    averaged(rank)


def test_a_killed_rank_is_an_error_on_the_others_that_wait_for_it():
    survivor, killed = run_ranks(2, killed_in_mid_average, check=False, timeout=40, pg_timeout=5)
    assert killed.exitcode == -9
    assert isinstance(survivor.error, RuntimeError)
    assert survivor.exitcode == 0


def test_a_script_that_raises_ends_everywhere(engine):
    outcomes = run_script(
        2,
        """
import datetime, torch, torch.distributed as dist
dist.init_process_group("dssync", timeout=datetime.timedelta(seconds=10))
tensor = torch.ones(1000)
dist.all_reduce(tensor, op=dist.ReduceOp.AVG)
if dist.get_rank() == 1:
    raise ValueError("the script's own trouble")
dist.all_reduce(tensor, op=dist.ReduceOp.AVG)
""",
        check=False,
        timeout=60,
    )
    assert [outcome.exitcode for outcome in outcomes] == [1, 1]
    assert "the script's own trouble" in outcomes[1].output
    if engine == "native":
        assert re.search(
            r"failed on rank 0 of 2, phase (start|transfer): rank 1( \(.*, shm\) has|: the averager has been) shut down",
            outcomes[0].output,
        )
    else:
        assert "A peer ended or lost its connection" in outcomes[0].output


def aborts_before_its_average(rank, world_size):
    model = DistributedDataParallel(torch.nn.Linear(50, 50))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.ones(2, 50)).sum().backward()
        optimizer.step()
    (sync,) = get_syncs(model)
    model(torch.ones(2, 50)).sum().backward()  # an average is due, and rank 1 does not come
    store = rank_store()
    if rank == 1:
        store.wait(["aborted"])
    start = time.monotonic()
    dist.distributed_c10d._abort_process_group()
    seconds = time.monotonic() - start
    store.set("aborted", "1")
    return seconds, sync.step


def test_abort_does_not_launch_what_is_due():
    for seconds, step in run_ranks(2, aborts_before_its_average, pg_timeout=60):
        assert seconds < 10
        assert step == 2
