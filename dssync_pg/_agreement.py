"""All ranks of a group come to one answer through torch's Store, before there is any other connection between them.

Rank 0 stands in the middle: it gathers what every rank proposes, decides, and publishes the verdict: a handful of requests to
the store for each rank, and one that fetches all proposals. Every key is deleted by the last to need it; only a meeting that
failed because a rank never came leaves its verdict behind, for the rank that comes late. A place in the store serves one meeting at
a time: the next one may come there once every rank has left.

Proposals and verdicts are JSON, not pickles: whoever can write to the store must not be able to run code here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, Store

from ._loading import versions
from .options import Options
from .plan import Plan

_GRACE = timedelta(seconds=10)
"""How much longer the others wait than rank 0, to see its verdict, which names who is missing; how long it stays for them."""


class Disagreement(ValueError):
    """The ranks of a group cannot work together as they are; the text is the same on every rank."""


def exchange(store: Store, rank: int, world_size: int, timeout: timedelta, what: str, value: Any) -> list[Any]:
    """Every rank's `value`, by rank. Values are what JSON knows; tuples come back as lists. Collective over the store.

    what: for errors. Raises TimeoutError on every rank that came, naming those that did not.
    """
    found: list[Any] = json.loads(
        _meet(store, rank, world_size, timeout, what, json.dumps(value), lambda proposals: f"[{','.join(proposals)}]")
    )
    return found


def agree_on_options(
    store: Store,
    rank: int,
    world_size: int,
    timeout: timedelta,
    label: str,
    options: Options | Exception,
    averages: bool,
) -> Options:
    """This rank's options, which are every rank's. Collective over the store.

    options: this rank's, or what was wrong with them: told to the others before it is raised, so that nobody waits for this rank.
    Raises Disagreement with the same text on every rank when options, versions or world sizes differ or a rank's options are not
    valid; on a rank whose own options are not valid that error is raised instead.
    """
    proposal = {
        **versions(),
        "world size": world_size,
        "averages": averages,
        "options": None if isinstance(options, Exception) else json.loads(options.to_json()),
        "error": str(options) if isinstance(options, Exception) else None,
    }

    def decide(proposals: Sequence[str]) -> str:
        views = [json.loads(text) for text in proposals]
        return json.dumps({"error": _invalid(views) or _difference(views)})

    verdict = json.loads(_meet(store, rank, world_size, timeout, f"the making of the {label}", json.dumps(proposal), decide))
    if isinstance(options, Exception):
        raise options
    if verdict["error"] is not None:
        raise Disagreement(f"dssync: the {label} cannot be made: {verdict['error']}")
    return options


def agree_on_plan(store: Store, rank: int, world_size: int, timeout: timedelta, label: str, make: Callable[[], Plan]) -> Plan:
    """The plan of the group, made by rank 0 with `make` and checked by all. Collective over the store.

    Raises Disagreement, with the same text on every rank, where `make` raises ValueError or makes a plan for other ranks.
    """
    mine: dict[str, str] = {}
    if rank == 0:
        try:
            mine = {"plan": make().to_bytes().hex()}
        except ValueError as error:
            mine = {"error": str(error)}
    verdict = exchange(store, rank, world_size, timeout, f"the plan of the {label}", mine)[0]
    if "error" in verdict:
        raise Disagreement(f"dssync: the {label} cannot be made: {verdict['error']}")
    plan = Plan.from_bytes(bytes.fromhex(verdict["plan"]))
    if plan.world_size != world_size:
        raise Disagreement(f"dssync: the plan of rank 0 is for {plan.world_size} ranks; the {label} has {world_size}")
    return plan


# ---- what rank 0 decides ---------------------------------------------------------------------------------------------------------


def _invalid(views: Sequence[Mapping[str, Any]]) -> str | None:
    errors: dict[str, list[int]] = {}
    for rank, view in enumerate(views):
        if view["error"] is not None:
            errors.setdefault(view["error"], []).append(rank)
    return "; ".join(f"on {_ranks(ranks)}: {text}" for text, ranks in errors.items()) or None


def _difference(views: Sequence[Mapping[str, Any]]) -> str | None:
    """Every field in which ranks differ, with each value and who has it."""
    flat = [{**view, **view["options"]} for view in views]
    parts = []
    for name in flat[0]:
        holders: dict[str, list[int]] = {}
        for rank, view in enumerate(flat):
            holders.setdefault(json.dumps(view.get(name)), []).append(rank)
        if len(holders) > 1 and name != "options":
            parts.append(f"{name} is " + ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in holders.items()))
    return f"ranks differ: {'; '.join(parts)}. Give every rank the same" if parts else None


def _ranks(ranks: Sequence[int], most: int = 8) -> str:
    shown = ", ".join(map(str, ranks[:most])) + (f" and {len(ranks) - most} more" if len(ranks) > most else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


# ---- meeting in the store --------------------------------------------------------------------------------------------------------


def _meet(
    store: Store,
    rank: int,
    world_size: int,
    timeout: timedelta,
    what: str,
    proposal: str,
    decide: Callable[[Sequence[str]], str],
) -> str:
    """What rank 0 decides from every rank's proposal; the same text on every rank."""
    if world_size == 1:
        return decide([proposal])
    if rank == 0:
        verdict = _preside(store, world_size, timeout, what, proposal, decide)
    else:
        store.set(f"proposal/{rank}", proposal)
        if not _wait(store, ["verdict"], timeout + _GRACE):
            raise TimeoutError(
                f"dssync: {what}: rank {rank} waited {_seconds(timeout + _GRACE)} for rank 0, which has not come. Has it "
                "failed, or does it make its groups in another order?"
            )
        verdict = json.loads(store.get("verdict"))
        if store.add("readers", 1) == verdict["readers"]:
            if verdict["missing"] is None:  # else it stays, for the rank that comes late
                store.delete_key("verdict")
            store.delete_key("readers")
            store.set("read", "")
    if verdict["missing"] is not None:
        raise TimeoutError(verdict["missing"])
    decided: str = verdict["decided"]
    return decided


def _preside(
    store: Store,
    world_size: int,
    timeout: timedelta,
    what: str,
    own: str,
    decide: Callable[[Sequence[str]], str],
) -> dict[str, Any]:
    """Rank 0's part: gathers, decides, publishes, and stays until the others have read it (they may depend on its store)."""
    keys = [f"proposal/{rank}" for rank in range(1, world_size)]
    missing = []
    if not _wait(store, keys, timeout):
        missing = [rank for rank, key in enumerate(keys, 1) if not store.check([key])]
    verdict: dict[str, Any] = {"missing": None, "decided": None, "readers": world_size - 1 - len(missing)}
    if missing:
        verdict["missing"] = (
            f"dssync: {what}: {_ranks(missing)} of {world_size} did not come within {_seconds(timeout)}. Have they failed, or do "
            "they make their groups in another order?"
        )
    else:
        proposals = [value.decode() for value in store.multi_get(keys)]
        for key in keys:
            store.delete_key(key)
        verdict["decided"] = decide([own, *proposals])
    store.set("verdict", json.dumps(verdict))
    if verdict["readers"] and _wait(store, ["read"], min(_GRACE, timeout)):
        store.delete_key("read")
    return verdict


def _wait(store: Store, keys: list[str], timeout: timedelta) -> bool:
    """Whether the keys are there within `timeout`. A lost connection to the store is raised as what it is."""
    deadline = time.monotonic() + timeout.total_seconds()
    try:
        store.wait(keys, timeout)
    except RuntimeError:  # which of the stores' many texts mean a time-out is told by the clock
        if time.monotonic() < deadline - 0.1:
            raise
        return False
    return True


def _seconds(timeout: timedelta) -> str:
    return f"{timeout.total_seconds():g} s"


def meeting_place(store: Store, name: str) -> Store:
    """The part of `store` that the meeting `name` has to itself."""
    return PrefixStore(f"dssync/{name}", store)
