"""The command `dssync`: what would be done on a cluster and what it would take, without one."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

# Nothing of torch here, and rich and matplotlib only where they are used: `dssync --help` answers at once.
from . import __version__
from ._cli_common import delay, group_size, period, positive, rate, seconds, seed, share, size, steps

_METHODS = ("ring", "leaders", "two-dimensional", "parameter-server")
_PLANS = ("auto", "grid", "random", "leaders", "striped", "hybrid", "exact")

_CLUSTER = """\
The cluster is a file (see `dssync_pg.Topology`), else what the options say, else the file that DSSYNC_TOPOLOGY names, else that of
the Slurm job. --nic and --uplink replace what a file says: what if the uplink were slower?
"""

_PLAN_EXAMPLES = """\
examples:
  dssync plan cluster.toml
  dssync plan --racks 2 --hosts 4 --nic "500 Mbit/s" --uplink "100 Mbit/s" --compute 0.2
  dssync plan --hosts 4,4,2 --workers 8 --nic 25Gbit --uplink 40Gbit --model-size "1.5 GiB" --plot plan.png
  dssync plan cluster.toml --plan striped --max-period 5 --json
"""

_SIMULATE_EXAMPLES = """\
examples:
  dssync simulate cluster.toml --compute 0.2 --noise 0.3
  dssync simulate --racks 128 --hosts 32 --nic 10Gbit --uplink 40Gbit --compute 0.5 --stragglers 0.01
  dssync simulate cluster.toml --plan auto --plan striped --against ring --steps 1000 --json
  dssync simulate cluster.toml --plot step_time.png --measured measured.json

measured.json holds points to draw beside the predictions:
  [{"method": "ring", "uplink": "100 Mbit/s", "seconds": 5.4}, {"method": "auto", "uplink": 1e8, "seconds": 0.68}]
"""

_PROBE_EXAMPLES = """\
Started on every rank, as a training is. Racks, hosts, rates and latencies are measured with short timed exchanges; rank 0 prints
them.

examples:
  torchrun --nproc-per-node 4 -m dssync_pg probe
  torchrun --nnodes 8 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint host1 -m dssync_pg probe --save cluster.toml
"""

_DOCTOR_EXAMPLES = """\
The exit code is 1 if something is wrong, so that a job can ask before it starts.

examples:
  dssync doctor
  dssync doctor --json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, 1 where `doctor` found something wrong, 2 for what cannot be done."""
    args = _parser().parse_args(argv)
    try:
        code = _run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever reads has enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:
        text = str(error).removeprefix("dssync: ").removeprefix("dssync_pg: ")
        print(f"dssync {args.command}: error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(args: argparse.Namespace) -> int:
    if args.command == "doctor":
        from ._doctor import run_doctor

        return run_doctor(args)
    from ._loading import load_extension

    load_extension()  # or says in one line what to do
    if args.command == "plan":
        from ._cli_plan import run_plan

        return run_plan(args)
    if args.command == "simulate":
        from ._cli_simulate import run_simulate

        return run_simulate(args)
    from .probe import run_from_command_line

    return run_from_command_line(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dssync", description="Divide-and-shuffle synchronization: plans, predictions and help for a cluster."
    )
    parser.add_argument("--version", action="version", version=f"dssync_pg {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_plan(
        _command(commands, "plan", "who averages with whom on a cluster, what a step costs, and why", _CLUSTER, _PLAN_EXAMPLES)
    )
    _add_simulate(
        _command(commands, "simulate", "predict the time a step of plans and of exact exchanges", _CLUSTER, _SIMULATE_EXAMPLES)
    )
    _add_probe(_command(commands, "probe", "measure the cluster's links, under torchrun", "", _PROBE_EXAMPLES))
    _add_doctor(_command(commands, "doctor", "what would be used on this machine, and what is wrong", "", _DOCTOR_EXAMPLES))
    return parser


def _command(commands: argparse._SubParsersAction, name: str, what: str, more: str, examples: str) -> argparse.ArgumentParser:  # type: ignore[type-arg]
    text = f"{what[0].upper()}{what[1:]}.\n\n{more}".rstrip()
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=what, description=text, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    return parser


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument("topology", nargs="?", metavar="FILE", help="TOML or JSON: racks, hosts, workers and links")
    cluster.add_argument("--racks", type=positive, metavar="R", help="equal racks (default 1)")
    cluster.add_argument("--hosts", metavar="H", help="hosts in each rack (default 1); 4,4,2: of three racks")
    cluster.add_argument("--workers", type=positive, metavar="W", help="workers on each host (default 1)")
    cluster.add_argument("--nic", type=rate, metavar="RATE", help='of each host, as "500 Mbit/s" or 10Gbit')
    cluster.add_argument("--uplink", type=rate, metavar="RATE", help="of each rack, shared by its hosts")
    cluster.add_argument("--latency", type=seconds, metavar="TIME", help='that a NIC adds to a message, as "50 us"')


def _add_job(parser: argparse.ArgumentParser) -> None:
    job = parser.add_argument_group("training")
    job.add_argument("--model-size", type=size, default=32 << 20, metavar="SIZE", help='bytes averaged a step (default "32 MiB")')
    job.add_argument(
        "--compute", type=seconds, default=0.0, metavar="TIME", help="of a step without synchronisation (default 0: the worst case)"
    )
    job.add_argument("--group-size", type=group_size, default="auto", metavar="N", help="wanted workers a group")
    job.add_argument(
        "--max-period",
        type=period,
        default=8,
        metavar="P",
        help="most rounds until groups repeat (default 8, at most 1024; for 10,000 workers planning with 16 takes half a minute, "
        "with 32 minutes)",
    )
    job.add_argument(
        "--delay", type=delay, default="auto", metavar="STEPS", help="of a crossing's correction (default: the fewest that hide it)"
    )
    job.add_argument("--seed", type=seed, default=0, help="of shuffles and of compute times")


def _add_output(parser: argparse.ArgumentParser, picture: str) -> None:
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="for programs")
    output.add_argument("--plot", metavar="FILE.png", help=picture)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_cluster(parser)
    parser.add_argument("--plan", choices=_PLANS, default="auto", help="which to show (default auto: the cheapest)")
    _add_job(parser)
    _add_output(parser, "picture of the groups of each round and of the load of each link")


def _add_simulate(parser: argparse.ArgumentParser) -> None:
    _add_cluster(parser)
    parser.add_argument("--plan", choices=_PLANS, action="append", help="may be repeated (default auto)")
    parser.add_argument(
        "--against",
        default=",".join(_METHODS),
        metavar="METHODS",
        help=f"exact exchanges to compare with, divided by commas (default {','.join(_METHODS)}); none for none",
    )
    _add_job(parser)
    chance = parser.add_argument_group("compute times")
    chance.add_argument("--steps", type=steps, default=200, metavar="N", help="to simulate (default 200)")
    chance.add_argument("--noise", type=float, default=0.0, metavar="SIGMA", help="of the logarithm of compute times (default 0)")
    chance.add_argument("--stragglers", type=share, default=0.0, metavar="SHARE", help='of workers in each step, as 0.01 or "1%%"')
    chance.add_argument("--straggler-factor", type=float, default=2.0, metavar="X", help="how much longer these take (default 2)")
    _add_output(parser, "picture of the time a step against the rate of the uplinks")
    parser.add_argument("--measured", metavar="FILE.json", help="points to draw into the picture")


def _add_probe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--save", metavar="FILE", help="write what was found as a topology file (TOML, or JSON by its name)")
    parser.add_argument("--json", action="store_true", help="for programs")


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs")


if __name__ == "__main__":
    raise SystemExit(main())
