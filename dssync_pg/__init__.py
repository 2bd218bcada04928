"""Divide-and-shuffle synchronization (DS-Sync, arXiv 2007.03298) as a PyTorch process-group backend.

`torch.distributed.init_process_group(backend="dssync")` needs no import of this package (unless the environment says
TORCH_DEVICE_BACKEND_AUTOLOAD=0); import it for what a script may want beyond that:

Options        what can be chosen, passed as `pg_options`
Plan           who averages with whom, as a plain object
Topology       where the workers are and how fast the links between them; TopologyError for one that cannot be
simulate       what a training's steps would take on a topology; returns a Simulation
exact          a context in which every collective is exact
attach         averages a model's parameters after each step of an optimizer
Sync           what `attach` returns; `get_syncs` lists those that were attached by themselves
global_average the exact mean of the parameters for the length of a context
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._backend import exact
    from .options import Options
    from .plan import Plan
    from .simulation import Simulation, simulate
    from .sync import Sync
    from .topology import Topology, TopologyError
    from .training import attach, get_syncs, global_average

__version__ = "0.1.0"
__all__ = [
    "Options",
    "Plan",
    "Topology",
    "TopologyError",
    "Simulation",
    "simulate",
    "exact",
    "attach",
    "Sync",
    "get_syncs",
    "global_average",
    "__version__",
]

# Lazy (PEP 562): `import torch` loads this module to find ._autoload, and must stay cheap.
_HOME = {
    "Options": "options",
    "Plan": "plan",
    "Topology": "topology",
    "TopologyError": "topology",
    "Simulation": "simulation",
    "simulate": "simulation",
    "exact": "_backend",
    "attach": "training",
    "get_syncs": "training",
    "Sync": "sync",
    "global_average": "training",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    from ._loading import load_extension

    load_extension()
    value: object = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Where torch is told not to load entry points, importing this package is what makes the backend known.
if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") != "1":
    from ._autoload import register

    register()
