"""Builds the C core and engine (csrc/core, csrc/engine) as a C11 library, the shim (csrc/shim) as dssync_pg._C against torch.

DSSYNC_WERROR=1 makes warnings errors (CI sets it).
"""

import importlib
import os
import re
import site
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import setup

OLDEST_TORCH, NEWEST_TORCH = (2, 11), (2, 14)

# An older dssync_pg that is installed already must not load while this one is built.
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"


def outer_site_packages():
    """Where the torch of the environment that pip was called in may lie while pip builds in isolation."""
    yield from (sysconfig.get_path(name) for name in ("purelib", "platlib"))
    yield from site.getsitepackages()
    yield site.getusersitepackages()
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if os.environ.get(variable):
            yield sysconfig.get_path("purelib", vars={"base": os.environ[variable]})


def import_torch():
    try:
        return importlib.import_module("torch")
    except ImportError:
        found = [path for path in outer_site_packages() if path not in sys.path and Path(path, "torch").is_dir()]
    sys.path += found[:1]  # appended: what the isolated build brought along goes first
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        sys.exit(
            f"dssync_pg is built against the torch that is installed, and this build cannot see one ({error}). "
            "With torch installed, run: pip install --no-build-isolation ."
        )


torch = import_torch()
torch_version = re.match(r"\d+\.\d+", torch.__version__).group()
torch_release = tuple(int(part) for part in torch_version.split("."))
if not OLDEST_TORCH <= torch_release <= NEWEST_TORCH:
    sys.exit(f"dssync_pg supports torch 2.11 to 2.14; found torch {torch.__version__} in {Path(torch.__file__).parent}")

from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths  # noqa: E402

WARNINGS = ["-Wall", "-Wextra"] + (["-Werror"] if os.environ.get("DSSYNC_WERROR") == "1" else [])
CORE_SOURCES = sorted(glob("csrc/core/*.c") + glob("csrc/engine/*.c"))
SHIM_SOURCES = sorted(glob("csrc/shim/*.cpp"))
HEADERS = sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.hpp", recursive=True))

core = (
    "dssync_core",
    {
        "sources": CORE_SOURCES,
        "include_dirs": ["csrc/include", "csrc/core", "csrc/engine"],
        "cflags": ["-std=c11", "-O3", "-fvisibility=hidden", "-fPIC", "-Wpedantic", *WARNINGS],
        "obj_deps": {"": HEADERS},
    },
)
shim = CppExtension(
    "dssync_pg._C",
    SHIM_SOURCES,
    include_dirs=[str(Path("csrc/include").resolve())],
    depends=CORE_SOURCES + SHIM_SOURCES + HEADERS,
    # torch's own headers as system headers: their warnings are not ours.
    extra_compile_args=[
        "-O2",
        "-g0",  # Python's own flags ask for debug information: 15 MB of it
        "-fvisibility=hidden",
        *WARNINGS,
        "-Wno-subobject-linkage",  # wrong for sources that are included, see in_two()
        *(f"-isystem{path}" for path in include_paths()),
    ],
    extra_link_args=["-Wl,--exclude-libs,ALL"] if sys.platform == "linux" else [],
)


def in_two(sources):
    """Two sources that include all others: torch's headers, 20 s of compiling each time, are read twice and not for every file."""
    folder = Path("build", "shim")
    folder.mkdir(parents=True, exist_ok=True)
    for half in range(2):
        target = folder / f"half{half}.cpp"
        text = "".join(f'#include "{Path(source).resolve()}"\n' for source in sources[half::2])
        if not target.exists() or target.read_text() != text:
            target.write_text(text)
        yield str(target)


class build_ext(BuildExtension):
    """The extension links the C core, so that is built first, also by `build_ext --inplace` and editable installs."""

    def finalize_options(self):
        if self.editable_mode:
            self.build_temp = "build/editable"  # kept, so that the next editable install compiles only what has changed
        super().finalize_options()

    def run(self):
        self.run_command("build_clib")
        shim.sources = list(in_two(SHIM_SOURCES))
        super().run()


entry_points = {
    "console_scripts": ["dssync = dssync_pg.cli:main"],
    "torch.distributed.backends": ["dssync = dssync_pg._autoload:register"],
}
if torch_release < (2, 14):  # which knows only the hook at the end of `import torch`
    entry_points["torch.backends"] = ["dssync = dssync_pg._autoload:register"]

setup(
    libraries=[core],
    ext_modules=[shim],
    cmdclass={"build_ext": build_ext},
    # The C++ interface of c10d changes from one minor release to the next.
    install_requires=[f"torch=={torch_version}.*", "rich", 'tomli; python_version < "3.11"'],
    entry_points=entry_points,
)
