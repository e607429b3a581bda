"""Schemas of the files in which a run describes itself: state.json and COMPLETE of a checkpoint, and run.json.

A run may come from an untrusted source, so every value has a type and bounds (`pretrain.stored`). Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from pretrain.stored import Annotated, Count, FileName, Ge, Le, Line, MaxLen, Predicate, Sha256

FORMAT_VERSION = 1
MAX_RANKS = 1 << 20
MAX_STEPS = 1 << 40

Step = Annotated[int, Ge(0), Le(MAX_STEPS)]
Digits = list[Annotated[int, Ge(0), Le(1 << 40)]]


def is_xxh3_128(text: str) -> bool:
    """Whether a text is 32 lowercase hexadecimal digits."""
    return len(text) == 32 and set(text) <= set("0123456789abcdef")


def is_run_id(text: str) -> bool:
    """Whether a text has only letters, digits, - and _, which is what W&B allows in the id of a run."""
    return 0 < len(text) <= 128 and all(c.isascii() and (c.isalnum() or c in "-_") for c in text)


RunId = Annotated[str, Predicate(is_run_id)]


@dataclass(kw_only=True, slots=True)
class FileEntry:
    """One file of a checkpoint."""

    bytes: Count
    xxh3_128: Annotated[str, Predicate(is_xxh3_128)]


@dataclass(kw_only=True, slots=True)
class Complete:
    """The content of COMPLETE: the list of all other files of the checkpoint."""

    format_version: Literal[1]
    files: Annotated[dict[FileName, FileEntry], MaxLen(1 << 20)]


class LossGuardState(TypedDict):
    """State of `pretrain.train.loss_guard.LossGuard`."""

    losses: Annotated[list[float], MaxLen(1 << 16)]
    skips: Count
    pauses: NotRequired[Count]


class LossScaleState(TypedDict):
    """State of `pretrain.engine.loss_scale.LossScale`."""

    value: Annotated[float, Ge(0.0), Le(2.0**127)]
    applied: Count


class EarlyStopState(TypedDict):
    """State of `pretrain.train.early_stop.EarlyStop`."""

    step: Step
    best_step: Step
    best_loss: float | None
    without_gain: Count


class BaseReference(TypedDict):
    """The frozen weights that adapters were trained on: the checkpoint in `base/` beside the run's checkpoints."""

    step: Step
    """Step of the run that the weights came from."""
    complete_xxh3_128: Annotated[str, Predicate(is_xxh3_128)]
    """Hash of its file COMPLETE, which holds the hashes of all its other files."""


class RunState(TypedDict):
    """The content of state.json: everything that a resumed run needs besides the tensors.

    Fields that are not required were added later; older checkpoints do not have them.
    """

    format_version: Literal[1]
    step: Step
    tokens_seen: Count
    samples_seen: NotRequired[Count]
    sequence_length: Annotated[int, Ge(1), Le(1 << 24)]
    optimizer_step: Step
    order: dict[str, Any]
    """State of the sample order; `OrderState.from_dict` parses it."""
    loss_guard: NotRequired[LossGuardState]
    early_stop: NotRequired[EarlyStopState]
    tokenizer_sha256: Sha256
    run_id: RunId
    wandb_run_id: RunId
    attempt: Count
    world_size: Annotated[int, Ge(1), Le(MAX_RANKS)]
    zero_stage: NotRequired[Annotated[int, Ge(0), Le(3)]]
    precision: NotRequired[Literal["bf16", "fp16", "fp32"]]
    loss_scale: NotRequired[LossScaleState | None]
    versions: NotRequired[dict[Line, Line]]
    config: dict[str, Any]
    """The run's configuration; `pretrain.config.stored_config` parses it."""
    micro_batch_found: NotRequired[bool]
    ema: NotRequired[bool]
    """Whether the checkpoint has a moving average of the weights, as `ema.<name>`."""
    weights_only: NotRequired[Literal["fp32", "bf16"]]
    """The type of the weights in a checkpoint that has no moments, so that no run can go on from it."""
    tensors: Annotated[dict[Annotated[str, MaxLen(512)], Annotated[Digits, MaxLen(8)]], MaxLen(1 << 20)]
    """Shape of each parameter, by parameter name. In a run of adapters: of the adapters' parameters only."""
    base: NotRequired[BaseReference]
    """In a run of adapters: the weights that they belong to."""


class Identity(TypedDict):
    """The content of run.json: the identity of a run."""

    run_id: RunId
    attempt: Count
    wandb_run_id: NotRequired[RunId]


__all__ = ["FORMAT_VERSION", "BaseReference", "Complete", "FileEntry", "Identity", "RunState"]
