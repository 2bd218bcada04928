"""Where a job's topology comes from: a file, else Slurm, else nothing is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .topology import Topology, TopologyError, slurm_address


def find(options_topology: str, rank: int, world_size: int, gather: Callable[[Any], list[Any]]) -> tuple[Topology | None, str]:
    """The topology, the same on every rank, and in words where it is from. Collective: one gather.

    options_topology: the file that the option `topology` or DSSYNC_TOPOLOGY names; "" for none. Only rank 0 need have it.
    gather: gives every rank's value (what JSON knows), by rank, to every rank.
    None: nothing is known, and all links count as equal.
    Raises TopologyError, with the same text on every rank, when the file is wrong, or of another world size.
    """
    mine: dict[str, Any] = {"slurm": slurm_address()}
    if rank == 0 and options_topology:
        mine.update(_from_file(options_topology, world_size))
    all_ranks = gather(mine)
    first = all_ranks[0]
    if "error" in first:
        raise TopologyError(first["error"])
    if "topology" in first:
        return Topology.from_json(first["topology"]), first["source"]
    without = next((other for other, found in enumerate(all_ranks) if not found["slurm"]), None)
    if without is None:
        addresses = [(host, address) for host, address in (found["slurm"] for found in all_ranks)]
        return Topology.from_slurm_addresses(addresses), "Slurm's topology variables"
    if any(found["slurm"] for found in all_ranks):
        return None, f"flat: SLURM_TOPOLOGY_ADDR tells no switch on rank {without}, though it does on others"
    return None, "flat"


def _from_file(path: str, world_size: int) -> dict[str, str]:
    """In a form that can be gathered, also what is wrong with it: the others wait for rank 0."""
    try:
        return {"topology": Topology.load(path, world_size).to_json(), "source": f"the file {path}"}
    except TopologyError as error:
        return {"error": str(error)}
