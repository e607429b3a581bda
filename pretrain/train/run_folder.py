"""Writes the files that describe a run, and checks whether a configuration may continue the run in a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import MISSING, OmegaConf

from pretrain.checkpoint.state import Identity, RunState
from pretrain.checkpoint.tensors import base_root
from pretrain.config import AUTO, Objective, TrainConfig, to_dict
from pretrain.corpus.chat_template import CHAT_TEMPLATE_NAME
from pretrain.corpus.manifest import Manifest
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.data.inputs import chat_template_of, tokenizer_path
from pretrain.errors import ConfigError
from pretrain.files import read_capped, write_atomically
from pretrain.monitor.monitor import new_run_id
from pretrain.stored import parse

_MAX_RUN_JSON_BYTES = 1 << 16
NOT_OF_THE_RUN = ("run_dir", "stop_at_step", "stop_after_s")
"""Keys that do not affect training. Changes to these keys between starts are not reported."""


def check_resumable(config: TrainConfig, state: RunState) -> list[str]:
    """The changed keys, each as `key: old -> new`. Raises ConfigError for a change that a resumed run may not make."""
    old, new = _flat(_with_defaults(state["config"])), _flat(to_dict(config))
    if state.get("micro_batch_found"):
        old["micro_batch_sequences"] = AUTO
    changed = [key for key in new if old.get(key) != new[key] and key not in NOT_OF_THE_RUN]
    fixed = [key for key in changed if key in ("seed", "optim.name", "objective") or shapes_the_run(key)]
    if fixed:
        what = ", ".join(f"{key}={new[key]} (was {old.get(key)})" for key in fixed)
        raise ConfigError(
            f"run_dir={config.run_dir} holds a run with another configuration: {what}; "
            "put these back, or use another run_dir (with init_from= to keep the weights)"
        )
    return [f"{key}: {old.get(key)} -> {new[key]}" for key in changed]


def _with_defaults(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration, with the defaults of keys that did not exist when it was written."""
    filled = {"objective": Objective.causal.value, **stored}
    for name, kind in get_type_hints(TrainConfig).items():
        if is_dataclass(kind):
            defaults = OmegaConf.to_container(OmegaConf.structured(kind), enum_to_str=True)
            assert isinstance(defaults, dict)
            known = {str(key): value for key, value in defaults.items() if value != MISSING}
            filled[name] = known | stored.get(name, {})
    return filled


def shapes_the_run(key: str) -> bool:
    """Whether a key determines the model or the masks, and so must not change when the run resumes."""
    free = (
        "model.activation_checkpointing",
        "model.loss_chunk_tokens",
        "model.dropout",
        "model.z_loss",
        "lora.dropout",
    )
    fixed = ("model.", "lora.", "mlm.")
    return (key.startswith(fixed) and key not in free) or key == "data.document_masking"


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The nested values as a flat dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def write_run_files(
    config: TrainConfig,
    run_dir: Path,
    state: RunState | None,
    tokenizer_sha256: str,
    manifests: Mapping[str, Manifest],
) -> dict[str, Any]:
    """Write config.json, run.json, the tokenizer and the chat template, if any; rank 0 calls this.

    The last two also go to the folder of the frozen weights of a run of adapters, so that every command reads it like a
    run. Returns the content of run.json.
    """
    tokenizer = Tokenizer(tokenizer_path(config.data.corpora()[0].manifest), tokenizer_sha256)
    path = run_dir / "run.json"
    identity: dict[str, Any] = {"run_id": new_run_id(), "attempt": 0}
    with suppress(FileNotFoundError, ConfigError):  # the checkpoint has the same values
        identity |= parse(
            Identity, read_capped(path, _MAX_RUN_JSON_BYTES), str(path), "the identity of a run"
        )
    if state:
        identity |= {"run_id": state["run_id"], "wandb_run_id": state["wandb_run_id"]}
    identity.setdefault("wandb_run_id", identity["run_id"])
    identity["attempt"] = max(identity["attempt"], state["attempt"] if state else 0) + 1
    write_atomically(path, (json.dumps(identity, indent=1) + "\n").encode())
    write_atomically(run_dir / "config.json", (json.dumps(to_dict(config), indent=1) + "\n").encode())
    template = chat_template_of(config, manifests)
    for folder in (run_dir, base_root(run_dir)) if config.lora.r else (run_dir,):
        folder.mkdir(exist_ok=True)
        write_atomically(folder / tokenizer.file_name, tokenizer.content)
        if template is not None:
            write_atomically(folder / CHAT_TEMPLATE_NAME, template.encode())
    return identity
