"""The command line: what it says is true of the plan or simulation, and what it cannot do it says in one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT

from dssync_pg import Plan, Topology, cli, simulate

BED = ["--racks", "2", "--hosts", "4", "--nic", "500 Mbit/s", "--uplink", "100 Mbit/s"]
MODEL_BYTES = 32 << 20
ON_WIRE = 1514 / 1448 * 8  # bits on the wire for a byte


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this machine's own environment."""
    for name in list(os.environ):
        if name.startswith(("DSSYNC_", "SLURM", "GLOO_SOCKET", "MASTER_")):
            monkeypatch.delenv(name)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that has to end well and returns what it printed."""

    def run(*arguments: str) -> str:
        assert cli.main(arguments) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return run


@pytest.fixture
def as_json(said: Callable[..., str]) -> Callable[..., Any]:
    return lambda *arguments: json.loads(said(*arguments, "--json"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a command that cannot be done: exit code 2 and one line, which is returned."""
    try:
        code: object = cli.main(arguments)
    except SystemExit as stop:  # argparse's own
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    lines = err.splitlines()
    assert sum(": error: " in line for line in lines) == 1
    assert len(lines) == 1 or lines[0].startswith("usage: ")
    return lines[-1]


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


# ---- plan -------------------------------------------------------------------------------------------------------------------


def test_plan_in_words(said: Callable[..., str]) -> None:
    text = said("plan", *BED)
    assert "8 workers on 8 hosts in 2 racks" in text
    table = [line.split() for line in text.splitlines() if re.match(r"(exact|grid|random|leaders|striped|hybrid) ", line)]
    assert [row[0] for row in table[:6]] == ["exact", "grid", "random", "leaders", "striped", "hybrid"]
    assert [row[0] for row in table[:6] if row[1] == "*"] == ["striped"]  # what auto takes
    assert re.search(r"across racks +\{0-7\}", text)
    assert re.search(r"0 +\{0 1\} \{2 3\} \{4 5\} \{6 7\}", text)
    assert "longest wait for a global average" in text


def test_plan_for_programs_is_the_plan_of_the_library(as_json: Callable[..., Any]) -> None:
    topology = Topology.uniform(2, 4, nic="500 Mbit/s", uplink="100 Mbit/s")
    told = as_json("plan", *BED, "--plan", "striped", "--max-period", "5", "--compute", "200 ms", "--seed", "3")
    plan = Plan.create(None, "striped", max_period=5, seed=3, topology=topology, compute_s=0.2)
    cost = plan.cost(topology, MODEL_BYTES, 0.2)
    assert told["plan"]["rounds"] == plan.rounds
    assert told["plan"]["crossing_rounds"] == [index for index in range(plan.period) if plan.is_crossing(index)]
    assert told["plan"]["delay"] == plan.delay
    assert told["plan"]["step_s"] == pytest.approx(0.2 + cost.sync_s)
    assert told["plan"]["busiest_bytes"] == pytest.approx(cost.busiest_bytes)
    assert told["plan"]["uplink_bytes"] == pytest.approx(plan.link_bytes(topology, MODEL_BYTES)[1])
    assert told["topology"]["racks"] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [each["kind"] for each in told["candidates"] if each.get("shown")] == ["striped"]


def test_kinds_that_cannot_be_are_told_with_the_reason(said: Callable[..., str], as_json: Callable[..., Any]) -> None:
    candidates = as_json("plan", "--hosts", "7")["candidates"]
    problems = {each["kind"]: each["problem"] for each in candidates if "problem" in each}
    assert {"leaders", "striped", "hybrid"} <= problems.keys()
    assert "no striped plan: " in said("plan", "--hosts", "7")


def test_why_is_told_beside_what_auto_weighs_with_the_same_options(said: Callable[..., str], as_json: Callable[..., Any]) -> None:
    for options, kind in ([], "striped"), (["--max-period", "1"], "exact"), (["--group-size", "8", "--delay", "0"], "striped"):
        told = as_json("plan", *BED, *options)
        weighed = {each["kind"]: each["step_s"] for each in told["candidates"] if "step_s" in each and each["kind"] != "hybrid"}
        assert told["plan"]["kind"] == kind == min(weighed, key=lambda each: weighed[each])
        assert f"{kind} has the shortest step" in told["plan"]["explanation"]
        assert f"{kind} has the shortest step" in said("plan", *BED, *options)


@pytest.mark.parametrize("name", ["a[/b]", "[red]", "row[2]"])
def test_names_are_no_markup(said: Callable[..., str], tmp_path: Path, name: str) -> None:
    path = tmp_path / "[bold].toml"
    racks = "".join(f'[[rack]]\nname = "{name}{index}"\nuplink = "10 Mbit/s"\n[[rack.host]]\ncount = 2\n' for index in range(2))
    path.write_text(f'nic = "1 Gbit/s"\n{racks}')
    for command in ["plan"], ["simulate", "--steps", "2"]:
        text = said(*command, str(path))
        assert f"uplink of {name}0" in text
        assert "[bold].toml" in text


def test_racks_of_different_sizes_and_several_workers_a_host(as_json: Callable[..., Any]) -> None:
    told = as_json("plan", "--hosts", "3,1", "--workers", "2", "--nic", "10Gbit", "--uplink", "1e9")
    assert told["topology"]["racks"] == [[0, 1, 2, 3, 4, 5], [6, 7]]
    assert told["topology"]["hosts"] == 4


def test_links_of_a_file_can_be_replaced(as_json: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cluster.toml"
    Topology.uniform(2, 4, nic="500 Mbit/s", uplink="100 Mbit/s").save(path)
    exact = as_json("plan", str(path), "--plan", "exact")["plan"]
    assert exact["sync_s"] == pytest.approx(MODEL_BYTES * ON_WIRE / 100e6)  # all bytes through the uplink, once
    slower = as_json("plan", str(path), "--plan", "exact", "--uplink", "50 Mbit/s")["plan"]
    assert slower["sync_s"] == pytest.approx(2 * exact["sync_s"])
    monkeypatch.setenv("DSSYNC_TOPOLOGY", str(path))
    assert as_json("plan", "--plan", "exact")["plan"] == exact
    assert as_json("plan", "--hosts", "2")["topology"]["workers"] == 2  # the command line goes first


# ---- simulate ---------------------------------------------------------------------------------------------------------------


def by_name(told: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {result["name"]: result for result in told["results"]}


def test_simulations_of_all_methods(as_json: Callable[..., Any]) -> None:
    results = by_name(as_json("simulate", *BED, "--compute", "0.2", "--steps", "50"))
    assert list(results) == ["auto plan", "ring", "leaders", "two-dimensional", "parameter-server"]
    once = MODEL_BYTES * ON_WIRE / 100e6
    assert results["ring"]["mean_step_s"] == pytest.approx(0.2 + 2 * 7 / 8 * once)
    assert results["two-dimensional"]["mean_step_s"] == pytest.approx(0.2 + once + 2 * 0.75 * once / 5)
    assert results["ring"]["busiest"] == "uplink"
    assert results["auto plan"]["mean_step_s"] < results["two-dimensional"]["mean_step_s"] / 3


def test_chance_is_the_seeds(as_json: Callable[..., Any]) -> None:
    noisy = ["simulate", *BED, "--compute", "0.2", "--noise", "0.3", "--stragglers", "5%", "--steps", "40", "--against", "ring"]
    first = as_json(*noisy)
    assert as_json(*noisy) == first
    assert as_json(*noisy, "--seed", "1") != first
    assert first["stragglers"] == 0.05
    assert by_name(first)["ring"]["mean_wait_s"] > by_name(first)["auto plan"]["mean_wait_s"] > 0


def test_simulations_in_words(said: Callable[..., str]) -> None:
    text = said("simulate", *BED, "--plan", "grid", "--plan", "striped", "--against", "ring", "--steps", "20", "--noise", "0.1")
    assert "20 steps: 32 MiB averaged; no compute; noise 0.1" in text
    assert re.search(r"grid plan +\S+ s .*uplink of rack0", text)
    assert re.search(r"striped plan +\S+ s ", text)
    assert re.search(r"ring .* 1\.00x", text)
    assert "leaders" not in text


def test_the_library_simulates_the_same(as_json: Callable[..., Any]) -> None:
    topology = Topology.uniform(2, 4, nic="500 Mbit/s", uplink="100 Mbit/s")
    told = by_name(as_json("simulate", *BED, "--compute", "0.2", "--noise", "0.3", "--steps", "30", "--seed", "9"))
    steps_done: list[int] = []
    done = simulate(topology, "ring", steps=30, compute=0.2, noise=0.3, seed=9, progress=steps_done.append)
    assert told["ring"]["mean_step_s"] == done.mean_step
    assert told["ring"]["median_step_s"] == done.quantile(0.5)
    assert steps_done == list(range(1, 31))
    assert sum(done.steps) == pytest.approx(done.total)
    with pytest.raises(ValueError, match=r"'rings', expected a Plan or one of ring, leaders"):
        simulate(topology, "rings")
    with pytest.raises(ValueError, match=r"the plan is for 4 workers, the topology has 8"):
        simulate(topology, Plan.create(4))
    with pytest.raises(ZeroDivisionError):
        simulate(topology, "ring", progress=lambda steps: steps // 0)


@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_without_rates_it_says_so(said: Callable[..., str], command: str) -> None:
    text = said(command, "--racks", "2", "--hosts", "2")
    assert "no rate of any link is known" in text
    assert "busiest link" in text and "memory of" not in text


# ---- pictures ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cluster",
    [BED, ["--hosts", "3,2,1", "--workers", "2"], ["--racks", "8", "--hosts", "32", "--nic", "10Gbit", "--uplink", "40Gbit"]],
    ids=["racks", "unequal", "many"],
)
def test_picture_of_a_plan(said: Callable[..., str], tmp_path: Path, cluster: list[str]) -> None:
    path = tmp_path / "plan.png"
    assert f"picture: {path}" in said("plan", *cluster, "--plot", str(path)).replace("\n", "")
    assert is_png(path)


def test_picture_of_one_worker_warns_of_nothing(said: Callable[..., str], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said("plan", "--workers", "1", "--plot", str(tmp_path / "plan.png"))


def test_picture_of_step_times(as_json: Callable[..., Any], tmp_path: Path) -> None:
    path, measured = tmp_path / "times.png", tmp_path / "measured.json"
    measured.write_text(
        '[{"method": "ring", "uplink": "100 Mbit/s", "seconds": 5.4}, {"method": "auto", "uplink": 1e8, "seconds": 1}]'
    )
    told = as_json("simulate", *BED, "--steps", "10", "--measured", str(measured), "--plot", str(path))
    assert is_png(path)
    ring = {round(point["uplink_bit_s"]): point["step_s"] for point in told["by_uplink"]["ring"]}
    assert ring[25_000_000] == pytest.approx(4 * by_name(told)["ring"]["mean_step_s"])


def test_without_matplotlib_the_extra_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "dssync_pg._plots", raising=False)
    assert "pip install 'dssync-pg[plot]'" in refused(capsys, "plan", *BED, "--plot", str(tmp_path / "plan.png"))


# ---- what cannot be done ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("plan", "no cluster is given"),
        ("plan nowhere.toml", "nowhere.toml: the topology cannot be read"),
        ("plan nowhere.toml --racks 2", "give one or the other"),
        ("plan --hosts 4,x", "'4,x', expected a number of hosts, or one for each rack"),
        ("plan --racks 3 --hosts 4,4", "hosts of 2 racks"),
        ("plan --racks 99999 --hosts 99999", "expected at most 16,777,216"),
        ("plan --hosts 4 --nic 3X", "expected a rate above 0"),
        ("plan --hosts 4 --model-size 0", "expected a size"),
        ("plan --hosts 4 --compute -1", "expected a time of at least 0"),
        ("plan --hosts 4 --seed -1", "expected an integer from 0"),
        ("plan --hosts 4 --plan striped", "striped"),
        ("plan --hosts 4 --group-size 9", "group_size is 9"),
        ("plan --hosts 4 --plan best", "invalid choice: 'best'"),
        ("plan --hosts 4 --plot nowhere/plan.png", "nowhere/plan.png"),
        ("plan --hosts 4 --plot plan.xyz", "xyz"),
        ("simulate --hosts 4 --against rings", "'rings', expected some of ring"),
        ("simulate --hosts 4 --stragglers 2", "expected a share from 0 to 1"),
        ("simulate --hosts 4 --noise -1", "compute_sigma is -1"),
        ("simulate --hosts 4 --steps 0", "expected an integer from 1"),
        ("simulate --hosts 4 --plot times.png", "there is one rack"),
        ("simulate --racks 2 --plot times.png", "the uplinks' rates are not known"),
        ("simulate --racks 2 --measured points.json", "give --plot"),
        ("simulate --racks 2 --uplink 1e8 --plot t.png --measured pyproject.toml", "pyproject.toml: "),
        ("forecast", "invalid choice: 'forecast'"),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: str, part: str
) -> None:
    monkeypatch.chdir(ROOT)
    assert part in refused(capsys, *arguments.split())


@pytest.mark.parametrize("text", ["{", "{}", '[{"method": "ring"}]', '[{"method": "ring", "uplink": "fast", "seconds": 1}]', "[3]"])
def test_measured_points_that_are_none(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str) -> None:
    path = tmp_path / "points.json"
    path.write_text(text)
    line = refused(capsys, "simulate", *BED, "--plot", str(tmp_path / "times.png"), "--measured", str(path))
    assert f"{path}: " in line and "expected a list" in line


# ---- probe and doctor -------------------------------------------------------------------------------------------------------


def test_probe_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    probe = types.ModuleType("dssync_pg.probe")
    probe.run_from_command_line = lambda args: seen.append(args.save) or 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dssync_pg.probe", probe)
    assert cli.main(["probe", "--save", "cluster.toml"]) == 0
    assert seen == ["cluster.toml"]


def diagnosed(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, str]]]:
    """The exit code, and the last finding about each thing."""
    code = cli.main(["doctor", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] == (code == 0)
    return code, {finding["about"]: finding for finding in told["findings"]}


def test_a_machine_that_works(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    code, findings = diagnosed(capsys)
    assert code == 0
    assert findings["torch"]["text"] == torch.__version__
    assert findings["extension"]["verdict"] == "ok"
    assert findings["engine"]["text"].startswith("native")
    assert findings["interface lo"]["text"].startswith("127.0.0.1")
    assert "measures its network" in findings["topology"]["text"]
    assert cli.main(["doctor"]) == 0
    assert "nothing wrong" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("variables", "about", "part"),
    [
        ({"DSSYNC_TRANSPROT": "shm"}, "options", "did you mean DSSYNC_TRANSPORT?"),
        ({"DSSYNC_GROUP_SIZE": "many"}, "options", "DSSYNC_GROUP_SIZE='many'"),
        ({"DSSYNC_SOCKET_IFNAME": "nosuch0"}, "network", "DSSYNC_SOCKET_IFNAME=nosuch0 names no interface"),
        ({"GLOO_SOCKET_IFNAME": "nosuch0,nosuch1"}, "network", "GLOO_SOCKET_IFNAME=nosuch0,nosuch1 names no interface"),
        ({"DSSYNC_ENGINE": "native", "DSSYNC_SOCKET_IFNAME": "nosuch0"}, "engine", "nosuch0"),
        ({"MASTER_ADDR": "no such host"}, "network", "MASTER_ADDR=no such host cannot be reached"),
    ],
)
def test_what_is_wrong_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], about: str, part: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, findings = diagnosed(capsys)
    assert code == 1
    assert findings[about]["verdict"] == "wrong"
    assert part in findings[about]["text"]
    assert findings[about]["advice"]
    assert cli.main(["doctor"]) == 1
    assert "to mend" in capsys.readouterr().out


def test_the_topology_that_would_be_used(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "cluster.toml"
    Topology.uniform(2, 3).save(path)
    monkeypatch.setenv("DSSYNC_TOPOLOGY", str(path))
    _, findings = diagnosed(capsys)
    assert findings["topology"] == {
        "about": "topology",
        "verdict": "ok",
        "text": f"{path}: 6 workers on 6 hosts in 2 racks",
        "advice": "",
    }
    assert findings["plan"]["text"] == f"for 32 MiB a step: {Plan.create(6).summary()}"
    bed = Topology.uniform(2, 4, nic="500 Mbit/s", uplink="100 Mbit/s")
    bed.save(path)
    _, findings = diagnosed(capsys)
    plan = Plan.create(topology=bed)
    assert findings["plan"]["text"].startswith(f"for 32 MiB a step: {plan.summary()}; striped has the shortest step: ")
    monkeypatch.setenv("DSSYNC_PLAN", "leaders")
    monkeypatch.setenv("DSSYNC_MAX_PERIOD", "1")
    code, findings = diagnosed(capsys)
    assert code == 1
    assert "too short for the leaders to rotate" in findings["plan"]["text"]
    path.write_text("[[rack]]\nhosts = 3\n")
    code, findings = diagnosed(capsys)
    assert code == 1
    assert findings["topology"]["text"].startswith(f"{path}:2: ")


def test_flat_is_a_topology_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSSYNC_TOPOLOGY", "flat")
    code, findings = diagnosed(capsys)
    assert code == 0
    assert findings["topology"]["text"].startswith("flat, because DSSYNC_TOPOLOGY says so")
    assert "no cluster is given" in refused(capsys, "plan")


def test_interfaces_that_are_named_are_used(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0,lo")
    code, findings = diagnosed(capsys)
    assert code == 0
    assert "would be used: GLOO_SOCKET_IFNAME=nosuch0,lo" in findings["interface lo"]["text"]


def test_a_slurm_job(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, as_json: Callable[..., Any]) -> None:
    for name, value in {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_TASKS_PER_NODE": "2(x3)"}.items():
        monkeypatch.setenv(name, value)
    _, findings = diagnosed(capsys)
    assert findings["Slurm"]["text"].startswith("job 77: 6 workers on 3 hosts")
    assert as_json("plan", "--nic", "1Gbit")["topology"]["hosts"] == 3


# ---- as a program -----------------------------------------------------------------------------------------------------------


def run_program(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )


def test_python_dash_m() -> None:
    done = run_program("-m", "dssync_pg", "plan", *BED, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["plan"]["kind"] == "striped"
    failed = run_program("-m", "dssync_pg", "plan", "nowhere.toml")
    assert failed.returncode == 2
    assert failed.stderr == "dssync plan: error: nowhere.toml: the topology cannot be read: No such file or directory\n"


@pytest.mark.parametrize("command", ["plan", "simulate", "probe", "doctor"])
def test_help_needs_neither_torch_nor_rich(command: str) -> None:
    program = f"""
import sys
from dssync_pg import cli
try:
    cli.main(["{command}", "--help"])
except SystemExit:
    print("loaded:", *(name for name in ("torch", "rich", "matplotlib") if name in sys.modules))
"""
    done = run_program("-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"
    assert "examples:" in done.stdout
