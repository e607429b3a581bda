"""The middle phase of a curation: finds duplicates among all documents, and decides which of them are kept."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_tools.curation.dedup import (
    EXACT,
    DedupConfig,
    choose_kept,
    components,
    load_array,
    n_ranges,
    n_tables,
    pairs_in,
    read_range,
    repeated_lines_in,
    save_array,
)
from data_tools.curation.executors import TaskProgress
from data_tools.curation.phases import Layout, write_json

_ROW_BYTES = 16
_LARGEST_SHOWN = 20


@dataclass
class CompareTask:
    """Compares one range of one table: finds pairs of documents with equal hashes, or lines in too many documents."""

    dedup: DedupConfig
    layout: Layout
    n_ranks: int
    jobs: list[tuple[int, int, int]]
    """Table, range and number of ranges of each task."""

    def run(self, rank: int, progress: TaskProgress) -> None:
        table, part, parts = self.jobs[rank]
        rows = read_range(self.layout.work, table, self.n_ranks, part, parts)
        if table < n_tables(self.dedup):
            found = pairs_in(rows)
        else:
            found = repeated_lines_in(rows, self.dedup.max_line_documents)
        save_array(self.layout.work / "pairs" / f"{rank:05d}.npy", found)
        progress.advance(len(rows) * _ROW_BYTES)


def compare_task(dedup: DedupConfig, layout: Layout, n_ranks: int) -> tuple[CompareTask, int]:
    """The phase over all ranges of all tables, and the number of bytes that it reads."""
    jobs, n_rows = [], 0
    for table in range(n_tables(dedup) + 1):
        parts = n_ranges(layout.work, table, n_ranks)
        jobs += [(table, part, parts) for part in range(parts)]
        n_rows += sum(
            len(load_array(layout.work / f"table-{table:03d}" / f"{rank:05d}.npy", mapped=True))
            for rank in range(n_ranks)
        )
    return CompareTask(dedup, layout, n_ranks, jobs), n_rows * _ROW_BYTES


def decide(task: CompareTask) -> dict[str, Any]:
    """Join pairs into clusters, and write which documents the last phase removes. Returns statistics on clusters."""
    layout, dedup = task.layout, task.dedup
    none = np.zeros((0, 2), dtype=np.uint64)
    found = {"exact": [none], "near": [none], "lines": [none]}
    for number, (table, _, _) in enumerate(task.jobs):
        kind = "exact" if table == EXACT else "near" if table < n_tables(dedup) else "lines"
        found[kind].append(load_array(layout.work / "pairs" / f"{number:05d}.npy"))
    exact, near, lines = (np.concatenate(found[kind]) for kind in ("exact", "near", "lines"))
    save_array(layout.lines, lines[np.argsort(lines[:, 0])])
    documents, labels = components(np.concatenate((exact, near)))
    kept = choose_kept(labels, _source_ranks(documents, layout))
    removed = documents[~kept]
    # Reason 0: another document has exactly the same text; reason 1: another document has a similar text.
    reasons = np.where(np.isin(removed, exact), 0, 1).astype(np.uint64)
    tasks = removed >> np.uint64(32)
    for rank in range(task.n_ranks):
        mine = tasks == rank
        numbers = removed[mine] & np.uint64(0xFFFFFFFF)
        save_array(layout.removed(rank), np.column_stack((numbers, reasons[mine])))
    statistics = _statistics(documents, labels, kept, layout) | {"repeated_lines": len(lines)}
    write_json(layout.work / "clusters.json", statistics)
    return statistics


def _source_ranks(documents: np.ndarray, layout: Layout) -> np.ndarray:
    """Priority of each document's source, the smallest first: int [documents]."""
    ranks = np.zeros(len(documents), dtype=np.int64)
    tasks = documents >> np.uint64(32)
    for rank in np.unique(tasks).tolist():
        mine = tasks == rank
        ranks[mine] = load_array(layout.ranks(rank))[documents[mine] & np.uint64(0xFFFFFFFF)]
    return ranks


def _statistics(
    documents: np.ndarray, labels: np.ndarray, kept: np.ndarray, layout: Layout
) -> dict[str, Any]:
    _, sizes = np.unique(labels, return_counts=True)
    histogram = Counter(sizes.tolist())
    largest = []
    for label in np.unique(labels)[np.argsort(-sizes, kind="stable")][:_LARGEST_SHOWN].tolist():
        inside = labels == label
        document = int(documents[inside & kept][0])
        largest.append({"documents": int(inside.sum()), "kept": [document >> 32, document & 0xFFFFFFFF]})
    return {
        "clusters": len(sizes),
        "documents": len(documents),
        "sizes": {str(size): count for size, count in sorted(histogram.items())},
        "largest": largest,
    }
