"""What must hold between a configuration and the corpora it names, checked before any process group is made."""

from __future__ import annotations

from pathlib import Path

from pretrain.config import ConfigError, TrainConfig
from pretrain.manifest import load_manifest
from pretrain.tokenizer import TOKENIZER_NAMES, tokenizer_in

VOCABULARY_MULTIPLE = (
    64  # matrix kernels like the output head's width in multiples of 64 (nanoGPT: 25% faster)
)


def resolve_inputs(config: TrainConfig, world_size: int) -> TrainConfig:
    """The config with `model.vocab_size` filled in. Raises ConfigError where inputs and config do not fit.

    Reads manifests only; imports no torch, so that a mistake is answered at once.
    """
    config.grad_accum_steps(world_size)
    manifests = {source.manifest: load_manifest(source.manifest) for source in config.data.corpora()}
    for path, manifest in manifests.items():
        if manifest.chunk_tokens % config.data.sequence_length:
            raise ConfigError(
                f"data.sequence_length={config.data.sequence_length} does not divide the chunks of {path} "
                f"({manifest.chunk_tokens} tokens); use a power of two up to that"
            )
    if config.evaluation.manifest is not None:
        manifests[config.evaluation.manifest] = load_manifest(config.evaluation.manifest)
    first_path, first = next(iter(manifests.items()))
    for path, manifest in manifests.items():
        if manifest.tokenizer_sha256 != first.tokenizer_sha256:
            raise ConfigError(
                f"{path} was made with another tokenizer than {first_path}; "
                "prepare both with the same tokenizer (tokenizer.path=...)"
            )
    needed = -(-first.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    if config.model.vocab_size is None:
        config.model.vocab_size = needed
    elif config.model.vocab_size < first.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the vocabulary of {first_path} "
            f"({first.vocab_size}); leave it out or give at least {needed}"
        )
    return config


def tokenizer_path(manifest_path: str) -> Path:
    """The tokenizer file of a corpus folder; a held-out corpus has its parent's. Raises ConfigError."""
    folder = Path(manifest_path).resolve().parent
    for candidate in (tokenizer_in(folder), tokenizer_in(folder.parent)):
        if candidate.is_file():
            return candidate
    raise ConfigError(
        f"{folder} has no {' or '.join(TOKENIZER_NAMES)}; prepare the corpus again or copy its tokenizer there"
    )
