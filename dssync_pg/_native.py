"""Makes a group's native engine: all of its ranks have one, or none has."""

from __future__ import annotations

import logging
import socket
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from . import _C
from ._agreement import exchange, meeting_place
from .options import variable

logger = logging.getLogger("dssync_pg")

_EXCHANGES = 2
"""That an engine makes while it is created."""


class _ElsewhereError(Exception):
    """Another rank has no engine."""


def make_engine(store: Store, rank: int, world_size: int, timeout: timedelta, label: str, transport: str) -> _C.Engine | str:
    """The engine of this rank, or why there is none: the same outcome, and the same text, on every rank. Collective.

    The interface to listen on is named by DSSYNC_SOCKET_IFNAME, else GLOO_SOCKET_IFNAME (several divided by commas: the first that
    exists); without them it is the one from which the store's host is reached.
    """
    done = 0

    def meet(value: str | None) -> list[str | None]:
        nonlocal done
        place = meeting_place(store, f"engine/{done}")
        done += 1
        return exchange(place, rank, world_size, timeout, f"the making of the engine of the {label}", value)

    stopped: BaseException | None = None  # why the exchange of addresses ended; it comes back out of Engine() as a text only

    def allgather(mine: bytes) -> list[bytes]:
        nonlocal stopped
        try:
            answers = [bytes.fromhex(answer) for answer in meet(mine.hex()) if answer is not None]
            if len(answers) < world_size:
                raise _ElsewhereError
        except BaseException as error:  # Ctrl-C too: the C interface carries only its text
            stopped = error
            raise
        return answers

    engine, problem = None, None
    interfaces = variable("DSSYNC_SOCKET_IFNAME") or variable("GLOO_SOCKET_IFNAME")
    try:
        engine = _C.Engine(rank, world_size, transport, interfaces, host_of(store), store, allgather)
    except RuntimeError as error:
        if stopped is not None and not isinstance(stopped, _ElsewhereError):
            raise stopped from None
        problem = str(error) if stopped is None else ""
    made = done
    for _ in range(made, _EXCHANGES):
        meet(None)
    problems = meet(problem)
    if engine is not None and all(text is None for text in problems):
        return engine
    return "; ".join([f"rank {at}: {text}" for at, text in enumerate(problems) if text][:4])


def gloo_devices() -> list[Any]:
    """What Gloo is to listen on because DSSYNC_SOCKET_IFNAME names it; empty: Gloo chooses, GLOO_SOCKET_IFNAME wins."""
    present = {name for _, name in socket.if_nameindex()}
    named = [name for name in variable("DSSYNC_SOCKET_IFNAME").split(",") if name in present]
    for name in named if not variable("GLOO_SOCKET_IFNAME") else []:
        try:
            return [dist.ProcessGroupGloo.create_device(interface=name)]
        except RuntimeError as error:
            logger.warning("dssync: Gloo cannot listen on %s, named by DSSYNC_SOCKET_IFNAME: %s", name, error)
    return []


def host_of(store: Store) -> str:
    """The host of the TCP store under any prefixes; "" if the store is of another kind."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return store.host if isinstance(store, TCPStore) else ""


def describe_engine(engine: _C.Engine, transport: str) -> str:
    """For people: what carries the bytes, and why."""
    hosts = len(set(engine.hosts))
    if transport == "tcp":
        return "native engine, TCP (transport=tcp)"
    if hosts == 1:
        return "native engine, shared memory: all ranks are on one host"
    if hosts == len(engine.hosts):
        return f"native engine, TCP: the {hosts} ranks are on as many hosts, or cannot share memory"
    return f"native engine, shared memory inside {hosts} hosts and TCP between them"


def connected(engine: _C.Engine | None) -> dict[str, int]:
    """How many peers this rank is connected to over what."""
    if engine is None:
        return {}
    stats = engine.stats()
    return {name: stats[f"{name}_peers"] for name in ("shm", "tcp", "unix") if stats[f"{name}_peers"]}
