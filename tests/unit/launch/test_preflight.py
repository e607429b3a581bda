"""launch/preflight.py: what it measures here, whom it blames, and that whatever hangs or dies, it ends.

Real processes on one machine stand for nodes; tests/cluster has real ones.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pretrain.config import PreflightConfig, SubmitConfig, load_config
from pretrain.errors import ConfigError
from support import ROOT
from support.launching import free_port

SCRIPT = ROOT / "launch" / "preflight.py"
MODEST = ["min_memory_gib=0.1", "min_run_dir_gib=0.1", "min_tmpdir_gib=0.1", "min_write_mib_per_second=1"]
MODEST += ["min_network_mib_per_second=1", "check_timeout_s=60"]


@pytest.fixture(scope="module")
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("launch_preflight", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # dataclasses look their module up
    spec.loader.exec_module(loaded)
    return loaded


def a_job(module: ModuleType, tmp_path: Path, **settings: Any) -> Any:
    known = {"folder": str(tmp_path / "preflight"), "start": "1-0", "run_dir": str(tmp_path), "nodes": "n1"}
    return module.Preflight(**(known | settings))


# ---- whom it blames ----


def fit(**links: str) -> dict[str, Any]:
    return {"checks": {"memory": {"ok": True}}, "links": links, "running": None}


def test_a_node_that_fails_alone_is_named_with_the_reason(module: ModuleType) -> None:
    broken = {"checks": {"write": {"ok": False, "reason": "too slow"}}, "links": {}, "running": None}
    hung = {"checks": {}, "links": {}, "running": "gpus"}
    # The others could not reach it: not their fault, nor the fault of their links to each other.
    found = module.unfit_nodes(
        ["a", "b", "c", "d"], [{"a": fit(b="no connection"), "b": broken, "c": hung}], []
    )
    assert found == {"b": "write: too slow", "c": "died or hung while checking gpus", "d": "no report"}


def test_the_node_with_more_failed_links_is_to_blame(module: ModuleType) -> None:
    ring = {"a": fit(b="slow"), "b": fit(c="slow"), "c": fit(), "d": fit()}
    assert module.unfit_nodes(list("abcd"), [ring], []) == {"b": "a to b: slow; b to c: slow"}
    two_bad = {"a": fit(b="slow"), "b": fit(), "c": fit(d="slow"), "d": fit(e="slow"), "e": fit()}
    assert set(module.unfit_nodes(list("abcde"), [two_bad], [])) == {"d", "b"}


def test_a_wrong_guess_between_two_shows_at_the_next_start(module: ModuleType) -> None:
    first = {"a": fit(b="slow"), "b": fit()}
    assert set(module.unfit_nodes(["a", "b"], [first], [])) == {"b"}
    second = {"a": fit(c="slow"), "c": fit()}
    assert set(module.unfit_nodes(["a", "c"], [first, second], [])) == {"a"}


def test_a_node_where_no_task_can_be_started(
    module: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slurm ends the tasks of the other nodes then: what they had reported by that time is no fault of theirs."""
    job = a_job(module, tmp_path, nodes="n1 n2 n3", judge=True)
    job.reports.mkdir(parents=True)
    (job.reports / "n1.json").write_text(json.dumps({**fit(), "running": "write"}))
    said = "srun: error: Task launch for StepId=1.0 failed on node n2: Communication connection failure\n"
    (job.reports / "srun.log").write_text(said + "srun: error: Application launch failed\n")
    assert module.report_unfit_nodes(job) == 10
    assert capsys.readouterr().out == "n2\n"


def test_fit_nodes_and_a_failed_collective_name_nobody(module: ModuleType) -> None:
    assert module.unfit_nodes(["a", "b"], [{"a": fit(), "b": fit()}], []) == {}
    failed = fit()
    failed["checks"]["collective"] = {"ok": False, "reason": "an all_reduce by gloo gave a wrong sum"}
    assert module.unfit_nodes(["a", "b"], [{"a": failed, "b": fit()}], []) == {}


@pytest.mark.parametrize(
    ("reports", "code", "names", "says"),
    [
        (
            {"a": fit(), "b": {**fit(), "running": "write"}},
            10,
            "b\n",
            "b is not fit: died or hung while checking",
        ),
        ({}, 1, "", "no node is fit, so the cause must be the limits or the network"),
        (
            {"a": fit(), "b": {**fit(), "checks": {"collective": {"ok": False, "reason": "no answer"}}}},
            1,
            "",
            "the collective failed on b: no answer",
        ),
    ],
)
def test_the_verdict(
    module: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    reports: dict[str, Any],
    code: int,
    names: str,
    says: str,
) -> None:
    job = a_job(module, tmp_path, nodes="a b", judge=True)
    job.reports.mkdir(parents=True)
    for name, report in reports.items():
        (job.reports / f"{name}.json").write_text(json.dumps(report))
    assert module.report_unfit_nodes(job) == code
    output = capsys.readouterr()
    assert output.out == names
    assert says in output.err


# ---- checks of one node ----


def run_check(module: ModuleType, tmp_path: Path, check: Any, timeout_s: float = 20) -> dict[str, Any]:
    report = module.Report(tmp_path / "n1.json")
    report.run("check", check, timeout_s)
    report.write(running=None)
    return json.loads((tmp_path / "n1.json").read_text())["checks"]["check"]


def test_limits_are_named_with_figure_and_unit(module: ModuleType, tmp_path: Path) -> None:
    job = a_job(module, tmp_path, min_memory_gib=1e6)
    low = run_check(module, tmp_path, lambda: module.check_memory(job))
    assert low["reason"].startswith("available memory is ")
    assert low["reason"].endswith(" GiB, less than 1e+06 GiB")
    full = run_check(module, tmp_path, lambda: module.check_space(tmp_path, 1e6))
    assert f"free space in {tmp_path} is" in full["reason"]
    slow = run_check(module, tmp_path, lambda: module.check_write(tmp_path, 1e9))
    assert "MiB/s, less than 1e+09 MiB/s" in slow["reason"]
    fast = run_check(module, tmp_path, lambda: module.check_write(tmp_path, 0))
    assert fast["ok"]
    assert fast["value"] > 0
    assert not list(tmp_path.glob(".preflight-*"))
    gone = run_check(module, tmp_path, lambda: module.check_write(tmp_path / "nowhere", 0))
    assert "No such file or directory" in gone["reason"]


def test_a_check_that_hangs_is_left_behind(module: ModuleType, tmp_path: Path) -> None:
    never = threading.Event()
    hung = run_check(module, tmp_path, lambda: never.wait() or {}, timeout_s=0.2)
    assert (hung["ok"], hung["reason"]) == (False, "no answer within 0.2 s")
    never.set()


def test_a_report_says_what_was_running(module: ModuleType, tmp_path: Path) -> None:
    report = module.Report(tmp_path / "n1.json")
    seen = []
    report.run("gpus", lambda: seen.append(json.loads((tmp_path / "n1.json").read_text())) or {}, 20)
    assert seen == [{"checks": {}, "links": {}, "running": "gpus"}]


FAKE_SMI = '#!/bin/bash\necho "0, NVIDIA H100, 0"; echo "1, NVIDIA H100, {errors}"; exit {code}\n'


def test_gpus_that_are_not_there_or_have_errors(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for nvidia-smi: no machine with a broken GPU can be had."""
    job = a_job(module, tmp_path, gpus_per_node=2)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    missing = run_check(module, tmp_path, lambda: module.check_gpus(job))
    assert missing["reason"] == "2 GPUs are expected, but there is no nvidia-smi"
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "nvidia-smi"
    for errors, code, says in (
        (3, 0, "GPU 1 (NVIDIA H100) has 3 uncorrected memory errors"),
        (0, 9, "nvidia-smi: "),
    ):
        fake.write_text(FAKE_SMI.format(errors=errors, code=code))
        fake.chmod(0o755)
        assert run_check(module, tmp_path, lambda: module.check_gpus(job))["reason"].startswith(says)


def test_link_figures_and_a_clock_that_is_ahead(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=module.answer, args=(listener,), daemon=True)
    here = threading.get_ident()
    clock = time.time
    monkeypatch.setattr(module.time, "time", lambda: clock() + (0 if threading.get_ident() == here else 3600))
    thread.start()
    ahead_s, rate = module.measure_link(f"127.0.0.1:{listener.getsockname()[1]}", 20)
    assert ahead_s == pytest.approx(3600, abs=60)  # a busy machine may take its time
    assert rate > 0
    listener.close()


def test_own_address(module: ModuleType) -> None:
    assert module.own_address("lo") == "127.0.0.1"
    with pytest.raises(module.Unfit, match="network interface nope0: No such device"):
        module.own_address("nope0")


def test_limits_in_the_configuration() -> None:
    given = ["run_dir=r", "data.manifest=m", "total_steps=10000", "cluster.preflight.max_clock_offset_s=2"]
    assert load_config(SubmitConfig, given, "submit").cluster.preflight.max_clock_offset_s == 2
    with pytest.raises(ConfigError, match=r"cluster\.preflight\.check_timeout_s=0 must be greater than 0"):
        PreflightConfig(check_timeout_s=0)


# ---- two nodes ----


def start_node(tmp_path: Path, name: str, port: int, *more: str) -> subprocess.Popen[str]:
    words = [f"folder={tmp_path}/preflight", "start=1-0", f"run_dir={tmp_path}", "nodes='n1 n2'", *MODEST]
    words += ["network_interface=lo", *more]
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *words],
        env={**os.environ, **variables, "SLURMD_NODENAME": name, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def outcome(module: ModuleType, tmp_path: Path, nodes: list[subprocess.Popen[str]]) -> dict[str, str]:
    """Wait for the nodes; the verdict over their reports."""
    for node in nodes:
        output, _ = node.communicate(timeout=240)
        assert node.returncode == 0, output
    folder = tmp_path / "preflight" / "1-0"
    reports = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    return module.unfit_nodes(["n1", "n2"], [reports], [])


@pytest.mark.integration
def test_two_fit_nodes(module: ModuleType, tmp_path: Path) -> None:
    port = free_port()
    nodes = [start_node(tmp_path, name, port) for name in ("n1", "n2")]
    assert outcome(module, tmp_path, nodes) == {}
    for name, other in (("n1", "n2"), ("n2", "n1")):
        checks = json.loads((tmp_path / "preflight" / "1-0" / f"{name}.json").read_text())["checks"]
        assert list(checks) == [
            "memory",
            "run_dir_space",
            "tmpdir_space",
            "write",
            "meeting",
            "links",
            "collective",
        ]
        assert checks["links"]["to"] == other
        assert checks["collective"]["gloo_s"] >= 0


@pytest.mark.integration
@pytest.mark.parametrize("absent", ["n1", pytest.param("n2", marks=pytest.mark.long)])
def test_a_node_that_does_not_come_is_blamed_alone(module: ModuleType, tmp_path: Path, absent: str) -> None:
    there = "n2" if absent == "n1" else "n1"
    node = start_node(tmp_path, there, free_port(), "check_timeout_s=12")
    assert outcome(module, tmp_path, [node]) == {absent: "no report"}
    report = json.loads((tmp_path / "preflight" / "1-0" / f"{there}.json").read_text())
    assert list(report["links"]) == [absent]


@pytest.mark.integration
def test_nobody_waits_for_a_collective_with_an_unfit_node(module: ModuleType, tmp_path: Path) -> None:
    port = free_port()
    nodes = [start_node(tmp_path, "n1", port), start_node(tmp_path, "n2", port, "min_memory_gib=1e6")]
    found = outcome(module, tmp_path, nodes)
    assert list(found) == ["n2"]
    assert found["n2"].startswith("memory: available memory is")
    report = json.loads((tmp_path / "preflight" / "1-0" / "n1.json").read_text())
    assert "collective" not in report["checks"]
