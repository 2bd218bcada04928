"""What a group that was never used costs, and how much memory averaging a model takes, on the native engine and over Gloo.

    python benchmarks/engine_costs.py

Eight ranks on this host average a tensor in groups of four, in all 35 ways to divide eight ranks into two fours: in groups that
were never used before (all ranks are connected to each other already), and, in turn with them, in those used nine ways ago. Then
two ranks, and four, average a model of 256 MiB in 64 tensors, one of them a second after the others; the peak of each process's
resident memory is read from the kernel, and the largest is shown.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import re
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import multiprocessing

GROUPS_WORLD = 8
USED_AGO = 9
MODELS = {"2 ranks, float32": (2, torch.float32), "4, float32": (4, torch.float32), "4, bfloat16": (4, torch.bfloat16)}
LATE_S = 1.0
TENSORS, TENSOR_BYTES = 64, 4 << 20
TIMEOUT = datetime.timedelta(minutes=2)
ENGINES = {"native, shared memory": ("native", "shm"), "native, TCP": ("native", "tcp"), "Gloo": ("gloo", "auto")}


def divisions() -> list[list[list[int]]]:
    """Every way to divide the ranks into two groups of half the size."""
    rest = range(1, GROUPS_WORLD)
    firsts = [[0, *others] for others in itertools.combinations(rest, GROUPS_WORLD // 2 - 1)]
    return [[first, [rank for rank in rest if rank not in first]] for first in firsts]


def join(rank: int, world_size: int, port: int, engine: str, transport: str) -> Any:
    """This rank's dssync group, as the package keeps it."""
    import dssync_pg
    from dssync_pg import _backend

    torch.set_num_threads(1)
    options = dssync_pg.Options(engine=engine, transport=transport, group_size=world_size)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("dssync", init_method=address, rank=rank, world_size=world_size, timeout=TIMEOUT, pg_options=options)
    return _backend.live[0]


def turns(period: int) -> list[tuple[int, int]]:
    """Rounds never used before (0), each followed by one that was used a while ago (1): the one just used has warm caches."""
    return [turn for round_ in range(period) for turn in ((0, round_), (1, round_ - USED_AGO)) if turn[1] >= 0]


def time_groups(rank: int, port: int, engine: str, transport: str, results: Any) -> None:
    from dssync_pg import _C, _backend

    group = join(rank, GROUPS_WORLD, port, engine, transport)
    plan = _C.Plan.explicit(GROUPS_WORLD, divisions())
    if group.engine is not None:
        averager: Any = _C.NativeAverager("costs", group.engine, plan, TIMEOUT)
    else:
        store = _backend._own_connection(group.store)
        averager = _C.GlooAverager("costs", store, rank, plan, _backend._make_gloo, TIMEOUT, max_groups=64)
    tensor = torch.ones(16384)
    # small: everyone sends to everyone, and is connected then; a larger one would go in a ring
    averager.launch(0, 0, [(_C.EXACT_ROUND, [tensor[:1024]])], "the first average").wait()
    seconds: list[list[float]] = [[], []]
    for step, (again, round_) in enumerate(turns(plan.period), 1):
        dist.barrier()
        begin = time.perf_counter()
        averager.launch(step, 0, [(round_, [tensor])], "an average").wait()
        seconds[again].append(time.perf_counter() - begin)
    if rank == 0:
        results["groups"] = [statistics.median(those) for those in seconds]
    averager.shutdown()
    dist.destroy_process_group()


def resident(name: str) -> int:
    """Bytes, of /proc/self/status."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


def measure_model(rank: int, port: int, engine: str, transport: str, world_size: int, dtype: torch.dtype, results: Any) -> None:
    from dssync_pg import _C

    group = join(rank, world_size, port, engine, transport)
    model = [torch.ones(TENSOR_BYTES // dtype.itemsize, dtype=dtype) for _ in range(TENSORS)]
    averager = group.make_averager("costs")
    averager.launch(0, 0, [(_C.EXACT_ROUND, [torch.ones(1 << 18, dtype=dtype)])], "the first average").wait()
    dist.barrier()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    if rank == world_size - 1:
        time.sleep(LATE_S)  # what comes from the others meanwhile may have to be kept
    averager.launch(1, 0, [(_C.EXACT_ROUND, model)], "the model").wait()
    results[rank] = resident("VmHWM") - before
    dist.barrier()
    averager.shutdown()
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON")
    out = parser.parse_args().out
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    console = Console()
    table = Table("engine", "never used", "used before", *MODELS, title="An average in a group; extra memory of a model's average")
    records = {}
    manager = multiprocessing.Manager()
    for name, (engine, transport) in ENGINES.items():
        results = manager.dict()
        multiprocessing.spawn(time_groups, (free_port(), engine, transport, results), nprocs=GROUPS_WORLD)  # type: ignore[attr-defined]
        extra = {}
        for model, (world_size, dtype) in MODELS.items():
            peaks = manager.dict()
            arguments = (free_port(), engine, transport, world_size, dtype, peaks)
            multiprocessing.spawn(measure_model, arguments, nprocs=world_size)  # type: ignore[attr-defined]
            extra[model] = max(peaks.values())
        first, later = results["groups"]
        shares = [f"{bytes_ / 2**20:.1f} MiB ({bytes_ / (TENSORS * TENSOR_BYTES):.1%})" for bytes_ in extra.values()]
        table.add_row(name, f"{first * 1e3:.2f} ms", f"{later * 1e3:.2f} ms", *shares)
        records[name] = {"seconds_never_used": first, "seconds_used": later, "extra_bytes": extra}
    console.print(table)
    out.mkdir(parents=True, exist_ok=True)
    (out / "engine_costs.json").write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
