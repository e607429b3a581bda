"""What a run says of itself in files: state.json and COMPLETE of a checkpoint, run.json. Schemas, without torch.

Whoever gives you a run has written these files, so every value has a type and a bound (`pretrain.stored`).
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
    """32 hexadecimal digits."""
    return len(text) == 32 and set(text) <= set("0123456789abcdef")


def is_run_id(text: str) -> bool:
    """Letters, digits, - and _, as W&B allows them in the id of a run."""
    return 0 < len(text) <= 128 and all(c.isascii() and (c.isalnum() or c in "-_") for c in text)


RunId = Annotated[str, Predicate(is_run_id)]


@dataclass(kw_only=True, slots=True)
class FileEntry:
    """One file of a checkpoint."""

    bytes: Count
    xxh3_128: Annotated[str, Predicate(is_xxh3_128)]


@dataclass(kw_only=True, slots=True)
class Complete:
    """COMPLETE: every other file of the checkpoint."""

    format_version: Literal[1]
    files: Annotated[dict[FileName, FileEntry], MaxLen(1 << 20)]


class LossGuardState(TypedDict):
    """Of `pretrain.train.loss_guard.LossGuard`."""

    losses: Annotated[list[float], MaxLen(1 << 16)]
    skips: Count


class LossScaleState(TypedDict):
    """Of `pretrain.engine.loss_scale.LossScale`."""

    value: Annotated[float, Ge(0.0), Le(2.0**127)]
    applied: Count


class RunState(TypedDict):
    """state.json: all that a resumed run needs beside the tensors.

    What is not required was added later: checkpoints from before go without it.
    """

    format_version: Literal[1]
    step: Step
    tokens_seen: Count
    samples_seen: NotRequired[Count]
    sequence_length: Annotated[int, Ge(1), Le(1 << 24)]
    optimizer_step: Step
    order: dict[str, Any]
    """Parsed by `OrderState.from_dict`."""
    loss_guard: NotRequired[LossGuardState]
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
    """Parsed by `pretrain.config.stored_config`."""
    micro_batch_found: NotRequired[bool]
    tensors: Annotated[dict[Annotated[str, MaxLen(512)], Annotated[Digits, MaxLen(8)]], MaxLen(1 << 20)]
    """Name of each parameter -> its shape."""


class Identity(TypedDict):
    """run.json: who a run is."""

    run_id: RunId
    attempt: Count
    wandb_run_id: NotRequired[RunId]


__all__ = ["FORMAT_VERSION", "Complete", "FileEntry", "Identity", "RunState"]
