"""Sees that no test leaves a process or a shared-memory file behind; runs tests once for each engine."""

from __future__ import annotations

import multiprocessing.forkserver
import os
from collections.abc import Iterator
from pathlib import Path

import harness
import pytest
import torch

# A test says which options it means; what the developer's shell holds must not decide.
for _name in [name for name in os.environ if name.startswith("DSSYNC_")]:
    del os.environ[_name]


@pytest.fixture(params=["native", "gloo"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs once for each engine: its ranks, and the Options that it makes, take this one unless they say otherwise."""
    name: str = request.param
    monkeypatch.setenv("DSSYNC_ENGINE", name)
    return name


def _children(pid: int) -> set[int]:
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            after_name = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        if int(after_name[1]) == pid and after_name[0] != "Z":
            found.add(int(folder.name))
    return found


def _shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("*")}


@pytest.fixture(scope="session", autouse=True)
def leave_nothing_behind() -> Iterator[None]:
    torch.set_num_threads(1)
    before = _shared_memory()
    yield
    server = multiprocessing.forkserver._forkserver._forkserver_pid  # None if no test has run ranks
    mine = (_children(server) if server else set()) | (_children(os.getpid()) & harness.rank_pids)
    assert not mine, f"processes left behind: {mine}"
    marks = {"dssync", *(f"_{pid}_" for pid in harness.rank_pids)}
    left = {name for name in _shared_memory() - before if any(mark in name for mark in marks)}
    assert not left, f"shared memory left behind: {left}"
