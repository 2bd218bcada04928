"""Runs a function on N ranks, each a process of its own, and never hangs.

    from harness import run_ranks

    def averages(rank, world_size, value):          # a module-level function: it travels by name
        tensor = torch.full((1000,), float(rank))
        dist.all_reduce(tensor, op=dist.ReduceOp.AVG)
        return tensor

    def test_average():
        results = run_ranks(4, averages, 3.0)       # what each rank returned, by rank

Ranks are forked from a server that has torch and dssync_pg loaded already, so a run costs tens of milliseconds, not an import of
torch for each rank. What follows from that: arguments and results travel by plain pickle; the C library's view of variables that
torch reads only while it is imported cannot be changed by `env`; assertions in rank functions are plain ones; and code after an
ordinary return ends by os._exit, unless `interpreter_exit=True`. A script from scratch, import included: `run_script`.

For failures that a test expects, `check=False` returns one Outcome a rank instead of raising. A run that is not over after
`timeout` seconds always raises, with the stacks of all threads of all ranks that were still alive, and those are killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import functools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
PR_SET_PDEATHSIG = 1

rank_pids: set[int] = set()
"""Every process that this session started; see conftest."""


@dataclass
class Outcome:
    """How one rank ended."""

    rank: int
    pid: int
    value: Any = None
    error: BaseException | None = None
    """What the function raised; None when it returned or the process was killed."""
    traceback: str = ""
    exitcode: int | None = None
    """0, or minus the signal that killed the process, as in subprocess."""
    output: str = ""
    """stdout and stderr of the process."""
    finished: bool = field(default=False, repr=False)

    @property
    def ok(self) -> bool:
        return self.finished and self.error is None and self.exitcode == 0

    def __str__(self) -> str:
        state = "returned" if self.ok else "raised" if self.error else f"ended with exit code {self.exitcode}"
        parts = [f"--- rank {self.rank} (pid {self.pid}) {state}", self.traceback.rstrip(), self.output.rstrip()]
        return "\n".join(part for part in parts if part)


class RanksFailed(AssertionError):
    """A rank failed; the text holds every rank's traceback and output."""

    def __init__(self, headline: str, outcomes: Sequence[Outcome]) -> None:
        super().__init__("\n".join([headline, *(str(outcome) for outcome in outcomes if not outcome.ok or outcome.output)]))
        self.outcomes = list(outcomes)


def run_ranks(
    world_size: int,
    fn: Callable[..., Any],
    *args: Any,
    timeout: float = 60.0,
    env: Mapping[str, str] | Sequence[Mapping[str, str]] | None = None,
    backend: str = "dssync",
    pg_options: Any = None,
    pg_timeout: float | Sequence[float] = 30.0,
    init: bool = True,
    store: str = "tcp",
    check: bool = True,
    interpreter_exit: bool = False,
) -> list[Any]:
    """Calls fn(rank, world_size, *args) on every rank, between init_process_group and destroy_process_group.

    timeout: seconds for the whole run. pg_timeout: that of the process group, in seconds, for all ranks or a list with one a rank.
    env: variables for all ranks, or one mapping a rank. pg_options: an object for all ranks, or a list with one a rank.
    init=False: no process group is made; RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set so that
    `init_process_group(backend)` works as under torchrun, and `rank_store()` gives a store that all ranks share.
    store: "tcp" or "file".
    check=False: returns the Outcomes. Otherwise returns the values, and raises RanksFailed if a rank raised or died.
    interpreter_exit: after fn (and without destroying the group) each rank ends as a Python program does: atexit, finalisation
    of the interpreter, static destructors.
    """
    start_server()
    with tempfile.TemporaryDirectory(prefix="dssync-test-") as folder, _rendezvous(store, folder) as where:
        outcomes, processes, pipes = [], [], []
        try:
            for rank in range(world_size):
                call = _Call(
                    rank=rank,
                    world_size=world_size,
                    payload=pickle.dumps((fn, args, pg_options[rank] if isinstance(pg_options, list) else pg_options)),
                    env={**os.environ, **where, **((env[rank] if isinstance(env, Sequence) else env) or {})},
                    backend=backend if init else None,
                    pg_timeout=pg_timeout[rank] if isinstance(pg_timeout, Sequence) else pg_timeout,
                    output=str(Path(folder, f"rank{rank}")),
                    interpreter_exit=interpreter_exit,
                )
                reader, writer = multiprocessing.Pipe(duplex=False)
                process = _context().Process(target=_rank_main, args=(call, writer))
                process.start()
                writer.close()
                assert process.pid is not None
                rank_pids.add(process.pid)
                processes.append(process)
                pipes.append(reader)
                outcomes.append(Outcome(rank, process.pid))
            late = _collect(outcomes, processes, pipes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()  # no effect on those that have ended
            for process, pipe in zip(processes, pipes, strict=True):
                process.join()
                pipe.close()
        for outcome, process in zip(outcomes, processes, strict=True):
            outcome.exitcode = process.exitcode
            outcome.output = _read(Path(folder, f"rank{outcome.rank}"))
            process.close()
    if late:
        raise RanksFailed(f"{fn.__name__}: ranks {late} not over after {timeout} s; their stacks follow", outcomes)
    if not check:
        return outcomes
    failed = [outcome for outcome in outcomes if not outcome.ok]
    if failed:
        first = next((outcome.error for outcome in failed if outcome.error), None)
        raise RanksFailed(f"{fn.__name__}: ranks {[outcome.rank for outcome in failed]} failed", outcomes) from first
    return [outcome.value for outcome in outcomes]


def run_script(
    world_size: int,
    script: str,
    *,
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
    check: bool = True,
    python: str = sys.executable,
) -> list[Outcome]:
    """Runs a Python program (its text) on every rank as torchrun would: import of torch, environment rendezvous, real exit.

    Slow, about 3 s a rank and core: for what only a fresh process shows.
    """
    with tempfile.TemporaryDirectory(prefix="dssync-test-") as folder, _rendezvous("tcp", folder) as where:
        file = Path(folder, "script.py")
        file.write_text(script)
        processes = []
        for rank in range(world_size):
            variables = {**os.environ, **where, **THREADS, **(env or {}), "RANK": str(rank), "WORLD_SIZE": str(world_size)}
            with open(Path(folder, f"rank{rank}"), "wb") as output:
                command = [python, "-X", "faulthandler", str(file)]
                processes.append(subprocess.Popen(command, env=variables, cwd=folder, stdout=output, stderr=output))
        rank_pids.update(process.pid for process in processes)
        deadline = time.monotonic() + timeout
        late = []
        for rank, process in enumerate(processes):
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                late.append(rank)
                process.send_signal(signal.SIGABRT)  # faulthandler writes the stacks
                process.wait()
        outcomes = [
            Outcome(rank, process.pid, exitcode=process.returncode, output=_read(Path(folder, f"rank{rank}")), finished=True)
            for rank, process in enumerate(processes)
        ]
    if late or (check and not all(outcome.ok for outcome in outcomes)):
        raise RanksFailed(f"script: ranks {late} not over after {timeout} s" if late else "script failed", outcomes)
    return outcomes


def rank_store() -> dist.Store:
    """In a rank: a new connection to the store that all ranks of this run share."""
    if "RANK_FILE_STORE" in os.environ:
        return dist.FileStore(os.environ["RANK_FILE_STORE"], int(os.environ["WORLD_SIZE"]))
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)


def die() -> None:
    """In a rank: ends the process at once, as a crash would."""
    os.kill(os.getpid(), signal.SIGKILL)


# ---- the test's side ------------------------------------------------------------------------------------------------------


@dataclass
class _Call:
    rank: int
    world_size: int
    payload: bytes
    env: dict[str, str]
    backend: str | None
    pg_timeout: float
    output: str
    interpreter_exit: bool


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["harness_preload"])
    return context


@functools.cache
def start_server() -> None:
    """Starts the fork server, with this folder on its path and one thread a process, and waits until it has loaded everything."""
    from multiprocessing import forkserver

    before = dict(os.environ)
    os.environ.update(THREADS, PYTHONPATH=os.pathsep.join([str(HERE), before.get("PYTHONPATH", "")]).rstrip(os.pathsep))
    try:
        context = _context()
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    first = context.Process(target=os.getpid)
    first.start()
    first.join()


@contextlib.contextmanager
def _rendezvous(kind: str, folder: str) -> Any:
    if kind == "file":
        yield {"RANK_FILE_STORE": str(Path(folder, "store"))}
        return
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # As torchrun does it: the launcher holds the store, all ranks are its clients.
    yield {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    del server


def _collect(outcomes: list[Outcome], processes: list[Any], pipes: list[Connection], deadline: float) -> list[int]:
    """Takes in results until every process has ended; returns the ranks that are late, having made them write their stacks."""
    open_pipes = dict(zip(pipes, outcomes, strict=True))
    running = {process.sentinel: process for process in processes}
    while running:
        ready = wait([*open_pipes, *running], timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            late = [rank for rank, process in enumerate(processes) if process.sentinel in running]
            for rank in late:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(outcomes[rank].pid, signal.SIGUSR1)
            # The stacks are written by signal handlers: wait for that, or for the ends, not longer than a second.
            wait(list(running), timeout=1.0)
            return late
        for item in ready:
            if item in running:
                del running[item]  # type: ignore[arg-type]
            else:
                _receive(open_pipes, item)  # type: ignore[arg-type]
    for pipe in list(open_pipes):
        _receive(open_pipes, pipe)
    return []


def _receive(open_pipes: dict[Connection, Outcome], pipe: Connection) -> None:
    outcome = open_pipes.pop(pipe)
    try:
        data = pipe.recv_bytes()
    except EOFError:
        return
    outcome.value, outcome.error, outcome.traceback = pickle.loads(data)
    outcome.finished = True


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


# ---- the rank's side ------------------------------------------------------------------------------------------------------


def _rank_main(call: _Call, results: Connection) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # the server ends with the test process, and we with it
    output = os.open(call.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    faulthandler.enable(file=2)
    os.environ.clear()
    os.environ.update(call.env, RANK=str(call.rank), WORLD_SIZE=str(call.world_size), LOCAL_RANK=str(call.rank))
    torch.manual_seed(0)
    result = _call(call)
    try:
        data = pickle.dumps(result)
        pickle.loads(data)  # some exceptions can be written but not read
    except Exception as error:
        failure = result[1] or error
        data = pickle.dumps((None, RuntimeError(f"{type(failure).__name__}: {failure}"), result[2] or traceback.format_exc()))
    results.send_bytes(data)
    results.close()
    if call.interpreter_exit:
        del result
        ctypes.pythonapi.Py_Exit(0)


def _call(call: _Call) -> tuple[Any, BaseException | None, str]:
    try:
        fn, args, pg_options = pickle.loads(call.payload)
        if call.backend is not None:
            dist.init_process_group(
                call.backend,
                store=rank_store(),
                rank=call.rank,
                world_size=call.world_size,
                timeout=timedelta(seconds=call.pg_timeout),
                pg_options=pg_options,
            )
        value = fn(call.rank, call.world_size, *args)
        if dist.is_initialized() and not call.interpreter_exit:
            dist.destroy_process_group()
        return value, None, ""
    except BaseException as error:
        return None, error, traceback.format_exc()
