"""Every way to build and install, and the one clear line for those that cannot work.

What compiles the whole extension is marked `packaging` and runs by `make test-packaging`.
"""

import os
import shutil
import subprocess
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest
import torch
from harness import ROOT, THREADS

MINOR = ".".join(torch.__version__.split(".")[:2])
USE = """
import torch, torch.distributed as dist
dist.init_process_group("dssync", store=dist.HashStore(), rank=0, world_size=1)
import dssync_pg
print(dist.get_backend(), dssync_pg.Plan.create(4).period, dssync_pg.__file__)
"""
BUILD_WHEEL = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
BUILD_SDIST = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"


@pytest.fixture
def tree(tmp_path):
    """The sources, without anything that was built."""
    ignore = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "*.so", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
    )
    return Path(shutil.copytree(ROOT, tmp_path / "tree", ignore=ignore))


class Environment:
    """A virtual environment that holds links to packages of this one; dssync_pg is never among them."""

    def __init__(self, folder, *packages):
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = folder / "bin" / "python"
        self.folder = folder
        site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        roots = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
        roots |= {Path(module.__file__).parent.parent for module in (torch, pytest)}  # an environment over another one
        for root in roots:
            for source in root.iterdir():
                ours = "dssync" in source.name or "__pycache__" in source.name or source.suffix == ".pth"
                wanted = not packages or source.name.split("-")[0] in packages
                if wanted and not ours and not (site / source.name).exists():
                    (site / source.name).symlink_to(source)

    def run(self, *arguments, cwd, check=True, **env):
        outer = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH", "CONDA_PREFIX")}
        done = subprocess.run(
            [self.python, *arguments],
            cwd=cwd,
            env={**outer, **THREADS, "PYTHONNOUSERSITE": "1", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1200,
        )
        assert not check or done.returncode == 0, done.stdout
        return done

    def pip_install(self, *arguments, cwd):
        self.run("-m", "pip", "install", "--no-deps", *arguments, cwd=cwd)

    def check_it_works(self):
        answer = self.run("-c", USE, cwd="/").stdout.splitlines()[-1]
        assert answer.startswith("dssync 2 ")
        return Path(answer.split()[-1])


# ---- quick: nothing is compiled ------------------------------------------------------------------------------------------------


def metadata_of(tree, name):
    return next(tree.glob("*.egg-info")).joinpath(name).read_text()


def test_a_builder_that_cannot_see_torch_says_what_to_do(tree, tmp_path):
    bare = Environment(tmp_path / "bare", "setuptools", "_distutils_hack", "pip")
    done = bare.run("-c", BUILD_WHEEL, cwd=tree, check=False)
    assert done.returncode != 0
    assert done.stdout.splitlines()[-1].endswith("With torch installed, run: pip install --no-build-isolation .")


def test_the_torch_of_the_outer_environment_is_found(tree, tmp_path):
    """As in pip's isolated build: the interpreter's own packages are hidden, and lie where sysconfig says."""
    outer = Environment(tmp_path / "outer")
    hide = "import sys; sys.path = [path for path in sys.path if 'site-packages' not in path]; import runpy; "
    site = sysconfig.get_path("purelib")
    program = (
        f"{hide}sys.path += [{str(tmp_path / 'tools')!r}]; sys.argv = ['setup.py', '-q', 'egg_info']; runpy.run_path('setup.py')"
    )
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("setuptools", "_distutils_hack"):
        (tools / name).symlink_to(Path(site) / name)
    outer.run("-c", program, cwd=tree)
    assert f"torch=={MINOR}.*" in metadata_of(tree, "requires.txt").splitlines()
    for name in ("demo", "test"):
        assert f"[{name}]" in metadata_of(tree, "requires.txt")


def pretend_torch(folder, version):
    """A torch that says its version and nothing else."""
    (folder / "torch" / "utils").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text(f"__version__ = {version!r}")
    (folder / "torch" / "utils" / "__init__.py").touch()
    (folder / "torch" / "utils" / "cpp_extension.py").write_text(
        "from setuptools import Extension\n"
        "from setuptools.command.build_ext import build_ext as BuildExtension\n"
        "def CppExtension(name, sources, **rest): return Extension(name, sources, **rest)\n"
        "def include_paths(): return []\n"
    )
    return str(folder)


@pytest.mark.parametrize(
    ("version", "groups"),
    [
        ("2.11.0", {"torch.backends", "torch.distributed.backends"}),
        ("2.13.0+cpu", {"torch.backends", "torch.distributed.backends"}),
        ("2.14.0a0+git1234", {"torch.distributed.backends"}),
    ],
)
def test_entry_points_and_requirement_follow_the_torch_built_against(tree, tmp_path, version, groups):
    bare = Environment(tmp_path / "bare", "setuptools", "_distutils_hack")
    bare.run("setup.py", "-q", "egg_info", cwd=tree, PYTHONPATH=pretend_torch(tmp_path / "pretended", version))
    lines = metadata_of(tree, "entry_points.txt").splitlines()
    assert {line.strip("[]") for line in lines if line.startswith("[")} == groups | {"console_scripts"}
    assert f"torch=={version[:4]}.*" in metadata_of(tree, "requires.txt").splitlines()


@pytest.mark.parametrize("version", ["2.10.1", "1.13.0", "2.15.0"])
def test_other_torches_are_refused_in_one_line(tree, tmp_path, version):
    bare = Environment(tmp_path / "bare", "setuptools", "_distutils_hack")
    done = bare.run("setup.py", "egg_info", cwd=tree, check=False, PYTHONPATH=pretend_torch(tmp_path / "pretended", version))
    assert done.returncode != 0
    assert done.stdout.startswith(f"dssync_pg supports torch 2.11 to 2.14; found torch {version} in ")


# ---- slow: each compiles the extension -----------------------------------------------------------------------------------------


@pytest.fixture
def environment(tmp_path):
    return Environment(tmp_path / "environment")


@pytest.mark.packaging
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("arguments", [("--no-build-isolation", "."), (".",)], ids=" ".join)
def test_install(tree, environment, arguments):
    environment.pip_install(*arguments, cwd=tree)
    package = environment.check_it_works().parent
    assert package.is_relative_to(environment.folder)
    assert {path.name for path in package.iterdir()} >= {"py.typed", "_C.pyi", "__init__.py"}


@pytest.mark.packaging
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("arguments", [("-e", "."), ("--no-build-isolation", "-e", ".")], ids=" ".join)
def test_editable_install(tree, environment, arguments):
    environment.pip_install(*arguments, cwd=tree)
    assert environment.check_it_works().parent == tree / "dssync_pg"


@pytest.mark.packaging
@pytest.mark.timeout(1200)
def test_install_from_the_source_distribution(tree, environment):
    name = environment.run("-c", BUILD_SDIST, cwd=tree).stdout.splitlines()[-1]
    archive = tree / "dist" / name
    with tarfile.open(archive) as tar:
        names = {member.partition("/")[2] for member in tar.getnames()}
    tracked = {
        str(path.relative_to(tree)) for folder in ("csrc", "tests", "benchmarks") for path in (tree / folder).rglob("*.[chp]*")
    }
    assert names >= {path for path in tracked if not path.endswith((".png", ".pyc"))} | {
        "Makefile",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
    }
    environment.pip_install("--no-build-isolation", str(archive), cwd="/")
    environment.check_it_works()


@pytest.mark.packaging
@pytest.mark.timeout(1200)
def test_build_ext_in_place_builds_the_core_first(tree, environment):
    environment.run("setup.py", "-q", "build_ext", "--inplace", cwd=tree)
    done = environment.run("-c", "import torch, dssync_pg; print(dssync_pg.Plan.create(8).period)", cwd=tree)
    assert done.stdout.splitlines()[-1] == "3"
