"""The benchmark: order of runs, ratios, tables, settings that are refused, and one short session of real processes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from benchmarks.harness.report import (
    alternated,
    markdown,
    merged,
    paired_ratios,
    parts_table,
    speed_table,
    spread,
)
from benchmarks.harness.session import Session, Variant
from benchmarks.harness.worker import Job, own_tokens
from pretrain.config import load_config
from pretrain.errors import ConfigError
from support import ROOT


def result(speed: float, **more: Any) -> dict[str, Any]:
    values = {
        "tokens_per_second": speed,
        "step_s": [0.25, 0.5, 0.25],
        "losses": [6.0, 5.0],
        "peak_memory_bytes": 2**30,
        "parts_s": {
            "data": 0.0,
            "forward": 0.1,
            "backward": 0.2,
            "communication": 0.05,
            "optimizer": 0.1,
            "rest": 0.0,
        },
        "calls": {"all_reduce float32": 2.0, "all_gather_into_tensor bfloat16": 5.0},
        "bytes": {"all_reduce float32": 1e6, "all_gather_into_tensor bfloat16": 2e6},
    }
    return values | more


def runs(**speeds: list[float]) -> list[dict[str, Any]]:
    return [
        {"variant": variant, "repeat": repeat, "result": result(speed)}
        for variant, found in speeds.items()
        for repeat, speed in enumerate(found)
    ]


# ---- pure functions ----


def test_every_second_repeat_runs_backwards() -> None:
    orders = [alternated(["a", "b", "c"], repeat) for repeat in range(3)]
    assert orders == [["a", "b", "c"], ["c", "b", "a"], ["a", "b", "c"]]


def test_ratios_are_of_the_same_repeat() -> None:
    """The machine was half as fast in the second repeat: no ratio shows it, though medians of speeds would."""
    found = runs(a=[100, 50, 100], b=[110, 55, 110])
    assert paired_ratios(found, "b", "a") == pytest.approx([1.1, 1.1, 1.1])
    lacking = [run for run in found if (run["variant"], run["repeat"]) != ("a", 1)]
    lacking.append({"variant": "a", "repeat": 1, "problem": "failed"})
    assert paired_ratios(lacking, "b", "a") == pytest.approx([1.1, 1.1])
    assert paired_ratios(found, "b", "none") == []


def test_ratios_in_turns_are_of_the_same_step() -> None:
    """Seconds of steps; the second and third pair ran while the machine was slow."""
    bare, ours = (
        {"variant": name, "repeat": 0, "result": result(3 * tokens / sum(step_s), step_s=step_s)}
        for name, tokens, step_s in (("bare", 8, [1.0, 2.0, 3.0]), ("ours", 8, [1.25, 2.5, 6.0]))
    )
    assert paired_ratios([bare, ours], "ours", "bare", in_turns=True) == pytest.approx([0.8, 0.8, 0.5])


def test_spread() -> None:
    assert spread([3.0, 1.0, 2.0], "{:.1f}".format) == "2.0 (1.0..3.0)"
    assert spread([3.0], "{:.1f}".format) == "3.0"
    assert spread([], "{:.1f}".format) == "-"


def test_results_of_ranks_are_merged() -> None:
    ranks = [
        result(0, losses=[6.0, 4.0], peak_memory_bytes=5, step_s=[0.5, 0.5]),
        result(0, losses=[5.0, 3.0], peak_memory_bytes=7, step_s=[0.5, 0.5]),
    ]
    found = merged(ranks, tokens_per_step=100)
    assert (found["losses"], found["peak_memory_bytes"]) == ([5.5, 3.5], 7)
    assert found["tokens_per_second"] == 200


def test_tables() -> None:
    found = runs(ours=[100, 50], bare=[110, 55])
    header, rows = speed_table(found, ["bare", "ours", "absent"], {"bare": 10, "ours": 10}, 2200.0)
    assert rows[0] == ["bare", "82 (55..110)", "1.000 (1.000..1.000)", "37.5% (25.0%..50.0%)", *rows[0][4:]]
    assert rows[0][4:] == ["1.00 (1.00..1.00)", "6.0000, 5.0000"]
    assert rows[1][2] == "0.909 (0.909..0.909)"
    assert rows[2] == ["absent", "left out", "-", "-", "-", "-"]
    lines = markdown((header, rows)).splitlines()
    assert [line.count("|") for line in lines] == [len(header) + 1] * (2 + len(rows))
    assert lines[1] == "|" + " --- |" * len(header)


def test_table_of_parts() -> None:
    unseen = {"variant": "peer", "repeat": 0, "result": result(1, parts_s={}, calls={}, bytes={})}
    header, rows = parts_table([*runs(ours=[1]), unseen], ["ours", "peer", "absent"])
    ours = dict(zip(header, rows[0], strict=True))
    assert (ours["step"], ours["backward"], ours["communication"]) == ("250.0", "200.0", "50.0")
    assert (ours["collectives"], ours["gathers"], ours["MB moved"]) == ("7", "5", "3.000")
    assert rows[1][2:] == ["-"] * (len(header) - 2)
    assert len(rows) == 2


# ---- tokens ----


def job(ranks: int) -> Job:
    numbers = {
        "warmup_steps": 1,
        "steps": 1,
        "counted_steps": 1,
        "grad_accum_steps": 1,
        "threads": 1,
        "seed": 5,
    }
    return Job(
        runner="pytorch",
        ranks=ranks,
        model={"vocab_size": 1000},
        optim={},
        compile="never",
        sequence_length=512,
        global_batch_sequences=4,
        micro_batch_sequences=1,
        in_turns=False,
        config={},
        **numbers,
    )


def test_any_number_of_ranks_sees_the_same_tokens() -> None:
    alone = own_tokens(job(1), step=3, rank=0)
    assert alone.shape == (4, 513) and int(alone.max()) < 1000
    assert torch.equal(alone, torch.cat([own_tokens(job(2), 3, rank) for rank in (0, 1)]))
    assert not torch.equal(alone, own_tokens(job(1), 4, 0))


def test_there_is_something_to_learn() -> None:
    """Token 0 has 1 / (1 + 1/2 + ... + 1/1000) = 13.4% of all; of 2,052 draws that is 275 with a deviation of 15."""
    assert 200 < int((own_tokens(job(1), 0, 0) == 0).sum()) < 350


# ---- settings ----


def bench(*arguments: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launch/bench.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("launched_bench", ROOT / "launch" / "bench.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (
            ["bench.variants=[nonsense]"],
            ["'nonsense'", "runners: pret"],
        ),
        (["bench.variants=[pretrain zero1]"], ["'pretrain zero1'", "KEY=VALUE"]),
        (["bench.variants=[pretrain, pretrain]"], ["bench.variants"]),
        (['bench.variants=["pretrain engine=zero9"]'], ["zero9"]),
        (['bench.variants=["pretrain optim.learning_rate=1"]'], ["optim.learning_rate"]),
        (["bench.ranks=3"], ["global_batch_sequences", "micro_batch_sequences=4", "3 ranks"]),
        (
            ["bench.ranks=2", "bench.variants=[litgpt]"],
            ["'litgpt'", "bench.rank"],
        ),
        (
            ["bench.variants=[hf_trainer]", "model.qk_norm=true"],
            ["'hf_trainer'", "model.qk_norm"],
        ),
        (["bench.variants=[pytorch]", "data.manifest=x.json"], ["'pytorch'", "data.manifest"]),
        (["micro_batch_sequences=auto"], ["'pretrain'", "micro_batch_sequences"]),
        (["bench.ranks=2", "engine=zero3_ulysses"], ["engine.sequence_parallel_ranks"]),
        (
            ["bench.in_turns=true", 'bench.variants=[pretrain, "pytorch bench.steps=3"]'],
            ["bench.in_turns", "bench.warmup_steps", "bench.steps"],
        ),
        (["bench.steps=0"], ["bench.steps=0"]),
    ],
)
def test_what_is_wrong_is_refused(script: ModuleType, arguments: list[str], named: list[str]) -> None:
    given = ["bench.output=out", *arguments]
    with pytest.raises(ConfigError) as raised:
        script.checked_variants(load_config(script.BenchConfig, given, "bench"), given)
    assert [word for word in named if word not in str(raised.value)] == [], raised.value


def test_overrides_of_a_variant_take_the_place_of_what_is_given(script: ModuleType) -> None:
    variants = ["pretrain", "pretrain engine=zero1 micro_batch_sequences=2", "litgpt bench.ranks=1"]
    listed = ", ".join(f'"{variant}"' for variant in variants)
    given = ["bench.output=out", "bench.ranks=2", "engine=zero2", f"bench.variants=[{listed}]"]
    found = script.checked_variants(load_config(script.BenchConfig, given, "bench"), given)
    assert list(found) == variants
    assert [one.engine.zero_stage for one in found.values()] == [2, 1, 2]
    assert [one.micro_batch_sequences for one in found.values()] == [4, 2, 4]
    jobs = [script.job_values(text.split()[0], one) for text, one in found.items()]
    assert [(job["ranks"], job["grad_accum_steps"]) for job in jobs] == [(2, 4), (2, 8), (1, 8)]


def test_an_interpreter_that_is_not_there_is_refused(script: ModuleType) -> None:
    with pytest.raises(ConfigError, match="peers_python=/no/such/python cannot be run"):
        script.interpreter("/no/such/python")
    assert script.interpreter(None) == sys.executable


def test_groups_are_those_of_training() -> None:
    ours, training = (
        yaml.safe_load((ROOT / "conf" / f"{name}.yaml").read_text())["defaults"]
        for name in ("bench", "config")
    )
    assert ours == training


def test_peers_that_are_not_installed_are_left_out(tmp_path: Path) -> None:
    """One line that says what to do; and nothing is started where nothing is left."""
    chosen = ["bench.variants=[olmo_core_fsdp]", "bench.peers_python=/usr/bin/false"]
    found = bench(f"bench.output={tmp_path / 'out'}", *chosen)
    assert found.returncode == 2
    assert "olmo_core_fsdp: skipped, since /usr/bin/false has no ai2-olmo-core" in found.stdout
    assert found.stderr.startswith("error: bench.variants=['olmo_core_fsdp']")
    assert not (tmp_path / "out").exists()


# ---- a session ----

STAND_IN = """
import json, os, socket, sys, time
from pathlib import Path
path, rank = Path(sys.argv[1]), int(os.environ["RANK"])
job = json.loads(path.read_text())
if job["runner"] == "broken":
    if rank == 1:
        sys.exit("no more memory")
    time.sleep(600)  # waits for rank 1
if "BENCH_TURNS_PORT" in os.environ:
    with socket.create_connection(("127.0.0.1", int(os.environ["BENCH_TURNS_PORT"]))) as turns:
        for step in range(3):
            turns.sendall(b"?")
            assert turns.recv(1) == b"g"
            if job["runner"] == "weak" and step == 1:
                sys.exit("died in its step")
            if job["runner"] == "killed" and step == 1:
                turns.sendall(b"?")
                os.kill(os.getpid(), 9)  # while the others have their turns
            with (path.parents[2] / "order").open("a") as order:
                print(job["runner"], rank, step, file=order)
            time.sleep(0.05)
values = {"flops_per_second": 1e9}
if job["runner"] != "peak":
    seconds = {"fast": 0.1, "slow": 0.2}.get(job["runner"], 0.1)
    values = {"n_parameters": 1002 if job["runner"] == "larger" else 1000, "step_s": [seconds] * 2}
    values |= {"losses": [2.0, 1.0], "peak_memory_bytes": 2**30, "parts_s": {}, "calls": {}, "bytes": {}}
(path.parent / f"rank-{rank}.json").write_text(json.dumps(values))
"""
"""In the place of a runner: what a rank does and reports."""


def session(
    folder: Path, *runners: str, repeats: int = 2, in_turns: bool = False
) -> tuple[Session, list[str]]:
    script = folder.parent / "stand_in.py"
    script.write_text(STAND_IN)

    def variant(runner: str) -> Variant:
        own = replace(job(2), runner=runner, in_turns=in_turns and runner != "peak")
        return Variant(runner, script, sys.executable, own, 1000, 6000.0)

    made, lines = Session(folder, [variant(r) for r in runners], variant("peak"), repeats, 60), []
    made.run(lines.append)
    return made, lines


def test_runs_alternate_and_are_kept(tmp_path: Path) -> None:
    first, _ = session(tmp_path / "out", "slow", "fast")
    ran = [(run["repeat"], run["variant"]) for run in first.runs]
    assert ran == [(0, "peak"), (0, "slow"), (0, "fast"), (1, "peak"), (1, "fast"), (1, "slow")]
    assert paired_ratios(first.runs, "fast", "slow") == pytest.approx([2, 2])
    [speed, _] = [rows for _, (_, rows) in first.tables()]
    assert [row[1] for row in speed] == ["10,240 (10,240..10,240)", "20,480 (20,480..20,480)"]
    assert speed[0][3].startswith("3.1%")  # 10,240 x 6,000 / (2 ranks x 1e9)
    more, lines = session(tmp_path / "out", "slow", "other", repeats=3)
    assert lines[0] == f"4 runs of {tmp_path / 'out' / 'results.json'} are kept"
    assert [(run["repeat"], run["variant"]) for run in more.runs[6:]] == [
        (0, "other"), (1, "other"), (2, "peak"), (2, "slow"), (2, "other"),
    ]  # fmt: skip
    assert more.runs[:6] == first.runs


def test_a_variant_that_fails_is_told_and_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its other rank does not outlive it, and the others go on; the next start tries it again."""
    monkeypatch.setattr("benchmarks.harness.ranks._GRACE_S", 0.2)
    found, lines = session(tmp_path / "out", "fast", "broken", "larger")
    assert sorted(found.problems) == ["broken", "larger"]
    assert "rank 1 ended with exit code 1" in found.problems["broken"]
    assert "no more memory" in found.problems["broken"]
    assert "has 1,002 parameters where the others have 1,000" in found.problems["larger"]
    assert len(lines) == 6  # two peaks, two of the one that is well, one of each that is not
    assert "| broken | left out |" in (tmp_path / "out" / "table.md").read_text()
    again, _ = session(tmp_path / "out", "fast", "larger", repeats=1)
    assert [run["variant"] for run in again.runs] == ["peak", "fast", "peak", "fast", "larger"]


def test_variants_take_turns(tmp_path: Path) -> None:
    """Step by step, both ranks of one before any of the next; a variant that fails does not hold up the others."""
    made, lines = session(tmp_path / "out", "slow", "weak", "fast", repeats=1, in_turns=True)
    steps = [line.split() for line in (tmp_path / "out" / "order").read_text().splitlines()]
    turns = [(runner, step) for runner, rank, step in steps if rank == "0"]
    assert turns == [
        ("slow", "0"), ("weak", "0"), ("fast", "0"), ("fast", "1"), ("slow", "1"), ("slow", "2"), ("fast", "2"),
    ]  # fmt: skip
    assert [turn for turn in turns for _ in range(2)] == [(runner, step) for runner, _, step in steps]
    assert "died in its step" in made.problems["weak"] and len(lines) == 4
    again, lines = session(tmp_path / "out", "slow", "fast", repeats=1, in_turns=True)
    assert lines == [f"3 runs of {tmp_path / 'out' / 'results.json'} are kept"]
    assert "in the same step, taken in turns" in again.tables()[0][0]
    _, lines = session(tmp_path / "out", "slow", "other", repeats=1, in_turns=True)
    assert [line.split(":")[0] for line in lines[1:]] == ["[1/1] repeat 1, slow", "[1/1] repeat 1, other"]


def test_one_that_is_killed_while_it_waits_is_left_out(tmp_path: Path) -> None:
    made, _ = session(tmp_path / "out", "killed", "slow", "fast", repeats=1, in_turns=True)
    assert "ended with exit code -9" in made.problems["killed"]
    assert {run["variant"] for run in made.runs if "result" in run} == {"peak", "slow", "fast"}


TINY = [
    "model.n_layers=2",
    "model.d_model=64",
    "model.d_ff=160",
    "model.vocab_size=256",
    "data.sequence_length=64",
    "global_batch_sequences=8",
    "micro_batch_sequences=2",
    "optim.lr=3e-3",
    "bench.ranks=2",
    "bench.steps=3",
    "bench.warmup_steps=1",
    "bench.repeats=1",
]


@pytest.mark.integration
def test_a_session(tmp_path: Path) -> None:
    """Our engine beside the bare loop: the same weights and tokens give the same losses, and a second start runs
    nothing again.

    Losses are at most 0.002 apart: the bare loop sums its micro batches in bf16 and stage 3 in fp32, a relative error
    of 2^-9 in each gradient, of which Adam's first steps let little through; 0.00013 was seen. A bare loop that does
    not reduce its gradients is 0.017 apart at the third step; another initial weight shows in the first digit.
    """
    variants = ["pretrain", "pytorch"]
    arguments = [f"bench.output={tmp_path}", f"bench.variants=[{','.join(variants)}]", *TINY]
    found = bench(*arguments)
    assert found.returncode == 0, found.stdout + found.stderr
    done = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [run["variant"] for run in done] == ["peak", *variants]
    ours, bare = (run["result"] for run in done[1:])
    assert ours["n_parameters"] == bare["n_parameters"]
    assert ours["losses"] == pytest.approx(bare["losses"], abs=0.002)
    assert ours["losses"][-1] < ours["losses"][0] - 0.05
    weights = 2 * ours["n_parameters"]
    assert bare["bytes"] == {"all_reduce bfloat16": weights}
    assert ours["bytes"]["reduce_scatter_tensor bfloat16"] == 2 * weights  # 2 micro batches
    for one in (ours, bare):
        assert len(one["step_s"]) == 3 and min(one["step_s"]) > 0
        assert one["tokens_per_second"] == pytest.approx(3 * 8 * 64 / sum(one["step_s"]))
        assert 2**27 < one["peak_memory_bytes"] < 2**32
        assert min(one["parts_s"][part] for part in ("forward", "backward", "communication", "optimizer")) > 0
    text = (tmp_path / "table.md").read_text()
    assert all(f"| {variant} |" in text for variant in variants)
    again = bench(*arguments)
    assert again.stdout.startswith(f"3 runs of {tmp_path / 'results.json'} are kept\n")
    assert "repeat 1," not in again.stdout
    assert json.loads((tmp_path / "results.json").read_text())["runs"] == done
