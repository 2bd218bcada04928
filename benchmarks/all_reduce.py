"""How fast is an average, an exact all_reduce, a barrier? torch's Gloo, dssync over Gloo, and dssync's native engine side by side.

    python benchmarks/all_reduce.py                             # one host: 4 KiB to 256 MiB, 2, 4 and 8 ranks
    python benchmarks/all_reduce.py --quick --out /tmp/x        # a small part, in under a minute; its numbers mean little
    python benchmarks/all_reduce.py --sizes 1M,64M --ranks 2 --operations average --dtypes float32
    sudo python benchmarks/all_reduce.py --cluster              # emulated racks behind a slow uplink (cluster.py)

All series are measured in one run, in turn (all_reduce_worker.py): compare within a run only. "average" is the average of a pair,
for Gloo its sum; "all_reduce" an exact sum. A limit is what the machine itself does with the bytes that the ranks must send one
another, 2 (N-1) times the tensor's in all: two processes that copy in and out of shared memory, one iperf3 connection both ways.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from mmap import mmap
from pathlib import Path
from typing import Any, TypeAlias

from cluster import GOODPUT, Cluster, ClusterError, Job, measure_tcp
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
WORKER = HERE / "all_reduce_worker.py"
OPERATIONS = ("average", "all_reduce", "barrier")
DTYPES = ("float32", "bfloat16", "float16")
TITLES = {
    "gloo": "torch Gloo",
    "dssync-gloo": "dssync over Gloo",
    "native-tcp": "native, TCP",
    "native-shm": "native, memory",
    "native": "native",
}
COLORS = {"gloo": "#7a8594", "dssync-gloo": "#d08a00", "native-tcp": "#1b6ca8", "native-shm": "#d1495b", "native": "#d1495b"}
LIMIT_OF = {"gloo": "tcp", "dssync-gloo": "tcp", "native-tcp": "tcp", "native-shm": "shm"}
LIMIT_TITLES = {"tcp": "iperf3", "shm": "copying through shared memory"}
KIB, MIB = 1 << 10, 1 << 20
LEAST_LIMITED = 256 * KIB  # below, waking up the other process takes longer than the bytes
COPIED, ROUNDS = 64 * MIB, 5
PIECES = (64 * KIB, 256 * KIB, MIB, 4 * MIB)  # large ones are copied past the caches, which may be five times as fast or slower
RING_PIECES = 4
CROSSING, INSIDE = "one crossing pair", "pairs inside racks"

Record: TypeAlias = dict[str, Any]
Limits: TypeAlias = dict[str, float]

console = Console(highlight=False)


# ---- the machine's own limits --------------------------------------------------------------------------------------------------


def _copy(shared: mmap, piece: int, side: int, barrier: Any, seconds: Any) -> None:
    """One of two processes that hand COPIED bytes to each other through a ring of pieces each way."""
    view, private = memoryview(shared), memoryview(bytearray(b"x") * COPIED)
    ring = RING_PIECES * piece
    mine, other = (view[at * ring : (at + 1) * ring] for at in (side, 1 - side))
    counters = view[2 * ring :].cast("Q")  # pieces written and read by either side, far enough apart
    written, read, other_written, other_read = (64 * place for place in (side, 2 + side, 1 - side, 3 - side))
    times, count = [], COPIED // piece
    for first in range(0, ROUNDS * count, count):
        barrier.wait()
        start = time.perf_counter()
        for number in range(first, first + count):
            own = slice((number - first) * piece, (number - first + 1) * piece)
            place = slice(number * piece % ring, number * piece % ring + piece)
            while number + 1 - counters[other_read] > RING_PIECES:
                os.sched_yield()
            mine[place] = private[own]
            counters[written] = number + 1
            while counters[other_written] <= number:
                os.sched_yield()
            private[own] = other[place]
            counters[read] = number + 1
        times.append(time.perf_counter() - start)
    seconds[side] = min(times)


def shm_limit() -> float:
    """Bytes a second from process to process through shared memory, both ways together, in pieces of the best size."""
    return max(2 * COPIED / _copy_seconds(piece) for piece in PIECES)


def _copy_seconds(piece: int) -> float:
    """The best of ROUNDS."""
    context: Any = multiprocessing.get_context("fork")
    barrier, seconds, shared = context.Barrier(2), context.Array("d", 2), mmap(-1, 2 * RING_PIECES * piece + 4096)
    processes = [context.Process(target=_copy, args=(shared, piece, side, barrier, seconds)) for side in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    slowest: float = max(seconds)
    return slowest


def tcp_limit() -> float | None:
    """Bytes a second over one TCP connection each way on the loopback, both ways together; None without iperf3."""
    if shutil.which("iperf3") is None:
        return None
    return sum(measure_tcp("127.0.0.1", _free_port())) / 8


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def least_seconds(record: Record, limits: Limits) -> float | None:
    """What the bytes of this operation take at the machine's limit."""
    rate = limits.get(LIMIT_OF.get(record["series"], ""))
    if rate is None or record.get("bytes", 0) < LEAST_LIMITED:
        return None
    return 2 * (record["ranks"] - 1) * record["bytes"] / rate  # type: ignore[no-any-return]


# ---- running -------------------------------------------------------------------------------------------------------------------


def run_host(spec: Record) -> None:
    """All ranks on this host."""
    size = max(spec["ranks"])
    common = {"OMP_NUM_THREADS": "1", **os.environ, "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    command = [sys.executable, str(WORKER), json.dumps(spec)]
    job = Job([(command, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(size)], None)
    try:
        job.wait()
    finally:
        job.stop()


def fitting(sizes: Sequence[int], ranks: int) -> list[int]:
    """The sizes for which the ranks' tensors, and what each library keeps of them, fit into the memory that is free."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free_bytes = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * KIB
    return [size for size in sizes if 4 * ranks * size < 0.8 * free_bytes]


def measure_host(arguments: argparse.Namespace) -> tuple[list[Record], Record]:
    limits: dict[str, list[float]] = {}

    def measure_limits() -> None:
        for name, measure in (("shm", shm_limit), ("tcp", tcp_limit)):
            rate = measure()
            if rate is not None:
                limits.setdefault(name, []).append(rate)

    spec: Record = {
        "series": [series for series in TITLES if series != "native"],
        "operations": arguments.operations,
        "dtypes": arguments.dtypes,
        "ranks": arguments.ranks,
        "sizes": {size: fitting(arguments.sizes, size) for size in arguments.ranks},
        "repetitions": arguments.repetitions,
    }
    for size in arguments.ranks:
        for left_out in sorted({*arguments.sizes} - {*spec["sizes"][size]}):
            console.print(f"{size} ranks: {size_text(left_out)} left out, too little memory is free")
    measure_limits()
    records = collect(spec, run_host)
    measure_limits()  # before and after: the better one is the limit
    return records, {"series": spec["series"], "limits": {name: max(rates) for name, rates in limits.items()}}


def collect(spec: Record, run: Callable[[Record], object]) -> list[Record]:
    with tempfile.TemporaryDirectory(prefix="dssync-bench-") as folder:
        out = Path(folder, "records.jsonl")
        run({**spec, "out": str(out)})
        return [json.loads(line) for line in out.read_text().splitlines()]


def measure_cluster(arguments: argparse.Namespace) -> tuple[list[Record], Record]:
    with Cluster([4, 4], arguments.access, arguments.uplink, arguments.congestion) as cluster:
        paths = cluster.check()
        for measured in paths:
            console.print(f"cluster: {measured}")
        cases = {INSIDE: [[0, 1], [2, 3], [4, 5], [6, 7]], CROSSING: [[0, 4]]}
        spec: Record = {
            "series": ["gloo", "dssync-gloo", "native"],
            "cases": cases,
            "sizes": arguments.sizes,
            "repetitions": arguments.repetitions,
        }
        quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # it would warn that the addresses have no names
        records = collect(spec, lambda spec: cluster.run([sys.executable, str(WORKER), json.dumps(spec)], env=quiet))
    rates = {INSIDE: arguments.access, CROSSING: min(arguments.access, arguments.uplink)}
    for record in records:  # each way, one tensor with its headers must pass the slowest link
        record["bound_seconds"] = record["bytes"] / GOODPUT * 8 / (rates[record["case"]] * 1e6)
    about = {"access_mbit": arguments.access, "uplink_mbit": arguments.uplink, "congestion": arguments.congestion}
    return records, {**about, "series": spec["series"], "checked": [str(measured) for measured in paths]}


# ---- showing -------------------------------------------------------------------------------------------------------------------


def size_text(size_bytes: int) -> str:
    return (
        f"{size_bytes // MIB} MiB" if size_bytes >= MIB else f"{size_bytes // KIB} KiB" if size_bytes >= KIB else f"{size_bytes} B"
    )


def time_text(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def setting(record: Record) -> tuple[str, int, str]:
    return record["operation"], record["ranks"], record.get("dtype", "")


def setting_text(record: Record) -> str:
    operation, ranks, dtype = setting(record)
    return ", ".join(part for part in (operation, f"{ranks} ranks", dtype) if part)


def against_gloo(record: Record, records: Sequence[Record], field: str, keys: Sequence[str]) -> float:
    """How many times Gloo's value in the same run this record's fits into it."""
    gloo = next(r for r in records if r["series"] == "gloo" and all(r.get(key) == record.get(key) for key in keys))
    return float(gloo[field] / record[field])


def host_tables(records: Sequence[Record], limits: Limits) -> list[Table]:
    tables = []
    keys = ("operation", "ranks", "dtype", "bytes")
    for _, rows in groupby(records, key=setting):
        members = list(rows)
        table = new_table(setting_text(members[0]))
        for heading in ("size", "", "time", "faster\nthan Gloo", "CPU time,\nall ranks", "of\nGloo's", "of its\nlimit"):
            table.add_column(heading, justify="left" if heading in ("size", "") else "right", no_wrap=True)
        for size, same in groupby(members, key=lambda record: record.get("bytes", 0)):
            cells = list(same)
            for record in cells:
                least = least_seconds(record, limits)
                table.add_row(
                    size_text(size) if size and record is cells[0] else "",
                    TITLES[record["series"]],
                    time_text(record["seconds"]),
                    f"{against_gloo(record, records, 'seconds', keys):.2f}x",
                    time_text(record["cpu_seconds"]),
                    f"{100 / against_gloo(record, records, 'cpu_seconds', keys):.0f} %",
                    "" if least is None else f"{100 * least / record['seconds']:.0f} %",
                )
            table.add_section()
        tables.append(table)
    return tables


def cluster_tables(records: Sequence[Record], about: Record) -> list[Table]:
    tables = []
    rates = f"{about['access_mbit']:g}/{about['uplink_mbit']:g} Mbit/s, {about['congestion']}"
    for _, rows in groupby(records, key=lambda record: (record["case"], record["bytes"])):
        members = list(rows)
        case, size, bound = members[0]["case"], size_text(members[0]["bytes"]), time_text(members[0]["bound_seconds"])
        table = new_table(f"{case}, {size}, {rates}: bound {bound}")
        for heading in ("", "time", "time /\nbound", "faster\nthan Gloo", "bytes on the busiest\nlink / tensor's"):
            table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
        for record in members:
            table.add_row(
                TITLES[record["series"]],
                time_text(record["seconds"]),
                f"{record['seconds'] / record['bound_seconds']:.3f}",
                f"{against_gloo(record, records, 'seconds', ('case', 'bytes')):.2f}x",
                f"{record['busiest_link_bytes'] / record['bytes']:.3f}",
            )
        tables.append(table)
    return tables


def new_table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def plot_host(records: Sequence[Record], limits: Limits, path: Path) -> None:
    """Time by size, a field each for operation, ranks and dtype."""
    settings = [list(rows) for _, rows in groupby((r for r in records if "bytes" in r), key=setting)]
    if not settings:
        return
    columns = min(3, len(settings))
    rows = -(-len(settings) // columns)
    figure = Figure(figsize=(4.3 * columns, 3.2 * rows + 0.5), layout="constrained")
    fields = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in fields[len(settings) :]:
        axes.set_visible(False)
    for axes, members in zip(fields, settings, strict=False):
        for series in dict.fromkeys(record["series"] for record in members):
            points = [(r["bytes"], r["seconds"]) for r in members if r["series"] == series]
            axes.plot(*zip(*points, strict=True), "o-", ms=3, color=COLORS[series], label=TITLES[series])
        for name, style in (("tcp", "--"), ("shm", ":")):
            series = next(series for series, limit in LIMIT_OF.items() if limit == name)
            bounds = [(r["bytes"], least_seconds({**r, "series": series}, limits)) for r in members]
            drawn = sorted({(size, least) for size, least in bounds if least is not None})
            if drawn:
                axes.plot(*zip(*drawn, strict=True), style, color="#222222", lw=1, label=LIMIT_TITLES[name])
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(lambda size, _: size_text(int(size)))
        axes.yaxis.set_major_formatter(lambda seconds, _: time_text(seconds))
        axes.yaxis.set_minor_formatter(lambda *_: "")
        axes.tick_params(labelsize=7)
        axes.tick_params(axis="x", rotation=30)
        axes.grid(color="#e3e6ea", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(setting_text(members[0]), loc="left", fontsize=10)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def plot_cluster(records: Sequence[Record], path: Path) -> None:
    """Bars of time over bound, a field each case."""
    cases = [list(rows) for _, rows in groupby(records, key=lambda record: (record["case"], record["bytes"]))]
    figure = Figure(figsize=(4.3 * len(cases), 3), layout="constrained")
    for axes, members in zip(figure.subplots(1, len(cases), squeeze=False).flat, cases, strict=True):
        names = [TITLES[record["series"]] for record in members]
        colors = [COLORS[record["series"]] for record in members]
        axes.bar(names, [record["seconds"] / record["bound_seconds"] for record in members], color=colors, width=0.6)
        axes.axhline(1, color="#222222", lw=1, ls="--")
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylabel("time / bound of the wire", fontsize=8)
        axes.set_title(f"{members[0]['case']}, {size_text(members[0]['bytes'])}", loc="left", fontsize=10)
    figure.savefig(path, dpi=120)


def machine() -> Record:
    congestion = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    return {
        "torch": importlib.metadata.version("torch"),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "congestion": congestion.read_text().strip() if congestion.exists() else None,
    }


def report(records: list[Record], about: Record, arguments: argparse.Namespace) -> None:
    name = "all_reduce_cluster" if arguments.cluster else "all_reduce"
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / name
    if arguments.cluster:
        for table in cluster_tables(records, about):
            console.print(table)
        plot_cluster(records, path.with_suffix(".png"))
    else:
        for table in host_tables(records, about["limits"]):
            console.print(table)
        for limit, title in LIMIT_TITLES.items():
            rate = about["limits"].get(limit)
            console.print(
                f"{title}: " + (f"{rate / 1e9:.1f} GB/s, both ways together" if rate else "not measured, it is not there")
            )
        plot_host(records, about["limits"], path.with_suffix(".png"))
    for series in sorted({*about["series"]} - {record["series"] for record in records}):
        console.print(f"{TITLES[series]}: not available in the dssync_pg that is installed")
    lines = ",\n".join(json.dumps(record) for record in records)
    path.with_suffix(".json").write_text(f'{{"machine": {json.dumps({**machine(), **about})}, "records": [\n{lines}\n]}}\n')
    console.print(f"{path}.json, {path}.png", soft_wrap=True)


# ---- the command ---------------------------------------------------------------------------------------------------------------


def _size(text: str) -> int:
    unit = {"K": KIB, "M": MIB, "G": 1 << 30}.get(text[-1].upper(), 1)
    size = int(text.rstrip("kKmMgG")) * unit
    if size < 8 or size % 8:
        raise argparse.ArgumentTypeError(f"size {text}: must be a multiple of 8 bytes")
    return size


def _several(read: Callable[[str], Any], allowed: Sequence[Any] = ()) -> Callable[[str], list[Any]]:
    """Reads a list with commas."""

    def parse(text: str) -> list[Any]:
        try:
            values = [read(part) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        for value in values:
            if allowed and value not in allowed:
                raise argparse.ArgumentTypeError(f"{value!r}: must be among {', '.join(map(str, allowed))}")
        return values

    return parse


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=_several(_size), help="of the tensors (default: 4K,16K,...,256M; on the cluster 32M)")
    parser.add_argument("--ranks", type=_several(int, range(2, 65)), help="numbers of ranks (default: 2,4,8); averages take 2")
    parser.add_argument("--operations", type=_several(str, OPERATIONS), help=f"default: {','.join(OPERATIONS)}")
    parser.add_argument("--dtypes", type=_several(str, DTYPES), help=f"default: {','.join(DTYPES)}")
    parser.add_argument("--repetitions", type=int, help="turns of each series (default: 7; on the cluster 3)")
    parser.add_argument("--quick", action="store_true", help="a small part; its numbers mean little")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of JSON and PNG (default: benchmarks/results)")
    parser.add_argument("--cluster", action="store_true", help="averages of pairs in two emulated racks of four; needs root")
    parser.add_argument(
        "--access", type=float, default=500, help="on the cluster: rate of a worker's link in Mbit/s (default: 500)"
    )
    parser.add_argument("--uplink", type=float, default=100, help="on the cluster: rate of a rack's uplink (default: 100)")
    parser.add_argument("--congestion", choices=("reno", "bbr"), default="reno", help="on the cluster: of TCP (default: reno)")
    arguments = parser.parse_args()
    quick, cluster = arguments.quick, arguments.cluster
    every = [32 * MIB] if cluster else [4 * KIB * 4**step for step in range(9)]
    arguments.sizes = arguments.sizes or (([4 * MIB] if cluster else [4 * KIB, MIB]) if quick else every)
    arguments.ranks = arguments.ranks or ([2, 4] if quick else [2, 4, 8])
    arguments.operations = arguments.operations or list(OPERATIONS)
    arguments.dtypes = arguments.dtypes or (["float32"] if quick else list(DTYPES))
    arguments.repetitions = arguments.repetitions or (3 if quick or cluster else 7)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    records, about = (measure_cluster if cluster else measure_host)(arguments)
    report(records, about, arguments)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ClusterError as error:
        sys.exit(f"all_reduce: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
