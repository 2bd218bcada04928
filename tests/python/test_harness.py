"""The harness itself: a failing, dying or hanging rank is told, never waited for."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from harness import RanksFailed, die, run_ranks


def summed(rank, world_size, factor):
    tensor = torch.full((10,), rank * factor)
    dist.all_reduce(tensor)
    return tensor[0].item()


def raising(rank, world_size):
    print(f"rank {rank} was here")
    if rank == 1:
        raise ValueError("rank one's trouble")


def dying(rank, world_size):
    if rank == 1:
        die()
    return os.getpid()


def hanging(rank, world_size):
    if rank == 0:
        time.sleep(600)


def from_environment(rank, world_size):
    dist.init_process_group("gloo")
    return dist.get_rank(), os.environ["FLAVOUR"]


def at_exit(rank, world_size):
    import atexit

    atexit.register(print, "the interpreter ended")


@pytest.mark.parametrize("store", ["tcp", "file"])
def test_values_by_rank(store):
    assert run_ranks(3, summed, 2.0, backend="gloo", store=store) == [6.0] * 3


def test_environment_rendezvous_with_an_environment_for_each_rank():
    assert run_ranks(2, from_environment, init=False, env=[{"FLAVOUR": "a"}, {"FLAVOUR": "b"}]) == [(0, "a"), (1, "b")]


def test_a_raising_rank_is_raised_with_its_traceback():
    with pytest.raises(RanksFailed, match="in raising") as caught:
        run_ranks(2, raising, backend="gloo")
    assert isinstance(caught.value.__cause__, ValueError)
    assert "rank 0 was here" in str(caught.value)


def test_a_killed_rank_is_an_outcome():
    survivor, killed = run_ranks(2, dying, backend="gloo", check=False)
    assert survivor.ok
    assert survivor.value == survivor.pid
    assert (killed.exitcode, killed.error, killed.ok) == (-9, None, False)


def test_a_hang_ends_with_stacks():
    with pytest.raises(RanksFailed, match="in hanging"):
        run_ranks(2, hanging, backend="gloo", timeout=1.0)


def test_interpreter_exit_runs_exit_handlers():
    for outcome in run_ranks(2, at_exit, backend="gloo", interpreter_exit=True, check=False):
        assert outcome.ok
        assert "the interpreter ended" in outcome.output
