"""Runs the distributed tests that torch ships, one at a time on request, over one backend; conformance.py starts it.

    python conformance_worker.py BACKEND LIMIT_SECONDS LOG_FOLDER

It writes one JSON line with the names of the tests, then for each name that it reads one JSON line with the result. A result has
`test`, `status` (passed|failed|skipped), `reason` (of a skip; of a failure the first error), `seconds`. What a test printed lies in
the log folder.

The tests are torch.testing._internal.distributed.distributed_test. They name the backends that they are for, so for a backend
that torch does not know they would be skipped: `_load_tests` makes them take it for Gloo. Each test runs in processes of its own:
torch starts them with "spawn", which imports torch anew for each rank, seconds of work; here they are forked from this process,
which has loaded torch and the tests and started no thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
import time
import unittest
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn
from unittest import mock

WORLD_SIZE = 4  # torch's default; the least that every test for CPUs accepts
GRACE_S = 20  # on top of the limit: for torch to collect the stacks of ranks that are late, before we end them
PR_SET_PDEATHSIG = 1

Result = dict[str, Any]


class TakenForGloo(str):
    """A backend's name that, where torch's tests compare it or look it up, is Gloo's as well."""

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or other == "gloo"

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:  # the tests look the name up in literal sets such as {"gloo", "nccl"}
        return hash("gloo")


def main() -> None:
    _end_with_parent()
    backend, limit, logs = sys.argv[1], float(sys.argv[2]), Path(sys.argv[3])
    # The channel to conformance.py is ours alone: what torch or a test prints must not get into it.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        module = _load_tests(backend)
    except ModuleNotFoundError as error:  # torch does not list what only its tests need, such as expecttest
        sys.exit(f"torch's tests import {error.name}, which is not installed: pip install {error.name}")
    case_class = _make_case_class(module, limit)
    tests = unittest.defaultTestLoader.getTestCaseNames(case_class)
    print(json.dumps({"tests": tests}), file=channel)
    for line in sys.stdin:
        print(json.dumps(_run_apart(case_class, line.strip(), limit + GRACE_S, logs / f"{line.strip()}.log")), file=channel)


# ---- torch's tests -------------------------------------------------------------------------------------------------------------


def _load_tests(backend: str) -> ModuleType:
    """torch's test module, imported for `backend`.

    Two things are changed for every backend, so that more runs: tests that torch skips below 8 ranks (they need 3; torch dropped
    them to spare its machines' time), and all_to_all on CPU tensors, which the tests leave to MPI though Gloo has it by now.
    """
    os.environ.update(WORLD_SIZE=str(WORLD_SIZE), INIT_METHOD="file://", BACKEND=backend)
    from torch.testing._internal import common_distributed, common_utils

    skip_if = common_utils.skip_but_pass_in_sandcastle_if

    def skip_unless_runnable(condition: bool, reason: str) -> Callable[..., Any]:
        return skip_if(condition and not reason.startswith("Only MPI supports"), reason)

    if backend != "gloo":
        from dssync_pg import _backend  # noqa: F401  loads everything that ranks need, before they are forked

        for feature in ("gpu", "cuda", "ddp", "subgroup", "plugin"):
            common_distributed.DistTestCases.backend_feature[feature].add(backend)
    # The module keeps what it finds under BACKEND when it is imported; os.environ itself would make it a plain str again.
    environ = {**os.environ, "BACKEND": TakenForGloo(backend)} if backend != "gloo" else os.environ
    with (
        mock.patch.object(os, "environ", environ),
        mock.patch.object(common_utils, "skip_but_pass_in_sandcastle_if", skip_unless_runnable),
        mock.patch.object(common_distributed, "skip_if_small_worldsize", lambda test: test),
    ):
        from torch.testing._internal.distributed import distributed_test
    if backend != "gloo":
        for kind in ("", "CUDA_", "SEND_RECV_"):
            getattr(distributed_test, f"{kind}PROFILING_SUPPORTED_BACKENDS").append(backend)
    return distributed_test


def _make_case_class(module: ModuleType, limit: float) -> type[unittest.TestCase]:
    from torch.testing._internal import common_distributed

    common_distributed.get_timeout = lambda test_id: limit

    class Case(module.TestDistBackend, module.DistributedTest._DistTestBase):  # type: ignore[misc, name-defined]
        def setUp(self) -> None:
            super().setUp()
            module.INIT_METHOD = os.environ["INIT_METHOD"]  # a new file for each test; ranks read it from the module
            self._start_processes(multiprocessing.get_context("fork").Process)

        @classmethod
        def _run(cls, rank: int, *args: Any, **kwargs: Any) -> None:
            _end_with_parent()
            super()._run(rank, *args, **kwargs)

    return Case


# ---- running one ---------------------------------------------------------------------------------------------------------------


def _run_apart(case_class: type[unittest.TestCase], test: str, limit: float, log: Path) -> Result:
    """Runs the test in a process of its own, and leaves none of its processes behind."""
    started = time.monotonic()
    reader, writer = multiprocessing.Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        _case_main(case_class, test, log, writer)
    writer.close()
    ended = os.pidfd_open(pid)
    try:
        multiprocessing.connection.wait([reader, ended], timeout=limit)
        result = {"status": "failed", "reason": f"not over after {limit:g} s" if _alive(ended) else "the test's process died"}
        with contextlib.suppress(EOFError):
            result = reader.recv() if reader.poll() else result
    finally:
        # The group is named after the case, whose number is not given to another process before waitpid.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # had it not come to make its group
        os.waitpid(pid, 0)
        os.close(ended)
        reader.close()
    return {"test": test, **result, "seconds": round(time.monotonic() - started, 2)}


def _alive(pidfd: int) -> bool:
    return not multiprocessing.connection.wait([pidfd], timeout=0)


def _case_main(case_class: type[unittest.TestCase], test: str, log: Path, writer: Any) -> NoReturn:
    try:
        os.setpgid(0, 0)
        _end_with_parent()
        with log.open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        logging.basicConfig(level=logging.INFO, stream=sys.stderr)
        outcome = unittest.TestResult()
        unittest.TestSuite([case_class(test)]).run(outcome)
        for _, text in outcome.failures + outcome.errors:
            print(text, file=sys.stderr, flush=True)
        writer.send(_verdict(outcome, log))
    finally:
        os._exit(0)


def _verdict(outcome: unittest.TestResult, log: Path) -> Result:
    failures = [text for _, text in outcome.failures + outcome.errors] + ["unexpected success"] * len(outcome.unexpectedSuccesses)
    if failures:
        return {"status": "failed", "reason": _first_error(failures[0])[:300]}
    if outcome.skipped:
        reason = outcome.skipped[0][1]
        if "look at subprocess log" in reason:
            found = re.search(r"skipping test \S+ for following reason: (.*)", log.read_text(errors="replace"))
            reason = found[1] if found else reason
        return {"status": "skipped", "reason": reason}
    return {"status": "passed", "reason": ""}


def _first_error(text: str) -> str:
    """The line of a traceback that names the error; of torch's own traceback, which quotes those of the ranks, the first quoted."""
    crash = re.search(r"^Expected exit code .*", text, re.MULTILINE)
    error = re.search(r"^(?!RuntimeError: Process \d+ exited)[A-Za-z_.]+(Error|Exception|Warning)\b.*", text, re.MULTILINE)
    return crash[0] if crash else error[0] if error else text.splitlines()[-1]


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
