"""What a corpus holds: its manifest.json, the index of a shard, and how its files are written, hashed and checked.

The corpus itself is read by `pretrain/shards.py` and written by `pretrain/corpus_writer.py`.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pretrain import __version__
from pretrain.config import ConfigError, RunError
from pretrain.files import is_inside, read_capped
from pretrain.remote import DamagedError, as_path, is_remote, read_whole, retry_local

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
UINT16_VOCAB_SIZE = 65_536
MAX_MANIFEST_BYTES = 64 << 20  # some 180,000 shards
MAX_DOCUMENTS_BYTES = 64 << 20  # of one .doc member
MANIFEST_TIMEOUT_S = 300.0  # for one behind a URL
MAX_CHUNKS = 1 << 32  # of a corpus: 10^15 tokens in chunks of the usual size
TOKENS, DOCUMENTS = 0, 1  # second axis of an index
_SHARD_NAME = re.compile(r"shard-\d{5,}\.tar")
_READ_BYTES = 1 << 22
_INDEX_HEADER_BYTES = 128  # of a .npy array
_INDEX_ROW_BYTES = 2 * 3 * 8
_BLOCK = tarfile.BLOCKSIZE


class CorruptShardError(RunError):
    """A shard is not what its manifest says, or not there. The text names the file, the member and what differs."""

    def __init__(self, text: str, *, source_path: str | None = None, chunk: int | None = None) -> None:
        super().__init__(text)
        self.source_path, self.chunk = source_path, chunk
        """The manifest of the corpus, as it was given, and the chunk that cannot be used; None: not of one chunk."""


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
    loss_mask: bool = False
    """Only the tokens that the `.doc` members mark are to be predicted. Written where it is true only, so that other
    corpora have the hashes that they had before there was a mask, and programs that know none refuse this corpus."""
    root_sha256: str = ""

    @property
    def last_chunk_tokens(self) -> int:
        """Tokens of the corpus's last chunk, 1 to chunk_tokens."""
        return self.n_tokens - (self.n_chunks - 1) * self.chunk_tokens

    def compute_root_sha256(self) -> str:
        """The hash over everything else in the manifest."""
        content = {key: value for key, value in self._content().items() if key != "root_sha256"}
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps(self._content(), indent=1, ensure_ascii=False) + "\n"

    def _content(self) -> dict[str, Any]:
        content = asdict(self)
        if self.loss_mask is False:
            del content["loss_mask"]
        return content

    @classmethod
    def from_json(cls, text: str, where: str = MANIFEST_NAME) -> Manifest:
        """Parse and check a manifest. Raises ConfigError, whose text begins with `where`."""
        try:
            raw = json.loads(text)
            version = raw["format_version"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
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
        counts = [self.vocab_size, self.chunk_tokens, self.n_chunks, self.n_tokens, self.n_documents]
        counts += [n for s in self.shards for n in (s.bytes, s.first_chunk, s.chunks, s.documents, s.tokens)]
        counts += [n for s in self.sources for n in (s.documents, s.tokens, s.text_bytes)]
        counts += [file.bytes for file in self.files]
        if type(self.loss_mask) is not bool:
            raise ConfigError(f"{where} has loss_mask {self.loss_mask!r}, which is neither true nor false")
        if not all(type(n) is int and 0 <= n < 1 << 62 for n in counts):
            raise ConfigError(f"{where} has a size or count that is no whole number from 0 to 2^62")
        first = np.cumsum([0] + [shard.chunks for shard in self.shards])
        if (
            self.dtype != token_dtype(self.vocab_size).name
            or [shard.first_chunk for shard in self.shards] != first[:-1].tolist()
            or first[-1] != self.n_chunks
            or not all(0 < shard.chunks <= shard.bytes // (2 * _BLOCK) for shard in self.shards)
            or self.n_chunks > MAX_CHUNKS
            or sum(shard.tokens for shard in self.shards) != self.n_tokens
            or not 0 < self.last_chunk_tokens <= self.chunk_tokens
        ):
            raise ConfigError(f"{where} contradicts itself in its numbers of chunks and tokens, or its dtype")


def token_dtype(vocab_size: int) -> np.dtype:
    """How tokens of this vocabulary are stored: uint16 up to 65,536 entries, else uint32."""
    return np.dtype("uint16" if vocab_size <= UINT16_VOCAB_SIZE else "uint32")


def load_manifest(path: str | Path, time_limit_s: float = MANIFEST_TIMEOUT_S) -> Manifest:
    """Read and check a manifest.json, a path or a URL. Raises ConfigError, and RunError where a store is away."""
    if isinstance(path, str) and is_remote(path):
        return _load_remote_manifest(path, time_limit_s)
    path = as_path(path)
    try:
        text = read_capped(path, MAX_MANIFEST_BYTES).decode("utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; give the manifest.json of a prepared corpus") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ConfigError(f"{path} cannot be read as a manifest: {reason}") from error
    return Manifest.from_json(text, str(path))


def _load_remote_manifest(url: str, time_limit_s: float) -> Manifest:
    found = []

    def check(content: bytes) -> str | None:
        try:
            found.append(Manifest.from_json(content.decode("utf-8")))
        except (ConfigError, UnicodeDecodeError) as error:
            return str(error)
        return None

    try:
        read_whole(url, MAX_MANIFEST_BYTES, time_limit_s, check)
    except DamagedError as error:
        raise ConfigError(str(error)) from error
    return found[-1]


def resolve_inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`, where it may lie behind a link within the folder, not outside of it."""
    path = folder / name
    if not is_inside(path, folder):
        raise CorruptShardError(f"{path} is a link to a file outside of {folder}; put the file itself there")
    return path


def member_name(chunk: int, kind: int) -> str:
    """Name of a tar member: NNNNNN.tok or NNNNNN.doc."""
    return f"{chunk:06d}.{'tok' if kind == TOKENS else 'doc'}"


def padded_bytes(n_bytes: int) -> int:
    """Space that a member takes in a tar."""
    return _BLOCK + n_bytes + -n_bytes % _BLOCK


def read_index(folder: Path, manifest: Manifest, number: int) -> np.ndarray:
    """uint64 [chunks, 2, 3]: (offset, length, xxh3-64) of the .tok and the .doc member of each chunk of a shard.

    The members must fill the shard in order, so that what a tar reader finds there is what is read here. Raises
    CorruptShardError.
    """
    info = manifest.shards[number]
    path = resolve_inside(folder, info.index_name)
    try:
        content = retry_local(lambda: read_capped(path, index_bytes(info)))
    except ConfigError as error:
        raise CorruptShardError(str(error)) from error
    except OSError as error:
        raise CorruptShardError(f"{path} cannot be read: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != info.index_sha256:
        raise CorruptShardError(f"{path} has another sha256 than its manifest says; restore the file")
    return parse_index(content, manifest, number, str(path))


def index_bytes(info: ShardInfo) -> int:
    """Size of the index of a shard."""
    return _INDEX_HEADER_BYTES + info.chunks * _INDEX_ROW_BYTES


def parse_index(content: bytes, manifest: Manifest, number: int, path: str) -> np.ndarray:
    """The index of a shard, of bytes with the right hash, read from `path`. Raises CorruptShardError."""
    info = manifest.shards[number]
    try:
        index = np.load(io.BytesIO(content), allow_pickle=False)
    except ValueError as error:
        raise CorruptShardError(f"{path} is no index of a shard; prepare the corpus again") from error
    problem = _index_problem(index, manifest, info)
    if problem is not None:
        raise CorruptShardError(f"{path} {problem}; prepare the corpus again")
    return index


def _index_problem(index: np.ndarray, manifest: Manifest, info: ShardInfo) -> str | None:
    if index.dtype != np.dtype("<u8") or index.shape != (info.chunks, 2, 3):
        return f"is no index of {info.chunks} chunks"
    lengths = index[:, :, 1]
    width = np.dtype(manifest.dtype).itemsize
    token_bytes = np.full(info.chunks, manifest.chunk_tokens * width, np.uint64)
    if info.first_chunk + info.chunks == manifest.n_chunks:
        token_bytes[-1] = manifest.last_chunk_tokens * width
    if not np.array_equal(lengths[:, TOKENS], token_bytes):
        row = int(np.argmax(lengths[:, TOKENS] != token_bytes))
        name = member_name(info.first_chunk + row, TOKENS)
        return f"says that {name} has {lengths[row, TOKENS]} bytes, its manifest {token_bytes[row]}"
    if (lengths[:, DOCUMENTS] > MAX_DOCUMENTS_BYTES).any():
        row = int(np.argmax(lengths[:, DOCUMENTS]))
        name = member_name(info.first_chunk + row, DOCUMENTS)
        return f"says that {name} has {lengths[row, DOCUMENTS]} bytes, more than {MAX_DOCUMENTS_BYTES:,}"
    sizes = lengths.astype(np.int64).reshape(-1)
    ends = np.cumsum(_BLOCK + sizes + -sizes % _BLOCK)
    starts = np.concatenate([[0], ends[:-1]]) + _BLOCK
    if not np.array_equal(index[:, :, 0].reshape(-1), starts.astype(np.uint64)):
        return "has members that do not follow one another"
    if ends[-1] + 2 * _BLOCK != info.bytes:
        return f"does not fill the {info.bytes} bytes of its shard"
    return None


def header_problem(block: bytes, name: str, n_bytes: int) -> str | None:
    """What is wrong with a member's tar header, which plain tar readers believe; None: it is as the index says."""
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        return f"has no tar header ({error})"
    if header.name != name or not header.isreg() or header.size != n_bytes:
        return f"is {header.name!r} of type {header.type!r} with {header.size} bytes in its tar header"
    return None


def describe_file(folder: Path, name: str) -> FileInfo:
    """Size and hash of the file `name` in `folder`."""
    digest, size = hashlib.sha256(), 0
    with (folder / name).open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
            size += len(block)
    return FileInfo(name=name, bytes=size, sha256=digest.hexdigest())
