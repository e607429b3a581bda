"""Verifies a corpus: every file and every member of a shard against the manifest."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from pretrain.corpus.chunk_documents import (
    ChunkDocuments,
    continuation_problem,
    parse_documents,
    tokens_problem,
)
from pretrain.corpus.ids import IDS_NAME, ids_problem
from pretrain.corpus.manifest import (
    DOCUMENTS,
    CorruptShardError,
    FileInfo,
    Manifest,
    describe_open_file,
    header_problem,
    load_manifest,
    member_name,
    open_member,
    read_index,
)
from pretrain.corpus.shards import SHARDS_FOLDER
from pretrain.errors import ConfigError

_BLOCK = tarfile.BLOCKSIZE

Progress = Callable[[int, int], None]  # (bytes checked so far, bytes in total)


def verify_corpus(manifest_path: str | Path, progress: Progress | None = None) -> list[str]:
    """Read every file of a corpus and compare it with the manifest.

    Returns the problems found, each as one sentence that names the file and the member; an intact corpus has none.
    """
    try:
        manifest = load_manifest(manifest_path)
    except ConfigError as error:
        return [str(error)]
    folder = Path(manifest_path).parent
    shards = [FileInfo(f"{SHARDS_FOLDER}/{s.name}", s.bytes, s.sha256) for s in manifest.shards]
    total, done = sum(file.bytes for file in shards + manifest.files), 0
    members = _Members(folder / SHARDS_FOLDER, manifest)
    problems = []
    for number, file in enumerate(shards + manifest.files):
        problems += _file_problems(folder, file, members, number if number < len(shards) else None)
        done += file.bytes
        if progress is not None:
            progress(done, total)
    return problems + _foreign_files(folder, manifest)


def _foreign_files(folder: Path, manifest: Manifest) -> list[str]:
    """Files beside the shards that the manifest does not list. They matter because other readers read every tar."""
    named = {file.name for file in manifest.files}
    named |= {f"{SHARDS_FOLDER}/{name}" for s in manifest.shards for name in (s.name, s.index_name)}
    try:
        found = sorted((folder / SHARDS_FOLDER).iterdir())
    except OSError:  # already reported for each shard
        return []
    foreign = [path for path in found if f"{SHARDS_FOLDER}/{path.name}" not in named]
    return [f"{path} is not in the manifest; remove it" for path in foreign]


def _file_problems(folder: Path, expected: FileInfo, members: _Members, shard: int | None) -> list[str]:
    """The problems of one file and, for a shard, of its members, which are read from the same open file."""
    path = folder / expected.name
    try:
        with open_member(folder, expected.name) as file:
            problems = _hash_problems(file, path, expected)
            if shard is not None:
                problems += members.problems(shard, file, damaged=bool(problems))
            elif expected.name == IDS_NAME and not problems:
                problem = ids_problem(file, members.manifest)
                problems += [f"{path} {problem}"] if problem is not None else []
    except CorruptShardError as error:
        return [str(error)]
    except OSError as error:
        return [f"{path} cannot be read: {error.strerror}"]
    return problems


def _hash_problems(file: BinaryIO, path: Path, expected: FileInfo) -> list[str]:
    size = os.fstat(file.fileno()).st_size
    if size != expected.bytes:
        return [f"{path} has {size} bytes, the manifest says {expected.bytes}"]
    found = describe_open_file(file, expected.name)
    if found.sha256 != expected.sha256:
        return [f"{path} has sha256 {found.sha256}, the manifest says {expected.sha256}"]
    return []


class _Members:
    """Checks the members of all shards in order, because a document can continue from one chunk to the next."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        self._folder = folder
        self._before: tuple[int, ChunkDocuments | None] = (-1, None)
        """Number and documents of the last chunk whose documents could be parsed."""

    def problems(self, number: int, content: BinaryIO, damaged: bool) -> list[str]:
        """The problems of one shard's index, tar headers, tokens and documents.

        For a `damaged` shard, whose hash is wrong, they name every member that differs.
        """
        info = self.manifest.shards[number]
        try:
            index = read_index(self._folder, self.manifest, number)
        except CorruptShardError as error:
            return [str(error)]
        problems = []
        for row, kind in np.ndindex(*index.shape[:2]):
            offset, length, digest = (int(value) for value in index[row, kind])
            chunk = info.first_chunk + row
            name = member_name(chunk, kind)
            content.seek(offset - _BLOCK)
            what = header_problem(content.read(_BLOCK), name, length)
            member = content.read(length)
            if damaged:
                if len(member) < length:
                    what = "is cut off"
                elif xxhash.xxh3_64_intdigest(member) != digest:
                    what = "has a different xxh3-64 than its index says"
            elif (problem := self._problem(chunk, kind, member)) is not None:
                problems.append(f"{self._folder / info.name}: {name} {problem}")
            if what is not None:
                problems.append(f"{self._folder / info.name}: member {name} {what}")
        return problems

    def _problem(self, chunk: int, kind: int, member: bytes) -> str | None:
        """What is wrong with the content of a member whose hash is right; None where it is valid."""
        manifest = self.manifest
        if kind != DOCUMENTS:
            return tokens_problem(member, manifest)
        is_last = chunk == manifest.n_chunks - 1
        n_tokens = manifest.last_chunk_tokens if is_last else manifest.chunk_tokens
        try:
            found = parse_documents(
                member,
                "",
                n_tokens=n_tokens,
                n_sources=len(manifest.sources),
                masked=manifest.loss_mask,
                sequence_tokens=manifest.sequence_tokens,
            )
        except CorruptShardError as error:
            return str(error).strip()
        known, before = self._before
        self._before = (chunk, found)
        return continuation_problem(before, manifest.chunk_tokens, found) if known == chunk - 1 else None
