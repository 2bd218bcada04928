"""Loaded by the fork server before it forks ranks; see harness."""

import contextlib
from importlib import import_module

for _name in ("numpy", "torch", "torch.distributed", "torch.nn.parallel", "torch.optim", "pytest", "hypothesis", "harness"):
    import_module(_name)
for _name in ("dssync_pg._C", "dssync_pg._backend", "dssync_pg.attach", "dssync_pg.sync"):
    with contextlib.suppress(ImportError):  # a test of the broken package says so better than a server that does not start
        import_module(_name)
import_module("torch").set_num_threads(1)
