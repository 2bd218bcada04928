"""`dssync doctor`: what would be used on this machine, why, what is wrong and how to mend it.

Each check is a function that yields findings; it tries the thing itself where it can, as the engine would, rather than asking what
ought to work. Nothing outside this process is changed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import ipaddress
import mmap
import os
import platform
import secrets
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ._cli_common import console, new_table, print_json, topology_variable
from .options import variable

if TYPE_CHECKING:
    from .topology import Topology

Verdict = Literal["ok", "note", "wrong"]

_SIOCGIFADDR = 0x8915
_MASTER_PORT = 29500  # torch's own default
_STYLES = {"ok": "green", "note": "yellow", "wrong": "bold red"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was looked at, and what to do about it. Something "wrong" makes the exit code 1; a note may be as wanted."""

    about: str
    verdict: Verdict
    text: str
    advice: str = ""


def run_doctor(args: argparse.Namespace) -> int:
    findings = [finding for check in _CHECKS for finding in check()]
    wrong = sum(finding.verdict == "wrong" for finding in findings)
    if args.json:
        print_json({"ok": wrong == 0, "findings": [dataclasses.asdict(finding) for finding in findings]})
        return 1 if wrong else 0
    out = console()
    table = new_table(("", "", ""), left=("",))
    table.show_header = False
    for finding in findings:
        verdict = f"[{_STYLES[finding.verdict]}]{finding.verdict}[/]"
        table.add_row(verdict, _plain(finding.about, ""), _plain(finding.text, finding.advice))
    out.print(table)
    out.print(f"\n[bold red]{wrong} thing{'s' if wrong > 1 else ''} to mend[/]" if wrong else "\n[green]nothing wrong[/]")
    return 1 if wrong else 0


def _plain(text: str, advice: str) -> str:
    from rich.markup import escape

    return escape(text) + (f"\n[bold]{escape(advice)}[/]" if advice else "")


# ---- versions ---------------------------------------------------------------------------------------------------------------


def _check_versions() -> Iterator[Finding]:
    from . import __version__

    yield Finding("dssync_pg", "ok", f"{__version__} in {Path(__file__).parent}")
    yield Finding("Python", "ok", f"{platform.python_version()} ({sys.executable})")
    yield Finding("kernel", "ok", f"{platform.system()} {platform.release()} on {platform.machine()}")
    try:
        import torch
    except Exception as error:
        yield Finding("torch", "wrong", f"cannot be imported: {error}", "install the torch that dssync_pg was built against")
        return
    yield Finding("torch", "ok", f"{torch.__version__}")
    if not torch.distributed.is_available():
        yield Finding("torch.distributed", "wrong", "is not in this build of torch", "install a torch with distributed support")


def _loads() -> bool:
    from ._loading import load_extension

    try:
        load_extension()
    except Exception:
        return False
    return True


def _check_extension() -> Iterator[Finding]:
    from ._loading import load_extension

    try:
        load_extension()
    except Exception as error:
        yield Finding("extension", "wrong", str(error), "build it against this torch: pip install --no-build-isolation .")
        return
    from . import _C

    yield Finding("extension", "ok", f"built against torch {_C.TORCH_VERSION}, which matches")
    import torch.distributed as dist

    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") != "1":
        text = "TORCH_DEVICE_BACKEND_AUTOLOAD is off, so torch finds the backend only where a script imports dssync_pg"
        yield Finding("backend", "note", text)
    elif not dist.is_backend_available("dssync"):
        text = 'torch does not know the backend "dssync": the package is on the path, but not installed'
        yield Finding("backend", "wrong", text, "pip install --no-build-isolation . (or import dssync_pg in the script)")
    else:
        yield Finding("backend", "ok", '"dssync" is known to torch, no import needed')


# ---- what carries the bytes -------------------------------------------------------------------------------------------------


def _check_options() -> Iterator[Finding]:
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith("DSSYNC_")}
    if not _loads():
        return
    from .options import Options

    try:
        options = Options()
    except (TypeError, ValueError) as error:
        text = str(error).removeprefix("dssync: ")
        yield Finding("options", "wrong", text, "mend or unset the variable: every rank would stop with this error")
        return
    listed = ", ".join(f"{name}={value}" for name, value in variables.items()) or "no DSSYNC_ variable is set"
    yield Finding("options", "ok", listed)
    yield from _check_engine(options.engine, options.transport)


def _check_engine(engine: str, transport: str) -> Iterator[Finding]:
    """What Options choose, tried with an engine of one rank."""
    if engine == "gloo":
        yield Finding("engine", "note", "gloo, because options say so; the native one is faster")
        return
    problem = _native_problem(transport)
    if problem:
        wanted = engine == "native" or transport == "shm"
        text = f"the native engine cannot be had: {problem}"
        advice = "unset DSSYNC_ENGINE and DSSYNC_TRANSPORT to run over Gloo, or mend what is said here"
        yield Finding(
            "engine", "wrong" if wanted else "note", text if wanted else f"gloo, slower: {text}", advice if wanted else ""
        )
        return
    yield Finding("engine", "ok", "native" + (", because options say so" if engine == "native" else ": it starts here"))
    shared = _shared_memory_problem()
    if transport == "tcp":
        yield Finding("transport", "note", "TCP, also inside a host, because options say so")
    elif not shared:
        yield Finding("transport", "ok", "shared memory between ranks of this host, TCP between hosts")
    else:
        text = f"ranks of this host cannot share memory: {shared}"
        yield Finding("transport", "wrong" if transport == "shm" else "note", f"{text}; sockets carry the bytes, slower")


def _native_problem(transport: str) -> str:
    from torch.distributed import HashStore

    from . import _C

    interfaces = variable("DSSYNC_SOCKET_IFNAME") or variable("GLOO_SOCKET_IFNAME")
    reach = os.environ.get("MASTER_ADDR", "")
    try:
        _C.Engine(0, 1, transport, interfaces, reach, HashStore(), lambda mine: [mine])
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def _shared_memory_problem() -> str:
    """Memory handed over as the engine does it: a memfd through an abstract Unix socket. "" if that works."""
    try:
        with contextlib.ExitStack() as stack:
            memory = os.memfd_create("dssync-doctor")
            stack.callback(os.close, memory)
            os.ftruncate(memory, mmap.PAGESIZE)
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            name = "\0dssync-doctor-" + secrets.token_hex(8)
            listener.bind(name)
            listener.listen(1)
            caller = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            caller.settimeout(5)
            listener.settimeout(5)
            caller.connect(name)
            called = stack.enter_context(listener.accept()[0])
            socket.send_fds(caller, [b"x"], [memory])
            _, received, _, _ = socket.recv_fds(called, 1, 1)
            stack.callback(os.close, received[0])
            ours = stack.enter_context(mmap.mmap(memory, mmap.PAGESIZE))
            theirs = stack.enter_context(mmap.mmap(received[0], mmap.PAGESIZE))
            ours[:4] = b"seen"
            return "" if theirs[:4] == b"seen" else "what one mapping writes the other does not show"
    except (OSError, IndexError, AttributeError) as error:
        return str(error)


# ---- the network ------------------------------------------------------------------------------------------------------------


def interface_addresses() -> dict[str, list[str]]:
    """Of each interface its IPv4 address and its IPv6 addresses that others can reach."""
    found: dict[str, list[str]] = {name: [] for _, name in socket.if_nameindex()}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for name, addresses in found.items():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                addresses.append(socket.inet_ntoa(answer[20:24]))
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            number, *_, name = line.split()
            address = ipaddress.IPv6Address(int(number, 16))
            if name in found and not address.is_link_local:
                found[name].append(str(address))
    return found


def _state(name: str) -> str:
    folder = Path("/sys/class/net", name)
    words = []
    with contextlib.suppress(OSError):
        words.append((folder / "operstate").read_text().strip())
    with contextlib.suppress(OSError, ValueError):
        speed = int((folder / "speed").read_text())
        words += [f"{speed} Mbit/s"] if speed > 0 else []
    return ", ".join(word for word in words if word != "unknown")


def _check_interfaces() -> Iterator[Finding]:
    addresses = interface_addresses()
    used, why, problem = _used_interface(addresses)
    for name, own in addresses.items():
        state = _state(name)
        text = ", ".join(own) or "no address"
        text += f" ({state})" if state else ""
        yield Finding(f"interface {name}", "ok", f"{text}; would be used: {why}" if name == used else text)
    if problem:
        yield Finding("network", "wrong", problem, f"there are {', '.join(name for name, own in addresses.items() if own)}")
    if used is None and not problem:
        yield Finding("network", "note", f"no route to {why}: only ranks on this host would find each other")
    yield from _check_host_name()


def _used_interface(addresses: dict[str, list[str]]) -> tuple[str | None, str, str]:
    """The interface, why that one, and what is wrong instead."""
    for key in ("DSSYNC_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        named = variable(key)
        if named:
            usable = [name for name in named.split(",") if addresses.get(name)]
            if usable:
                return usable[0], f"{key}={named}", ""
            return None, "", f"{key}={named} names no interface of this machine that has an address"
    target = os.environ.get("MASTER_ADDR") or "192.0.2.1"  # a documentation address: where the default route leads
    try:
        family, *_, sockaddr = socket.getaddrinfo(target, _MASTER_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as caller:
            caller.connect(sockaddr)  # of UDP: nothing is sent
            own = caller.getsockname()[0]
    except OSError as error:
        if "MASTER_ADDR" in os.environ:
            return None, "", f"MASTER_ADDR={target} cannot be reached: {error.strerror or error}"
        return None, "other hosts", ""
    used = next((name for name, some in addresses.items() if own in some), None)
    return used, f"MASTER_ADDR={target} is reached from it" if "MASTER_ADDR" in os.environ else "the default route", ""


def _check_host_name() -> Iterator[Finding]:
    """Gloo, which carries what the native engine does not, listens where the host's name leads unless it is told an interface."""
    name = socket.gethostname()
    told = variable("DSSYNC_SOCKET_IFNAME") or variable("GLOO_SOCKET_IFNAME")
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        if not told:
            text = f"the host's own name {name!r} cannot be resolved ({error.strerror or error}); Gloo wants it"
            yield Finding("host name", "note", text, "add it to /etc/hosts, or set GLOO_SOCKET_IFNAME")
        return
    if ipaddress.ip_address(address).is_loopback and not told:
        text = f"{name} resolves to {address}: Gloo cannot be reached from other hosts"
        yield Finding("host name", "note", text, "for several hosts set GLOO_SOCKET_IFNAME on each")
    else:
        yield Finding("host name", "ok", f"{name} resolves to {address}")


# ---- the cluster ------------------------------------------------------------------------------------------------------------


def _check_topology() -> Iterator[Finding]:
    path = topology_variable()
    if not _loads():
        return
    if os.environ.get("DSSYNC_TOPOLOGY") == "flat":
        yield Finding("topology", "note", "flat, because DSSYNC_TOPOLOGY says so: all links count as equal")
        return
    from .topology import Topology, TopologyError

    if path:
        try:
            topology = Topology.load(path)
            yield Finding("topology", "ok", f"{path}: {topology.summary()}")
            yield from _check_plan(topology)
        except TopologyError as error:
            yield Finding("topology", "wrong", str(error), "mend the file, or unset DSSYNC_TOPOLOGY")
    if "SLURM_JOB_ID" in os.environ:
        try:
            yield Finding("Slurm", "ok", f"job {os.environ['SLURM_JOB_ID']}: {Topology.from_slurm().summary()}{_switches()}")
        except TopologyError as error:
            yield Finding("Slurm", "note", f"job {os.environ['SLURM_JOB_ID']}: {error}")
    elif not path:
        text = "no DSSYNC_TOPOLOGY and no Slurm job: a job on several hosts measures its network when it starts"
        yield Finding("topology", "note", text, "with racks behind slow uplinks: dssync probe, or write a topology file")


def _check_plan(topology: Topology) -> Iterator[Finding]:
    """What the options make of it; for averages of 32 MiB, since nothing is known of the model."""
    from .options import Options
    from .plan import Plan

    try:
        options = Options()
    except (TypeError, ValueError):
        return  # which is told above
    try:
        plan = Plan.create(None, str(options.plan), options.group_size, options.max_period, options.seed, topology=topology)
        why = plan.explain(topology, group_size=options.group_size, max_period=options.max_period).splitlines()[-1].strip()
        known = f"; {why}" if plan.cost(topology).bound_s else ""  # without rates no plan takes any time
        yield Finding("plan", "ok", f"for 32 MiB a step: {plan.summary()}{known}")
    except ValueError as error:
        text = str(error).removeprefix("dssync: ")
        yield Finding("plan", "wrong", f"plan={options.plan}: {text}", "every rank would stop with this error")


def _switches() -> str:
    from .topology import slurm_address

    return "; its switches tell the racks" if slurm_address() else "; no switches are told, so racks are not known"


_CHECKS = (_check_versions, _check_extension, _check_options, _check_interfaces, _check_topology)
