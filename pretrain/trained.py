"""Loads a trained model for use: its configuration, weights and tokenizer, after checking that they belong together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pretrain.checkpoint.folder import list_checkpoints, newest_state, root_of_run, step_of
from pretrain.checkpoint.state import BaseReference
from pretrain.checkpoint.tensors import StoredWeights, open_base_weights, open_weights
from pretrain.config import LoraConfig, ModelConfig, Precision, TrainConfig, Weights, Which, stored_config
from pretrain.corpus.chat import OWN_TEMPLATE, Chat
from pretrain.corpus.chat_template import template_in
from pretrain.corpus.tokenizer import Tokenizer, tokenizer_in
from pretrain.errors import ConfigError
from pretrain.model.decoder import Decoder, build_decoder
from pretrain.model.kernels import capability_of
from pretrain.model.lora import is_adapter, merged, require_peft
from pretrain.model.precision import precision_of, resolve_precision
from pretrain.reliability.journal import heldout_losses_of


@dataclass(frozen=True)
class Adapters:
    """The adapters of a run, apart from the weights that they belong to."""

    config: LoraConfig
    weights: dict[str, Tensor]
    """Whole fp32 parameters by the names in the run's checkpoints."""
    base: BaseReference
    """The weights that they belong to, which `open_base_weights` reads."""


@dataclass(frozen=True)
class TrainedModel:
    """A run at one checkpoint."""

    config: TrainConfig
    weights: Mapping[str, Tensor]
    """Whole fp32 parameters under the names of `Decoder.named_parameters()`. They are in memory, or read when used."""
    tokenizer: Tokenizer
    step: int
    tokens_seen: int
    sequence_length: int
    """Number of tokens per sequence in the last data stage that the model was trained on."""
    precision: Precision
    """Precision in which it was last trained."""
    chat_template: str | None = None
    """The template of the dialogues it was trained on, for `pretrain.corpus.chat.Chat`; None where there were none."""
    has_ema: bool = False
    """Whether the checkpoint has a moving average of the weights, too."""
    adapters: Adapters | None = None
    """What a run of adapters has trained; its `weights` are then those with the adapters merged in."""

    def decoder(self, device: torch.device, dtype: torch.dtype) -> Decoder:
        """The model in evaluation mode, with its weights on `device` in `dtype`."""
        return build_decoder(self.config.model, self.weights, device, dtype, self.config.causal)

    def chat(self) -> Chat:
        """Writes dialogues for this model: in the template of its training, or in ours if it never saw dialogues."""
        return Chat(self.tokenizer, OWN_TEMPLATE if self.chat_template is None else self.chat_template)


def load_trained(
    run_dir: str | Path,
    step: int | None = None,
    target: str | None = None,
    *,
    which: Which = Which.newest,
    weights: Weights = Weights.trained,
) -> TrainedModel:
    """Load the model of a run's newest good checkpoint, or of its best one, or of the one at `step`, in one process.

    `weights` chooses between the trained weights and their moving average. `target` is the URL of the checkpoints where
    they are not in the run folder. Raises ConfigError where there is no such checkpoint, where its configuration does
    not match its weights, or where the run folder has a different tokenizer.
    """
    with open_trained(run_dir, step, target, which=which, weights=weights) as trained:
        stored = trained.weights
        return replace(
            trained, weights=stored.read(stored) if isinstance(stored, StoredWeights) else dict(stored)
        )


@contextmanager
def open_trained(
    run_dir: str | Path,
    step: int | None = None,
    target: str | None = None,
    *,
    which: Which = Which.newest,
    weights: Weights = Weights.trained,
) -> Iterator[TrainedModel]:
    """What `load_trained` returns, with weights that are read when they are used, so the model may exceed memory.

    Those of a run of adapters are merged then, and only the adapters are in memory.
    """
    if which is Which.best:
        if step is not None:
            raise ConfigError(f"step={step} and which=best: give one of them")
        step = best_step(Path(run_dir), target)
    with ExitStack() as stack:
        config, stored, state = stack.enter_context(open_weights(run_dir, step, target, weights))
        tensors: Mapping[str, Tensor] = stored
        shapes, adapters = stored.shapes, None
        if "base" in state:
            require_peft()
            adapters = Adapters(config.lora, stored.read(stored), state["base"])
            base = stack.enter_context(open_base_weights(run_dir, adapters.base, target))
            head = {n: weight.shape for n, weight in adapters.weights.items() if not is_adapter(n)}
            shapes = {**base.shapes, **head}
            _check_model(config.model, shapes, Path(run_dir))
            tensors = merged(config.model, adapters.config, base, adapters.weights)
            config = replace(config, lora=LoraConfig())  # from here on it is an ordinary model
        _check_model(config.model, shapes, Path(run_dir))
        tokenizer = Tokenizer(tokenizer_in(Path(run_dir)), sha256=state["tokenizer_sha256"])
        yield TrainedModel(
            config=config,
            weights=tensors,
            tokenizer=tokenizer,
            step=state["step"],
            tokens_seen=state["tokens_seen"],
            sequence_length=state["sequence_length"],
            precision=precision_of(state),
            chat_template=template_in(Path(run_dir)),
            has_ema=bool(state.get("ema")),
            adapters=adapters,
        )


def check_writes_text(trained: TrainedModel, run_dir: str | Path) -> None:
    """Raise ConfigError for a classifier."""
    if trained.config.model.classes:
        raise ConfigError(
            f"run_dir={run_dir} was trained with objective=classify, so it names classes and writes no text; "
            "launch/eval.py classifies"
        )


def best_step(run_dir: Path, target: str | None = None) -> int:
    """The step of the checkpoint with the lowest held-out loss, of those that the run still has. Raises ConfigError."""
    if not run_dir.is_dir():
        raise ConfigError(f"run_dir={run_dir} does not exist")
    newest = newest_state(run_dir, target)
    evaluation = stored_config(newest["config"], f"run_dir={run_dir}").evaluation
    losses = heldout_losses_of(run_dir, evaluation.deciding_metric)
    steps = [step_of(path) for path in list_checkpoints(root_of_run(run_dir, target))]
    if not (measured := [step for step in steps if step in losses]):
        raise ConfigError(
            f"which=best: run_dir={run_dir} has no checkpoint at a step with a held-out loss (checkpoints: "
            f"{', '.join(map(str, steps)) or 'none'}); give step=N, or train with evaluation.manifest=DIR"
        )
    return min(measured, key=lambda step: losses[step])


def _check_model(config: ModelConfig, shapes: dict[str, torch.Size], run_dir: Path) -> None:
    """Raise ConfigError unless the model of a stored configuration has exactly the checkpoint's parameters."""
    expected = None
    # A stored configuration is untrusted. This condition limits the size of the model that is built here.
    if config.n_layers <= len(shapes) and config.vocab_size is not None:
        with torch.device("meta"):
            expected = {name: weight.shape for name, weight in Decoder(config, seed=0).named_parameters()}
    if expected != shapes:
        raise ConfigError(
            f"run_dir={run_dir}: the configuration in its checkpoint does not match the weights in it"
        )


def precision_on(device: torch.device, asked: Precision) -> Precision:
    """The precision in which a model computes on a device: `asked`, with auto resolved for this device."""
    return resolve_precision(asked, capability_of(device).bf16)
