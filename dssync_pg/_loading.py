"""Loads the compiled extension, or says in one line why it cannot be."""

from __future__ import annotations

import re


def load_extension() -> None:
    """Imports dssync_pg._C.

    Raises ImportError when it is missing, damaged, or built against another minor release of torch than the one that runs: the C++
    interface of process groups changes between those, and a mismatch would crash rather than fail.
    """
    import torch

    built = _torch_built_against()
    if built is not None and built != _minor(torch.__version__):
        raise ImportError(_advice(f"it was built against torch {built} and this is torch {torch.__version__}"))
    try:
        from . import _C
    except ImportError as error:
        raise ImportError(_advice(f"its extension does not load with torch {torch.__version__}: {error}")) from error
    if _minor(_C.TORCH_VERSION) != _minor(torch.__version__):
        raise ImportError(_advice(f"it was built against torch {_C.TORCH_VERSION} and this is torch {torch.__version__}"))


def _torch_built_against() -> str | None:
    """From the installed metadata, since an extension built against another torch may not even load; None when not installed."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        lines = requires("dssync-pg") or []
    except PackageNotFoundError:
        return None
    return next((found[1] for line in lines if (found := re.match(r"torch==(\d+\.\d+)\.\*", line))), None)


def versions() -> dict[str, str]:
    """What must be the same on every rank for process groups to understand one another."""
    import torch

    from . import __version__

    return {"dssync_pg": __version__, "torch": torch.__version__.split("+")[0]}


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _advice(reason: str) -> str:
    return (
        f"dssync_pg cannot be used: {reason}. Rebuild it for this torch: in its source folder, "
        "pip install --no-build-isolation --force-reinstall --no-deps ."
    )
