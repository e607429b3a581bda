"""Figures about a corpus: statistics.json.

There are two kinds. Figures about the documents are computed from their tokens while they are written, by `prepare` and
again by `remove`. Figures about what was left out (drops, duplicates, personal data, evaluation sets) come from the
curation, and do not change when documents are removed later. A figure that was not measured is null, not 0.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import PurePath
from typing import Any

import numpy as np

from data_tools.report.funnel import Funnel, StageCounts, stage_counts
from data_tools.text import count_cjk
from pretrain.corpus.manifest import Manifest
from pretrain.corpus.tokenizer import Tokenizer

_PERCENTILES = (5, 50, 95)
# First UTF-8 bytes of U+3000 to U+DFFF, which are Chinese, Japanese and Korean except for a few hundred signs.
_CJK_BYTES = range(0xE3, 0xEE)
_FIRST_BYTES = (*range(0x21, 0x7F), *range(0xC2, 0xF5))
_COUNTED_TOKENS = 1 << 18
"""Number of tokens of documents that are counted together."""
_PROBE_TOKENS = 512  # decoded to detect a document's script where the pieces of a vocabulary are not text


class DocumentCounts:
    """Counts lengths and scripts of documents in constant memory."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        if tokenizer.is_sentencepiece:  # its pieces are text
            pieces = [_piece_characters(tokenizer.piece(token)) for token in range(tokenizer.vocab_size)]
            self._characters, self._cjk = np.array(pieces, dtype=np.uint8).T
            for special in (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id):
                self._characters[special] = 0
        self._lengths: Counter[int] = Counter()
        self._scripts: dict[str, Counter[str]] = {}
        self._waiting: list[
            tuple[np.ndarray, int]
        ] = []  # documents that are not counted yet, since many cost less
        self._waiting_tokens = 0

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        """Add one document. `tokens` includes bos and eos: int [length], and must not change afterwards."""
        self._waiting.append((tokens, text_bytes))
        self._waiting_tokens += len(tokens)
        if self._waiting_tokens >= _COUNTED_TOKENS:
            self._count_waiting()

    def _count_waiting(self) -> None:
        """Count the documents that are waiting."""
        if self._waiting:
            tokens, sizes = zip(*self._waiting, strict=True)
            starts = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
            self.add_all(np.concatenate(tokens), starts, np.array(sizes, np.int64))
        self._waiting, self._waiting_tokens = [], 0

    def add_all(self, tokens: np.ndarray, starts: np.ndarray, text_bytes: np.ndarray) -> None:
        """Add many documents. Document k has the tokens [starts[k], starts[k + 1])."""
        lengths = np.diff(starts)
        if self._tokenizer.is_sentencepiece:
            n_characters, n_cjk = (
                np.add.reduceat(counts[tokens], starts[:-1], dtype=np.int64)
                for counts in (self._characters, self._cjk)
            )
        else:
            probes = (tokens[start : min(start + _PROBE_TOKENS, end)] for start, end in pairwise(starts))
            texts = (self._tokenizer.decode(probe.tolist()) for probe in probes)
            n_characters, n_cjk = np.array([count_cjk(text) for text in texts], np.int64).T
        self._lengths.update(lengths.tolist())
        is_cjk = 2 * n_cjk > n_characters
        for script, chosen in (("cjk", is_cjk), ("other", ~is_cjk)):
            if chosen.any():
                counts = {
                    "documents": chosen.sum(),
                    "tokens": lengths[chosen].sum(),
                    "text_bytes": text_bytes[chosen].sum(),
                }
                self._scripts.setdefault(script, Counter()).update(
                    {name: int(n) for name, n in counts.items()}
                )

    def to_json(self) -> dict[str, Any]:
        """`lengths`, in tokens, and `scripts` (`cjk`: most characters are Chinese, Japanese or Korean)."""
        self._count_waiting()
        return {
            "lengths": length_statistics(self._lengths),
            "scripts": {name: dict(counts) for name, counts in sorted(self._scripts.items())},
        }


def _piece_characters(piece: str) -> tuple[int, int]:
    """Number of visible characters of a vocabulary entry, and how many of them are Chinese, Japanese or Korean.

    A character that is written as bytes counts with its first byte.
    """
    if len(piece) == 6 and piece.startswith("<0x"):
        byte = int(piece[3:5], 16)
        return int(byte in _FIRST_BYTES), int(byte in _CJK_BYTES)
    return count_cjk(piece.replace("\u2581", " "))


def length_statistics(lengths: Mapping[int, int]) -> dict[str, Any]:
    """Percentiles (nearest rank) of document lengths, and a histogram by powers of two.

    In the histogram, `"64": 3` means that 3 documents have 64 to 127 tokens.
    """
    ordered = np.array(sorted(lengths.items()), dtype=np.int64).reshape(-1, 2)
    upto = np.cumsum(ordered[:, 1])
    n_documents = int(upto[-1])
    at = {p: int(np.searchsorted(upto, -(-n_documents * p // 100))) for p in _PERCENTILES}
    histogram: Counter[int] = Counter()
    for length, count in ordered.tolist():
        histogram[1 << (length.bit_length() - 1)] += count
    return {
        "mean": round(int((ordered[:, 0] * ordered[:, 1]).sum()) / n_documents, 1),
        **{f"p{p}": int(ordered[row, 0]) for p, row in at.items()},
        "max": int(ordered[-1, 0]),
        "histogram": {str(size): count for size, count in sorted(histogram.items())},
    }


def corpus_figures(manifest: Manifest, heldout: Manifest | None, counts: DocumentCounts) -> dict[str, Any]:
    """Figures about the documents of a corpus. `counts` covers all training documents."""
    sources = sorted((s for s in manifest.sources if s.documents), key=lambda s: (-s.tokens, s.name))
    held = None
    if heldout is not None:
        held = {"documents": heldout.n_documents, "tokens": heldout.document_tokens}
    return {
        "root_sha256": manifest.root_sha256,
        "documents": manifest.n_documents,
        "tokens": manifest.document_tokens,
        "text_bytes": sum(source.text_bytes for source in sources),
        "heldout": held,
        **counts.to_json(),
        "sources": [
            {
                "name": source.name,
                "license": source.license,
                "documents": source.documents,
                "tokens": source.tokens,
                "text_bytes": source.text_bytes,
                "bytes_per_token": round(source.text_bytes / source.tokens, 3),
            }
            for source in sources
        ],
    }


def drop_figures(reports: Sequence[Mapping[str, Any]], n_inputs: int, funnel: Funnel) -> dict[str, Any]:
    """Figures about what was left out. `reports` are those of the curations that the inputs come from."""
    if not reports:
        return {
            "languages": None,
            "funnel": [preparation_counts(funnel)],
            "duplicates": {"exact_in_preparation": funnel.dropped.get("duplicate", 0)},
            "personal_data": None,
            "contamination": None,
        }
    merged = _merged(reports)
    tally = merged["tally"]
    languages = None
    if len(reports) == n_inputs:  # otherwise the language of some text is not known
        languages = {
            name: {"documents": count, "text_bytes": tally["language_bytes"].get(name, 0)}
            for name, count in sorted(tally["languages"].items(), key=lambda item: (-item[1], item[0]))
        }
    stages = [_row(counts) for counts in stage_counts(merged)]
    return {
        "languages": languages,
        "funnel": [*stages, preparation_counts(funnel)],
        "duplicates": _duplicates(merged, funnel),
        "personal_data": _named(tally["counts"], "pii") if "pii" in merged["stages"] else None,
        "contamination": _contamination(reports, tally) if "contaminated" in tally else None,
    }


def preparation_counts(funnel: Funnel) -> dict[str, Any]:
    """The preparation as the last row of the funnel; the number of bytes that it read is not known."""
    dropped = dict(sorted(funnel.dropped.items(), key=lambda item: (-item[1], item[0])))
    return {
        "stage": "prepare",
        "documents_in": funnel.read,
        "documents_out": funnel.kept,
        "bytes_in": None,
        "bytes_out": funnel.kept_bytes,
        "dropped": dropped,
    }


def _row(counts: StageCounts) -> dict[str, Any]:
    return {name: getattr(counts, name) for name in StageCounts.__slots__}


def _merged(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several curations as one, with added counts."""
    tally: dict[str, Counter[str]] = {}
    sizes: Counter[str] = Counter()
    clusters: Counter[str] = Counter()
    for report in reports:
        for name, counts in report["tally"].items():
            tally.setdefault(name, Counter()).update(counts)
        sizes.update(report["clusters"]["sizes"])
        clusters.update(
            {name: report["clusters"][name] for name in ("clusters", "documents", "repeated_lines")}
        )
    longest = max((report["stages"] for report in reports), key=len)
    stages = list(dict.fromkeys([*longest, *(name for report in reports for name in report["stages"])]))
    return {"tally": tally, "stages": stages, "clusters": clusters, "sizes": sizes}


def _duplicates(merged: Mapping[str, Any], funnel: Funnel) -> dict[str, Any]:
    dropped, clusters = merged["tally"]["dropped"], merged["clusters"]
    return {
        "exact": dropped["dedup/exact_duplicate"],
        "near": dropped["dedup/near_duplicate"],
        "only_repeated_lines": dropped["dedup/only_repeated_lines"],
        "repeated_lines": clusters["repeated_lines"],
        "clusters": clusters["clusters"],
        "documents_in_clusters": clusters["documents"],
        "cluster_sizes": dict(sorted(merged["sizes"].items(), key=lambda item: int(item[0]))),
        "exact_in_preparation": funnel.dropped.get("duplicate", 0),
    }


def _named(counts: Mapping[str, int], stage: str) -> dict[str, int]:
    """The counts of a stage, the most frequent first."""
    found = {name.partition(".")[2]: n for name, n in counts.items() if name.startswith(f"{stage}.")}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _contamination(
    reports: Sequence[Mapping[str, Any]], tally: Mapping[str, Mapping[str, int]]
) -> dict[str, int] | None:
    """Number of documents that share text with each evaluation set, also where it is 0."""
    files = [
        file
        for report in reports
        for file in report["recipe"]["options"]["curation"]["decontaminate"]["files"]
    ]
    named = {PurePath(file).name.partition(".")[0]: 0 for file in files}
    return (named | dict(tally["contaminated"])) or None


def to_text(statistics: Mapping[str, Any]) -> bytes:
    """The content of statistics.json."""
    return (json.dumps(statistics, indent=1, ensure_ascii=False) + "\n").encode()
