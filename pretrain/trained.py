"""Loads a trained model for use: its configuration, weights and tokenizer, after checking that they belong together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pretrain.checkpoint.tensors import StoredWeights, open_weights
from pretrain.config import ModelConfig, Precision, TrainConfig
from pretrain.corpus.tokenizer import Tokenizer, tokenizer_in
from pretrain.errors import ConfigError
from pretrain.model.decoder import Decoder, build_decoder
from pretrain.model.kernels import capability_of
from pretrain.model.precision import precision_of, resolve_precision


@dataclass(frozen=True)
class TrainedModel:
    """A run at one checkpoint."""

    config: TrainConfig
    weights: Mapping[str, Tensor]
    """Whole fp32 parameters under the names of `Decoder.named_parameters()`. They are in memory, or `StoredWeights`."""
    tokenizer: Tokenizer
    step: int
    tokens_seen: int
    sequence_length: int
    """Number of tokens per sequence in the last data stage that the model was trained on."""
    precision: Precision
    """Precision in which it was last trained."""

    def decoder(self, device: torch.device, dtype: torch.dtype) -> Decoder:
        """The model in evaluation mode, with its weights on `device` in `dtype`."""
        return build_decoder(self.config.model, self.weights, device, dtype)


def load_trained(run_dir: str | Path, step: int | None = None, target: str | None = None) -> TrainedModel:
    """Load the model of a run's newest good checkpoint, or of the one at `step`, in one process.

    `target` is the URL of the checkpoints where they are not in the run folder. Raises ConfigError where there is no
    such checkpoint, where its configuration does not match its weights, or where the run folder has a
    different tokenizer.
    """
    with open_trained(run_dir, step, target) as trained:
        assert isinstance(trained.weights, StoredWeights)
        return replace(trained, weights=trained.weights.read(trained.weights))


@contextmanager
def open_trained(
    run_dir: str | Path, step: int | None = None, target: str | None = None
) -> Iterator[TrainedModel]:
    """What `load_trained` returns, with weights that are read when they are used, so the model may exceed memory."""
    with open_weights(run_dir, step, target) as (config, weights, state):
        _check_model(config.model, weights.shapes, Path(run_dir))
        tokenizer = Tokenizer(tokenizer_in(Path(run_dir)), sha256=state["tokenizer_sha256"])
        yield TrainedModel(
            config=config,
            weights=weights,
            tokenizer=tokenizer,
            step=state["step"],
            tokens_seen=state["tokens_seen"],
            sequence_length=state["sequence_length"],
            precision=precision_of(state),
        )


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
