"""The weights that a run begins with: those of another run, trained on, or frozen under adapters.

A run of adapters copies the weights to `base/` beside its checkpoints, as a checkpoint without moments: what it needs
does not depend on the other run's folder, and its own checkpoints hold the adapters and the hash of that copy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from pretrain.checkpoint import tensors as checkpoint
from pretrain.checkpoint.folder import root_of, root_of_run
from pretrain.checkpoint.state import BaseReference, RunState
from pretrain.checkpoint.tensors import Verified
from pretrain.config import Objective, TrainConfig, to_dict
from pretrain.distributed import Partition, World, on_main
from pretrain.errors import ConfigError
from pretrain.model.decoder import Decoder
from pretrain.model.lora import HEAD, is_trained
from pretrain.reliability.heartbeat import mark
from pretrain.remote import is_url
from pretrain.train.run_folder import shapes_the_run


class Base(NamedTuple):
    """The frozen weights of a run of adapters."""

    reference: BaseReference
    """What its checkpoints say about them."""
    shares: dict[str, torch.Tensor]
    """This rank's share of each flattened weight by key (`weight.<name>`)."""


def source_of(run_dir: str, world: World, tokenizer_sha256: str) -> Verified:
    """The newest good checkpoint of another run, given by its folder or its URL. Raises ConfigError."""
    root = root_of(run_dir, run_dir) if is_url(run_dir) else root_of_run(Path(run_dir), key="init_from")
    found = checkpoint.find_latest(root, world)
    if found.verified is None:
        raise ConfigError(
            f"init_from={run_dir} holds no usable checkpoint ({'; '.join(found.passed_over) or 'none'})"
        )
    if found.verified.state["tokenizer_sha256"] != tokenizer_sha256:
        raise ConfigError(f"init_from={run_dir} was trained with another tokenizer than this corpus")
    if "base" in found.verified.state:
        raise ConfigError(
            f"init_from={run_dir} holds adapters, not a whole model; launch/export.py with dtype=fp32 merges them, and "
            "launch/import_model.py makes a run folder of the export for init_from"
        )
    return found.verified


def new_weights(source: Verified, config: TrainConfig) -> list[str]:
    """The names of the weights that keep their initial values where all others begin as those of another run: the head
    of a classifier, unless that run is one of the same classes.

    Raises ConfigError where that run is a classifier, whose head no other objective can use.
    """
    theirs = source.state["config"].get("model", {}).get("classes", [])
    if theirs and not config.model.classes:
        raise ConfigError(
            f"init_from={config.init_from} was trained with objective=classify and has no head for a vocabulary; give "
            "the run that it began with, or objective=classify"
        )
    return [HEAD] if config.model.classes != theirs else []


def base_of(
    config: TrainConfig, root: Path, state: RunState | None, tokenizer_sha256: str, world: World
) -> Base | None:
    """The frozen weights of a run of adapters, copied if the run begins; None for any other run.

    `state` is that of the run's newest checkpoint. All ranks call this together. Raises ConfigError where `init_from`
    does not suit the configuration, and CheckpointError where the copy is damaged or not the one of the checkpoint.
    """
    if not config.lora.r:
        return None
    if state is None:
        _copy(config, root, tokenizer_sha256, world)
    mark("load")
    found = checkpoint.find_base(root, world, state.get("base") if state else None)
    return Base(checkpoint.reference_to(found), _shares(found, config, world))


def _shares(found: Verified, config: TrainConfig, world: World) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = Decoder(config.model, seed=0)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    without = [name for name in shapes if is_trained(name, config.model)]
    return checkpoint.load(found, [f"weight.{name}" for name in shapes], shapes, world, without=without)


def _copy(config: TrainConfig, root: Path, tokenizer_sha256: str, world: World) -> None:
    """Write the weights of `init_from` to `base/`, instead of any that an earlier start has left there."""
    assert config.init_from is not None
    source = source_of(config.init_from, world, tokenizer_sha256)
    check_same_model(config, source)
    mark("base")
    shares = _shares(source, config, world)
    shapes = source.state["tensors"]
    partitions = {
        key: Partition(values, torch.Size(shapes[key.removeprefix("weight.")]).numel())
        for key, values in shares.items()
    }
    held = {name: shape for name, shape in shapes.items() if f"weight.{name}" in shares}
    state = {**source.state, "optimizer_step": 0, "order": {}, "tensors": held}
    folder = checkpoint.base_root(root)

    def prepare() -> None:
        for earlier in checkpoint.list_checkpoints(folder):
            checkpoint.remove(earlier)

    on_main(prepare, world)
    checkpoint.save(folder, source.state["step"], partitions, state, world)


def check_same_model(config: TrainConfig, source: Verified) -> None:
    """Raise ConfigError where what the weights' shapes do not show differs: heads, positions, norms, objective."""
    objective = source.state["config"].get("objective", Objective.causal.value)
    has_same_body = {objective, config.objective.value} <= {Objective.causal.value, Objective.classify.value}
    if objective != config.objective.value and not (has_same_body and config.model.classes):
        raise ConfigError(
            f"objective={config.objective.value}, but init_from={config.init_from} was trained with {objective}, and "
            "adapters need the same model; give the objective of that run"
        )
    theirs, ours = (
        _derived(model) for model in (source.state["config"].get("model", {}), to_dict(config.model))
    )
    for key, value in ours.items():
        of_head = key in ("classes", "pooling") and config.model.classes
        if of_head or key == "init_std" or not shapes_the_run(f"model.{key}"):
            continue
        if theirs.get(key, value) != value:
            raise ConfigError(
                f"model.{key}={value}, but init_from={config.init_from} was trained with {theirs[key]}, and adapters "
                "need the same model; give the model options of that run"
            )


def _derived(model: dict[str, Any]) -> dict[str, Any]:
    """The keys of a model with the values that stand for null in it; an import states them."""
    n_heads = model.get("n_heads")
    values = {"n_kv_heads": n_heads, "d_head": model.get("d_model", 0) // n_heads if n_heads else None}
    return model | {key: value for key, value in values.items() if key in model and model[key] is None}
