"""The precision of a run: what the devices decide, loss scaling for fp16, and runs that change it on the way."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.checkpoint.tensors import list_checkpoints, read_state
from pretrain.config import Precision, TrainConfig, load_config
from pretrain.engine import loss_scale
from pretrain.engine import peak as device_peak
from pretrain.engine.loss_scale import GROWTH_STEPS, INITIAL, LossScale
from pretrain.engine.peak import emulation_warning
from pretrain.errors import ConfigError
from pretrain.model.kernels import Capability, least_capable, resolve
from pretrain.model.precision import cpu_has_bf16, host_cpu_has_bf16, precision_of, resolve_precision
from pretrain.reliability.journal import read_ledger, read_metrics
from support import ROOT
from support.launching import Ranks, run_ranks
from support.tiny import TinyCorpus, events, run_arguments
from support.trained_run import TEXTS, make_run, run_script

GENOA = "processor : 0\nflags\t\t: fpu avx2 avx512f avx512_bf16 avx512vl\nprocessor : 1\nflags\t: fpu\n"
LAPTOP = "processor : 0\nflags\t\t: fpu sse4_2 avx2 fma avx512_bf16x\n"
GRAVITON = "processor\t: 0\nFeatures\t: fp asimd sve bf16 i8mm\n"
WITHOUT = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
"""Environment of a process that plays a CPU without bf16 units on any x86-64 machine."""
CPU_WITHOUT = Capability("cpu", bf16=False, host="laptop")


def config_of(*overrides: str) -> TrainConfig:
    given = ["run_dir=r", "data.manifest=m", "total_steps=200", *overrides]
    return load_config(TrainConfig, given, "config")


# ---- what the devices decide -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpuinfo", "isa", "expected"),
    [
        (GENOA, None, True),
        (GENOA.replace("avx512_bf16", "amx_bf16"), None, True),
        (GENOA.replace("avx512_bf16", "avx512_vnni"), None, False),
        (LAPTOP, None, False),
        (GRAVITON, None, True),
        (GRAVITON.replace(" bf16", ""), None, False),
        ("", None, False),
        (GENOA, "AVX2", False),
        (GENOA, "avx512_core_vnni", False),
        (GENOA, "AVX512_CORE_BF16", True),
        (GENOA, "DEFAULT", True),
    ],
)
def test_a_cpu_with_bf16_units_is_told_by_its_flags(cpuinfo: str, isa: str | None, expected: bool) -> None:
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        assert cpu_has_bf16(cpuinfo, {} if isa is None else {name: isa}) is expected


def test_only_auto_depends_on_the_device() -> None:
    assert [resolve_precision(Precision.auto, has) for has in (True, False)] == [
        Precision.bf16,
        Precision.fp32,
    ]
    for precision in set(Precision) - {Precision.auto}:
        assert resolve_precision(precision, True) is resolve_precision(precision, False) is precision


def test_the_least_capable_host_decides() -> None:
    a100 = Capability("cuda", 80, triton=True, bf16=True, host="a")
    t4 = Capability("cuda", 75, triton=False, bf16=False, host="t")
    assert least_capable([a100, a100._replace(host="b")]) == a100
    both = least_capable([a100, t4, a100])
    assert both == Capability("cuda", 75, triton=False, bf16=False, host="t")
    assert resolve(config_of(), both).engine.precision is Precision.fp32
    assert resolve(config_of(), a100).engine.precision is Precision.bf16
    assert resolve(config_of("engine.precision=fp16"), both).kernels.attention.value == "sdpa"
    assert resolve(config_of("engine.precision=fp16"), a100).kernels.attention.value == "flash"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["kernels=fp8"], ["kernels.fp8=true", "fp32"]),
        (["engine.quantized_weights=true"], ["engine.quantized_weights=true", "fp32"]),
        (["engine.quantized_gradients=true"], ["engine.quantized_gradients=true", "fp32"]),
        (["kernels.attention=flex"], ["kernels.attention=flex"]),
    ],
)
def test_what_the_chosen_precision_does_not_allow_is_refused(overrides: list[str], words: list[str]) -> None:
    """`auto` is checked again once it is known; a rule of the precision says where the precision came from."""
    config = config_of(*overrides)
    with pytest.raises(ConfigError) as raised:
        resolve(config, CPU_WITHOUT)
    assert all(word in str(raised.value) for word in words), raised.value
    if "fp32" in words:
        assert "engine.precision=auto is fp32 on laptop" in str(raised.value)


def test_stage_0_needs_fp32() -> None:
    config = config_of("engine.zero_stage=0")
    assert resolve(config, CPU_WITHOUT).engine.precision is Precision.fp32
    with pytest.raises(ConfigError, match=r"engine.zero_stage=0.*engine.precision=auto is bf16 on genoa"):
        resolve(config, Capability("cpu", bf16=True, host="genoa"))


def test_a_state_from_before_auto_is_still_understood() -> None:
    old = {"config": {"engine": {"precision": "bf16"}}}
    assert precision_of(old) is Precision.bf16
    new = {"config": {"engine": {"precision": "auto"}}, "precision": "fp32"}
    assert precision_of(new) is Precision.fp32


@pytest.mark.parametrize(("asked", "plain", "warned"), [(0.9e9, 58e9, True), (190e9, 54e9, False)])
@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp16])
def test_emulation_is_said_with_both_rates(
    monkeypatch: pytest.MonkeyPatch, precision: Precision, asked: float, plain: float, warned: bool
) -> None:
    """A stand-in gives the rates: what this machine would measure is not known beforehand."""

    def rate(device: torch.device, dtype: torch.dtype, **_: object) -> float:
        return plain if dtype is torch.float32 else asked

    monkeypatch.setattr(device_peak, "measure_matmul_flops", rate)
    found = emulation_warning(precision, CPU_WITHOUT, torch.device("cpu"))
    assert (found is not None) == warned
    if found is not None:
        assert all(word in found for word in (precision.value, "laptop", "0.9 GFLOP/s", "58.0"))


def test_hardware_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_peak, "measure_matmul_flops", lambda *_, **__: pytest.fail("it was measured"))
    cpu = torch.device("cpu")
    assert emulation_warning(Precision.fp32, CPU_WITHOUT, cpu) is None
    assert emulation_warning(Precision.bf16, CPU_WITHOUT._replace(bf16=True), cpu) is None


def test_a_process_can_play_a_cpu_without_bf16_units() -> None:
    """What the tests below and docs/configuration.md rely on."""
    code = "from pretrain.model.precision import host_cpu_has_bf16; print(host_cpu_has_bf16())"
    found = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **WITHOUT}, cwd=ROOT, capture_output=True, text=True
    )
    assert found.stdout.strip() == "False", found.stderr


# ---- the loss scale --------------------------------------------------------------------------------------------------

STEPS = st.lists(st.tuples(st.booleans(), st.sampled_from([2.0, math.nan, math.inf, 9.0])), max_size=60)


@given(STEPS, st.integers(0, 60))
def test_a_restored_scale_goes_on_as_it_would_have(steps: list[tuple[bool, float]], cut: int) -> None:
    straight, resumed = LossScale(), LossScale()
    for number, (applied, loss) in enumerate(steps):
        if number == cut:
            resumed = LossScale(json.loads(json.dumps(resumed.state())))
        said = {scale.update(applied=applied, loss=loss, limit=5.0) for scale in (straight, resumed)}
        assert len(said) == 1
        assert straight.value == resumed.value
    assert straight.state() == resumed.state()


@given(STEPS)
def test_only_a_gradient_that_overflows_alone_halves_the_scale(steps: list[tuple[bool, float]]) -> None:
    scale = LossScale()
    for applied, loss in steps:
        before = scale.value
        blamed = scale.update(applied=applied, loss=loss, limit=5.0)
        assert blamed == (not applied and loss == 2.0 and before > 1)
        assert scale.value == (before / 2 if blamed else before)  # 60 steps are too few to double it
        assert scale.value >= 1


def test_a_scale_is_doubled_after_enough_updates_in_a_row() -> None:
    scale = LossScale()
    for _ in range(GROWTH_STEPS - 1):
        scale.update(applied=True, loss=2.0, limit=math.inf)
    assert scale.value == INITIAL
    scale.update(applied=True, loss=2.0, limit=math.inf)
    assert scale.value == 2 * INITIAL
    assert scale.state()["applied"] == 0


def test_a_gradient_that_overflows_without_a_scale_is_a_fault() -> None:
    scale = LossScale({"value": 2.0, "applied": 3})
    assert scale.update(applied=False, loss=2.0, limit=math.inf)
    assert scale.state() == {"value": 1.0, "applied": 0}
    assert not scale.update(applied=False, loss=2.0, limit=math.inf)
    assert scale.value == loss_scale.SMALLEST


# ---- the model in use ------------------------------------------------------------------------------------------------


def test_evaluation_and_generation_follow_the_same_rule(tmp_path: Path) -> None:
    """They name what they computed in, and agree but for rounding; a CPU without bf16 units takes fp32 by itself."""
    make_run(tmp_path / "run")
    (tmp_path / "text.txt").write_text(TEXTS[0])
    run, text = f"run_dir={tmp_path / 'run'}", f"input=[{tmp_path / 'text.txt'}]"
    here = resolve_precision(Precision.auto, host_cpu_has_bf16()).value
    losses = {}
    for asked, env, expected in [
        ("bf16", {}, "bf16"),
        ("fp16", {}, "fp16"),
        ("fp32", {}, "fp32"),
        ("auto", {}, here),
        ("auto", WITHOUT, "fp32"),
    ]:
        words = [f"precision={asked}", "--json"]
        scored = run_script("eval", run, text, *words, env=env)
        assert scored.returncode == 0, scored.stderr
        found = json.loads(scored.stdout.splitlines()[-1])
        assert found["precision"] == expected
        losses[asked] = found["loss"]
        if asked in ("fp16", "auto"):
            written = run_script("generate", run, "max_new_tokens=3", *words, env=env)
            assert json.loads(written.stdout.splitlines()[-1])["precision"] == expected, written.stderr
    assert losses["auto"] == pytest.approx(losses["fp32"], abs=1e-5)  # other instructions. Seen: 5e-7.
    assert losses["fp16"] == pytest.approx(losses["fp32"], abs=2e-3)  # 11 bits of mantissa
    assert losses["bf16"] == pytest.approx(losses["fp32"], abs=2e-2)  # 8 bits
    assert len({losses[name] for name in ("bf16", "fp16", "fp32")}) == 3


# ---- real runs -------------------------------------------------------------------------------------------------------


def samples(run_dir: Path) -> list[tuple[int, list[int], str]]:
    return [(e["step"], e["samples"], e["tokens_xxh3"]) for e in read_ledger(run_dir)]


@pytest.mark.integration
def test_a_run_changes_its_precision_on_the_way(corpus: TinyCorpus, straight: Path, tmp_path: Path) -> None:
    """bf16 to step 4, fp32 to step 8 because one rank has no bf16, and bf16 again: the samples are the same."""
    run_dir = tmp_path / "run"

    def start(
        name: str, *more: str, env_of: dict[int, dict[str, str]] | None = None
    ) -> tuple[list[int], str]:
        arguments = run_arguments(corpus, run_dir, "logging.every_steps=1", *more)
        with Ranks(2, "launch/train.py", *arguments, log_dir=tmp_path / name, env_of=env_of) as ranks:
            return ranks.wait(), ranks.output()

    codes, _ = start("first", "engine.precision=bf16", "stop_at_step=4")
    assert codes == [75, 75]
    codes, said = start("second", "stop_at_step=8", env_of={1: WITHOUT})
    assert codes == [75, 75]
    assert "tok/s in fp32" in said and "tok/s in bf16" not in said
    codes, said = start("third", "engine.precision=bf16")
    assert codes == [0, 0], said
    assert samples(run_dir) == samples(straight)
    facts = [
        {key: event.get(key) for key in ("precision", "precision_before", "precision_decided_by")}
        for event in events(run_dir)
        if event["event"] in ("started", "resumed")
    ]
    host = os.uname().nodename
    assert facts == [
        {"precision": "bf16", "precision_before": None, "precision_decided_by": None},
        {"precision": "fp32", "precision_before": "bf16", "precision_decided_by": host},
        {"precision": "bf16", "precision_before": "fp32", "precision_decided_by": None},
    ]
    assert [read_state(path)["precision"] for path in list_checkpoints(run_dir)] == ["bf16", "fp32", "bf16"]
    ours, theirs = ([r["loss"] for r in read_metrics(folder)] for folder in (run_dir, straight))
    assert ours == pytest.approx(theirs, abs=0.02)  # bf16's rounding. Seen: 4e-3.


@pytest.mark.integration
def test_an_fp16_run_is_resumed_bit_for_bit(corpus: TinyCorpus, tmp_path: Path) -> None:
    """The loss scale among the rest; and its losses are those of fp32, but for rounding."""

    def train(name: str, *more: str, expect: int = 0) -> Path:
        run_dir = tmp_path / name
        arguments = run_arguments(corpus, run_dir, "engine.precision=fp16", "total_steps=8", *more)
        log_dir = tmp_path / f"{name}-{len(more)}"
        run_ranks(2, "launch/train.py", *arguments, log_dir=log_dir, expect=expect)
        return run_dir

    straight = train("straight")
    train("halves", "stop_at_step=5", expect=75)
    halves = train("halves")
    reference = train("reference", "engine.precision=fp32")
    losses = {name: [r["loss"] for r in read_metrics(tmp_path / name)] for name in ("straight", "halves")}
    assert losses["straight"] == losses["halves"]
    assert losses["straight"] == pytest.approx([r["loss"] for r in read_metrics(reference)], abs=2e-3)
    for run_dir in (straight, halves):
        assert [r["loss_scale"] for r in read_metrics(run_dir)] == [INITIAL] * 8
        state = read_state(list_checkpoints(run_dir)[-1])
        assert state["loss_scale"] == {"value": INITIAL, "applied": 8}
        assert state["optimizer_step"] == 8
    assert {r["loss_scale"] for r in read_metrics(reference)} == {None}
