"""What a corpus holds: its manifest.json, and how the files that it names are written and hashed.

The corpus itself is `pretrain/shards.py`, which offers everything here too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from pretrain import __version__
from pretrain.config import ConfigError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
UINT16_VOCAB_SIZE = 65_536
_SHARD_NAME = re.compile(r"shard-\d{5,}\.tar")
_READ_BYTES = 1 << 22


@dataclass(kw_only=True, slots=True)
class CorpusSource:
    """Where documents come from, and how much of the corpus is theirs."""

    name: str
    license: str = "unknown"
    documents: int = 0
    tokens: int = 0
    """With one bos and one eos per document."""
    text_bytes: int = 0
    """UTF-8 bytes of the documents' text."""


@dataclass(kw_only=True, slots=True)
class ShardInfo:
    """One tar file of a corpus."""

    name: str
    bytes: int = 0
    sha256: str = ""
    index_sha256: str = ""
    first_chunk: int
    chunks: int = 0
    documents: int = 0
    """Documents that begin in this shard."""
    tokens: int = 0

    @property
    def index_name(self) -> str:
        """File name of the index beside it."""
        return self.name.removesuffix(".tar") + ".idx"


@dataclass(slots=True)
class FileInfo:
    """Another file that belongs to a corpus; `name` is its path relative to the manifest."""

    name: str
    bytes: int
    sha256: str


@dataclass(kw_only=True, slots=True)
class Manifest:
    """What a corpus holds. `root_sha256` covers every other field, and so the content of every file."""

    format_version: int = FORMAT_VERSION
    created_by: str = f"pretrain {__version__}"
    tokenizer_sha256: str
    vocab_size: int
    bos_id: int
    eos_id: int
    dtype: str
    """uint16 or uint32, little-endian."""
    chunk_tokens: int
    n_chunks: int
    n_tokens: int
    n_documents: int
    sources: list[CorpusSource]
    shards: list[ShardInfo]
    files: list[FileInfo] = field(default_factory=list)
    root_sha256: str = ""

    @property
    def last_chunk_tokens(self) -> int:
        """Tokens of the corpus's last chunk, 1 to chunk_tokens."""
        return self.n_tokens - (self.n_chunks - 1) * self.chunk_tokens

    def compute_root_sha256(self) -> str:
        """The hash over everything else in the manifest."""
        content = {key: value for key, value in asdict(self).items() if key != "root_sha256"}
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = MANIFEST_NAME) -> Manifest:
        """Parse and check a manifest. Raises ConfigError, whose text begins with `where`."""
        try:
            raw = json.loads(text)
            version = raw["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{where} is no corpus manifest; prepare the corpus again") from error
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"{where} has format version {version!r}, this program reads {FORMAT_VERSION}; "
                "prepare the corpus again with this program"
            )
        try:
            raw["sources"] = [CorpusSource(**source) for source in raw["sources"]]
            raw["shards"] = [ShardInfo(**shard) for shard in raw["shards"]]
            raw["files"] = [FileInfo(**file) for file in raw["files"]]
            manifest = cls(**raw)
            manifest._check(where)
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{where} is no corpus manifest: {error}") from error
        return manifest

    def _check(self, where: str) -> None:
        if self.compute_root_sha256() != self.root_sha256:
            raise ConfigError(
                f"{where} was changed: its root_sha256 does not match its content; restore it or prepare the "
                "corpus again"
            )
        for shard in self.shards:
            if not _SHARD_NAME.fullmatch(shard.name):
                raise ConfigError(
                    f"{where} names a shard {shard.name!r}; a name like shard-00000.tar is needed"
                )
        for file in self.files:
            if Path(file.name).is_absolute() or ".." in Path(file.name).parts:
                raise ConfigError(f"{where} names a file {file.name!r} outside of its folder")
        first = np.cumsum([0] + [shard.chunks for shard in self.shards])
        if (
            self.dtype != token_dtype(self.vocab_size).name
            or [shard.first_chunk for shard in self.shards] != first[:-1].tolist()
            or first[-1] != self.n_chunks
            or sum(shard.tokens for shard in self.shards) != self.n_tokens
            or not 0 < self.last_chunk_tokens <= self.chunk_tokens
        ):
            raise ConfigError(f"{where} contradicts itself in its numbers of chunks and tokens, or its dtype")


def token_dtype(vocab_size: int) -> np.dtype:
    """How tokens of this vocabulary are stored: uint16 up to 65,536 entries, else uint32."""
    return np.dtype("uint16" if vocab_size <= UINT16_VOCAB_SIZE else "uint32")


def load_manifest(path: str | Path) -> Manifest:
    """Read and check a manifest.json. Raises ConfigError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; give the manifest.json of a prepared corpus") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ConfigError(f"{path} cannot be read as a manifest: {reason}") from error
    return Manifest.from_json(text, str(path))


def sync_folder(folder: Path) -> None:
    """Make renames within a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is there as a whole or not at all, synced to disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def describe_file(folder: Path, name: str) -> FileInfo:
    """Size and hash of the file `name` in `folder`."""
    digest, size = hashlib.sha256(), 0
    with (folder / name).open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
            size += len(block)
    return FileInfo(name=name, bytes=size, sha256=digest.hexdigest())
