"""Reads what `torch.save` has written: a zip archive with a pickle, and the bytes of each storage as in memory.

`Archive.root` is the decoded pickle. `Archive.tensor_of` finds a tensor in it, whose values are read from their place
in the file when they are asked for, one tensor at a time.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pretrain.convert.foreign.pickled import MAX_BYTES, Made, Name, Persistent, PickledError, decode
from pretrain.convert.streamed import Weight, weight_of

_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _STORAGES.values()}
_MAX_ENTRIES = 1_000_000


def joined(parts: list[Weight], dim: int = 0) -> Weight:
    """Weights that become one when they are put one behind the other in dimension `dim`. Raises PickledError."""
    first = parts[0]
    if len(parts) == 1:
        return first
    around = [(part.dtype, part.shape[:dim], part.shape[dim + 1 :], len(part.shape)) for part in parts]
    if any(one != around[0] for one in around) or len(first.shape) <= dim:
        shapes = ", ".join(str(list(part.shape)) for part in parts)
        raise PickledError(f"its parts have the shapes {shapes}, which do not fit each other")
    shape = (*first.shape[:dim], sum(part.shape[dim] for part in parts), *first.shape[dim + 1 :])
    return weight_of(shape, first.dtype, lambda: torch.cat([part.whole() for part in parts], dim))


class Archive:
    """A file of `torch.save`, or a part of a file that is one."""

    def __init__(self, path: Path, start: int = 0, size: int | None = None) -> None:
        """Read its directory. Raises PickledError where it is no archive."""
        self.path, self._start = path, start
        try:
            whole = path.stat().st_size
            self._size = whole - start if size is None else size
            if start < 0 or self._size < 0 or start + self._size > whole:
                raise PickledError("it is shorter than its index says")
            with _Part(path, start, self._size) as file, zipfile.ZipFile(file) as archive:
                self._entries = {entry.filename: entry for entry in archive.infolist()}
        except FileNotFoundError as error:
            raise PickledError(f"it lacks the file {path.name}") from error
        except zipfile.BadZipFile as error:
            raise PickledError(
                "it is no archive of torch.save; torch before 1.6 wrote another format, which a newer torch can read "
                "and save again"
            ) from error
        except (ValueError, EOFError, struct.error, OverflowError, RuntimeError) as error:
            raise PickledError(f"its directory is damaged ({error})") from error
        if len(self._entries) > _MAX_ENTRIES:
            raise PickledError(f"it has {len(self._entries):,} entries; at most {_MAX_ENTRIES:,} are read")
        pickles = [name for name in self._entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise PickledError("it has no entry data.pkl; it was not written by torch.save")
        self._prefix = pickles[0].removesuffix("data.pkl")
        if self._entry("byteorder", b"little") != b"little":
            raise PickledError("its numbers have the byte order of another kind of machine")

    @cached_property
    def root(self) -> Any:
        """The saved object as `pickled.decode` describes it."""
        return decode(bytes(self._entry("data.pkl")))

    def _entry(self, name: str, missing: bytes | None = None) -> bytes | bytearray:
        """The bytes of a small entry."""
        if self._prefix + name not in self._entries and missing is not None:
            return missing
        at, size = self._place(name)
        if size > MAX_BYTES:
            raise PickledError(f"its entry {name} has {size:,} bytes; at most {MAX_BYTES:,} are read")
        return self._bytes(at, size)

    def _place(self, name: str) -> tuple[int, int]:
        """Offset in the file and size of the bytes of an entry."""
        entry = self._entries.get(self._prefix + name)
        if entry is None:
            raise PickledError(f"it lacks the entry {name}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise PickledError(f"its entry {name} is packed, which torch.save does not do")
        if not 0 <= entry.header_offset <= self._size - 30:
            raise PickledError(f"its entry {name} is outside of it")
        header = self._bytes(self._start + entry.header_offset, 30)
        if header[:4] != b"PK\x03\x04":
            raise PickledError(f"its entry {name} is not where its directory says")
        names, extra = struct.unpack("<HH", header[26:30])
        at = self._start + entry.header_offset + 30 + names + extra
        if at + entry.file_size > self._start + self._size:
            raise PickledError(f"its entry {name} goes beyond its end")
        return at, entry.file_size

    def _bytes(self, at: int, size: int) -> bytearray:
        content = bytearray(size)
        with self.path.open("rb") as file:
            file.seek(at)
            if file.readinto(content) != size:
                raise PickledError("it ends early")
        return content

    def tensor(self, arguments: tuple[Any, ...], dtype: torch.dtype | None) -> Weight:
        """The tensor that `torch._utils._rebuild_tensor_v2` would make of these arguments. Raises PickledError.

        `dtype` is None where the storage says it.
        """
        storage, offset, shape, stride = arguments
        reference = storage.reference if isinstance(storage, Persistent) else None
        if not (isinstance(reference, tuple) and len(reference) == 5 and reference[0] == "storage"):
            raise PickledError("it has a tensor without a storage")
        _, kind, key, _, _ = reference
        if dtype is None:
            dtype = _STORAGES.get(kind.name if isinstance(kind, Name) else "")
        shape, stride = numbers_of(shape), numbers_of(stride)
        if dtype is None or shape is None or stride is None or len(shape) != len(stride):
            raise PickledError(f"it has a tensor of the unknown type {kind}")
        if not (isinstance(key, str) and isinstance(offset, int) and offset >= 0):
            raise PickledError("it has a tensor at a place that is no number")
        at, size = self._place(f"data/{key}")
        span = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if 0 not in shape else 0
        # Without this, steps of 0 could make a tensor of any size out of a few bytes.
        if (offset + span) * dtype.itemsize > size or math.prod(shape) > span:
            raise PickledError(f"it has a tensor of shape {list(shape)} that does not fit its storage")

        def values(first: int, count: int) -> torch.Tensor:
            content = self._bytes(at + (offset + first) * dtype.itemsize, count * dtype.itemsize)
            return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)

        if span == math.prod(shape) and torch.empty_strided(shape, stride, device="meta").is_contiguous():
            return Weight(shape, dtype, lambda start, stop: values(start, stop - start))
        return weight_of(shape, dtype, lambda: values(0, span).as_strided(shape, stride))

    def tensor_of(self, value: Any) -> Weight | None:
        """The tensor that a value of `root` stands for, or None if it is something else. Raises PickledError."""
        if not isinstance(value, Made):
            return None
        arguments = value.arguments
        match value.kind:
            case "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor" if len(arguments) >= 4:
                return self.tensor(arguments[:4], None)
            case "torch._utils._rebuild_tensor_v3" if len(arguments) >= 7:
                return self.tensor(arguments[:4], _DTYPES.get(getattr(arguments[6], "name", "")))
            case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state" if (
                arguments
            ):
                return self.tensor_of(arguments[0])
            case "torch._tensor._rebuild_from_type_v2" if len(arguments) >= 3 and isinstance(
                arguments[2], tuple
            ):
                return self.tensor_of(Made(arguments[0], arguments[2]))
        return None

    def tensors(self, values: Any) -> dict[str, Weight]:
        """The tensors of a state dict by name; what is no tensor is left out. Raises PickledError."""
        if isinstance(values, Made):
            values = values.entries
        if not isinstance(values, dict):
            raise PickledError("it has no state dict where one is expected")
        found = {name: self.tensor_of(value) for name, value in values.items() if isinstance(name, str)}
        return {name: weight for name, weight in found.items() if weight is not None}


def numbers_of(value: Any) -> tuple[int, ...] | None:
    """The whole numbers of a tuple, list or torch.Size that are not negative; None if it is none of these."""
    if isinstance(value, Made) and value.kind == "torch.Size" and len(value.arguments) == 1:
        value = value.arguments[0]
    if not isinstance(value, tuple | list) or isinstance(value, Name | Persistent):
        return None
    if not all(type(n) is int and 0 <= n < 1 << 48 for n in value) or len(value) > 8:
        return None
    return tuple(value)


class _Part(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, path: Path, start: int, size: int) -> None:
        self._file = path.open("rb")
        self._first, self._size, self._at = start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError("a place before the beginning")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._first + self._at)
        view = memoryview(buffer)[: max(0, self._size - self._at)]
        count = self._file.readinto(view) or 0  # type: ignore[attr-defined]
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
