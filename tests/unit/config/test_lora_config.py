"""The keys of adapters: what cannot work is refused by name, and an old run has none."""

from __future__ import annotations

import pytest

from pretrain.config import LoraConfig, TrainConfig, load_config, to_dict
from pretrain.config.objective import TARGETS
from pretrain.errors import ConfigError
from pretrain.train.run_folder import check_resumable
from support.trained_run import script

RUN = ["run_dir=r", "data.manifest=m", "total_steps=2"]
ADAPTED = [*RUN, "init_from=base", "lora.r=8"]


def config_of(*words: str) -> TrainConfig:
    return load_config(TrainConfig, list(words), "config")


def test_adapters_are_off_by_default() -> None:
    assert config_of(*RUN).lora == LoraConfig()
    assert LoraConfig().r == 0


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([*RUN, "lora.r=8"], ("lora.r=8", "init_from=")),
        ([*RUN, "lora.alpha=32"], ("lora.alpha=32", "lora.r=0", "no effect")),
        ([*RUN, "lora.dora=true"], ("lora.dora=True", "lora.r=0")),
        ([*RUN, "lora.targets=[q]"], ("lora.targets=['q']", "lora.r=0")),
        ([*ADAPTED, "lora.r=-1"], ("lora.r=-1",)),
        ([*ADAPTED, "lora.alpha=0"], ("lora.alpha=0",)),
        ([*ADAPTED, "lora.dropout=1"], ("lora.dropout=1",)),
        ([*ADAPTED, "lora.targets=[q_proj,v,experts]"], ("q_proj", "experts", *TARGETS)),
        ([*ADAPTED, "lora.targets=[]"], ("lora.targets=[]", *TARGETS)),
        ([*ADAPTED, "lora.quantized=true"], ("lora.quantized", "QLoRA")),
        ([*ADAPTED, "load_in_4bit=true"], ("load_in_4bit", "QLoRA")),
        ([*RUN, "lora_rank=8"], ("lora_rank", "did you mean lora.r?")),
        ([*RUN, "use_rslora=true"], ("use_rslora", "did you mean lora.rank_stabilized?")),
    ],
)
def test_what_cannot_work_is_refused_by_name(words: list[str], parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(*words)
    assert [part for part in parts if part not in str(caught.value)] == []


def test_the_benchmark_knows_no_adapters_and_says_so() -> None:
    module = script("bench")
    with pytest.raises(ConfigError, match=r"lora\.r=8 "):
        load_config(module.BenchConfig, ["bench.output=o.json", "init_from=base", "lora.r=8"], "bench")


def test_the_planner_takes_adapters_without_a_run_that_they_begin_with() -> None:
    module = script("plan")
    config = load_config(module.PlanConfig, ["total_tokens=1000000", "lora.r=8"], "plan")
    assert (config.lora.r, config.init_from) == (8, "unused")


def test_a_run_keeps_its_adapters() -> None:
    state = {"config": to_dict(config_of(*ADAPTED))}
    for word in (
        "lora.r=4",
        "lora.alpha=8",
        "lora.targets=[q]",
        "lora.dora=true",
        "lora.rank_stabilized=true",
    ):
        with pytest.raises(ConfigError, match=word.split("=")[0]):
            check_resumable(config_of(*ADAPTED, word), state)
    assert check_resumable(config_of(*ADAPTED, "lora.dropout=0.1"), state) == ["lora.dropout: 0.0 -> 0.1"]


def test_a_run_of_before_has_no_adapters() -> None:
    old = to_dict(config_of(*RUN))
    del old["lora"]
    assert check_resumable(config_of(*RUN), {"config": old}) == []
    with pytest.raises(ConfigError, match=r"lora\.r=8 \(was 0\)"):
        check_resumable(config_of(*ADAPTED), {"config": old})
