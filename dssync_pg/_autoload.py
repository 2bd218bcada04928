"""Makes `backend="dssync"` known to torch. Runs at the end of every `import torch` on this Python (entry point torch.backends,
torch before 2.14) or when the name is first used (entry point torch.distributed.backends, 2.14 and later).

So it imports nothing but what `import torch` has loaded, and never raises: an installation that cannot work is reported when the
backend is used, not to people who only import torch.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Registers the backend; what it needs is loaded when the first group is made."""
    try:
        import torch.distributed

        if torch.distributed.is_available():
            torch.distributed.Backend.register_backend("dssync", _create, extended_api=True, devices=["cpu", "cuda"])
    except Exception as error:
        import warnings

        warnings.warn(f'dssync_pg could not register the backend "dssync" with this torch: {error!r}', stacklevel=2)


def _create(dist_backend_opts: Any, pg_options: Any) -> Any:
    from ._loading import load_extension

    load_extension()
    from ._backend import create

    return create(dist_backend_opts, pg_options)
