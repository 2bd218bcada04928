"""A cluster on one Linux machine: racks of workers in network namespaces, with every link shaped to a rate.

    python benchmarks/cluster.py run --racks 4,4 --access 500 --uplink 100 -- python train.py   # needs root
    python benchmarks/cluster.py run --racks 4,4 --at 10 uplink 1 40 --at 20 traffic 0 1 50 -- python train.py
    python benchmarks/cluster.py check --racks 4,4,4
    python benchmarks/cluster.py clean

    with Cluster(racks=[4, 4], access_mbit=500, uplink_mbit=100) as cluster:
        cluster.check()                                  # raises ShapingError where iperf3 sees other rates
        job = cluster.start([sys.executable, "train.py"])
        cluster.set_uplink(1, 40)
        job.wait()

One namespace, the fabric, holds a bridge a rack and a core bridge; each rack's uplink joins its bridge to the core. Each worker has
a namespace and a link into its rack's bridge, and so has one neighbour a rack, another machine that no program runs on: background
traffic and the check of an uplink come from there, so that they load the uplink and nobody's NIC. Both directions of the workers'
links and of the uplinks are shaped with tbf. Nothing outside these namespaces is touched.

Workers differ from hosts in what namespaces do not part: all share one kernel, its cores, its host name and its shared memory.

Everything is taken down when the `with` block is left, and by a guardian process when the owner dies without leaving it. Should the
guardian die too, the namespaces' names hold the owner's pid and start time: the next cluster, or `clean`, finds and removes them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, NamedTuple, NoReturn

NAMESPACES = Path("/run/netns")
PREFIX = "dssync-bed"
PACKAGES = {"ip": "iproute2", "tc": "iproute2", "iperf3": "iperf3"}  # of Debian
CONGESTION_CONTROLS = ("reno", "bbr")  # the kernel lets namespaces set only unrestricted ones
GOODPUT = 1448 / 1514  # payload in a full Ethernet frame of TCP with timestamps; tbf counts the whole frame
# What a link queues before it drops. Longer queues cost two-way traffic up to half of one way: acknowledgements wait in them too.
QUEUE_S, QUEUE_MIN_BYTES = 0.005, 1 << 16
TOLERANCE = 0.10
OMITTED_S, MEASURED_S = 1, 1  # of a check: slow start, and what counts (iperf3 takes whole seconds)

_serial = count()
_handles = count()


class ClusterError(Exception):
    """The cluster cannot be built or changed; the text says what is missing."""


class ShapingError(ClusterError):
    """A link does not have the rate that it should: nothing measured here would mean anything."""


class WorkersFailed(ClusterError):
    """A program ended with an error or did not end in time."""


class LinkBytes(NamedTuple):
    """Bytes sent since the cluster was built, with the headers of every frame."""

    up: int
    """From the worker into its rack; from the rack to the core."""
    down: int


@dataclass(frozen=True)
class Measured:
    """What iperf3 saw on a path, both directions at once, in Mbit/s on the wire."""

    path: str
    expected: float
    there: float
    back: float

    @property
    def right(self) -> bool:
        return all(abs(rate / self.expected - 1) <= TOLERANCE for rate in (self.there, self.back))

    def __str__(self) -> str:
        return f"{self.path}: {self.there:.1f} and {self.back:.1f} Mbit/s, should be {self.expected:g}"


# ---- commands ------------------------------------------------------------------------------------------------------------------


def _batch(tool: str, lines: Sequence[str], namespace: str = "") -> None:
    """Runs many lines in one process of ip or tc."""
    command = [tool, *(["-n", namespace] if namespace else []), "-batch", "-"]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True)
    if done.returncode != 0:
        raise ClusterError(f"`{' '.join(command)}` failed: {' '.join(done.stderr.split())}; the lines were\n" + "\n".join(lines))


def _tbf(device: str, mbit: float) -> str:
    """Shapes what leaves `device`. The burst, a power of two, holds 4 ms: less misses the rate, far more does not shape.

    A handle of its own makes it another queue: what waited in the one before is lost, and TCP sends it again. A segmented packet
    that is larger than the new burst would stand at the head for ever.
    """
    bytes_per_s = mbit * 1e6 / 8
    burst_bytes = 1 << max(15, int(bytes_per_s / 250 - 1).bit_length())
    limit_bytes = burst_bytes + max(round(bytes_per_s * QUEUE_S), QUEUE_MIN_BYTES)
    queue = f"dev {device} root handle {next(_handles) % 0xFFFE + 1:x}:"
    return f"qdisc replace {queue} tbf rate {round(mbit * 1e6)}bit burst {burst_bytes} limit {limit_bytes}"


def _sent(namespace: str) -> dict[str, int]:
    """Bytes that left each shaped device. tbf counts the headers of every frame; a device counts a segmented packet's once."""
    shown = subprocess.run(["tc", "-n", namespace, "-s", "-j", "qdisc"], capture_output=True, text=True)
    if shown.returncode != 0:
        raise ClusterError(f"no counters in {namespace}: {shown.stderr.strip()}")
    return {entry["dev"]: entry["bytes"] for entry in json.loads(shown.stdout) if entry["kind"] == "tbf"}


def measure_tcp(
    address: str, port: int, client: Sequence[str] = (), server: Sequence[str] = (), streams: int = 1
) -> tuple[float, float]:
    """What iperf3 gets there and back at the same time, in payload bits a second; client and server: commands to run it under."""
    command = [*server, "iperf3", "--server", "--one-off", "--forceflush", "--port", str(port)]
    listening = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert listening.stdout
        while "listening" not in (line := listening.stdout.readline()):
            if not line:
                raise ClusterError("`iperf3 --server` ended by itself")
        command = [*client, "iperf3", "--client", address, "--port", str(port), "--connect-timeout", "5000", "--json"]
        command += ["--bidir", "--parallel", str(streams), "--omit", str(OMITTED_S), "--time", str(MEASURED_S)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        raise ClusterError(f"iperf3 to {address} does not end") from None
    finally:
        listening.kill()
        listening.communicate()
    result: dict[str, Any] = json.loads(done.stdout or "{}")
    if done.returncode != 0 or "error" in result:
        raise ClusterError(f"iperf3 to {address}: {result.get('error') or done.stderr.strip()}")
    there, back = (result["end"][key]["bits_per_second"] for key in ("sum_received", "sum_received_bidir_reverse"))
    return there, back


def link_bytes(bed: str) -> dict[str, LinkBytes]:
    """The bytes on every shaped link, "worker 3" or "uplink 1", of the cluster with this name; any process on the machine may ask.

    A program on a worker finds the name in CLUSTER_NAME.
    """
    fabric = _sent(f"{bed}-fabric")
    found = {}
    for rank in range(sum(device.startswith("w") for device in fabric)):
        found[f"worker {rank}"] = LinkBytes(_sent(f"{bed}-w{rank}")["eth0"], fabric[f"w{rank}"])
    for rack in range(sum(device.startswith("up") for device in fabric)):
        found[f"uplink {rack}"] = LinkBytes(fabric[f"up{rack}"], fabric[f"down{rack}"])
    return found


# ---- taking down ---------------------------------------------------------------------------------------------------------------


def _start_of(pid: int) -> str | None:
    """The start time of a process in the kernel's ticks, None if it has ended: pids come again, pairs of pid and start do not."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if after_name[0] == "Z" else after_name[19]


def _owner_lives(bed: str) -> bool:
    pid, start, _ = bed.removeprefix(f"{PREFIX}-").split("-")
    return _start_of(int(pid)) == start


def _beds() -> set[str]:
    """The names of all clusters of which any namespace stands."""
    return {path.name.rpartition("-")[0] for path in NAMESPACES.glob(f"{PREFIX}-*-*-*-*")}


def _processes_in(namespaces: Sequence[Path]) -> Iterator[int]:
    inodes = set()
    for path in namespaces:
        with contextlib.suppress(OSError):
            inodes.add(path.stat().st_ino)
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if (process / "ns/net").stat().st_ino in inodes:
                yield int(process.name)


def _remove(bed: str) -> None:
    """Kills every process in the cluster's namespaces and removes them. Raises ClusterError where one stays."""
    namespaces = list(NAMESPACES.glob(f"{bed}-*"))
    deadline = time.monotonic() + 10
    while pids := list(_processes_in(namespaces)):
        if time.monotonic() > deadline:
            raise ClusterError(f"processes {pids} in the namespaces of {bed} do not end")
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    lines = [f"netns del {path.name}" for path in namespaces]
    subprocess.run(["ip", "-force", "-batch", "-"], input="\n".join(lines), capture_output=True, text=True)
    left = [path.name for path in namespaces if path.exists()]  # not its exit code: somebody else may have been faster
    if left:
        raise ClusterError(f"namespaces that cannot be removed: {', '.join(left)}")


def clean() -> list[str]:
    """Removes what clusters left whose owner has ended; returns their names."""
    stale = sorted(bed for bed in _beds() if not _owner_lives(bed))
    for bed in stale:
        _remove(bed)
    return stale


def _guard(bed: str) -> None:
    """Waits for the owner's end, then removes the cluster."""
    pid = int(bed.removeprefix(f"{PREFIX}-").split("-")[0])
    with contextlib.suppress(ProcessLookupError):
        ending = os.pidfd_open(pid)
        if _owner_lives(bed):
            poll = select.poll()
            poll.register(ending, select.POLLIN)
            poll.poll()
    for _ in range(3):  # an `ip` that the owner had started may still be adding some
        _remove(bed)
        time.sleep(0.2)


# ---- a program on every worker -------------------------------------------------------------------------------------------------


class Job:
    """A program that runs on every worker, from Cluster.start()."""

    def __init__(self, commands: Sequence[tuple[list[str], dict[str, str]]], logs: Path | None) -> None:
        self.logs = logs
        self.exit_codes: dict[int, int] = {}
        """Of the ranks that have ended; minus the signal for those that one killed."""
        self._ends: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._processes: list[subprocess.Popen[str]] = []
        for rank, (command, env) in enumerate(commands):
            with contextlib.ExitStack() as opened:
                output: IO[str] | int = subprocess.PIPE
                if logs is not None:
                    output = opened.enter_context((logs / f"rank{rank}.log").open("w"))
                # A session of its own, so that a Ctrl-C is the owner's to act on, and stop() reaches children too.
                process = subprocess.Popen(
                    command,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    start_new_session=True,
                )
            self._processes.append(process)
            threading.Thread(target=self._follow, args=(rank, process), daemon=True).start()

    def wait(self, timeout: float | None = None, check: bool = True) -> list[int]:
        """The exit codes, when every rank has ended.

        With `check`, the first rank that fails ends all and raises WorkersFailed; the time-out, in seconds, does so in any case.
        """
        over = self.join(timeout, check)
        late = [rank for rank in range(len(self._processes)) if rank not in self.exit_codes]
        failed = {rank: code for rank, code in self.exit_codes.items() if code != 0}
        if not over or (check and failed):
            self.stop()
            where = "" if self.logs is None else f"; what they printed: {self.logs}/rank*.log"
            if not over:
                raise WorkersFailed(f"ranks {late} were not over after {timeout:g} s and have been killed{where}")
            text = ", ".join(f"rank {rank} ended with exit code {code}" for rank, code in failed.items())
            raise WorkersFailed(text + (f"; ranks {late} have been killed" if late else "") + where)
        return [self.exit_codes[rank] for rank in range(len(self._processes))]

    def join(self, timeout: float | None = None, check: bool = True) -> bool:
        """Waits at most so many seconds for the end: of all ranks or, with `check`, of the first that fails. Whether it came."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while len(self.exit_codes) < len(self._processes):
            if check and any(self.exit_codes.values()):
                break
            try:
                rank, code = self._ends.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return False
            self.exit_codes[rank] = code
        return True

    def stop(self) -> None:
        """Kills what still runs."""
        for rank, process in enumerate(self._processes):
            if rank not in self.exit_codes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        self.join(check=False)

    def _follow(self, rank: int, process: subprocess.Popen[str]) -> None:
        for line in process.stdout or ():
            sys.stdout.write(f"[{rank}] {line.rstrip()}\n")  # in one piece, or ranks mix within a line
            sys.stdout.flush()
        self._ends.put((rank, process.wait()))


class Traffic:
    """Background traffic between two racks, until stop()."""

    def __init__(self, source: list[str], target: list[str], address: str, port: int, mbit: float | None) -> None:
        def start(command: list[str], ready: str) -> subprocess.Popen[str]:
            command += ["--port", str(port), "--forceflush"]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
            self._processes.append(process)
            assert process.stdout
            lines = []
            for line in process.stdout:
                lines.append(line)
                if ready in line:
                    # Nobody needs the rest, but a full pipe would stop the traffic.
                    threading.Thread(target=process.stdout.read, daemon=True).start()
                    return process
            self.stop()
            raise ClusterError(f"iperf3 sends no background traffic: {''.join(lines).strip()}")

        self._processes: list[subprocess.Popen[str]] = []
        start([*target, "iperf3", "--server", "--one-off"], "listening")
        rate = ["--udp", "--length", "1448", "--bitrate", str(round(mbit * 1e6 * 1448 / 1490))] if mbit is not None else []
        start([*source, "iperf3", "--client", address, "--time", "86400", *rate], "connected")

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.kill()
            process.wait()


# ---- the cluster ---------------------------------------------------------------------------------------------------------------


class Cluster:
    """Racks of workers with shaped links; a context manager that builds on entry and takes down on exit.

    racks: workers in each rack. Ranks count through the racks: racks=[2, 3] has ranks 0, 1 and 2, 3, 4.
    access_mbit: rate of every worker's link, uplink_mbit: of every rack's; in each direction, in 10^6 bits of Ethernet frames a
    second. A ring of all workers is slowed down by an uplink only if that is slower than a NIC.
    congestion: TCP's congestion control in all workers.

    Raises ClusterError when not root or where a tool is missing.
    """

    def __init__(self, racks: Sequence[int], access_mbit: float = 500, uplink_mbit: float = 100, congestion: str = "reno") -> None:
        if not racks or min(racks) < 1 or max(racks) > 250 or len(racks) > 250:
            raise ValueError(f"racks={list(racks)}: must be 1 to 250 numbers of workers, each from 1 to 250")
        if min(access_mbit, uplink_mbit) < 1:
            raise ValueError(f"rates of {access_mbit:g} and {uplink_mbit:g} Mbit/s: must be at least 1")
        if congestion not in CONGESTION_CONTROLS:
            raise ValueError(f"congestion={congestion!r}: must be one of {', '.join(CONGESTION_CONTROLS)}")
        self.racks = list(racks)
        self.rack_of = [rack for rack, workers in enumerate(racks) for _ in range(workers)]
        """The rack of each rank."""
        self.nics = [float(access_mbit)] * len(self.rack_of)
        """The rate of each worker's link, in Mbit/s."""
        self.uplinks = [float(uplink_mbit)] * len(racks)
        """The rate of each rack's uplink, in Mbit/s."""
        self.congestion = congestion
        self.name = f"{PREFIX}-{os.getpid()}-{_start_of(os.getpid())}-{next(_serial)}"
        """For link_bytes(); its namespaces are <name>-fabric, <name>-w<rank>, <name>-n<rack>."""
        self.addresses = [f"10.90.{rack}.{self._place(rank) + 1}" for rank, rack in enumerate(self.rack_of)]
        """IPv4, of each rank."""
        self._guardian: subprocess.Popen[bytes] | None = None
        self._jobs = count()
        self._ports = count(5201)  # of iperf3, for which every port of a namespace is free

    def __enter__(self) -> Cluster:
        _require_tools()
        clean()
        command = [sys.executable, "-I", __file__, "--guard", self.name]
        self._guardian = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Kills what runs on the workers and removes the namespaces. Safe to repeat."""
        _remove(self.name)
        if self._guardian is not None:  # kept until here: it tries again, should _remove fail
            self._guardian.kill()
            self._guardian.wait()
            self._guardian = None

    # ---- rates

    def set_uplink(self, rack: int, mbit: float) -> None:
        """Sets the rate of a rack's uplink; what flows goes on at the new rate."""
        self.uplinks[rack] = mbit
        _batch("tc", [_tbf(f"up{rack}", mbit), _tbf(f"down{rack}", mbit)], self._fabric)

    def set_nic(self, rank: int, mbit: float) -> None:
        """Sets the rate of a worker's link."""
        self.nics[rank] = mbit
        _batch("tc", [_tbf(f"w{rank}", mbit)], self._fabric)
        _batch("tc", [_tbf("eth0", mbit)], f"{self.name}-w{rank}")

    def add_traffic(self, source_rack: int, target_rack: int, mbit: float | None = None) -> Traffic:
        """Sends from a neighbour in one rack to one in another: constantly `mbit` of UDP, or as much as one TCP connection gets."""
        source, target = (["ip", "netns", "exec", self._neighbour(rack)] for rack in (source_rack, target_rack))
        return Traffic(source, target, _neighbour_address(target_rack), next(self._ports), mbit)

    def link_bytes(self) -> dict[str, LinkBytes]:
        """Bytes on every shaped link since the cluster was built: "worker 3" or "uplink 1" to LinkBytes."""
        return link_bytes(self.name)

    def check(self) -> list[Measured]:
        """Measures a pair of workers inside a rack, and every uplink, with iperf3 --bidir, four connections each way: what one
        gets says more about TCP than about the link.

        Raises ShapingError where a rate is off by more than 10 %, counted on the wire.
        """
        found = []
        pair = next((rank for rank in range(len(self.rack_of) - 1) if self.rack_of[rank] == self.rack_of[rank + 1]), None)
        if pair is not None:
            ends = [f"{self.name}-w{rank}" for rank in (pair, pair + 1)]
            rate = min(self.nics[pair : pair + 2])
            found.append(self._measure(f"worker {pair} with worker {pair + 1}", ends, self.addresses[pair + 1], rate))
        for rack in range(len(self.racks) - 1):
            ends = [self._neighbour(rack), self._neighbour(rack + 1)]
            rate = min(self.uplinks[rack : rack + 2])
            found.append(self._measure(f"rack {rack} with rack {rack + 1}", ends, _neighbour_address(rack + 1), rate))
        if not all(measured.right for measured in found):
            raise ShapingError("the emulated links are off, nothing is measured on them: " + "; ".join(map(str, found)))
        return found

    # ---- programs

    def start(self, command: Sequence[str], env: Mapping[str, str] | None = None, logs: Path | None = None) -> Job:
        """Starts a program on every worker, as torchrun would on hosts with one process each.

        It finds RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT, the interface to use, one OpenMP thread
        unless the environment says otherwise, CLUSTER_NAME, and what `env` adds. Its output is printed line by line behind
        "[rank]", or written to rank<rank>.log in the folder `logs`.
        """
        if logs is not None:
            logs.mkdir(parents=True, exist_ok=True)
        common = {
            "OMP_NUM_THREADS": "1",
            **os.environ,
            "WORLD_SIZE": str(len(self.rack_of)),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": self.addresses[0],
            "MASTER_PORT": str(29500 + next(self._jobs)),  # free: these namespaces hold nobody else
            "GLOO_SOCKET_IFNAME": "eth0",
            "DSSYNC_SOCKET_IFNAME": "eth0",
            "CLUSTER_NAME": self.name,
            **(env or {}),
        }
        ranks = range(len(self.rack_of))
        return Job([([*self._exec(rank), *command], {**common, "RANK": str(rank)}) for rank in ranks], logs)

    def run(
        self,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        logs: Path | None = None,
        timeout: float | None = None,
        check: bool = True,
    ) -> list[int]:
        """start() and Job.wait(): the exit codes."""
        job = self.start(command, env, logs)
        try:
            return job.wait(timeout, check)
        finally:
            job.stop()

    # ---- inside

    @property
    def _fabric(self) -> str:
        return f"{self.name}-fabric"

    def _neighbour(self, rack: int) -> str:
        return f"{self.name}-n{rack}"

    def _exec(self, rank: int) -> list[str]:
        return ["ip", "netns", "exec", f"{self.name}-w{rank}"]

    def _place(self, rank: int) -> int:
        return rank - self.rack_of.index(self.rack_of[rank])

    def _build(self) -> None:
        racks, ranks = range(len(self.racks)), range(len(self.rack_of))
        # A host's port in the fabric has the name of the host: w<rank> or n<rack>.
        hosts = {f"w{rank}": (self.rack_of[rank], self.addresses[rank]) for rank in ranks}
        hosts |= {f"n{rack}": (rack, _neighbour_address(rack)) for rack in racks}
        congestion = f"echo {self.congestion} > /proc/sys/net/ipv4/tcp_congestion_control"
        _batch(
            "ip",
            [
                f"netns add {self._fabric}",
                *(f"netns add {self.name}-{host}" for host in hosts),
                *(f"link add eth0 netns {self.name}-{host} type veth peer {host} netns {self._fabric}" for host in hosts),
                *(f"netns exec {self.name}-{host} sh -c '{congestion}'" for host in hosts),
            ],
        )
        _batch(
            "ip",
            [
                *(f"link add {bridge} type bridge" for bridge in ("core", *(f"rack{rack}" for rack in racks))),
                *(f"link add up{rack} type veth peer down{rack}" for rack in racks),
                *(f"link set up{rack} master rack{rack} up" for rack in racks),
                *(f"link set down{rack} master core up" for rack in racks),
                *(f"link set {host} master rack{rack} up" for host, (rack, _) in hosts.items()),
                *(f"link set {bridge} up" for bridge in ("core", *(f"rack{rack}" for rack in racks))),
            ],
            self._fabric,
        )
        for host, (_, address) in hosts.items():
            _batch("ip", [f"addr add {address}/16 dev eth0", "link set eth0 up", "link set lo up"], f"{self.name}-{host}")
        for rack, mbit in enumerate(self.uplinks):
            self.set_uplink(rack, mbit)
        for rank, mbit in enumerate(self.nics):
            self.set_nic(rank, mbit)

    def _measure(self, path: str, namespaces: Sequence[str], address: str, expected: float) -> Measured:
        client, server = (["ip", "netns", "exec", namespace] for namespace in namespaces)
        there, back = measure_tcp(address, next(self._ports), client, server, streams=4)
        return Measured(path, expected, there / GOODPUT / 1e6, back / GOODPUT / 1e6)


def _neighbour_address(rack: int) -> str:
    return f"10.90.{rack}.254"


def _require_tools() -> None:
    if sys.platform != "linux":
        raise ClusterError("the emulated cluster is made of Linux network namespaces")
    if os.geteuid() != 0:
        raise ClusterError("the emulated cluster makes network namespaces, which only root may: run it with sudo")
    for tool, package in PACKAGES.items():
        if shutil.which(tool) is None:
            raise ClusterError(f"`{tool}` is missing; on Debian: apt-get install {package}")


# ---- the command ---------------------------------------------------------------------------------------------------------------

Change = Callable[[Cluster], object]


def _change(words: Sequence[str]) -> tuple[float, Change]:
    """An --at as its time and what it does."""
    try:
        seconds, what, *numbers = words
        first, *more = map(float, numbers)
        index = int(first)
        if what in ("uplink", "nic"):
            (mbit,) = more
            return float(seconds), lambda cluster: (cluster.set_uplink if what == "uplink" else cluster.set_nic)(index, mbit)
        if what == "traffic":
            target, *rate = more
            return float(seconds), lambda cluster: cluster.add_traffic(index, int(target), *rate)
    except (ValueError, TypeError):
        pass
    raise ClusterError(
        f"--at {' '.join(words)}: must be SECONDS uplink RACK MBIT, SECONDS nic RANK MBIT or SECONDS traffic RACK RACK [MBIT]"
    )


def _run(cluster: Cluster, changes: Sequence[tuple[float, Change]], arguments: argparse.Namespace) -> None:
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    start = time.monotonic()
    job = cluster.start(command, logs=arguments.logs)
    for seconds, change in changes:
        if job.join(max(0.0, start + seconds - time.monotonic())):
            break
        try:
            change(cluster)
        except IndexError:
            raise ClusterError(f"--at {seconds:g}: no such rack or rank") from None
    left = None if arguments.timeout is None else max(0.0, start + arguments.timeout - time.monotonic())
    job.wait(left)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="build a cluster, check its rates, run a program on every worker, take it down")
    check = commands.add_parser("check", help="build a cluster, print the rates that iperf3 sees, take it down")
    commands.add_parser("clean", help="remove what clusters left whose process has ended")
    for command in (run, check):
        command.add_argument("--racks", type=_numbers, default=[4, 4], metavar="N,N", help="workers in each rack (default: 4,4)")
        command.add_argument("--access", type=float, default=500, metavar="MBIT", help="rate of a worker's link (default: 500)")
        command.add_argument("--uplink", type=float, default=100, metavar="MBIT", help="rate of a rack's uplink (default: 100)")
        command.add_argument("--congestion", choices=CONGESTION_CONTROLS, default="reno", help="of TCP (default: reno)")
    run.add_argument(
        "--at",
        nargs="+",
        action="append",
        metavar=("SECONDS", "CHANGE"),
        help="change something while the program runs: `--at 10 uplink RACK MBIT`, `nic RANK MBIT`, or `traffic RACK RACK [MBIT]` "
        "for background traffic from the one rack to the other (without MBIT a TCP connection that takes what it gets)",
    )
    run.add_argument("--logs", type=Path, metavar="FOLDER", help="write each worker's output there instead of printing it")
    run.add_argument("--timeout", type=float, metavar="SECONDS", help="end the program after that time, as an error")
    run.add_argument("--no-check", action="store_true", help="run without checking the rates first")
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="-- PROGRAM ...", help="what every worker runs")
    return parser


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM and SIGHUP end the command as Ctrl-C does: in order."""
    raise KeyboardInterrupt


def main() -> int:
    parser = _parser()
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    if arguments.what == "clean":
        _require_tools()
        for bed in clean():
            print(f"removed {bed}")
        for bed in sorted(_beds()):
            print(f"in use: {bed}")
        return 0
    if arguments.what == "run" and not arguments.command:
        parser.error("run needs a program: run [options] -- python script.py")
    changes = sorted(map(_change, vars(arguments).get("at") or []), key=lambda change: change[0])
    try:
        cluster = Cluster(arguments.racks, arguments.access, arguments.uplink, arguments.congestion)
    except ValueError as error:
        parser.error(str(error))
    with cluster:
        if arguments.what == "check" or not arguments.no_check:
            for measured in cluster.check():
                print(f"cluster: {measured}", flush=True)
        if arguments.what == "run":
            _run(cluster, changes, arguments)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--guard"]:
        _guard(sys.argv[2])
        sys.exit()
    try:
        sys.exit(main())
    except ClusterError as error:
        sys.exit(f"cluster: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
