"""The middle phase of a curation: finds duplicates among all documents, and decides which of them are kept.

First come the rules of which equal hashes decide alone, each among what the one before it left (`settle`): one
document per address, a number of documents per domain, one document per text. Then tasks find the near duplicates
among what is left (`CompareTask`). At the end the documents are gone through in the order of preference: one is dropped
if it is similar to a document that is kept (`decide`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_tools.curation.collection import Collection
from data_tools.curation.dedup import (
    DOMAIN,
    EXACT,
    LINES,
    NO_DOCUMENT,
    URL,
    band_tables,
    equal_tables,
    in_runs,
    is_in,
    load_array,
    n_ranges,
    n_rows,
    places_in_runs,
    read_range,
    repeated_lines_in,
    save_array,
)
from data_tools.curation.executors import TaskProgress
from data_tools.curation.phases import REASONS, Layout, write_json
from data_tools.curation.similar import EDGE, band_of, similar_pairs

_ROW_BYTES = 16
_LARGEST_SHOWN = 20
REMOVAL = np.dtype([("document", "<u8"), ("kept", "<u8"), ("similarity", "<f8"), ("reason", "<u1")])
"""A dropped document, the kept one that stands for it, their similarity (0 where the text is not the
reason), and the number of the reason in REASONS."""
_REASON_OF = {
    EXACT: REASONS.index("exact_duplicate"),
    URL: REASONS.index("same_url"),
    DOMAIN: REASONS.index("domain_limit"),
}
_NEAR = REASONS.index("near_duplicate")


# ---- equal hashes ----------------------------------------------------------------------------------------------------


def settle(collection: Collection, layout: Layout) -> None:
    """Write which documents the rules of equal hashes remove: [REMOVAL], sorted by document."""
    removals = np.zeros(0, dtype=REMOVAL)
    for table in equal_tables(collection.dedup):
        parts = n_ranges(n_rows(layout.work, table, collection.n_ranks))
        found = [removals]
        for part in range(parts):
            rows = read_range(layout.work, table, collection.n_ranks, part, parts)
            rows = in_runs(rows[~is_in(rows[:, 1], removals["document"])])
            found.append(
                _over_limit(rows, collection) if table == DOMAIN else _repeats(rows, table, collection)
            )
        removals = np.concatenate(found)
        removals = removals[np.argsort(removals["document"])]
    save_array(layout.settled, removals)


def _repeats(rows: np.ndarray, table: str, collection: Collection) -> np.ndarray:
    """All documents but the preferred one of each run of equal hashes: [REMOVAL]."""
    rows = rows[collection.order(rows[:, 0], rows[:, 1])]
    places = places_in_runs(rows[:, 0])
    chosen = np.flatnonzero((places > 0) & ~collection.is_earlier(rows[:, 1]))
    removals = np.zeros(len(chosen), dtype=REMOVAL)
    removals["document"] = rows[chosen, 1]
    removals["kept"] = rows[chosen - places[chosen], 1]
    removals["similarity"] = float(table == EXACT)
    removals["reason"] = _REASON_OF[table]
    return removals


def _over_limit(rows: np.ndarray, collection: Collection) -> np.ndarray:
    """Documents of each domain beyond the largest number: [REMOVAL].

    Those of earlier curations count first, then those of preferred sources. Within a source the hash of the address
    decides, so that pages of the whole domain are kept and not only those that came first.
    """
    facts = collection.facts(rows[:, 1], "url", "preference")
    preferences = facts["preference"].astype(np.int64)
    preferences[collection.is_earlier(rows[:, 1])] = -1
    rows = rows[np.lexsort((rows[:, 1], facts["url"], preferences, rows[:, 0]))]
    over = places_in_runs(rows[:, 0]) >= collection.dedup.max_documents_per_domain
    documents = rows[over & ~collection.is_earlier(rows[:, 1]), 1]
    removals = np.zeros(len(documents), dtype=REMOVAL)
    removals["document"], removals["kept"] = documents, NO_DOCUMENT
    removals["reason"] = _REASON_OF[DOMAIN]
    return removals


# ---- similar texts, and lines ----------------------------------------------------------------------------------------


@dataclass
class CompareTask:
    """Compares one range of one table: finds near duplicates, or lines in too many documents."""

    collection: Collection
    layout: Layout
    jobs: list[tuple[str, int, int]]
    """Table, range and number of ranges of each task."""

    def run(self, rank: int, progress: TaskProgress) -> None:
        (table, part, parts), dedup = self.jobs[rank], self.collection.dedup
        if table == LINES:
            rows = read_range(self.layout.work, table, self.collection.n_tasks, part, parts)
            found = repeated_lines_in(rows, dedup.max_line_documents)
        else:
            rows = read_range(self.layout.work, table, self.collection.n_ranks, part, parts)
            left = rows[~is_in(rows[:, 1], load_array(self.layout.settled, mapped=True)["document"])]
            found = similar_pairs(left, band_of(dedup, table), self.collection)
        save_array(self.layout.work / "pairs" / f"{rank:05d}.npy", found)
        progress.advance(len(rows) * _ROW_BYTES)


def compare_task(collection: Collection, layout: Layout) -> tuple[CompareTask, int]:
    """The phase over all ranges of all tables, and the number of bytes that it reads."""
    jobs, rows = [], 0
    for table in (*band_tables(collection.dedup), LINES):
        here = n_rows(layout.work, table, collection.n_tasks if table == LINES else collection.n_ranks)
        parts = n_ranges(here)
        jobs += [(table, part, parts) for part in range(parts)]
        rows += here
    return CompareTask(collection, layout, jobs), rows * _ROW_BYTES


# ---- the decision ----------------------------------------------------------------------------------------------------


def decide(task: CompareTask) -> dict[str, Any]:
    """Write which documents the last phase removes, and for which kept one. Returns statistics on clusters."""
    layout, collection = task.layout, task.collection
    edges, lines = [np.zeros(0, dtype=EDGE)], [np.zeros((0, 2), dtype=np.uint64)]
    for number, (table, _, _) in enumerate(task.jobs):
        (lines if table == LINES else edges).append(load_array(layout.work / "pairs" / f"{number:05d}.npy"))
    repeated = np.concatenate(lines)
    save_array(layout.lines, repeated[np.argsort(repeated[:, 0])])
    near = near_removals(np.concatenate(edges))
    removals = _joined(load_array(layout.settled), near)
    begins = np.searchsorted(
        removals["document"], np.arange(collection.n_tasks + 1, dtype=np.uint64) << np.uint64(32)
    )
    for rank in range(collection.n_tasks):
        save_array(layout.removed(rank), removals[begins[rank] : begins[rank + 1]])
    statistics = _statistics(removals) | {"repeated_lines": len(repeated)}
    write_json(layout.work / "clusters.json", statistics)
    return statistics


def near_removals(edges: np.ndarray) -> np.ndarray:
    """The documents that are similar to a kept one, each with the most similar of these: [REMOVAL].

    A document is kept if no preferred document to which it is similar is kept. In each round those are kept of which no
    neighbor is preferred, and their other neighbors are dropped; then edges that no longer matter are left out.
    """
    documents, flat = np.unique(np.concatenate((edges["kept"], edges["document"])), return_inverse=True)
    firsts, seconds = flat.reshape(2, -1)
    waits, dropped = np.zeros(len(documents), dtype=bool), np.zeros(len(documents), dtype=bool)
    left = np.arange(len(edges))
    while left.size:
        waits[seconds[left]] = True
        settled = left[~waits[firsts[left]]]
        waits[seconds[left]] = False
        dropped[seconds[settled]] = True
        left = left[~dropped[seconds[left]] & ~dropped[firsts[left]]]
    chosen = np.flatnonzero(~dropped[firsts])  # so the other one is dropped
    # The most similar one first, and of equally similar ones the first.
    order = chosen[
        np.lexsort((edges["kept"][chosen], -edges["similarity"][chosen], edges["document"][chosen]))
    ]
    order = order[places_in_runs(edges["document"][order]) == 0]
    removals = np.zeros(len(order), dtype=REMOVAL)
    for name in ("document", "kept", "similarity"):
        removals[name] = edges[name][order]
    removals["reason"] = _NEAR
    return removals


def _joined(settled: np.ndarray, near: np.ndarray) -> np.ndarray:
    """All removals, sorted by document, each with a document that is kept.

    Where the document that stands for another is removed itself, the one that stands for that one takes its place; the
    reason stays. But a document with the address of one that is over the limit of its domain is over that limit too.
    """
    removals = np.concatenate((settled, near))
    removals = removals[np.argsort(removals["document"])]
    while (moved := np.flatnonzero(is_in(removals["kept"], removals["document"]))).size:
        ends = removals[np.searchsorted(removals["document"], removals["kept"][moved])]
        removals["kept"][moved] = ends["kept"]
        by_text = removals["similarity"][moved] > 0
        removals["similarity"][moved] = np.where(by_text, ends["similarity"], 0)
        over = ends["kept"] == NO_DOCUMENT
        removals["reason"][moved] = np.where(over, ends["reason"], removals["reason"][moved])
    return removals


def _statistics(removals: np.ndarray) -> dict[str, Any]:
    """Clusters: a kept document, and those for which it stands."""
    found = removals[removals["kept"] != NO_DOCUMENT]
    kept, counts = np.unique(found["kept"], return_counts=True)
    sizes = counts + 1
    largest = np.argsort(-sizes, kind="stable")[:_LARGEST_SHOWN]
    return {
        "clusters": len(kept),
        "documents": int(sizes.sum()),
        "sizes": {str(size): count for size, count in sorted(Counter(sizes.tolist()).items())},
        "largest": [
            {"documents": int(sizes[place]), "kept": [int(kept[place]) >> 32, int(kept[place]) & 0xFFFFFFFF]}
            for place in largest
        ],
    }
