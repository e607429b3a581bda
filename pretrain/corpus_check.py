"""Verifying a corpus: every file and member against the manifest."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash

from pretrain.config import ConfigError
from pretrain.manifest import (
    DOCUMENTS,
    CorruptShardError,
    FileInfo,
    Manifest,
    describe_file,
    header_problem,
    load_manifest,
    member_name,
    read_index,
    resolve_inside,
)
from pretrain.shards import SHARDS_FOLDER, parse_documents

_BLOCK = tarfile.BLOCKSIZE

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


def verify_corpus(manifest_path: str | Path, progress: Progress | None = None) -> list[str]:
    """Read every file of a corpus and compare it with the manifest.

    Returns every problem found, each one sentence that names the file and the member; empty: all is well.
    """
    try:
        manifest = load_manifest(manifest_path)
    except ConfigError as error:
        return [str(error)]
    folder = Path(manifest_path).parent
    expected = [FileInfo(f"{SHARDS_FOLDER}/{s.name}", s.bytes, s.sha256) for s in manifest.shards]
    total, done = sum(file.bytes for file in expected + manifest.files), 0
    problems = []
    for number, file in enumerate(expected + manifest.files):
        found = _file_problems(folder, file)
        if number < len(expected):
            found += _member_problems(folder / SHARDS_FOLDER, manifest, number, damaged=bool(found))
        problems += found
        done += file.bytes
        if progress is not None:
            progress(done, total)
    named = {shard.name for shard in manifest.shards}
    foreign = [p for p in sorted((folder / SHARDS_FOLDER).glob("*.tar")) if p.name not in named]
    return problems + [f"{p} is not in the manifest; remove it" for p in foreign]


def _file_problems(folder: Path, expected: FileInfo) -> list[str]:
    try:
        path = resolve_inside(folder, expected.name)
        found = describe_file(folder, expected.name)
    except CorruptShardError as error:
        return [str(error)]
    except OSError as error:
        return [f"{path} cannot be read: {error.strerror}"]
    if found.bytes != expected.bytes:
        return [f"{path} has {found.bytes} bytes, the manifest says {expected.bytes}"]
    if found.sha256 != expected.sha256:
        return [f"{path} has sha256 {found.sha256}, the manifest says {expected.sha256}"]
    return []


def _member_problems(folder: Path, manifest: Manifest, number: int, damaged: bool) -> list[str]:
    """Whether the index is whole, each tar header is as it says, and each loss mask marks tokens of its chunk; for a
    damaged shard, each member that differs."""
    info = manifest.shards[number]
    try:
        index = read_index(folder, manifest, number)
        content = resolve_inside(folder, info.name).open("rb")
    except CorruptShardError as error:
        return [str(error)]
    except OSError:  # said already
        return []
    problems = []
    with content:
        for row, kind in np.ndindex(*index.shape[:2]):
            offset, length, digest = (int(value) for value in index[row, kind])
            name = member_name(info.first_chunk + row, kind)
            content.seek(offset - _BLOCK)
            what = header_problem(content.read(_BLOCK), name, length)
            if damaged:
                member = content.read(length)
                if len(member) < length:
                    what = "is cut off"
                elif xxhash.xxh3_64_intdigest(member) != digest:
                    what = "has another xxh3-64 than its index says"
            elif kind == DOCUMENTS and manifest.loss_mask:
                is_last = info.first_chunk + row == manifest.n_chunks - 1
                n_tokens = manifest.last_chunk_tokens if is_last else manifest.chunk_tokens
                try:
                    parse_documents(
                        content.read(length), f"{folder / info.name}: {name}", n_tokens, masked=True
                    )
                except CorruptShardError as error:
                    problems.append(str(error))
            if what is not None:
                problems.append(f"{folder / info.name}: member {name} {what}")
    return problems
