"""Reads checkpoints with only the stock safetensors package, and compares them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, each joined from its slices."""
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            offsets = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for key in file.keys():  # noqa: SIM118 (not a dict)
                pieces.setdefault(key, []).append((offsets[key]["saved_offsets"][0], file.get_tensor(key)))
    return {
        key: torch.cat([t for _, t in sorted(parts, key=lambda p: p[0])]) for key, parts in pieces.items()
    }


def assert_same_state(one: Path, other: Path) -> None:
    a, b = read_tensors(one), read_tensors(other)
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
