"""The last step of a preparation: order the documents, and write the corpus and its held-out part.

Documents are ordered by the hashes of their texts, so that every chunk is a fair sample of all sources. At most
GROUP_PARTS parts are in memory at a time: documents of a larger corpus are ordered within groups of parts, and the
parts are also assigned to the groups by a hash.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from data_tools.building.best_fit import best_fit
from data_tools.building.encode import EncodedPart, load_encoded, tokens_path
from data_tools.building.gather import Gathered
from data_tools.config import DocumentFormat, PrepareConfig
from data_tools.gzipped import Gzipped
from data_tools.names import HELDOUT_FOLDER, HELDOUT_TEXT
from data_tools.progress import stage
from data_tools.report.statistics import DocumentCounts
from pretrain.corpus.chat_template import CHAT_TEMPLATE_NAME
from pretrain.corpus.manifest import CorpusSource, Manifest, Packed
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.corpus.writer import CorpusWriter, Documents
from pretrain.files import create_file

LARGEST_CHUNK_TOKENS = 1 << 18
SMALLEST_CHUNK_TOKENS = 1 << 12
CHUNKS_WANTED = 512  # enough chunks to shuffle a small corpus well
GROUP_PARTS = 64
_BLOCK_TOKENS = 1 << 20  # that are put in order together
_BLOCK_SEQUENCES = 256  # that are packed together, at least; fewer would leave more filler


class _Block(NamedTuple):
    """Consecutive documents of the corpus, of which some are held out."""

    training: Documents
    heldout: Documents
    fields: list[dict[str, Any]]
    """Fields of the held-out documents in documents.jsonl.gz, without id and source."""


def choose_chunk_tokens(n_tokens: int) -> int:
    """The largest power of two from 4,096 to 262,144 that divides `n_tokens` into at least 512 chunks."""
    size = LARGEST_CHUNK_TOKENS
    while size > SMALLEST_CHUNK_TOKENS and n_tokens < CHUNKS_WANTED * size:
        size //= 2
    return size


def pack(
    config: PrepareConfig, gathered: Gathered, work: Path, corpus: Path, tokenizer: Tokenizer
) -> tuple[Manifest, Manifest | None, DocumentCounts]:
    """Write the corpus into the folder `corpus`, which holds its `tokenizer` and chat template already.

    Returns the manifests of the training and the held-out part, and counts of the training documents.
    """
    n_tokens = sum(_training_tokens(tokens_path(work, number)) for number in range(len(gathered.parts)))
    chunk_tokens = config.chunk_tokens or choose_chunk_tokens(n_tokens)
    packed = _packed(config, gathered)
    if packed is not None:  # given sizes are multiples of a sequence already
        chunk_tokens = max(1, chunk_tokens // packed.sequence_tokens) * packed.sequence_tokens
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
            loss_mask=config.format is not DocumentFormat.text,
            packed=packed,
            classes=gathered.classes,
        )

    own_files = [name for name in (tokenizer.file_name, CHAT_TEMPLATE_NAME) if (corpus / name).exists()]
    training = writer(corpus, own_files + [f"{HELDOUT_FOLDER}/manifest.json"] * has_heldout)
    heldout = writer(corpus / HELDOUT_FOLDER, [HELDOUT_TEXT]) if has_heldout else None
    text = HeldoutText(corpus / HELDOUT_FOLDER / HELDOUT_TEXT) if has_heldout else None
    counts = DocumentCounts(tokenizer)
    with stage("writing shards", gathered.funnel.kept_bytes) as progress:
        for block in _placed(work, len(gathered.parts), packed):
            if block.training.ids:
                training.add_documents(block.training)
                counts.add_all(block.training.tokens, block.training.starts, block.training.text_bytes)
            if block.heldout.ids and heldout is not None and text is not None:
                heldout.add_documents(block.heldout)
                rows = zip(block.heldout.ids, block.heldout.source.tolist(), block.fields, strict=True)
                for name, source, fields in rows:
                    text.add({"id": name, "source": gathered.sources[source][0], **fields})
            progress.advance(int(block.training.text_bytes.sum() + block.heldout.text_bytes.sum()))
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


def _packed(config: PrepareConfig, gathered: Gathered) -> Packed | None:
    """How dialogues and labeled documents are packed; None where they are not."""
    if config.packed_tokens is None:
        return None
    return Packed(
        sequence_tokens=config.packed_tokens,
        dropped_documents=gathered.funnel.dropped.get("too_many_tokens", 0),
        cut_documents=gathered.funnel.cut + gathered.funnel.shortened,
    )


def _placed(work: Path, n_parts: int, packed: Packed | None) -> Iterator[_Block]:
    """All documents, in the order of the corpus."""
    block_tokens = max(_BLOCK_TOKENS, _BLOCK_SEQUENCES * packed.sequence_tokens if packed else 0)
    dealt = sorted(range(n_parts), key=lambda number: xxhash.xxh3_64_intdigest(str(number).encode()))
    for first in range(0, n_parts, GROUP_PARTS):
        group = _merged([tokens_path(work, number) for number in sorted(dealt[first : first + GROUP_PARTS])])
        place = np.argsort(group.order, kind="stable")
        is_heldout = group.documents[:, 2].astype(bool)
        # For each held-out document, the index of its fields in `heldout`.
        text_of = np.cumsum(is_heldout) - 1
        ends = np.cumsum(np.diff(group.starts)[place])
        for rows in np.split(place, np.flatnonzero(np.diff(ends // block_tokens)) + 1):
            training, chosen = rows[~is_heldout[rows]], rows[is_heldout[rows]]
            if packed is not None:
                sizes = np.diff(group.starts)
                training = training[best_fit(sizes[training], packed.sequence_tokens)]
                chosen = chosen[best_fit(sizes[chosen], packed.sequence_tokens)]
            fields = [group.heldout[number] for number in text_of[chosen].tolist()]
            yield _Block(_documents(group, training), _documents(group, chosen), fields)


def _merged(paths: list[Path]) -> EncodedPart:
    """Several parts as one. Their tokens are in memory once, and one part twice."""
    starts = [np.zeros(1, np.int64)]
    parts = list[EncodedPart]()
    sizes = [_n_tokens(path) for path in paths]
    ends = np.cumsum([0, *sizes])
    tokens: np.ndarray | None = None
    for path, end in zip(paths, ends[1:], strict=True):
        part = load_encoded(path)
        if tokens is None:
            tokens = np.empty(int(ends[-1]), part.tokens.dtype)
        begin = end - len(part.tokens)
        tokens[begin:end] = part.tokens
        starts.append(part.starts[1:] + begin)
        targets = None if part.targets is None else part.targets + begin
        parts.append(replace(part, tokens=part.tokens[:0].copy(), targets=targets))
    assert tokens is not None
    merged = EncodedPart(
        tokens=tokens,
        starts=np.concatenate(starts),
        documents=np.concatenate([part.documents for part in parts]),
        order=np.concatenate([part.order for part in parts]),
        ids=[name for part in parts for name in part.ids],
        heldout=[fields for part in parts for fields in part.heldout],
    )
    if parts[0].targets is None:
        return merged
    n_targets = [np.diff(part.target_starts) for part in parts]
    return replace(
        merged,
        targets=np.concatenate([part.targets for part in parts]),
        target_starts=np.concatenate([[0], np.cumsum(np.concatenate(n_targets))]),
        target_bytes=np.concatenate([part.target_bytes for part in parts]),
    )


def _n_tokens(path: Path) -> int:
    with np.load(path, allow_pickle=False) as saved:
        return int(saved["starts"][-1])


def _documents(group: EncodedPart, rows: np.ndarray) -> Documents:
    """The documents of the given rows."""
    begins = group.starts[rows]
    places, starts = _ranges(begins, group.starts[rows + 1])
    found = Documents(
        tokens=group.tokens[places],
        starts=starts,
        source=group.documents[rows, 0],
        ids=list(map(group.ids.__getitem__, rows.tolist())),
        text_bytes=group.documents[rows, 1],
    )
    if group.targets is not None and group.target_starts is not None and group.target_bytes is not None:
        places, ends = _ranges(group.target_starts[rows], group.target_starts[rows + 1])
        found.targets = group.targets[places] + np.repeat(starts[:-1] - begins, np.diff(ends))
        found.target_bytes = group.target_bytes[rows]
    return found


def _ranges(begins: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of all ranges, one range after another, and where each begins among them, with the end."""
    starts = np.concatenate([[0], np.cumsum(ends - begins)])
    places = np.repeat(begins - starts[:-1], ends - begins)
    places += np.arange(starts[-1])
    return places, starts
