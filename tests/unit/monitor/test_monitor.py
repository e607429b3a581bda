"""What a run records, read back: exact values, torn files, the true history, W&B's own file, full disks."""

from __future__ import annotations

import json
import math
import os
import pty
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb

from pretrain.config import LoggingConfig, Precision, WandbMode
from pretrain.engine.peak import measure_matmul_flops, rank_peak_flops
from pretrain.gpus import known_peak
from pretrain.monitor import monitor
from pretrain.monitor.monitor import wandb_arguments, wandb_mode
from pretrain.printing import say
from pretrain.reliability.events import Event
from pretrain.reliability.journal import read_metrics
from pretrain.reliability.json_lines import read_lines
from support import ROOT
from support.recording import TOKENS_PER_STEP, a_config, a_monitor, a_record

# ---- what a step records ----


def test_padding_is_no_token_of_the_speed(tmp_path: Path) -> None:
    m = a_monitor(tmp_path)
    m.step(a_record(1, step_time_s=0.5, padding_tokens=TOKENS_PER_STEP // 4))
    m.close(0)
    (record,) = read_metrics(tmp_path)
    assert record["step_tokens"] == TOKENS_PER_STEP
    assert record["tokens_per_second"] == TOKENS_PER_STEP * 0.75 / 0.5


def test_derived_figures(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    m = a_monitor(tmp_path, first_step=101)
    for step in range(101, 121):
        m.step(a_record(step, loss=1 / step, step_time_s=0.5))
    m.close(0)
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == list(range(101, 121))
    last = records[-1]
    rate = TOKENS_PER_STEP / 0.5
    assert last["loss"] == 1 / 120
    assert last["tokens_per_second"] == rate
    assert last["tokens_per_second_per_rank"] == rate / 2
    assert last["mfu_frac"] == pytest.approx(rate * 6e7 / 2e12)
    assert last["tokens_seen"] == 120 * TOKENS_PER_STEP
    assert last["attempt"] == 1
    assert last["peak_memory_bytes"] > 10_000_000
    assert 0 < last["eta_s"] < 60
    assert last["z_loss"] is None
    assert last["time"].endswith("+00:00")
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["101/200", "110/200", "120/200"]
    expected = "step 120/200  loss 0.0083  lr 3.0e-04  grad 0.83  8,192 tok/s in fp32  "
    expected += "MFU 24.6% (measured peak)  ETA 0:00:"
    assert lines[-1].startswith(expected)


def test_the_eta_counts_what_time_went_by(tmp_path: Path) -> None:
    m = a_monitor(tmp_path, n_steps=3)
    m.step(a_record(1, step_time_s=0.1))
    time.sleep(0.4)  # an evaluation, say
    m.step(a_record(2, step_time_s=0.1))
    assert read_metrics(tmp_path)[-1]["eta_s"] >= 0.25


def test_without_a_peak_mfu_is_unknown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    m = a_monitor(tmp_path, peak_flops_per_second=None)
    m.step(a_record(1, skipped=True, grad_norm=None, loss=math.nan))
    (record,) = read_metrics(tmp_path)
    assert record["mfu_frac"] is None
    assert math.isnan(record["loss"])
    assert record["skipped"] is True
    line = capfd.readouterr().err.splitlines()[-1]
    assert "MFU unknown" in line
    assert "SKIPPED" in line


def test_a_step_with_nothing_to_predict_is_in_no_figure(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has neither loss nor speed: W&B gets no value, and the speed of the progress line is that of the others."""
    sent: dict[int, dict[str, Any]] = {}
    m = a_monitor(tmp_path, "logging.every_steps=2")
    monkeypatch.setattr(m, "_log_wandb", lambda step, line: sent.update({step: line}))
    nothing = {"loss": None, "grad_norm": None, "predicted_tokens": 0, "skipped": True, "step_time_s": 1e-4}
    m.step(a_record(1, step_time_s=0.5))
    m.step(a_record(2, **nothing))
    m.step(a_record(3, step_time_s=0.5))
    m.step(a_record(4, **nothing))
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("step ")]
    assert "no token to predict" in lines[1] and "tok/s" not in lines[1] and "SKIPPED" not in lines[1]
    assert f"{TOKENS_PER_STEP / 0.5:,.0f} tok/s" in lines[2]
    records = read_metrics(tmp_path)
    for name in ("loss", "grad_norm", "tokens_per_second", "tokens_per_second_per_rank", "mfu_frac"):
        assert records[1][name] is records[3][name] is sent[2][name] is None
        assert records[0][name] is not None
    assert [record["predicted_tokens"] for record in records] == [TOKENS_PER_STEP, 0] * 2
    assert records[3]["tokens_seen"] == 4 * TOKENS_PER_STEP


def test_other_ranks_write_their_ledger_only(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    m = a_monitor(tmp_path, "logging.sample_ledger=true", rank=1)
    m.step(a_record(10))
    m.event("resumed", step=1)
    m.evaluation(10, {"loss": 1.0})
    m.ledger(10, [3, 4], "ff")
    m.close(0)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["rank-00001.jsonl"]
    assert capfd.readouterr().err == ""


def test_events_say_what_happened(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    m = a_monitor(tmp_path)
    m.event(Event.CHECKPOINT_DELETED, step=100, path=tmp_path / "c", reason=None)
    m.close(0)
    first, second = read_lines(tmp_path / "events.jsonl")
    assert first["event"] == "monitoring"
    assert first["peak_source"] == "measured peak"
    assert (second["event"], second["attempt"], second["step"]) == ("checkpoint_deleted", 1, 100)
    assert second["path"] == str(tmp_path / "c")
    assert f"checkpoint deleted  step 100  path {tmp_path / 'c'}\n" in capfd.readouterr().err


# ---- nothing stops training ----


def test_a_full_disk_costs_one_warning(tmp_path: Path) -> None:
    """A limit on file sizes cuts a write short and then refuses it, as a full disk does."""
    script = (
        "import resource, sys; from pathlib import Path\n"
        "sys.path.insert(0, 'tests'); from support.recording import a_monitor, a_record\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "monitor = a_monitor(Path(sys.argv[1]))\n"
        "for step in range(1, 101):\n    monitor.step(a_record(step))\n"
        "monitor.close(0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stderr.count("warning: ") == 1
    assert "metrics.jsonl cannot be written" in done.stderr
    assert "step 100/200" in done.stderr
    data = (tmp_path / "metrics.jsonl").read_bytes()
    assert 9_000 < len(data) <= 10_000
    assert data.endswith(b"\n")
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, data.count(b"\n") + 1))


def test_a_run_folder_that_cannot_be_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    m = a_monitor(tmp_path / "file" / "run", "logging.sample_ledger=true")
    m.step(a_record(10))
    m.ledger(10, [1], "ff")
    m.evaluation(10, {"loss": 1.0})
    m.close(0)
    err = capfd.readouterr().err
    assert err.count("cannot be written") == 3  # one for each of metrics, events, ledger
    assert "step 10/200" in err


def test_a_closed_terminal_is_no_reason_to_stop(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "sys.path.insert(0, 'tests'); from support.recording import a_monitor, a_record\n"
        "sys.stdin.readline()\n"
        "monitor = a_monitor(Path(sys.argv[1]))\n"
        "for step in range(1, 31):\n    monitor.step(a_record(step))\n"
        "monitor.close(0); sys.stderr = None; import os; os._exit(0)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    process.stderr.close()
    process.communicate(b"\n")
    assert process.returncode == 0
    assert len(read_metrics(tmp_path)) == 30


def test_a_terminal_gets_the_same_line(monkeypatch: pytest.MonkeyPatch) -> None:
    main, side = pty.openpty()
    with open(side, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        say("step 1/2  loss [bold]3.0[/bold]")
        seen = os.read(main, 4096).decode()
    os.close(main)
    plain = "".join(part.split("m", 1)[-1] if i else part for i, part in enumerate(seen.split("\x1b[")))
    assert plain.strip() == "step 1/2  loss [bold]3.0[/bold]"


# ---- W&B ----


@pytest.fixture
def fresh_wandb() -> Iterator[None]:
    """W&B reads its environment once per process; forget it before and after."""
    wandb.teardown()
    yield
    wandb.teardown()


def wandb_files(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: 32 KiB blocks of (crc, length, type, piece of a protobuf), as LevelDB's log."""
    from wandb.proto import wandb_internal_pb2

    data, position, record = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            message = wandb_internal_pb2.Record()
            message.ParseFromString(record)
            record = b""
            yield message


def wandb_content(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = {"history": [], "config": {}, "preempting": False, "exit": None}
    for record in wandb_records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            content |= {
                "id": record.run.run_id,
                "project": record.run.project,
                "name": record.run.display_name,
            }
            content["config"] |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
        elif kind == "history":
            row = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            content["history"].append(row)
        elif kind == "preempting":
            content["preempting"] = True
        elif kind == "exit":
            content["exit"] = record.exit.exit_code
    return content


@pytest.mark.usefixtures("fresh_wandb")
def test_wandb_offline_holds_what_metrics_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two attempts of one run: the same W&B id, the same values, nothing secret."""
    canary = "canary0secret0" + "7" * 26
    monkeypatch.setenv("CANARY_TOKEN", canary)
    options = ["logging.wandb=auto", "logging.wandb_project=test", "logging.wandb_tags=[a, b]"]
    first = a_monitor(tmp_path, *options)
    first.event("started")
    for step in range(1, 26):
        first.step(a_record(step, loss=math.pi / step, grad_norm=math.inf if step == 20 else 1 / 3))
        if step == 20:
            first.evaluation(step, {"loss": 2 / 3})
    first.close(75)
    second = a_monitor(tmp_path, *options, attempt=2, first_step=21, n_steps=30)
    second.event("resumed", step=20)
    for step in range(21, 31):
        second.step(a_record(step, loss=math.e / step))
    second.close(0)

    one, two = (wandb_content(path) for path in wandb_files(tmp_path))
    assert (one["id"], one["project"], one["name"]) == ("abcd1234", "test", tmp_path.name)
    assert two["id"] == one["id"]
    assert (one["preempting"], one["exit"], two["preempting"], two["exit"]) == (True, 75, False, 0)
    assert one["config"]["optim"]["lr"] == 3e-4
    assert [row["_step"] for row in one["history"]] == [1, 10, 20]
    assert [row["_step"] for row in two["history"]] == [21, 30]
    metrics = {record["step"]: record for record in read_metrics(tmp_path)}
    for row in one["history"] + two["history"]:
        shown = {key: value for key, value in row.items() if not key.startswith("_")}
        expected = metrics[row["_step"]]
        assert shown == {k: v for k, v in expected.items() if k in shown}
        assert {"loss", "lr", "mfu_frac", "tokens_per_second", "tokens_seen"} <= set(shown)
    assert one["history"][-1]["heldout/loss"] == 2 / 3
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not [data for data in written if canary.encode() in data]
    assert not [e for e in read_lines(tmp_path / "events.jsonl") if e["event"] == "wandb_failed"]


@pytest.mark.usefixtures("fresh_wandb")
def test_an_unreachable_wandb_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps are recorded while W&B still tries; then the run goes on offline with what was queued."""
    key = "canary0secret0" + "8" * 26
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(monitor, "WANDB_INIT_TIMEOUT_S", 2.0)
    m = a_monitor(tmp_path, "logging.wandb=online")
    for step in range(1, 21):
        m.step(a_record(step))
    m.close(0)
    (failed,) = [e for e in read_lines(tmp_path / "events.jsonl") if e["event"] == "wandb_failed"]
    assert "offline" in failed["reason"]
    metrics = read_metrics(tmp_path)
    assert [record["step"] for record in metrics] == list(range(1, 21))
    assert metrics[-1]["time"] < failed["time"]
    content = wandb_content(wandb_files(tmp_path)[-1])
    assert [row["_step"] for row in content["history"]] == [1, 10, 20]
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not [data for data in written if key.encode() in data]


@pytest.mark.usefixtures("fresh_wandb")
def test_a_failing_wandb_is_one_event(tmp_path: Path) -> None:
    m = a_monitor(tmp_path, "logging.wandb=offline", "logging.wandb_project='no/slashes:allowed'")
    for step in range(1, 21):
        m.step(a_record(step))
    m.close(0)
    (failed,) = [e for e in read_lines(tmp_path / "events.jsonl") if e["event"] == "wandb_failed"]
    assert "project" in failed["reason"]
    assert len(read_metrics(tmp_path)) == 20


def test_disabled_wandb_leaves_no_trace(tmp_path: Path) -> None:
    m = a_monitor(tmp_path, "logging.wandb=disabled")
    m.step(a_record(10))
    m.close(0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.jsonl", "metrics.jsonl"]


def test_online_only_with_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mode(wanted: str) -> WandbMode:
        return wandb_mode(LoggingConfig(wandb=WandbMode[wanted]))

    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert [mode(m) for m in ("auto", "online")] == [WandbMode.offline] * 2
    (tmp_path / "netrc").write_text("machine other.example login user password x\n")
    assert mode("auto") is WandbMode.offline
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    (tmp_path / "netrc").chmod(0o600)
    assert mode("auto") is WandbMode.online
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example:8080/x")
    assert mode("auto") is WandbMode.offline
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert [mode(m) for m in ("auto", "offline", "disabled")] == [
        *(WandbMode.online, WandbMode.offline, WandbMode.disabled)
    ]


@pytest.mark.parametrize(
    ("variables", "auto"),
    [
        ({"WANDB_MODE": "disabled"}, WandbMode.disabled),
        ({"WANDB_MODE": "offline"}, WandbMode.offline),
        ({"WANDB_MODE": "dryrun"}, WandbMode.offline),
        ({"WANDB_MODE": "online"}, WandbMode.online),
        ({"WANDB_DISABLED": "true", "WANDB_MODE": "online"}, WandbMode.disabled),
        ({"WANDB_DISABLED": "false"}, WandbMode.online),
        ({"WANDB_MODE": "of-another-version"}, WandbMode.offline),
    ],
)
def test_the_mode_of_wandbs_own_variables(
    variables: dict[str, str], auto: WandbMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They decide where the configuration does not; a mode that it states wins."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "k")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode(LoggingConfig()) is auto
    for stated in (WandbMode.online, WandbMode.offline, WandbMode.disabled):
        assert wandb_mode(LoggingConfig(wandb=stated)) is stated


def test_what_is_not_stated_is_left_to_wandbs_own_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def arguments(*overrides: str) -> dict[str, Any]:
        return wandb_arguments(a_config(tmp_path, *overrides), tmp_path, "abcd1234", WandbMode.offline)

    keys = ("project", "entity", "name", "tags", "group")
    for name in ("PROJECT", "ENTITY", "NAME", "TAGS", "RUN_GROUP"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    assert {k: v for k, v in arguments().items() if k in keys} == {
        "project": "pretrain",
        "name": tmp_path.name,
    }
    for name in ("PROJECT", "ENTITY", "NAME", "TAGS", "RUN_GROUP"):
        monkeypatch.setenv(f"WANDB_{name}", "mine")
    assert not set(keys) & set(arguments())
    stated = {"project": "p", "entity": "e", "name": "n", "tags": ["t"]}
    given = arguments(
        "logging.wandb_project=p", "logging.wandb_entity=e", "logging.wandb_name=n", "logging.wandb_tags=[t]"
    )
    assert {key: given[key] for key in stated} == stated
    settings = wandb.Settings()
    settings.update_from_env_vars(dict(os.environ))
    assert (settings.project, settings.run_group, settings.run_tags) == ("mine", "mine", ("mine",))


def test_run_ids_are_what_wandb_takes() -> None:
    ids = {monitor.new_run_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(len(i) == 8 and i.isalnum() and i == i.lower() for i in ids)


# ---- the peak of a device ----


@pytest.mark.parametrize(
    ("name", "per_second"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
    ],
)
def test_known_gpus(name: str, per_second: float) -> None:
    peak = known_peak(name, Precision.bf16)
    assert peak is not None
    assert peak.per_second == per_second


@pytest.mark.parametrize(
    "name",
    [
        *(
            "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
            "NVIDIA GeForce RTX 4090 D",
            "NVIDIA GeForce RTX 4090 Laptop GPU",
        ),
        *("NVIDIA H100 80GB HBM2e", "NVIDIA A1000", "Tesla V100-SXM2-16GB", "Tesla T4", ""),
    ],
)
def test_a_gpu_that_is_not_exactly_known_has_no_peak(name: str) -> None:
    assert known_peak(name, Precision.bf16) is None


def test_a_peak_is_of_a_number_format() -> None:
    half = known_peak("Tesla V100-SXM2-16GB", Precision.fp16)
    assert half is not None
    assert half.per_second == 125e12
    assert known_peak("NVIDIA H100 PCIe", Precision.fp32) is None


def test_the_measured_peak_is_what_matrix_products_reach() -> None:
    """No slower than one product timed here, on a machine where timings vary by a factor of some."""
    x = torch.randn(1024, 1024)
    torch.nn.functional.linear(x, x)
    started = time.perf_counter()
    torch.nn.functional.linear(x, x)
    once = 2 * 1024**3 / (time.perf_counter() - started)
    measured = measure_matmul_flops(torch.device("cpu"), torch.float32, seconds=0.4)
    assert once / 4 < measured < once * 50


def test_the_peak_of_a_rank(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    configured = rank_peak_flops(a_config(tmp_path, "logging.peak_flops_per_second=5e11"), cpu)
    assert configured == (5e11, "configured peak")
    measured = rank_peak_flops(a_config(tmp_path), cpu)
    assert measured.source == "measured peak"
    assert measured.per_second > 1e8


def test_peak_memory_is_this_process_own() -> None:
    """A process that a large one has started is not large."""
    assert monitor._peak_memory_bytes() > 50 << 20
    code = "from pretrain.reliability.processes import own_memory_bytes as m; print(m('VmRSS'), m('VmHWM'))"
    ballast = bytearray(os.urandom(1)) * (
        300 << 20
    )  # resident here, and in what is forked from here until its exec
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    now, peak = map(int, done.stdout.split())
    assert now <= peak < 100 << 20 < len(ballast)
