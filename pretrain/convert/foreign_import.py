"""Imports checkpoints of other programs: another process reads them, and the result is imported like a Hugging Face
model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.folder import hash_file
from pretrain.config import ModelConfig, TrainConfig, load_config, validate
from pretrain.convert.hugging_face import Parity, hugging_face_config
from pretrain.convert.hugging_face_import import import_model
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.errors import ConfigError, RunError

_ROOT = Path(__file__).resolve().parents[2]
_PASSED_ON = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH")
"""Variables that the reading process gets. It gets no others, since some are secrets."""


def import_foreign(
    folder: Path, tokenizer: Tokenizer, output: Path, given: dict[str, Any], sequence_length: int | None
) -> tuple[ModelConfig, Parity]:
    """Write the run folder `output` with the weights of the checkpoint in `folder`.

    `given` are the keys of our models that the user states; they come before those of the checkpoint's own
    configuration. Raises ConfigError where it cannot be imported, and RunError where its logits differ.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        found = _read(folder, Path(temporary) / "model.safetensors", given)
        model = validate(ModelConfig, found["model"])
        length = sequence_length or found["sequence_length"]
        if length is None:
            raise ConfigError(
                f"input={folder} does not state for which length it was trained; give sequence_length="
            )
        words = [f"data.sequence_length={length}", "run_dir=x", "total_steps=1", "data.manifest=none"]
        config = load_config(TrainConfig, words, "config")
        config.model = model
        hugging_face_config(config, tokenizer, torch.float32).save_pretrained(temporary)
        return import_model(Path(temporary), tokenizer, output)


def _read(folder: Path, weights: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Have another process write the weights to the file `weights`. Returns what it says of them."""
    module = "pretrain.convert.foreign.worker"
    done = subprocess.run(
        [sys.executable, "-m", module, str(folder.resolve()), str(weights.resolve()), json.dumps(given)],
        capture_output=True,
        text=True,
        cwd=_ROOT,
        env={name: os.environ[name] for name in _PASSED_ON if name in os.environ} | {"OMP_NUM_THREADS": "1"},
    )
    lines = done.stderr.strip().splitlines()
    if done.returncode == 2 and lines:
        raise ConfigError(f"input={folder} cannot be imported: {lines[-1]}")
    if done.returncode:
        last = lines[-1] if lines else "it said nothing"
        raise RunError(f"the process that reads input={folder} ended with code {done.returncode} ({last})")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if hash_file(weights) != found["xxh3_128"]:
        raise RunError(f"{weights} has changed since it was written; start again")
    return found
