"""Every combination of the engine's keys is either one that can work or is refused by name."""

from __future__ import annotations

import itertools

import pytest

from pretrain.config import EngineConfig, Precision, TrainConfig, load_config, to_dict
from pretrain.distributed import World
from pretrain.engine import engine as engine_module
from pretrain.engine.engine import Engine, deepspeed_config, nvme_folder
from pretrain.errors import ConfigError
from pretrain.train.run_folder import check_resumable
from support import ROOT
from support.workers.engine_worker import small_config

CHOICES = {
    "zero_stage": [0, 1, 2, 3],
    "precision": list(Precision),
    "offload_optimizer": [False, True],
    "offload_params": [False, True],
    "nvme_path": [None, "/nvme"],
    "hpz_partition_ranks": [1, 8],
    "quantized_weights": [False, True],
    "quantized_gradients": [False, True],
}
# What cannot be together, each as the keys and values that meet.
CANNOT = [
    {"zero_stage": {0}, "precision": {Precision.bf16, Precision.fp16}},
    {"zero_stage": {0}, "offload_optimizer": {True}},
    {"zero_stage": {0, 1, 2}, "offload_params": {True}},
    {"zero_stage": {0, 1, 2}, "nvme_path": {"/nvme"}},
    {"offload_optimizer": {False}, "nvme_path": {"/nvme"}},
    {"zero_stage": {0, 1, 2}, "hpz_partition_ranks": {8}},
    {"zero_stage": {0, 1, 2}, "quantized_weights": {True}},
    {"zero_stage": {0, 1, 2}, "quantized_gradients": {True}},
    {"hpz_partition_ranks": {8}, "offload_params": {True}},
    {"precision": {Precision.fp16, Precision.fp32}, "quantized_weights": {True}},
    {"precision": {Precision.fp16, Precision.fp32}, "quantized_gradients": {True}},
]


def test_all_combinations_of_the_engine() -> None:
    """Refused exactly where a rule above forbids it, and then the sentence names the keys of one of those rules."""
    n_refused = 0
    for values in itertools.product(*CHOICES.values()):
        chosen = dict(zip(CHOICES, values, strict=True))
        rules = [rule for rule in CANNOT if all(chosen[key] in bad for key, bad in rule.items())]
        if not rules:
            EngineConfig(**chosen)
            continue
        n_refused += 1
        with pytest.raises(ConfigError) as caught:
            EngineConfig(**chosen)
        named = [all(f"engine.{key}" in str(caught.value) for key in rule) for rule in rules]
        assert any(named), f"{chosen}: {caught.value}"
    assert 0 < n_refused < 2**11


@pytest.mark.parametrize(
    ("group", "ranks", "local", "allowed"),
    [(1, 7, None, True), (8, 16, 8, True), (4, 16, 8, True), (8, 12, None, False), (8, 16, 4, False)],
)
def test_groups_of_hpz_fit_the_ranks(group: int, ranks: int, local: int | None, allowed: bool) -> None:
    engine = EngineConfig(hpz_partition_ranks=group)
    if allowed:
        engine.check_ranks(ranks, local)
        return
    with pytest.raises(ConfigError, match=f"engine.hpz_partition_ranks={group} does not divide"):
        engine.check_ranks(ranks, local)


@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf/engine").glob("*.yaml")))
def test_every_engine_goes_with_every_optimizer(optim: str, name: str) -> None:
    words = ["run_dir=r", "data.manifest=m", "total_steps=2", f"optim={optim}", f"engine={name}"]
    words += ["engine.nvme_path=/nvme"] if name == "zero3_nvme" else []
    config = load_config(TrainConfig, words, "config")
    settings = deepspeed_config(config, 8, nvme_folder(config, rank=3))
    zero, engine = settings["zero_optimization"], config.engine
    assert zero["stage"] == engine.zero_stage
    assert zero.get("zero_hpz_partition_size", 1) == engine.hpz_partition_ranks
    assert zero.get("zero_quantized_weights", False) == engine.quantized_weights
    assert zero.get("zero_quantized_gradients", False) == engine.quantized_gradients
    # Its kernels read the bits of any tensor as fp16.
    assert (settings.get("communication_data_type") == "fp16") == engine.quantized_gradients
    if engine.nvme_path:
        assert zero["offload_optimizer"]["device"] == "nvme"
        assert zero["offload_optimizer"]["nvme_path"].startswith("/nvme/pretrain-")
        assert zero["offload_optimizer"]["nvme_path"].endswith("-rank3")
        assert zero["offload_param"]["device"] == "cpu"


def test_another_optimizer_at_resume_is_refused() -> None:
    old = {"config": {"optim": {"name": "adamw"}}}
    muon = small_config(3, "bf16", ["optim=muon"])
    with pytest.raises(ConfigError, match=r"optim\.name=muon \(was adamw\)"):
        check_resumable(muon, old)


def test_a_key_that_a_run_of_before_does_not_name_has_its_default() -> None:
    """So that a key can be added to the model without ending the runs that were made before."""
    config = small_config(3, "bf16", [])
    stored = to_dict(config)
    for group, key in (
        ("model", "qk_norm"),
        ("model", "rope_scaling"),
        ("data", "document_masking"),
        ("optim", "eps"),
    ):
        del stored[group][key]
    assert check_resumable(config, {"config": stored}) == []
    scaled = small_config(3, "bf16", ["model.rope_scaling.rope_type=linear", "model.rope_scaling.factor=2"])
    with pytest.raises(ConfigError, match=r"model\.rope_scaling\.factor=2\.0 \(was 1\.0\)"):
        check_resumable(scaled, {"config": stored})
    changed = small_config(3, "bf16", ["model.qk_norm=true"])
    with pytest.raises(ConfigError, match=r"model\.qk_norm=True \(was False\)"):
        check_resumable(changed, {"config": stored})


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["engine.quantized_weights=true"], "engine.quantized_weights=True.* NVIDIA GPUs only"),
        (
            ["engine.quantized_gradients=true"],
            "engine.quantized_gradients=True: DeepSpeed quantizes on NVIDIA",
        ),
        (["engine.offload_optimizer=true", "engine.nvme_path=/nowhere"], "engine.nvme_path=/nowhere"),
    ],
)
def test_what_a_host_lacks_is_said_before_the_model_is_built(
    words: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module.torch.cuda, "is_available", lambda: False)
    engine = Engine.__new__(Engine)
    engine.config = small_config(3, "bf16", words)
    engine.world = World(rank=0, size=1, local_rank=0, device=engine_module.torch.device("cpu"))
    engine._files = nvme_folder(engine.config, 0)
    with pytest.raises(ConfigError, match=sentence):
        engine._check_hosts()
