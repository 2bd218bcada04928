"""The emulated cluster: rates as asked for, also when they change; programs find each other; nothing is left, whatever dies."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import cluster
from cluster import Cluster, ClusterError, ShapingError, WorkersFailed

MISSING = [tool for tool in cluster.PACKAGES if shutil.which(tool) is None]
UNABLE = "needs Linux" if sys.platform != "linux" else "needs root" if os.geteuid() != 0 else f"needs {', '.join(MISSING)}"
able = pytest.mark.skipif(UNABLE != "needs ", reason=UNABLE)

MEET = """
import os, socket
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
master = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
assert os.environ["GLOO_SOCKET_IFNAME"] in [name for _, name in socket.if_nameindex()] and os.environ["LOCAL_RANK"] == "0"
def meet():
    while True:
        try:
            return socket.create_connection(master)
        except ConnectionRefusedError:  # rank 0 does not listen yet
            pass
if rank == 0:
    with socket.create_server(master) as server:
        peers = [server.accept() for _ in range(size - 1)]
        print(sorted((int(peer.recv(8)), address[0]) for peer, address in peers))
        for peer, _ in peers:
            peer.sendall(b"bye")
else:
    with meet() as peer:
        peer.sendall(str(rank).encode())
        print(peer.recv(8).decode())
"""


def namespaces(bed: str) -> list[str]:
    return [path.name for path in cluster.NAMESPACES.glob(f"{bed}-*")]


def soon(condition: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture(scope="module")
def bed() -> Iterator[Cluster]:
    start = time.monotonic()
    with Cluster([2, 2], access_mbit=200, uplink_mbit=50) as made:
        assert time.monotonic() - start < 5
        yield made
    assert not namespaces(made.name)


@able
def test_rates_are_right(bed):
    inside, across = bed.check()
    assert (inside.expected, across.expected) == (200, 50)
    for measured in (inside, across):
        assert measured.there == pytest.approx(measured.expected, rel=0.1) == measured.back


@able
def test_a_rate_changes_while_traffic_flows(bed):
    def rates(seconds: float = 0.25) -> dict[str, float]:
        """What leaves each rack and what enters it, in Mbit/s."""
        before, start = bed.link_bytes(), time.monotonic()
        time.sleep(seconds)
        after, elapsed = bed.link_bytes(), time.monotonic() - start
        return {
            f"{link} {way}": (getattr(after[link], way) - getattr(before[link], way)) * 8e-6 / elapsed
            for link in ("uplink 0", "uplink 1")
            for way in ("up", "down")
        }

    traffic = bed.add_traffic(0, 1)
    try:
        assert soon(lambda: rates()["uplink 1 down"] == pytest.approx(50, rel=0.1))
        bed.set_uplink(1, 20)
        assert soon(lambda: rates()["uplink 1 down"] == pytest.approx(20, rel=0.1))
        assert rates()["uplink 1 up"] < 2  # acknowledgements
    finally:
        traffic.stop()
        bed.set_uplink(1, 50)
    assert soon(lambda: sum(rates().values()) < 1)
    traffic = bed.add_traffic(1, 0, mbit=10)
    try:
        assert soon(lambda: rates()["uplink 0 down"] == pytest.approx(10, rel=0.1))
    finally:
        traffic.stop()


@able
def test_measuring_on_wrong_rates_is_refused(bed, monkeypatch):
    monkeypatch.setattr(cluster, "OMITTED_S", 0)
    monkeypatch.setattr(bed, "nics", [rate * 1.3 for rate in bed.nics])
    with pytest.raises(ShapingError, match=r"off.*worker 0 with worker 1: .* should be 260"):
        bed.check()


@able
def test_programs_meet_at_the_master_and_what_they_print_is_kept(bed, tmp_path):
    assert bed.run([sys.executable, "-I", "-c", MEET], logs=tmp_path, timeout=30) == [0] * 4
    addresses = [(rank, bed.addresses[rank]) for rank in (1, 2, 3)]
    assert [(tmp_path / f"rank{rank}.log").read_text() for rank in range(4)] == [f"{addresses}\n"] + ["bye\n"] * 3
    before = bed.link_bytes()["uplink 0"]
    bed.run([sys.executable, "-I", "-c", MEET], timeout=30)  # its port is free again
    assert bed.link_bytes()["uplink 0"].down > before.down


@able
def test_output_has_its_rank_and_a_failure_ends_all(bed, capfd):
    with pytest.raises(WorkersFailed, match=r"rank 2 ended with exit code 3; ranks \[0, 1, 3\] have been killed"):
        bed.run(["sh", "-c", "echo I am $RANK; test $RANK != 2 || exit 3; exec sleep 100"])
    assert "[2] I am 2\n" in capfd.readouterr().out
    with pytest.raises(WorkersFailed, match=r"ranks \[0\] were not over after 0.3 s"):
        bed.run(["sh", "-c", "test $RANK != 0 || exec sleep 100"], timeout=0.3)
    assert bed.run(["sh", "-c", "test $RANK = 1 && kill -9 $$; exit 0"], check=False) == [0, -9, 0, 0]


@able
def test_an_exception_takes_everything_down():
    seen = []

    def broken():
        with Cluster([1, 1]) as made:
            seen.extend([made, made.start(["sleep", "100"]), made._guardian])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    made, job, guardian = seen
    assert not namespaces(made.name) and guardian.returncode is not None
    assert job.wait(timeout=10, check=False) == [-9, -9]


OWNER = """
import os, signal, sys
from cluster import Cluster
made = Cluster([2])
made.__enter__()
job = made.start(["sleep", "100"])
print(made.name, *(process.pid for process in job._processes), flush=True)
if sys.argv[1] == "alone":
    made._guardian.kill()
    made._guardian.wait()
os.kill(os.getpid(), signal.SIGKILL)
"""


@able
@pytest.mark.parametrize("guarded", ["guarded", "alone"])
def test_a_killed_owner_leaves_nothing(guarded):
    done = subprocess.run([sys.executable, "-c", OWNER, guarded], cwd=ROOT / "benchmarks", stdout=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL
    bed, *pids = done.stdout.split()
    if guarded == "alone":
        assert len(namespaces(bed)) == 4 and bed in cluster.clean()
    assert soon(lambda: not namespaces(bed))
    assert soon(lambda: not any(Path(f"/proc/{pid}/ns/net").exists() for pid in pids))
    assert bed not in cluster.clean()


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(cluster.os, "geteuid", lambda: 1000)
    with pytest.raises(ClusterError, match="only root"):
        Cluster([1]).__enter__()
    monkeypatch.setattr(cluster.os, "geteuid", lambda: 0)
    monkeypatch.setattr(cluster.shutil, "which", lambda tool: None if tool == "iperf3" else tool)
    with pytest.raises(ClusterError, match="`iperf3` is missing; on Debian: apt-get install iperf3"):
        Cluster([1]).__enter__()


def test_wrong_arguments():
    for racks in ([], [2, 0], [251]):
        with pytest.raises(ValueError, match="racks="):
            Cluster(racks)
    with pytest.raises(ValueError, match="at least 1"):
        Cluster([1], uplink_mbit=0)
    with pytest.raises(ValueError, match="must be one of reno, bbr"):
        Cluster([1], congestion="cubic")
    for words in ("5 uplink 1", "x uplink 1 2", "5 nothing 1 2", "5 traffic 1", "5"):
        with pytest.raises(ClusterError, match="must be SECONDS uplink RACK MBIT"):
            cluster._change(words.split())


TWO_HOSTS = """
import os, sys
import torch, torch.distributed as dist
host, place = int(os.environ["RANK"]), int(sys.argv[1])
rank = 2 * place + host  # the ranks of a host are not neighbours: the ring must order them by host
if place == 0 and os.fork() == 0:
    os.execv(sys.executable, [sys.executable, __file__, "1"])
torch.set_num_threads(1)
os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), "4"
import dssync_pg
dist.init_process_group("dssync", pg_options=dssync_pg.Options(engine="native"))
from dssync_pg import _backend
engine = _backend.live[0].engine
assert engine.hosts == [0, 1, 0, 1], engine.hosts
for dtype in (torch.float32, torch.bfloat16, torch.int64):
    tensor = torch.arange(300_001).remainder(7).to(dtype) + rank
    expected = (torch.arange(300_001).remainder(7) * 4 + 6).to(dtype)
    dist.all_reduce(tensor)
    assert torch.equal(tensor, expected), dtype
stats = engine.stats()
assert stats["shm_peers"] == 1 and stats["tcp_peers"] in (1, 2), stats  # 2 if a rank is in the barrier already
dist.barrier()
dist.destroy_process_group()
if place == 0:
    assert os.wait()[1] == 0
print("done", rank)
"""


@able
def test_shared_memory_inside_hosts_and_tcp_between_them(tmp_path):
    """Two ranks in each of two network namespaces: what cannot pass shared memory counts as another host."""
    script = tmp_path / "two_hosts.py"
    script.write_text(TWO_HOSTS)
    with Cluster([1, 1], 500, 500) as bed:
        job = bed.start([sys.executable, str(script), "0"], logs=tmp_path)
        assert job.wait(120) == [0, 0], [(tmp_path / f"rank{rank}.log").read_text() for rank in range(2)]
