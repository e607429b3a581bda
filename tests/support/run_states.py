"""Content of state.json for tests that save checkpoints without a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pretrain.config.data_stages import DataStage
from pretrain.data.state import OrderState


def run_state(step: int, shapes: Mapping[str, Sequence[int]], **given: Any) -> dict[str, Any]:
    """A complete checkpoint state for a run with these parameters. Values in `given` replace the defaults."""
    order = OrderState(
        manifest_sha=["0" * 64],
        seed=1,
        stages=[DataStage(weights=(1.0,), sequence_length=64, batch_sequences=8)],
        consumed_samples=8 * step,
        lanes=1,
        chunk_tokens=[1024],
        window_chunks=32,
        packing="concat",
    )
    return {
        "step": step,
        "tokens_seen": 512 * step,
        "samples_seen": 8 * step,
        "sequence_length": 64,
        "optimizer_step": step,
        "order": order.to_dict(),
        "tokenizer_sha256": "0" * 64,
        "run_id": "a1b2c3d4",
        "wandb_run_id": "a1b2c3d4",
        "attempt": 1,
        "world_size": 1,
        "config": {},
        "tensors": {name: list(shape) for name, shape in shapes.items()},
    } | given
