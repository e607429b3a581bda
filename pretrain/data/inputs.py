"""Checks that a configuration and its corpora fit together, before any process group is created."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pretrain.checkpoint.folder import COMPLETE, list_checkpoints, root_of_run
from pretrain.config import Objective, TrainConfig
from pretrain.config.data_stages import plan_stages
from pretrain.config.launched import launched_local_size
from pretrain.corpus.chat_template import CHAT_TEMPLATE_NAME, MAX_TEMPLATE_BYTES, template_in
from pretrain.corpus.manifest import MANIFEST_NAME, MANIFEST_TIMEOUT_S, Manifest, load_manifest
from pretrain.corpus.tokenizer import TOKENIZER_NAMES, Tokenizer
from pretrain.data.lanes import choose_lanes, end_with_epoch, steps_until_epoch, weighted_by_size
from pretrain.data.masking import Masking
from pretrain.data.order import Order, SourceSize
from pretrain.errors import ConfigError
from pretrain.files import read_capped
from pretrain.remote import DamagedError, as_path, check_url, exists, folder_of, is_url, read_whole

VOCABULARY_MULTIPLE = (
    64  # matrix kernels are faster where the output head's width is a multiple of 64 (nanoGPT: by 25%)
)
_OF_OTHERS = {
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "lit_model.pth", ".metadata", "zero", "latest"),
    *("latest_universal", "latest_checkpointed_iteration.txt"),
}
"""Files that show a checkpoint which `launch/import_model.py` may read."""


class Inputs(NamedTuple):
    """The configuration of a run and the manifests that it names."""

    config: TrainConfig
    """The configuration, with `model.vocab_size` filled in."""
    manifests: dict[str, Manifest]
    """The manifest of each corpus, by its path or URL in the configuration. Each is read only once per start."""
    masking: Masking | None = None
    """What hides tokens where the objective is mlm."""


def resolve_inputs(config: TrainConfig, world_size: int) -> Inputs:
    """Read the manifests and fill in `model.vocab_size`.

    Only the manifests of the corpora are read, and torch is not imported, so that mistakes are reported quickly. Raises
    ConfigError where the configuration and the corpora do not fit together.
    """
    config.grad_accum_steps(world_size)
    config.engine.check_ranks(world_size, launched_local_size())
    _check_urls(config)
    if config.init_from is not None and not is_url(config.init_from):
        _check_init_from(config.init_from, config)
    patience = config.data.read_timeout_s
    manifests = {
        source.manifest: load_manifest(source.manifest, patience) for source in config.data.corpora()
    }
    lengths = [stage.sequence_length for stage in config.stages]
    for path, manifest in manifests.items():
        check_lengths(lengths, manifest.chunk_tokens, path)
        check_packed(lengths, manifest, path)
    if config.total_epochs is not None:
        config.plan_epochs(steps_of_epochs(config, list(manifests.values())))
    for path in config.evaluation.corpora.values():
        manifests[path] = load_manifest(path, patience)
        check_packed([config.data.sequence_length], manifests[path], path)
    first_path, first = next(iter(manifests.items()))
    for path, manifest in manifests.items():
        if (manifest.tokenizer_sha256, manifest.vocab_size) != (first.tokenizer_sha256, first.vocab_size):
            raise ConfigError(
                f"{path} was made with another tokenizer than {first_path}; "
                "prepare both with the same tokenizer (tokenizer.path=...)"
            )
    _set_classes(config, manifests)
    needed = -(-first.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    if config.model.vocab_size is None:
        config.model.vocab_size = needed
    elif config.model.vocab_size < first.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the vocabulary of {first_path} "
            f"({first.vocab_size}); leave it out or give at least {needed}"
        )
    return Inputs(config, manifests, masking_of(config, first_path, first))


def masking_of(config: TrainConfig, manifest_path: str, manifest: Manifest) -> Masking | None:
    """What hides tokens in a run on this corpus; None unless the objective is mlm."""
    if config.objective is not Objective.mlm:
        return None
    tokenizer = Tokenizer(tokenizer_path(manifest_path), manifest.tokenizer_sha256)
    return Masking.of(config.mlm, config.seed, tokenizer)


def _set_classes(config: TrainConfig, manifests: Mapping[str, Manifest]) -> None:
    """Fill in `model.classes`. Raises ConfigError for labeled documents under another objective, documents without
    labels under objective=classify, and corpora with different classes."""
    first_path, first = next(iter(manifests.items()))
    for path, manifest in manifests.items():
        if config.objective is Objective.classify and not manifest.classes:
            raise ConfigError(
                f"objective=classify needs labeled documents, and those of {path} have no labels; prepare it with "
                "format=labeled"
            )
        if config.objective is not Objective.classify and manifest.classes:
            raise ConfigError(
                f"the documents of {path} are labeled with classes, which objective={config.objective.value} would "
                "take for text; give objective=classify, or prepare it with format=text"
            )
        lengths = {stage.sequence_length for stage in config.stages}
        if manifest.packed and manifest.classes and lengths != {manifest.packed.sequence_tokens}:
            length = min(lengths - {manifest.packed.sequence_tokens})
            raise ConfigError(
                f"data.sequence_length={length} is not the {manifest.packed.sequence_tokens} tokens to which the "
                f"labeled documents of {path} were cut, and a model is used as it was trained; give "
                f"{manifest.packed.sequence_tokens}, or prepare them again with labels.max_tokens={length}"
            )
        if manifest.classes != first.classes:
            raise ConfigError(
                f"{path} has the classes {', '.join(manifest.classes)}, and {first_path} has "
                f"{', '.join(first.classes)}; prepare both with the same labels.classes"
            )
    if config.model.classes not in ([], first.classes):
        raise ConfigError(
            f"model.classes={config.model.classes} are not those of {first_path}, {first.classes}; leave it out"
        )
    config.model.classes = list(first.classes)


def steps_of_epochs(config: TrainConfig, manifests: Sequence[Manifest]) -> int:
    """Number of steps of a new run of `total_epochs` epochs of these corpora. Raises ConfigError as the run would."""
    assert config.total_epochs is not None
    sizes = [SourceSize.of(manifest) for manifest in manifests]
    stages = plan_stages(weighted_by_size(config.data, sizes), config.global_batch_sequences)
    lanes = config.data.lanes or choose_lanes(sizes, config.global_batch_sequences)
    order = Order(sizes, stages, lanes=lanes, window_chunks=config.data.window_chunks, seed=config.seed)
    return steps_until_epoch(end_with_epoch(order, sizes, config.total_epochs, 0), [], config.total_epochs)


def check_lengths(lengths: Sequence[int], chunk_tokens: int, manifest_path: str) -> None:
    """Raise ConfigError for a sequence length that does not divide the chunks of a corpus."""
    for length in lengths:
        if chunk_tokens % length:
            fits = max(t for t in range(1, min(length, chunk_tokens) + 1) if chunk_tokens % t == 0)
            raise ConfigError(
                f"data.sequence_length={length} does not divide the chunks of {manifest_path}, which have "
                f"{chunk_tokens} tokens; {fits} would, or prepare the corpus with other chunk_tokens"
            )


def check_packed(lengths: Sequence[int], manifest: Manifest, manifest_path: str) -> None:
    """Raise ConfigError for a sequence length that would cut the documents of a corpus of whole documents."""
    packed = manifest.sequence_tokens
    for length in lengths:
        if packed is not None and length % packed:
            raise ConfigError(
                f"data.sequence_length={length} would cut the dialogues of {manifest_path}, which are packed whole "
                f"into sequences of {packed} tokens; give {packed} or a multiple, or prepare them again with "
                f"chat.max_tokens={length}"
            )


def _check_urls(config: TrainConfig) -> None:
    """Raise ConfigError for a URL that cannot be used, and for a read timeout longer than the watchdog waits."""
    key = "data.manifest" if config.data.manifest is not None else "data.sources: manifest"
    named = [(key, source.manifest) for source in config.data.corpora()]
    named += [(config.evaluation.key_of(name), path) for name, path in config.evaluation.corpora.items()]
    remote = [(key, url) for key, url in named if is_url(url)]
    target = config.checkpoint.target or ""
    for key, url in [*remote, *[("checkpoint.target", target)] * is_url(target)]:
        check_url(key, url)
    if remote and config.data.read_timeout_s >= config.watchdog.step_s:
        raise ConfigError(
            f"data.read_timeout_s={config.data.read_timeout_s} is not less than watchdog.step_s="
            f"{config.watchdog.step_s}, so that the watchdog would end a run that waits for its store; change one"
        )


def _check_init_from(init_from: str, config: TrainConfig) -> None:
    """Raise ConfigError where `init_from` is not the folder of a run with a checkpoint, saying what it is.

    A run that has a checkpoint of its own resumes from that and no longer needs the other run.
    """
    own = as_path(config.checkpoint.target or config.run_dir)
    if isinstance(own, str) or list_checkpoints(own):
        return
    folder = Path(as_path(init_from))
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    advice = "give the run_dir of a run that this program has trained"
    if not folder.exists():
        what = "does not exist"
    elif not folder.is_dir():
        what = "is a file"
    elif {"run.json", "checkpoints"} & names:
        if list_checkpoints(root_of_run(folder, key="init_from")):
            return
        what = "is a run that has no checkpoint yet"
    elif COMPLETE in names or any(name.startswith("step-") for name in names):
        what = "is a part of a run"
    elif MANIFEST_NAME in names:
        what = "is a corpus"
    elif "config.json" in names:
        what = "is the folder of a Hugging Face model"
        advice = (
            f"import it (python launch/import_model.py input={init_from} output=DIR) and give init_from=DIR"
        )
    elif names & _OF_OTHERS:
        what = "is a checkpoint of another program"
        advice = (
            f"import it (python launch/import_model.py input={init_from} output=DIR) and give init_from=DIR"
        )
    else:
        what = "is not the folder of a run"
    raise ConfigError(f"init_from={init_from} {what}; {advice}")


def tokenizer_path(manifest_path: str) -> str | Path:
    """The path or URL of the tokenizer of a corpus: in its folder, or for a held-out corpus in the parent folder.

    Raises ConfigError if neither folder has one.
    """
    path = as_path(manifest_path)
    folder = folder_of(path if isinstance(path, str) else path.resolve())
    for place in (folder, folder_of(folder)):
        names = [f"{place}/{name}" if isinstance(place, str) else place / name for name in TOKENIZER_NAMES]
        for candidate in filter(exists, names):
            return candidate
    raise ConfigError(
        f"{folder} has no {' or '.join(TOKENIZER_NAMES)}; prepare the corpus again or copy its tokenizer there"
    )


def chat_template_of(config: TrainConfig, manifests: Mapping[str, Manifest]) -> str | None:
    """The chat template of the run's corpora of dialogues or, without any, that of the run in `init_from`.

    None where neither has one. Raises ConfigError where two corpora have different templates.
    """
    found: dict[str, str] = {}
    for source in config.data.corpora():
        manifest = manifests[source.manifest]
        for digest in [file.sha256 for file in manifest.files if file.name == CHAT_TEMPLATE_NAME]:
            folder = folder_of(as_path(source.manifest))
            path = (
                f"{folder}/{CHAT_TEMPLATE_NAME}" if isinstance(folder, str) else folder / CHAT_TEMPLATE_NAME
            )
            found.setdefault(_template_at(path, digest), source.manifest)
    if len(found) > 1:
        first, second = list(found.values())[:2]
        raise ConfigError(
            f"the dialogues of {first} and {second} were prepared with different chat templates; prepare one of them "
            "again with the template of the other (chat.template=FILE)"
        )
    if not found and config.init_from is not None and not is_url(config.init_from):
        return template_in(Path(as_path(config.init_from)))
    return next(iter(found), None)


def _template_at(path: str | Path, digest: str) -> str:
    def check(content: bytes) -> str | None:
        return None if hashlib.sha256(content).hexdigest() == digest else f"its sha256 is not {digest}"

    try:
        if isinstance(path, str):
            return read_whole(path, MAX_TEMPLATE_BYTES, MANIFEST_TIMEOUT_S, check).decode()
        content = read_capped(path, MAX_TEMPLATE_BYTES)
    except (OSError, DamagedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"the chat template {path} cannot be read: {reason}; put back the file") from error
    if check(content) is not None:
        raise ConfigError(f"the chat template {path} is not the one of its corpus; put back the file")
    return content.decode()
