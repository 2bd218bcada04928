"""The native engine in a process group: which one is in use and why, and all_reduces against Gloo's in the same processes."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import rank_store, run_ranks
from torch import Tensor
from torch.distributed import ReduceOp
from torch.distributed.distributed_c10d import _get_default_store as default_store

import dssync_pg
from dssync_pg import Options
from dssync_pg._doctor import interface_addresses

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
DTYPES = [*FLOATS, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64, torch.complex128]
OPS = [ReduceOp.SUM, ReduceOp.PRODUCT, ReduceOp.MIN, ReduceOp.MAX, ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR]


def sample(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    """Values that depend on the seed only. Integers stay small enough that a product over four ranks fits into int8."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.complex128).to(dtype)
    if dtype in FLOATS:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 3, shape, generator=generator).to(dtype)


# ---- which engine, and why -------------------------------------------------------------------------------------------------


def shared_mappings() -> int:
    return sum("memfd:dssync" in line for line in Path("/proc/self/maps").read_text().splitlines())


def what_is_used(rank: int, size: int) -> tuple[str, dict[str, int], float, int]:
    model = torch.nn.Linear(2, 2)
    sync = dssync_pg.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    tensor = torch.full((10,), float(rank))
    dist.all_reduce(tensor)
    stats, mappings = sync.stats(), shared_mappings()
    dist.barrier()  # nobody leaves before all have looked
    return stats["engine"], stats["peers"], tensor[0].item(), mappings


@pytest.mark.parametrize(
    ("env", "engine", "transport", "said"),
    [
        ({}, "native", "shm", "runs on the native engine, shared memory: all ranks are on one host"),
        ({"DSSYNC_TRANSPORT": "shm"}, "native", "shm", "runs on the native engine, shared memory"),
        ({"DSSYNC_TRANSPORT": "tcp"}, "native", "tcp", "runs on the native engine, TCP (transport=tcp)"),
        ({"DSSYNC_ENGINE": "gloo"}, "gloo", None, "runs over Gloo (engine=gloo)"),
    ],
)
def test_stats_and_one_line_tell_what_is_in_use(env, engine, transport, said):
    outcomes = run_ranks(3, what_is_used, env=env, check=False)
    for outcome in outcomes:
        assert outcome.ok, outcome
        peers = {transport: 2} if transport else {}
        name, connected, total, mappings = outcome.value
        assert (name, connected, total) == (engine, peers, 3.0)
        assert (mappings > 0) == (transport == "shm")
    lines = [line for outcome in outcomes for line in outcome.output.splitlines() if " runs " in line]
    assert len(lines) == 1 and said in lines[0] and lines[0] in outcomes[0].output


def options_by_argument(rank: int, size: int) -> tuple[str, dict[str, int]]:
    return what_is_used(rank, size)[:2]


def test_arguments_win_over_the_environment():
    options = Options(engine="native", transport="tcp")
    env = {"DSSYNC_ENGINE": "gloo", "DSSYNC_TRANSPORT": "shm"}
    assert run_ranks(2, options_by_argument, pg_options=options, env=env) == [("native", {"tcp": 1})] * 2


WITHOUT = [{}, {"DSSYNC_SOCKET_IFNAME": "nosuch0"}, {}]
"""Rank 1 cannot have an engine."""


@pytest.mark.parametrize("name", ["nosuch0", os.fsdecode(b"\xff\xfenosuch0")])
def test_where_one_rank_cannot_have_an_engine_all_fall_back_to_gloo_with_one_warning(name):
    outcomes = run_ranks(3, what_is_used, env=[{}, {"DSSYNC_SOCKET_IFNAME": name}, {}], check=False)
    for outcome in outcomes:
        assert outcome.ok, outcome
        assert outcome.value == ("gloo", {}, 3.0, 0)
    warnings = [line for outcome in outcomes for line in outcome.output.splitlines() if "slower" in line]
    assert len(warnings) == 1 and warnings[0] in outcomes[0].output
    assert warnings[0].startswith("WARNING dssync: the default group runs over Gloo, slower: ")
    assert "rank 1: " in warnings[0] and "nosuch0" in warnings[0]


@pytest.mark.parametrize("named", [{"engine": "native"}, {"transport": "shm"}])
def test_where_native_was_asked_for_it_is_an_error_on_every_rank(named):
    outcomes = run_ranks(3, what_is_used, env=WITHOUT, pg_options=Options(**named), check=False, timeout=40)
    texts = {str(outcome.error) for outcome in outcomes}
    assert len(texts) == 1
    text = texts.pop()
    assert text.startswith("dssync: the default group has no native engine: rank 1: ") and "nosuch0" in text


@pytest.mark.parametrize("variable", ["DSSYNC_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"])
def test_an_interface_can_be_named(variable):
    env = {variable: "lo", "DSSYNC_TRANSPORT": "tcp", "DSSYNC_ENGINE": "native"}
    assert run_ranks(2, what_is_used, env=env) == [("native", {"tcp": 1}, 1.0, 0)] * 2


def listens(rank: int, size: int) -> tuple[set[str], float]:
    """The IPv4 addresses that this process listens on: Gloo's, as there is no engine and the store is elsewhere."""
    tensor = torch.full((3000,), float(rank))
    dist.all_reduce(tensor)  # it can be reached there
    dist.all_reduce(tensor, op=ReduceOp.AVG)  # by the groups of an average, too
    links = (os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}"))
    sockets = {link[8:-1] for link in links if link.startswith("socket:[")}
    rows = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    words = [row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in sockets]
    return {socket.inet_ntoa(bytes.fromhex(word)[::-1]) for word in words}, tensor[0].item()


@pytest.mark.parametrize("first", ["nosuch0", "lo"])
def test_gloo_listens_where_the_engine_would(first):
    """The last interface with an address is not the one that the host's name leads to, or there is only lo."""
    addresses = {name: own[0] for name, own in interface_addresses().items() if own and ":" not in own[0]}
    last = list(addresses)[-1]
    env = {"DSSYNC_SOCKET_IFNAME": f"{first},{last}", "DSSYNC_ENGINE": "gloo"}
    assert run_ranks(2, listens, env=env) == [({addresses.get(first, addresses[last])}, 1.0)] * 2


def test_gloos_own_variable_wins_for_gloo():
    env = {"DSSYNC_SOCKET_IFNAME": list(interface_addresses())[-1], "GLOO_SOCKET_IFNAME": "lo", "DSSYNC_ENGINE": "gloo"}
    assert run_ranks(2, listens, env=env) == [({"127.0.0.1"}, 1.0)] * 2


# ---- all_reduce against Gloo -----------------------------------------------------------------------------------------------

SHAPES = [(), (0,), (1,), (3, 5), (2500,)]
"""The last is above what small ones are exchanged by (8 KiB), in most dtypes."""


def reduced(group: dist.ProcessGroup, tensor: Tensor, op: ReduceOp.RedOpType) -> Tensor | str:
    try:
        dist.all_reduce(tensor, op=op, group=group)
    except Exception as error:
        return type(error).__name__
    return tensor


def is_same(expected: Tensor | str, got: Tensor | str) -> bool:
    if isinstance(expected, str) or isinstance(got, str):
        return isinstance(expected, str) and isinstance(got, str)
    if expected.dtype in FLOATS or expected.is_complex():
        rough = 2e-2 if expected.dtype in (torch.float16, torch.bfloat16) else 1e-5  # Gloo rounds after each addition
        return torch.allclose(expected, got, rtol=rough, atol=rough)
    if expected.dtype == torch.bool:  # Gloo adds them as bytes: a True of its sums may be 2, ours never
        return torch.equal(expected.view(torch.uint8) != 0, got) and bool((got.view(torch.uint8) < 2).all())
    return torch.equal(expected, got)


def differences(rank: int, size: int) -> tuple[list[str], int]:
    gloo = dist.new_group(backend="gloo")
    different, refused = [], 0
    for op in OPS:
        for dtype in DTYPES:
            for shape in SHAPES:
                tensor = sample(dtype, shape, seed=rank)
                expected = reduced(gloo, tensor.clone(), op)
                got = reduced(dist.group.WORLD, tensor, op)
                refused += isinstance(expected, str)
                if not is_same(expected, got):
                    different.append(f"{op} of {dtype}{shape}: gloo {expected}, dssync {got}")
    return different, refused


@pytest.mark.parametrize("size", [2, 3])
def test_every_operation_on_every_dtype_equals_gloo_or_fails_as_there(size):
    for different, refused in run_ranks(size, differences, timeout=120):
        assert different == []
        assert 0 < refused < len(OPS) * len(DTYPES) * len(SHAPES) / 2


def odd_tensors(rank: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, the tensor to reduce, all of its memory)"""
    whole = sample(torch.float32, (40, 50), seed=rank)
    yield "strided", whole[::2, ::3], whole
    whole = sample(torch.bfloat16, (60, 70), seed=rank)
    yield "transposed", whole.t(), whole
    whole = sample(torch.int64, (2, 3, 8, 9), seed=rank).contiguous(memory_format=torch.channels_last)
    yield "channels last", whole, whole
    memory = torch.zeros(4001, dtype=torch.uint8)
    memory[1:] = sample(torch.float32, (1000,), seed=rank).view(torch.uint8)
    yield "bytes from an odd address", memory[1:], memory
    whole = sample(torch.float64, (30,), seed=rank)
    yield "narrowed to nothing", whole[:0], whole


def odd_results(rank: int, size: int) -> list[tuple[str, Tensor, Tensor, Tensor, Tensor]]:
    gloo = dist.new_group(backend="gloo")
    results = []
    for name, tensor, whole in odd_tensors(rank):
        expected, before = tensor.contiguous().clone(), whole.clone()
        dist.all_reduce(expected, group=gloo)
        mask = torch.zeros_like(whole, dtype=torch.bool)
        mask.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset()).fill_(True)
        dist.all_reduce(tensor)
        results.append((name, expected, tensor.contiguous(), before[~mask], whole[~mask]))
    return results


@pytest.mark.parametrize("size", [2, 3])
def test_tensors_of_any_layout_and_nothing_around_them_is_touched(size):
    for results in run_ranks(size, odd_results):
        for name, expected, got, before, after in results:
            assert is_same(expected, got), name
            assert torch.equal(before, after), name


def many_in_flight(rank: int, size: int) -> bool:
    tensors = [torch.full((1 << turn % 17,), float(rank + turn)) for turn in range(200)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    barrier = dist.barrier(async_op=True)
    for work in reversed(works):
        work.wait()
    barrier.wait()
    return all((tensor == sum(range(size)) + size * turn).all() for turn, tensor in enumerate(tensors))


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_many_in_flight_waited_for_in_reverse(transport):
    assert run_ranks(3, many_in_flight, env={"DSSYNC_TRANSPORT": transport}) == [True] * 3


def ones(count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.ones(count, dtype=dtype)]


CHANNELS_LAST = [torch.ones(2, 3, 1, 4).contiguous(memory_format=torch.channels_last)]


def matches(rank: int, size: int, by_rank: list[list[Tensor]]) -> str:
    tensors, store, text = by_rank[rank], default_store(), ""
    try:
        if len(tensors) > 1:
            dist.all_reduce_coalesced(tensors)
        else:
            dist.all_reduce(tensors[0], op=ReduceOp.MAX)
    except dist.DistBackendError as error:
        text = str(error)
    store.set(f"over/{rank}", "1")
    store.wait([f"over/{other}" for other in range(size)])  # nobody's end is another's error
    return text


@pytest.mark.parametrize(
    ("mine", "part"),
    [
        ([ones(3, torch.bool), ones(300_000, torch.bool)], "max of 300000 x uint8"),
        ([ones(3000, torch.bool), ones(3000)], "max of 3000 x float32"),
        ([ones(3000, torch.bool), ones(3000, torch.uint8)], "(sizes, dtypes, order in memory"),
        ([ones(3) + ones(5), ones(5) + ones(3)], "(sizes, dtypes, order in memory"),
        ([ones(3) + ones(5), ones(3) + ones(2) + ones(3)], "(sizes, dtypes, order in memory"),
        ([[torch.ones(2, 3, 1, 4)], CHANNELS_LAST], "(sizes, dtypes, order in memory"),
    ],
)
def test_other_dtypes_sizes_or_orders_in_memory_are_an_error_on_every_rank(mine, part):
    for text in run_ranks(2, matches, mine, pg_timeout=60, timeout=30):
        assert "the ranks did not call the same thing: rank " in text and part in text


@pytest.mark.parametrize(
    "mine",
    [
        [ones(6), [torch.ones(2, 3)]],
        [ones(3) + ones(5), [torch.ones(3, 1), torch.ones(1, 5)]],
        [CHANNELS_LAST] * 2,
        [[torch.ones(3, 1).t()], [torch.ones(1, 3)]],
    ],
)
def test_other_shapes_of_as_many_elements_in_one_order_match(mine):
    assert run_ranks(2, matches, mine) == ["", ""]


def coalesced(rank: int, size: int) -> tuple[list[list[float]], list[float]]:
    lists = []
    for how in ("call", "manager", "async manager"):
        tensors = [torch.full((count,), float(rank + count)) for count in (1, 0, 300, 5000)]
        if how == "call":
            dist.all_reduce_coalesced(tensors)
        else:
            with dist._coalescing_manager(async_ops=how == "async manager") as manager:
                for tensor in tensors:
                    dist.all_reduce(tensor)
            if how == "async manager":
                manager.wait()
        lists.append([tensor.sum().item() for tensor in tensors])
    later = dist.all_reduce(torch.full((4,), float(rank)), async_op=True).get_future().then(lambda future: future.value()[0] * 10)
    return lists, later.wait().tolist()


def test_coalesced_calls_and_chained_futures():
    for lists, later in run_ranks(3, coalesced):
        assert lists == [[float(count * (3 + 3 * count)) for count in (1, 0, 300, 5000)]] * 3
        assert later == [30.0] * 4


def in_many_orders(rank: int, size: int) -> list[Tensor]:
    """Each turn another rank comes last, when all others wait; then all at once."""
    store = default_store()
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        for count in (1000, 100_000):
            for turn in range(size + 2):
                tensor = sample(dtype, (count,), seed=rank)
                key = f"{dtype}/{count}/{turn}"
                if rank == turn:
                    store.wait([f"{key}/{other}" for other in range(size) if other != rank])
                work = dist.all_reduce(tensor, async_op=True)
                store.set(f"{key}/{rank}", "posted")
                work.wait()
                results.append(tensor)
    return results


@pytest.mark.parametrize("size", [2, 3, 4])
def test_results_are_alike_to_the_last_bit_on_all_ranks_whoever_comes_last(size):
    turns = size + 2
    by_rank = run_ranks(size, in_many_orders)
    for case in range(4):
        first = by_rank[0][case * turns].view(torch.uint8)
        for results in by_rank:
            assert all(torch.equal(first, tensor.view(torch.uint8)) for tensor in results[case * turns : (case + 1) * turns])


# ---- groups ----------------------------------------------------------------------------------------------------------------


def in_threads(rank: int, size: int) -> list[str]:
    """Three threads, each with all_reduces on a group of its own: everyone twice, and this rank's half."""
    halves = [dist.new_group(ranks, backend="dssync") for ranks in ([0, 1], [2, 3])]
    groups = [
        (dist.group.WORLD, range(4)),
        (dist.new_group(backend="dssync"), range(4)),
        (halves[rank // 2], ((0, 1), (2, 3))[rank // 2]),
    ]
    problems: list[str] = []

    def work(index: int) -> None:
        group, members = groups[index]
        try:
            for turn in range(60):
                tensor = torch.full((1 << turn % 17,), float(rank * index + turn))
                dist.all_reduce(tensor, group=group)
                expected = sum(member * index + turn for member in members)
                if not (tensor == expected).all():
                    problems.append(f"group {index}, turn {turn}: {tensor[0]} instead of {expected}")
        except Exception as error:
            problems.append(f"group {index}: {error}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return problems


def test_groups_have_engines_of_their_own_and_work_at_the_same_time():
    assert run_ranks(4, in_threads) == [[]] * 4


def again_and_again(rank: int, size: int) -> list[tuple[int, int]]:
    counts = []
    for turn in range(5):
        dist.init_process_group("dssync", store=dist.PrefixStore(str(turn), rank_store()), rank=rank, world_size=size)
        pair = dist.new_group(backend="dssync", pg_options=Options(transport="tcp"))
        for group in (dist.group.WORLD, pair):
            dist.all_reduce(torch.ones(10_000), group=group)
            dist.all_reduce(torch.ones(10_000), op=ReduceOp.AVG, group=group)
        dist.destroy_process_group()
        del pair, group
        gc.collect()
        counts.append((len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))))
    return counts


def test_groups_made_again_in_one_process_leave_no_thread_and_no_descriptor():
    for counts in run_ranks(2, again_and_again, init=False):
        assert len(set(counts[1:])) == 1, counts


kept: list[object] = []


def works_outlive(rank: int, size: int) -> tuple[str, float]:
    store = default_store()
    done = dist.all_reduce(torch.ones(10), async_op=True)
    done.wait()
    future = done.get_future()
    pending = dist.all_reduce(torch.ones(10), async_op=True) if rank == 0 else None
    began = time.monotonic()
    dist.destroy_process_group()
    seconds = time.monotonic() - began
    store.set(str(rank), "gone")
    store.wait([str(other) for other in range(size)])
    assert done.is_completed() and done.is_success() and done.wait() and future.value()[0].tolist() == [2.0] * 10
    if pending is None:
        return "", seconds
    with pytest.raises(dist.DistBackendError) as error:
        pending.wait()
    kept.extend((done, pending))  # until the interpreter ends
    return str(error.value), seconds


def test_works_outlive_their_group():
    outcomes = run_ranks(2, works_outlive, interpreter_exit=True, check=False)
    for outcome in outcomes:
        assert outcome.ok, outcome
        assert outcome.value[1] < 15
    text = outcomes[0].value[0]
    assert "dssync: all_reduce call 1 of the default group" in text and "failed on rank 0 of 2, phase " in text
    assert "shut down" in text


# ---- fork ------------------------------------------------------------------------------------------------------------------


class Numbers(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> int:
        return index


def loads_while_reducing(rank: int, size: int) -> tuple[int, float]:
    loader = torch.utils.data.DataLoader(Numbers(), batch_size=4, num_workers=2, multiprocessing_context="fork")
    total, sums = 0, 0.0
    for batch in loader:
        tensor = torch.full((5000,), float(rank))
        dist.all_reduce(tensor)
        total += int(batch.sum())
        sums += tensor[0].item()
    return total, sums


def test_data_loaders_fork_while_a_group_exists():
    assert run_ranks(2, loads_while_reducing) == [(780, 10.0)] * 2


def forks_and_exits(rank: int, size: int) -> tuple[int, float]:
    """The child ends as a program does: its exit handlers run, and everything it has a copy of is dropped."""
    tensor = torch.ones(100_000)
    dist.all_reduce(tensor)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends it, should it hang
        atexit._run_exitfuncs()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    dist.all_reduce(tensor)
    return os.waitstatus_to_exitcode(status), tensor[0].item()


def test_a_forked_child_that_exits_leaves_its_parents_group_alone():
    assert run_ranks(2, forks_and_exits, timeout=60) == [(0, 4.0)] * 2


def impatient(rank: int, size: int) -> str:
    store = default_store()
    if rank == 1:
        store.wait(["gave up"])
        dist.barrier()
        return ""
    work = dist.barrier(async_op=True)
    with pytest.raises(RuntimeError) as error:
        work.wait(timedelta(milliseconds=50))
    store.set("gave up", "1")
    work.wait()
    return str(error.value)


def test_who_gives_up_waiting_may_wait_again():
    assert "timed out after 0.05 s" in run_ranks(2, impatient)[0]
