"""Loaded by the fork server before it forks ranks; see harness."""

import contextlib
import gc
from importlib import import_module

# torch._dynamo: DDP imports it in its constructor, for seconds.
_LIBRARIES = ("numpy", "torch", "torch.distributed", "torch.nn.parallel", "torch.optim", "torch._dynamo", "pytest", "hypothesis")
for _name in (*_LIBRARIES, "harness"):
    import_module(_name)
for _name in ("dssync_pg._C", "dssync_pg._backend", "dssync_pg.training", "dssync_pg.sync"):
    with contextlib.suppress(ImportError):  # a test of the broken package says so better than a server that does not start
        import_module(_name)
import_module("torch").set_num_threads(1)
gc.freeze()  # ranks share these objects with the server: no collection, at exit above all, need walk and so copy them
