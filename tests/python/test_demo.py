"""The demo: what its workers write is true, its failures are told, and its workers end with it."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import ROOT
from rich.console import Console

sys.path.insert(0, str(ROOT / "benchmarks"))

import demo_digits
import train_digits

STEPS_AN_EPOCH = 43  # 1,347 images in batches of 2 * 16, the last one short


def averaged_bytes() -> int:
    """What is averaged in a step, from the model alone: its parameters and BatchNorm's running means and variances."""
    model = train_digits.make_model()
    tensors = [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def gradient_bytes() -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in train_digits.make_model().parameters())


@pytest.mark.parametrize("backend", demo_digits.BACKENDS)
def test_one_epoch(backend: str, tmp_path: Path) -> None:
    result = demo_digits.run_backend(backend, workers=2, epochs=1, out=tmp_path)

    curves = result["curves"]
    assert result["backend"] == backend
    assert result["steps"] == STEPS_AN_EPOCH
    assert all(len(curve) == 1 for curve in curves.values())
    assert 0.5 < curves["test_accuracy"][0] <= 1  # chance is 0.1
    assert curves["train_loss"][0] < 2.3  # ln 10, what guessing gives
    assert curves["seconds"][0] > 0
    if backend == "gloo":
        assert result["bytes_are"] == "computed"
        assert result["bytes_per_step"] == gradient_bytes()  # a ring of two: 2 (2-1)/2 of the gradients
        assert curves["consensus_distance"] == [0]
    else:
        (sync,) = result["syncs"]
        assert (sync["step"], sync["plan"], sync["group_size"]) == (STEPS_AN_EPOCH, "grid", 2)
        assert result["bytes_are"] == "counted"
        assert result["bytes_per_step"] == averaged_bytes()  # a group of both: 2 (2-1)/2 of what is averaged
        assert curves["consensus_distance"][0] == pytest.approx(0, abs=1e-6)  # and exact in every step


def test_failing_worker_is_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(demo_digits.WorkerFailed, match="training over no-such-backend failed"):
        demo_digits.run_backend("no-such-backend", workers=1, epochs=1, out=tmp_path)
    assert "invalid choice: 'no-such-backend'" in capfd.readouterr().err


def descendants(pid: int) -> set[int]:
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it ended meanwhile
    found, layer = set(), {pid}
    while layer:
        layer = {child for child, parent in parents.items() if parent in layer}
        found |= layer
    return found


def test_interrupt_stops_the_workers(tmp_path: Path) -> None:
    command = [sys.executable, demo_digits.__file__, "--workers=2", "--epochs=1000", f"--out={tmp_path}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        try:
            assert any("epoch 1/1000" in line for line in demo.stdout)
            started = descendants(demo.pid)
            demo.send_signal(signal.SIGINT)
            _, stderr = demo.communicate(timeout=60)
        finally:
            demo.terminate()
    assert demo.returncode == 130
    assert "demo: interrupted; the workers have been stopped" in stderr
    assert len(started) >= 3  # torchrun and two workers
    assert not {pid for pid in started if os.path.exists(f"/proc/{pid}")}


def test_report(tmp_path: Path) -> None:
    curves = {"train_loss": [1.0, 0.1], "test_accuracy": [0.5, 0.9871], "consensus_distance": [0.25, 0.001], "seconds": [1.5, 2.0]}
    run = {"workers": 4, "epochs": 2, "steps": 44, "test_images": 450, "weights_norm": 12.8, "curves": curves}
    dssync = run | {"backend": "dssync", "bytes_per_step": 117416.0, "bytes_are": "counted"}
    gloo = dssync | {"backend": "gloo", "curves": curves | {"consensus_distance": [0, 0]}, "bytes_are": "computed"}
    text = io.StringIO()

    demo_digits.report([gloo, dssync], tmp_path, Console(file=text, width=100))

    rows = {line.split()[1]: line for line in text.getvalue().splitlines() if line.startswith("│")}
    assert [cell.strip() for cell in rows["dssync"].split("│")[2:-1]] == ["98.7 %", "0.25, 0.001", "117.4 kB", "3.5 s"]
    assert [cell.strip() for cell in rows["gloo"].split("│")[2:-1]] == ["98.7 %", "0", "117.4 kB*", "3.5 s"]
    picture = tmp_path / "curves.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in text.getvalue()


def test_split_is_fixed() -> None:
    """The accuracies of two backends are compared on the same images."""
    for first, second in zip(train_digits.load_data(), train_digits.load_data(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first.tensors, second.tensors, strict=True))
