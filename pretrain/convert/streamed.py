"""Weights that are not in memory, and files of safetensors that are read and written a few million values at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The types of floating-point numbers that weights may have, by their names in safetensors."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PIECE_ELEMENTS = 4 << 20


@dataclass(frozen=True)
class Weight:
    """A tensor that is not in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int, int], torch.Tensor]
    """Reads the elements [start, stop) of the flattened tensor."""
    in_order: bool = True
    """Whether the values lie in this order in a file, so that a part can be read without the whole."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def whole(self) -> torch.Tensor:
        """Reads all of it."""
        return self.read(0, self.numel).view(self.shape)

    def pieces(self) -> list[tuple[int, int]]:
        """Spans of elements that cover it, each as large as should be in memory at a time."""
        step = _PIECE_ELEMENTS if self.in_order else max(1, self.numel)
        return [(start, min(self.numel, start + step)) for start in range(0, self.numel, step)]


def weight_of(shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], torch.Tensor]) -> Weight:
    """A weight that `make` returns whole."""
    return Weight(shape, dtype, lambda start, stop: make().contiguous().flatten()[start:stop], in_order=False)


def equal(first: Weight, second: Weight) -> bool:
    """Whether two weights have the same shape and values. Their types may differ."""
    return first.shape == second.shape and all(
        torch.equal(first.read(*span).float(), second.read(*span).float()) for span in first.pieces()
    )


def open_safetensors(path: Path) -> dict[str, Weight]:
    """The weights in a file, by name, of any type. Raises SafetensorError or OSError where the file is damaged."""
    with safe_open(path, framework="pt"):  # checks that the header is consistent and fits the file
        pass
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))

    def weight(entry: dict) -> Weight:
        dtype, first = DTYPES.get(entry["dtype"], torch.uint8), 8 + size + entry["data_offsets"][0]

        def read(start: int, stop: int) -> torch.Tensor:
            content = bytearray((stop - start) * dtype.itemsize)
            with path.open("rb") as file:
                file.seek(first + start * dtype.itemsize)
                if file.readinto(content) != len(content):
                    raise OSError(f"{path} ends early")
            return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)

        return Weight(tuple(entry["shape"]), dtype, read)

    return {name: weight(entry) for name, entry in header.items() if name != "__metadata__"}


def write_safetensors(path: Path, weights: dict[str, Weight], dtype: torch.dtype | None = None) -> None:
    """Write weights to a new file, with their own types or all with `dtype`."""
    header, at = {}, 0
    for name, weight in weights.items():
        kind = dtype or weight.dtype
        size = weight.numel * kind.itemsize
        header[name] = {"dtype": _NAMES[kind], "shape": list(weight.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for weight in weights.values():
            for span in weight.pieces():
                values = weight.read(*span).to(dtype or weight.dtype).contiguous()
                file.write(values.view(torch.uint8).numpy().data)
