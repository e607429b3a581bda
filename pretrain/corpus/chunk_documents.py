"""Checks and parses the content of a chunk: its tokens and its `.doc` member, whose format `shards.py` describes."""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np

from pretrain.corpus.manifest import CorruptShardError, Manifest
from pretrain.stored import has_more_values

MAX_ID_CHARS = 1 << 16
"""Largest number of characters of a document's id. Longer ids are truncated when a corpus is prepared."""
_SMALL_BYTES = 1 << 20  # a .doc member up to this size is parsed without first counting its values
_MAX_OFFSET_TOKENS = 1 << 48
_MAX_DOCUMENT_BYTES = 1 << 40


@dataclass(frozen=True, slots=True)
class ChunkDocuments:
    """The pieces of documents in one chunk. Every field except `targets` has one entry per piece."""

    starts: np.ndarray  # int64: offset of the piece's first token in the chunk; the first is 0
    ends: (
        np.ndarray
    )  # int64: offset after the piece's last token; filler may lie between it and the next start
    source: np.ndarray  # int64: index into the manifest's sources
    ids: list[str]
    offsets: np.ndarray  # int64: offset of the piece's first token in its document
    text_bytes: np.ndarray  # int64: UTF-8 bytes of the whole document where the offset is 0, otherwise 0
    targets: np.ndarray | None = (
        None  # int64 [2 n]: start, stop, ... of the tokens that count in the loss; None: all
    )
    target_bytes: np.ndarray | None = (
        None  # int64: like text_bytes, for the text of the document's targets only
    )


def tokens_problem(content: bytes, manifest: Manifest) -> str | None:
    """What is wrong with the tokens of a chunk; None where all of them are rows of the embedding."""
    tokens = np.frombuffer(content, np.dtype(manifest.dtype).newbyteorder("<"))
    if manifest.vocab_size <= np.iinfo(tokens.dtype).max and int(tokens.max()) >= manifest.vocab_size:
        return f"has the token {tokens.max()}, which is outside of the vocabulary of {manifest.vocab_size} entries"
    return None


def parse_documents(
    content: bytes,
    where: str,
    *,
    n_tokens: int,
    n_sources: int,
    masked: bool,
    sequence_tokens: int | None = None,
) -> ChunkDocuments:
    """Parse the .doc member of a chunk with `n_tokens` tokens, in a corpus with `n_sources` sources.

    `masked` says whether the corpus has a loss mask, and `sequence_tokens` is the length of the sequences into which
    whole documents were packed, if they were. Raises CorruptShardError, whose text begins with `where`.
    """
    try:
        if len(content) > _SMALL_BYTES and has_more_values(content, 8 * n_tokens + _SMALL_BYTES):
            raise ValueError
        raw: dict[str, Any] = json.loads(content.decode())
        arrays = {key: _integers(value) for key, value in raw.items() if key != "ids"}
        ends = arrays.pop("ends", None)
        found = ChunkDocuments(
            ids=raw["ids"], ends=np.append(arrays["starts"][1:], n_tokens) if ends is None else ends, **arrays
        )
        if type(found.ids) is not list:
            raise TypeError
        id_bytes = len("".join(found.ids).encode())  # raises where an id is not a valid string
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CorruptShardError(f"{where} is not a list of documents; prepare the corpus again") from error
    problem = _pieces_problem(found, n_tokens, n_sources) or _targets_problem(found, n_tokens, masked)
    if problem is None and (ends is None) is not (sequence_tokens is None):
        problem = f"has {'no ' if ends is None else ''}ends of documents, but its manifest says otherwise"
    if problem is None and sequence_tokens is not None:
        problem = _packed_problem(found, n_tokens, sequence_tokens)
    if problem is None and id_bytes > MAX_ID_CHARS and max(map(len, found.ids)) > MAX_ID_CHARS:
        problem = f"has an id of more than {MAX_ID_CHARS} characters"
    if problem is not None:
        raise CorruptShardError(f"{where} {problem}; prepare the corpus again")
    return found


def _integers(values: Any) -> np.ndarray:
    """A list of integers as an int64 array. np.array alone would also accept 1.9 and "3". Here true and false become
    1 and 0."""
    if type(values) is not list:
        raise TypeError
    return np.array(array("q", values), np.int64)


def _pieces_problem(found: ChunkDocuments, n_tokens: int, n_sources: int) -> str | None:
    """What is wrong with the pieces of documents in a chunk; None where they are valid."""
    n, starts, offsets = len(found.ids), found.starts, found.offsets
    sizes = [found.text_bytes] if found.target_bytes is None else [found.text_bytes, found.target_bytes]
    if n == 0 or any(len(values) != n for values in (starts, found.source, offsets, *sizes)):
        return "is not a list of documents: its lists are empty or differ in length"
    # This compares neighbors because their difference could overflow.
    if starts[0] != 0 or starts[-1] >= n_tokens or (starts[1:] <= starts[:-1]).any():
        return f"has starts that do not ascend from 0 within the chunk's {n_tokens} tokens"
    if found.source.min() < 0 or found.source.max() >= n_sources:
        return f"has a source that is not one of the {n_sources} in its manifest"
    if not 0 <= offsets[0] < _MAX_OFFSET_TOKENS or offsets[1:].any():
        return "has wrong offsets: only the first piece of a chunk can continue a document"
    for values in sizes:
        if values.min() < 0 or values.max() > _MAX_DOCUMENT_BYTES or (offsets[0] and values[0]):
            return "has impossible text sizes, or a text size for a piece that continues a document"
    return None


def _packed_problem(found: ChunkDocuments, n_tokens: int, sequence_tokens: int) -> str | None:
    """What is wrong with how a chunk's documents are packed into sequences; None where it is valid.

    In each sequence, whole documents follow each other from its first token on, and filler may follow the last one.
    """
    starts, ends = found.starts, found.ends
    if len(ends) != len(starts) or found.offsets[0] or (ends <= starts).any() or ends[-1] > n_tokens:
        return "has ends of documents that do not match their starts"
    first, last = starts // sequence_tokens, (ends - 1) // sequence_tokens
    is_next = (starts[1:] == ends[:-1]) & (first[1:] == last[:-1])
    begins_one = (starts[1:] % sequence_tokens == 0) & (first[1:] == last[:-1] + 1)
    if (
        (first != last).any()
        or not (is_next | begins_one).all()
        or last[-1] != n_tokens // sequence_tokens - 1
    ):
        return f"has documents that are not packed whole into sequences of {sequence_tokens} tokens"
    return None


def continuation_problem(
    before: ChunkDocuments | None, tokens_before: int, found: ChunkDocuments
) -> str | None:
    """What is wrong with how a chunk continues the document that the previous chunk ends with; None where it is valid.

    `before` are the pieces of the previous chunk, which has `tokens_before` tokens; None for the first chunk.
    """
    if found.offsets[0] == 0:
        return None
    if before is None:
        return "continues a document, although it is the first chunk"
    offset = before.offsets[-1] + tokens_before - before.starts[-1]
    expected = (offset, before.ids[-1], before.source[-1])
    if (found.offsets[0], found.ids[0], found.source[0]) != expected:
        return "does not continue the document that the previous chunk ends with, or not at the right token"
    return None


def _targets_problem(found: ChunkDocuments, n_tokens: int, masked: bool) -> str | None:
    """What is wrong with the loss mask of a chunk of `n_tokens` tokens; None where it is valid."""
    targets = found.targets
    if (targets is not None) is not masked or (found.target_bytes is not None) is not masked:
        return f"has {'no' if masked else 'a'} loss mask, but its manifest says otherwise"
    if targets is None:
        return None
    if len(targets) % 2 or (targets[1:] < targets[:-1]).any():
        return "has targets that are not ascending pairs of start and stop"
    if (targets[::2] == targets[1::2]).any() or (
        len(targets) and not 0 <= targets[0] <= targets[-1] <= n_tokens
    ):
        return f"has targets that are empty or outside of the chunk's {n_tokens} tokens"
    return None
