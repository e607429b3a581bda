"""The last step of a preparation: order the documents, and write the corpus and its held-out part.

Documents are ordered by the hashes of their texts, so that every chunk is a fair sample of all sources. At most
GROUP_PARTS parts are in memory at a time: documents of a larger corpus are ordered within groups of parts, and the
parts are also assigned to the groups by a hash.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from data_tools.building.encode import EncodedPart, load_encoded, tokens_path
from data_tools.building.gather import Gathered
from data_tools.config import DocumentFormat, PrepareConfig
from data_tools.gzipped import Gzipped
from data_tools.names import HELDOUT_FOLDER, HELDOUT_TEXT
from data_tools.progress import stage
from data_tools.report.statistics import DocumentCounts
from pretrain.corpus.chat_template import CHAT_TEMPLATE_NAME
from pretrain.corpus.manifest import CorpusSource, Manifest
from pretrain.corpus.tokenizer import Tokenizer, tokenizer_in
from pretrain.corpus.writer import CorpusWriter
from pretrain.files import create_file

LARGEST_CHUNK_TOKENS = 1 << 18
SMALLEST_CHUNK_TOKENS = 1 << 12
CHUNKS_WANTED = 512  # enough chunks to shuffle a small corpus well
GROUP_PARTS = 64


class _PlacedDocument(NamedTuple):
    tokens: np.ndarray
    source: int
    id: str
    text_bytes: int
    heldout: dict[str, Any] | None
    """Fields of a held-out document in documents.jsonl.gz, without id and source; None for a training document."""
    targets: np.ndarray | None
    target_bytes: int


def choose_chunk_tokens(n_tokens: int) -> int:
    """The largest power of two from 4,096 to 262,144 that divides `n_tokens` into at least 512 chunks."""
    size = LARGEST_CHUNK_TOKENS
    while size > SMALLEST_CHUNK_TOKENS and n_tokens < CHUNKS_WANTED * size:
        size //= 2
    return size


def pack(
    config: PrepareConfig, gathered: Gathered, work: Path, corpus: Path
) -> tuple[Manifest, Manifest | None, DocumentCounts]:
    """Write the corpus into the folder `corpus`, which holds its tokenizer and chat template already.

    Returns the manifests of the training and the held-out part, and counts of the training documents.
    """
    tokenizer = Tokenizer.trusted(tokenizer_in(corpus))
    n_tokens = sum(_training_tokens(tokens_path(work, number)) for number in range(len(gathered.parts)))
    chunk_tokens = config.chunk_tokens or choose_chunk_tokens(n_tokens)
    has_heldout = gathered.funnel.heldout > 0

    def writer(folder: Path, files: list[str]) -> CorpusWriter:
        return CorpusWriter(
            folder,
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            chunk_tokens=chunk_tokens,
            sources=[CorpusSource(name=name, license=license) for name, license in gathered.sources],
            shard_bytes=config.shard_bytes,
            files=files,
            loss_mask=config.format is DocumentFormat.chat,
        )

    own_files = [name for name in (tokenizer.file_name, CHAT_TEMPLATE_NAME) if (corpus / name).exists()]
    training = writer(corpus, own_files + [f"{HELDOUT_FOLDER}/manifest.json"] * has_heldout)
    heldout = writer(corpus / HELDOUT_FOLDER, [HELDOUT_TEXT]) if has_heldout else None
    text = HeldoutText(corpus / HELDOUT_FOLDER / HELDOUT_TEXT) if has_heldout else None
    counts = DocumentCounts(tokenizer)
    with stage("writing shards", gathered.funnel.kept_bytes) as progress:
        for document in _placed(work, len(gathered.parts)):
            source = gathered.sources[document.source][0]
            target = training
            if document.heldout is not None and heldout is not None and text is not None:
                target = heldout
                text.add({"id": document.id, "source": source, **document.heldout})
            else:
                counts.add(document.tokens, document.text_bytes)
            target.add_document(
                document.tokens,
                source=source,
                document_id=document.id,
                text_bytes=document.text_bytes,
                targets=document.targets,
                target_bytes=document.target_bytes,
            )
            progress.advance(document.text_bytes)
        heldout_manifest = None
        if heldout is not None and text is not None:
            text.close()
            heldout_manifest = heldout.finish()
        return training.finish(), heldout_manifest, counts


class HeldoutText:
    """The held-out documents as gzipped JSON lines; the same documents give the same bytes."""

    def __init__(self, path: Path) -> None:
        self._raw = create_file(path)
        self._gzip = Gzipped(self._raw)

    def add(self, record: dict[str, Any]) -> None:
        """Write one document: id, source, text, and the messages of a dialogue."""
        line = json.dumps(record, ensure_ascii=False)
        self._gzip.write(line.encode() + b"\n")

    def close(self) -> None:
        self._gzip.finish()
        self._raw.flush()
        os.fsync(self._raw.fileno())
        self._raw.close()


def _training_tokens(path: Path) -> int:
    """Number of tokens of a part that are not held out."""
    with np.load(path, allow_pickle=False) as saved:
        lengths = np.diff(saved["starts"])
        return int(lengths[saved["documents"][:, 2] == 0].sum())


def _placed(work: Path, n_parts: int) -> Iterator[_PlacedDocument]:
    """All documents, in the order of the corpus."""
    dealt = sorted(range(n_parts), key=lambda number: xxhash.xxh3_64_intdigest(str(number).encode()))
    for first in range(0, n_parts, GROUP_PARTS):
        group = sorted(dealt[first : first + GROUP_PARTS])
        yield from _placed_within([load_encoded(tokens_path(work, number)) for number in group])


def _placed_within(parts: list[EncodedPart]) -> Iterator[_PlacedDocument]:
    place = np.argsort(np.concatenate([part.order for part in parts]), kind="stable")
    part_of = np.concatenate([np.full(len(part.ids), number) for number, part in enumerate(parts)])[place]
    row_of = np.concatenate([np.arange(len(part.ids)) for part in parts])[place]
    # Converted to lists, because single elements of arrays are slow to read.
    starts, documents = ([getattr(part, name).tolist() for part in parts] for name in ("starts", "documents"))
    # For each held-out document, the index of its fields in `heldout` of its part.
    text_of = [(np.cumsum(part.documents[:, 2]) - 1).tolist() for part in parts]
    for number, row in zip(part_of.tolist(), row_of.tolist(), strict=True):
        part = parts[number]
        source, text_bytes, held_out = documents[number][row]
        targets = None
        if part.targets is not None and part.target_starts is not None:
            targets = part.targets[slice(*part.target_starts[row : row + 2])] - part.starts[row]
        yield _PlacedDocument(
            tokens=part.tokens[starts[number][row] : starts[number][row + 1]],
            source=source,
            id=part.ids[row],
            text_bytes=text_bytes,
            heldout=part.heldout[text_of[number][row]] if held_out else None,
            targets=targets,
            target_bytes=0 if part.target_bytes is None else int(part.target_bytes[row]),
        )
