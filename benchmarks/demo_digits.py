"""Four workers learn to read handwritten digits, first over backend "gloo" and then over backend "dssync".

What `make demo` runs. Both times it is the same script, train_digits.py; nothing but the backend's name differs. At the end come a
table and a picture of the curves.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

BACKENDS = ("gloo", "dssync")
SCRIPT = Path(__file__).with_name("train_digits.py")
COLORS = {"gloo": "#7a8594", "dssync": "#d1495b"}
LABELS = {"gloo": "gloo (all-reduced gradients)", "dssync": "dssync (parameters averaged in groups)"}
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOP_PATIENCE_S = 40  # torchrun gives its workers 30 s to end before it kills them

Result = dict[str, Any]  # what train_digits.py writes


class WorkerFailed(Exception):
    """A training ended with an error; its workers have said why on stderr."""


# ---- launching -----------------------------------------------------------------------------------------------------------------


def run_backend(backend: str, workers: int, epochs: int, out: Path) -> Result:
    """Trains with `workers` workers under torchrun and returns the result, which is left in `out` as <backend>.json.

    Raises WorkerFailed if a worker fails. No worker outlives this call, whatever ends it.
    """
    path = out / f"{backend}.json"
    path.unlink(missing_ok=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    script = [str(SCRIPT), f"--backend={backend}", f"--epochs={epochs}", f"--out={path}"]
    # A session of its own: Ctrl-C reaches torchrun through stop() alone, and once: a second signal would cut its clean-up short.
    launcher = subprocess.Popen([*torchrun, *script], env={"OMP_NUM_THREADS": "1", **os.environ}, start_new_session=True)
    try:
        code = launcher.wait()
    finally:
        stop(launcher)
    if code != 0:
        raise WorkerFailed(f"training over {backend} failed (torchrun ended with {code}); its workers' errors stand above")
    result: Result = json.loads(path.read_text())
    return result


def stop(launcher: subprocess.Popen[bytes]) -> None:
    """Ends torchrun, which ends its workers, and waits for it. Further Ctrl-C's are ignored meanwhile."""
    if launcher.poll() is not None:
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ENDING}
    try:
        launcher.terminate()
        launcher.wait(STOP_PATIENCE_S)
    except subprocess.TimeoutExpired:
        launcher.kill()
        launcher.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM and SIGHUP end the demo, and with it the workers, as Ctrl-C does."""
    raise KeyboardInterrupt


# ---- showing -------------------------------------------------------------------------------------------------------------------


def report(results: list[Result], out: Path, console: Console) -> None:
    """Draws the curves into `out` and prints the table."""
    picture = out / "curves.png"
    plot(results, picture)
    norm, points = results[-1]["weights_norm"], 100 / results[0]["test_images"]
    notes = (
        f"Consensus distance: how far the workers' weights are from their mean, whose norm is about {norm:.0f}.\n"
        "* Computed for a ring all-reduce of the gradients; what dssync sends is counted.\n"
        f"One test image is {points:.1f} points. All workers share this machine, whose memory is their network:\n"
        "the times are no measure of what a cluster gains."
    )
    console.print(table_of(results), notes, "", f"Curves: {picture.resolve()}", sep="\n", highlight=False, soft_wrap=True)


def table_of(results: list[Result]) -> Table:
    title = f"Handwritten digits, {results[0]['workers']} workers, {results[0]['steps']} steps"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("backend", style="bold")
    headings = (
        "test accuracy\n(averaged model)",
        "consensus distance\n(largest, last)",
        "sent by a worker\nin a step",
        "training\ntime",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for result in results:
        curves = result["curves"]
        distances = curves["consensus_distance"]
        table.add_row(
            result["backend"],
            f"{100 * curves['test_accuracy'][-1]:.1f} %",
            f"{max(distances):.2g}, {distances[-1]:.1g}" if max(distances) > 0 else "0",
            f"{result['bytes_per_step'] / 1000:.1f} kB" + ("*" if result["bytes_are"] == "computed" else " "),
            f"{sum(curves['seconds']):.1f} s",
        )
    return table


def plot(results: list[Result], path: Path) -> None:
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    figure.suptitle(f"Handwritten digits, {results[0]['workers']} workers", x=0.01, ha="left", weight="bold")
    loss, accuracy, distance = figure.subplots(1, 3)
    decorate(loss, "Training loss")
    decorate(accuracy, "Test accuracy of the averaged model, %")
    decorate(distance, "Consensus distance")
    loss.set_yscale("log")
    for result in results:
        backend, curves = result["backend"], result["curves"]
        style = {"color": COLORS[backend], "label": LABELS[backend], "linewidth": 1.8, "marker": "o", "markersize": 3}
        epochs = range(1, result["epochs"] + 1)
        loss.plot(epochs, curves["train_loss"], **style)
        accuracy.plot(epochs, [100 * value for value in curves["test_accuracy"]], **style)
        distance.plot(epochs, curves["consensus_distance"], **style)
    figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=len(results), frameon=False)
    figure.savefig(path, dpi=150)


def decorate(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


# ---- the command ---------------------------------------------------------------------------------------------------------------


def at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=at_least_one, default=4, help="processes that train together (default: 4)")
    parser.add_argument("--epochs", type=at_least_one, default=20, help="passes over the training images (default: 20)")
    parser.add_argument("--out", type=Path, default=Path("demo_results"), help="folder for the curves (default: ./demo_results)")
    args = parser.parse_args()

    console = Console()
    for number in ENDING:
        signal.signal(number, interrupt)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        results = []
        for backend in BACKENDS:
            print(f"Training over {LABELS[backend]}: {args.workers} workers start ...", flush=True)
            results.append(run_backend(backend, args.workers, args.epochs, args.out))
    except WorkerFailed as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; the workers have been stopped", file=sys.stderr)
        return 130
    report(results, args.out, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
