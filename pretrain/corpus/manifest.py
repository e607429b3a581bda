"""The manifest of a corpus (manifest.json) and the index of a shard, and the checks of both.

`pretrain/corpus/shards.py` reads the corpus itself and `pretrain/corpus/writer.py` writes it.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from dataclasses import asdict, dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pretrain import __version__
from pretrain.config.model import MAX_CLASSES
from pretrain.errors import ConfigError, RunError
from pretrain.files import open_regular, read_capped
from pretrain.remote import DamagedError, as_path, is_url, read_whole, retry_local
from pretrain.stored import (
    Annotated,
    Count,
    Le,
    Line,
    MaxLen,
    MinLen,
    Positive,
    Predicate,
    RelativePath,
    Sha256,
    Text,
    parse,
)

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
UINT16_VOCAB_SIZE = 65_536
MAX_SHARDS = 40_000  # 40 TiB in shards of the usual size; each takes about 400 bytes in the manifest
MAX_MANIFEST_BYTES = 20 << 20
MAX_MANIFEST_VALUES = 450_000
MAX_DOCUMENTS_BYTES = 64 << 20  # size limit of one .doc member
MANIFEST_TIMEOUT_S = 300.0  # time limit for reading a manifest at a URL
MAX_CHUNKS = 1 << 32  # 10^15 tokens in chunks of the usual size
MAX_CHUNK_TOKENS = 1 << 26  # limited because a whole chunk is held in memory
MAX_SHARD_CHUNKS = 1 << 22  # limited because the index of a shard is held in memory, 48 bytes per chunk
MAX_VOCAB_SIZE = 1 << 22
TOKENS, DOCUMENTS = 0, 1  # positions on the second axis of an index
_MAX_LISTED = 1 << 20  # largest number of sources, and of files, in a manifest
_SHARD_NAME = re.compile(r"shard-[0-9]{5,12}\.tar")
_VERSION = re.compile(r'\s*\{\s*"format_version"\s*:\s*(\d{1,9})\b')
_READ_BYTES = 1 << 22
NPY_HEADER_BYTES = 128
_INDEX_ROW_BYTES = 2 * 3 * 8
_BLOCK = tarfile.BLOCKSIZE


class CorruptShardError(RunError):
    """A shard is missing or differs from its manifest. The text names the file, the member, and what differs."""

    def __init__(self, text: str, *, source_path: str | None = None, chunk: int | None = None) -> None:
        super().__init__(text)
        self.source_path, self.chunk = source_path, chunk
        """Path of the corpus's manifest as the caller gave it, and the bad chunk, or None where it is unknown."""


def is_shard_name(text: str) -> bool:
    """Whether a text is a name like shard-00000.tar."""
    return _SHARD_NAME.fullmatch(text) is not None


@dataclass(kw_only=True, slots=True)
class CorpusSource:
    """One source of documents, and its part of the corpus.

    Names and licenses come from file names and records, so they can be any text; code that prints them escapes them
    (`pretrain.printing`).
    """

    name: Text
    license: Text = "unknown"
    documents: Count = 0
    """Number of documents."""
    tokens: Count = 0
    """Number of tokens, including one bos and one eos per document."""
    text_bytes: Count = 0
    """Size of the documents' text in UTF-8, in bytes."""


@dataclass(kw_only=True, slots=True)
class ShardInfo:
    """One tar file of a corpus."""

    name: Annotated[str, Predicate(is_shard_name)]
    bytes: Count = 0
    sha256: Sha256 = ""
    index_sha256: Sha256 = ""
    first_chunk: Count
    chunks: Annotated[Count, Le(MAX_SHARD_CHUNKS)] = 0
    documents: Count = 0
    """Number of documents that begin in this shard."""
    tokens: Count = 0

    @property
    def index_name(self) -> str:
        """File name of the shard's index, which lies beside it."""
        return self.name.removesuffix(".tar") + ".idx"


@dataclass(slots=True)
class FileInfo:
    """A file of a corpus that is not a shard. `name` is its path relative to the manifest."""

    name: RelativePath
    bytes: Count
    sha256: Sha256


@dataclass(kw_only=True, slots=True)
class Packed:
    """How a corpus of whole documents was packed: each lies within one sequence, and filler ends the sequence."""

    sequence_tokens: Positive
    """T: number of tokens of each sequence. It divides the chunks, the last one included."""
    dropped_documents: Count = 0
    """Documents that preparation left out because they are longer than a sequence, held-out ones included."""
    cut_documents: Count = 0
    """Longer documents that preparation shortened to a sequence, held-out ones included."""


@dataclass(kw_only=True, slots=True)
class Manifest:
    """The list of a corpus's content. `root_sha256` covers all other fields and, through their hashes, every file."""

    format_version: Count = FORMAT_VERSION
    created_by: Line = f"pretrain {__version__}"
    tokenizer_sha256: Sha256
    vocab_size: Annotated[Positive, Le(MAX_VOCAB_SIZE)]
    bos_id: Count
    eos_id: Count
    dtype: Line
    """Type of the stored tokens: uint16 or uint32, little-endian."""
    chunk_tokens: Annotated[Positive, Le(MAX_CHUNK_TOKENS)]
    n_chunks: Annotated[Positive, Le(MAX_CHUNKS)]
    n_tokens: Positive
    """Number of tokens in all chunks, including filler."""
    n_documents: Count
    sources: Annotated[list[CorpusSource], MinLen(1), MaxLen(_MAX_LISTED)]
    shards: Annotated[list[ShardInfo], MinLen(1), MaxLen(MAX_SHARDS)]
    files: Annotated[list[FileInfo], MaxLen(_MAX_LISTED)] = field(default_factory=list)
    loss_mask: bool = False
    """Whether only the tokens that the `.doc` members mark count in the loss. It is written only where it is true, so
    corpora without a mask keep their old hashes, and older programs reject a corpus with one."""
    packed: Packed | None = None
    """How whole documents were packed into sequences; None where documents follow each other without a gap. Like
    `loss_mask`, it is written only where there is something to say."""
    classes: Annotated[list[Line], MaxLen(MAX_CLASSES)] = field(default_factory=list)
    """The classes of labeled documents, in the order of their numbers: the last token of a document, after its eos, is
    the number of its class, and the only one that counts in the loss. Empty where documents have no labels, and then
    not written."""
    root_sha256: Sha256 = ""

    @property
    def last_chunk_tokens(self) -> int:
        """Number of tokens in the corpus's last chunk, 1 to chunk_tokens."""
        return self.n_tokens - (self.n_chunks - 1) * self.chunk_tokens

    @property
    def sequence_tokens(self) -> int | None:
        """Length of the sequences into which whole documents were packed; None where they were not."""
        return self.packed.sequence_tokens if self.packed else None

    @property
    def filler_tokens(self) -> int:
        """Number of tokens that belong to no document, because they fill up sequences of whole documents."""
        return self.n_tokens - sum(source.tokens for source in self.sources) if self.packed else 0

    @property
    def document_tokens(self) -> int:
        """Number of tokens of documents, so without filler."""
        return self.n_tokens - self.filler_tokens

    def compute_root_sha256(self) -> str:
        """The hash of all other fields of the manifest."""
        content = {key: value for key, value in self._content().items() if key != "root_sha256"}
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps(self._content(), indent=1, ensure_ascii=False) + "\n"

    def _content(self) -> dict[str, Any]:
        content = _as_dict(self)
        for name in ("sources", "shards", "files"):
            content[name] = [_as_dict(item) for item in content[name]]
        if self.loss_mask is False:
            del content["loss_mask"]
        if self.packed is None:
            del content["packed"]
        else:
            content["packed"] = asdict(self.packed)
        if not self.classes:
            del content["classes"]
        return content

    @classmethod
    def from_json(cls, text: str | bytes, where: str = MANIFEST_NAME) -> Manifest:
        """Parse and check a manifest. Raises ConfigError, whose text begins with `where`, the manifest's path."""
        head = text[:200].decode(errors="replace") if isinstance(text, bytes) else text[:200]
        # The version is the first field. Manifests of other versions may have other fields.
        version = _VERSION.match(head)
        if version and int(version[1]) != FORMAT_VERSION:
            raise ConfigError(
                f"{where} has format version {version[1]}, this program reads {FORMAT_VERSION}; "
                "prepare the corpus again with this program"
            )
        manifest = parse(cls, text, where, "a corpus manifest", MAX_MANIFEST_VALUES)
        if manifest.compute_root_sha256() != manifest.root_sha256:
            raise ConfigError(
                f"{where} was changed: its root_sha256 does not match its content; restore it or prepare the "
                "corpus again"
            )
        problem = manifest._problem()
        if problem is not None:
            raise ConfigError(f"{where} contradicts itself in {problem}; prepare the corpus again")
        return manifest

    def _problem(self) -> str | None:
        """What is contradictory in the manifest; None where all parts agree."""
        if self.format_version != FORMAT_VERSION:
            return "its format version"
        if not max(self.bos_id, self.eos_id) < self.vocab_size:
            return f"its ids of bos and eos, which are outside of its vocabulary of {self.vocab_size} entries"
        if self.dtype != token_dtype(self.vocab_size).name:
            return "its dtype"
        paths = [file.name for file in self.files] + [shard.name for shard in self.shards]
        if len(set(paths)) != len(paths):
            return "its files, one of which is listed twice"
        first = np.cumsum([0] + [shard.chunks for shard in self.shards])
        if (
            [shard.first_chunk for shard in self.shards] != first[:-1].tolist()
            or first[-1] != self.n_chunks
            or not all(0 < shard.chunks <= shard.bytes // (2 * _BLOCK) for shard in self.shards)
            or sum(shard.tokens for shard in self.shards) != self.n_tokens
            or not 0 < self.last_chunk_tokens <= self.chunk_tokens
        ):
            return "its numbers of chunks and tokens"
        if self.classes and (
            not self.loss_mask
            or self.packed is None
            or len(set(self.classes)) < len(self.classes)
            or len(self.classes) > self.vocab_size
        ):
            return "its classes"
        if self.packed is not None and (
            self.chunk_tokens % self.packed.sequence_tokens
            or self.last_chunk_tokens % self.packed.sequence_tokens
            or self.filler_tokens < 0
        ):
            return "how its documents were packed"
        return None


_NAMES: dict[type, tuple[str, ...]] = {
    kind: tuple(f.name for f in fields(kind)) for kind in (Manifest, CorpusSource, ShardInfo, FileInfo)
}
_VALUES = {kind: attrgetter(*names) for kind, names in _NAMES.items()}


def _as_dict(item: Any) -> dict[str, Any]:
    """The fields as a dict. This is several times faster than dataclasses.asdict, which copies every value."""
    return dict(zip(_NAMES[type(item)], _VALUES[type(item)](item), strict=True))


def token_dtype(vocab_size: int) -> np.dtype:
    """The type in which tokens are stored: uint16 for up to 65,536 vocabulary entries, otherwise uint32."""
    return np.dtype("uint16" if vocab_size <= UINT16_VOCAB_SIZE else "uint32")


def load_manifest(path: str | Path, time_limit_s: float = MANIFEST_TIMEOUT_S) -> Manifest:
    """Read and check the manifest.json at a path or URL.

    Raises ConfigError where it is missing or invalid, and ReadError where a store fails.
    """
    if isinstance(path, str) and is_url(path):
        return _load_remote_manifest(path, time_limit_s)
    path = as_path(path)
    try:
        content = read_capped(path, MAX_MANIFEST_BYTES)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; give the manifest.json of a prepared corpus") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read as a manifest: {error.strerror}") from error
    return Manifest.from_json(content, str(path))


def _load_remote_manifest(url: str, time_limit_s: float) -> Manifest:
    found = []

    def check(content: bytes) -> str | None:
        try:
            found.append(Manifest.from_json(content))
        except ConfigError as error:
            return str(error)
        return None

    try:
        read_whole(url, MAX_MANIFEST_BYTES, time_limit_s, check)
    except DamagedError as error:
        raise ConfigError(str(error)) from error
    return found[-1]


def open_member(folder: Path, name: str) -> BinaryIO:
    """Open the file `name` in a corpus's folder.

    Raises CorruptShardError where it is not a regular file or lies outside the folder, and OSError.
    """
    try:
        return open_regular(folder / name, inside=folder)
    except ConfigError as error:
        raise CorruptShardError(str(error)) from error


def member_name(chunk: int, kind: int) -> str:
    """Name of a tar member: NNNNNN.tok or NNNNNN.doc."""
    return f"{chunk:06d}.{'tok' if kind == TOKENS else 'doc'}"


def padded_bytes(n_bytes: int) -> int:
    """Number of bytes that a member of `n_bytes` bytes takes in a tar, with its header and padding."""
    return _BLOCK + n_bytes + -n_bytes % _BLOCK


def read_index(folder: Path, manifest: Manifest, number: int) -> np.ndarray:
    """Read the index of a shard: uint64 [chunks, 2, 3], the (offset, length, xxh3-64) of each chunk's .tok and .doc
    member.

    The members must fill the shard in order, so that a tar reader finds exactly the members that are read here. Raises
    CorruptShardError.
    """
    info = manifest.shards[number]
    path = folder / info.index_name
    try:
        content = retry_local(lambda: read_capped(path, index_bytes(info), inside=folder))
    except ConfigError as error:
        raise CorruptShardError(str(error)) from error
    except OSError as error:
        raise CorruptShardError(f"{path} cannot be read: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != info.index_sha256:
        raise CorruptShardError(f"{path} has a different sha256 than its manifest says; restore the file")
    return parse_index(content, manifest, number, str(path))


def index_bytes(info: ShardInfo) -> int:
    """Size of the index of a shard in bytes."""
    return NPY_HEADER_BYTES + info.chunks * _INDEX_ROW_BYTES


def parse_index(content: bytes, manifest: Manifest, number: int, path: str) -> np.ndarray:
    """Parse and check the index of a shard (see `read_index`). Errors name `path`. Raises CorruptShardError."""
    info = manifest.shards[number]
    shape = (info.chunks, 2, 3)
    if len(content) != index_bytes(info) or not content.startswith(npy_header(shape)):
        raise CorruptShardError(f"{path} is not an index of {info.chunks} chunks; prepare the corpus again")
    index = np.frombuffer(content, "<u8", offset=NPY_HEADER_BYTES).reshape(shape)
    problem = _index_problem(index, manifest, info)
    if problem is not None:
        raise CorruptShardError(f"{path} {problem}; prepare the corpus again")
    return index


def npy_header(shape: tuple[int, ...]) -> bytes:
    """The header of a .npy file of uint64 values with this shape.

    A file's header is compared with it and never parsed, since the file may be untrusted.
    """
    header = io.BytesIO()
    description = {"descr": "<u8", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, description)
    return header.getvalue()


def _index_problem(index: np.ndarray, manifest: Manifest, info: ShardInfo) -> str | None:
    lengths = index[:, :, 1]
    width = np.dtype(manifest.dtype).itemsize
    token_bytes = np.full(info.chunks, manifest.chunk_tokens * width, np.uint64)
    if info.first_chunk + info.chunks == manifest.n_chunks:
        token_bytes[-1] = manifest.last_chunk_tokens * width
    if not np.array_equal(lengths[:, TOKENS], token_bytes):
        row = int(np.argmax(lengths[:, TOKENS] != token_bytes))
        name = member_name(info.first_chunk + row, TOKENS)
        return f"says that {name} has {lengths[row, TOKENS]} bytes, its manifest says {token_bytes[row]}"
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
    """How a member's tar header, which plain tar readers trust, differs from the index; None where it does not."""
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        return f"has no tar header ({error})"
    if header.name != name or not header.isreg() or header.size != n_bytes:
        return f"is {header.name!r} of type {header.type!r} with {header.size} bytes in its tar header"
    return None


def describe_file(folder: Path, name: str) -> FileInfo:
    """Size and hash of the file `name` in `folder`. Raises the errors of `open_member`."""
    with open_member(folder, name) as file:
        return describe_open_file(file, name)


def describe_open_file(file: BinaryIO, name: str) -> FileInfo:
    """Size and hash of an open file, read from its current position."""
    digest, size = hashlib.sha256(), 0
    while block := file.read(_READ_BYTES):
        digest.update(block)
        size += len(block)
    return FileInfo(name=name, bytes=size, sha256=digest.hexdigest())
