"""Near duplicates: candidates from one band, and their exact similarity from their texts.

The documents that share the hash of a band are a group, in which the preferred ones come first. Each document of a
group is compared with those before it, up to the first `_LEADERS` of the group. The sketches give an estimate of the
similarity; only pairs for which it may reach the threshold are read. A pair that shares several bands is verified in
one of them. So no document is compared with all others, and no text is read more often than necessary.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from data_tools.curation.collection import Collection
from data_tools.curation.dedup import DedupConfig, band_tables, in_runs, places_in_runs, shingles

EDGE = np.dtype([("kept", "<u8"), ("document", "<u8"), ("similarity", "<f8")])
"""A verified pair: the preferred document, the other one, and the Jaccard similarity of their shingles."""
_LEADERS = 64
"""Number of documents of a group with which all later ones are compared. It bounds the work for groups of millions."""
_CHUNK_ROWS = 100_000
"""Number of pairs whose sketches are compared at a time."""
_BATCH_PAIRS = 1 << 20
"""Number of candidates that are verified at a time, so that each of their texts is read once."""
_BATCH_SHINGLES = 4 << 20
"""Number of shingles of pairs that are in memory at a time, 8 bytes each, and of texts that are kept there."""


def similar_pairs(rows: np.ndarray, band: int, collection: Collection) -> np.ndarray:
    """The near duplicates among the documents of one band's sorted table that are verified in this band: [EDGE].

    `rows` are (hash, document): uint64 [rows, 2].
    """
    found, waiting = [np.zeros(0, dtype=EDGE)], [np.zeros((0, 2), dtype=np.uint64)]
    for pairs in candidates(rows, band, collection):
        waiting.append(pairs)
        if sum(map(len, waiting)) >= _BATCH_PAIRS:
            found.append(verified(np.concatenate(waiting), collection))
            waiting = waiting[:1]
    return np.concatenate([*found, verified(np.concatenate(waiting), collection)])


def candidates(rows: np.ndarray, band: int, collection: Collection) -> Iterator[np.ndarray]:
    """Pairs (preferred document, other one) whose similarity may reach the threshold: uint64 [pairs, 2]."""
    rows = in_runs(rows)
    rows = rows[collection.order(rows[:, 0], rows[:, 1])]
    documents, places = rows[:, 1], places_in_runs(rows[:, 0])
    facts = collection.facts(documents, "sketch", "shingles")
    left = np.flatnonzero((places > 0) & ~collection.is_earlier(documents))
    for leader in range(_LEADERS):
        left = left[places[left] > leader]
        stay = [np.zeros(0, dtype=left.dtype)]
        for start in range(0, len(left), _CHUNK_ROWS):
            chunk = left[start : start + _CHUNK_ROWS]
            firsts = chunk - places[chunk] + leader
            wanted, sure = _compare(
                facts[firsts], facts[chunk], documents[firsts], documents[chunk], band, collection
            )
            if wanted.any():
                yield np.column_stack((documents[firsts], documents[chunk]))[wanted]
            stay.append(chunk[~sure])
        left = np.concatenate(stay)


def _compare(
    first: np.ndarray,
    second: np.ndarray,
    names: np.ndarray,
    others: np.ndarray,
    band: int,
    collection: Collection,
) -> tuple[np.ndarray, np.ndarray]:
    """Which pairs are to be verified in this band, and which are so similar that others need not be tried."""
    dedup = collection.dedup
    agree = first["sketch"] == second["sketch"]  # [pairs, bands, band_hashes]
    estimate = (agree.mean(axis=(1, 2)) - 1 / 256) / (1 - 1 / 256)
    wanted, n = dedup.min_similarity, dedup.bands * dedup.band_hashes
    deviation = (wanted * (1 - wanted) / n) ** 0.5
    fewer, more = (f(first["shingles"], second["shingles"]) for f in (np.minimum, np.maximum))
    possible = (estimate >= wanted - 4 * deviation) & (fewer >= wanted * more)
    chosen = _chosen_band(agree.all(axis=2), names, others)
    return possible & (chosen == band), estimate >= min(1.0, wanted + 3 * deviation)


def _chosen_band(shared: np.ndarray, names: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each pair, the one of its shared bands (bool [pairs, bands]) in which it is verified.

    It depends on the pair, so that the work is spread over all bands, and the tasks that compare them.
    """
    bands = np.arange(shared.shape[1])
    turned = (
        bands + ((names * np.uint64(31) + others) % np.uint64(len(bands))).astype(np.int64)[:, None]
    ) % len(bands)
    first = np.take_along_axis(shared, turned, axis=1).argmax(axis=1)
    return turned[np.arange(len(shared)), first]


def verified(pairs: np.ndarray, collection: Collection) -> np.ndarray:
    """The pairs (uint64 [pairs, 2]) whose similarity reaches the threshold: [EDGE]."""
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    sizes = collection.facts(pairs.reshape(-1), "shingles")["shingles"].reshape(-1, 2)
    batches = np.cumsum(sizes.sum(axis=1, dtype=np.int64)) // _BATCH_SHINGLES
    edges = np.zeros(len(pairs), dtype=EDGE)
    edges["kept"], edges["document"] = pairs.T
    cuts = np.flatnonzero(np.diff(batches)) + 1
    sets: dict[int, np.ndarray] = {}
    for start, stop in pairwise([0, *cuts.tolist(), len(pairs)]):
        _load(sets, pairs[start:stop], collection)
        similarities = [jaccard(sets[first], sets[second]) for first, second in pairs[start:stop].tolist()]
        edges["similarity"][start:stop] = similarities
    return edges[edges["similarity"] >= collection.dedup.min_similarity]


def _load(sets: dict[int, np.ndarray], pairs: np.ndarray, collection: Collection) -> None:
    """Add the shingles of the pairs' documents that are not there yet, and forget others where there are too many."""
    wanted = np.unique(pairs)
    if sum(map(len, sets.values())) > _BATCH_SHINGLES:
        for document in sets.keys() - set(wanted.tolist()):
            del sets[document]
    missing = [document for document in wanted.tolist() if document not in sets]
    for document, content in collection.lines(np.array(missing, dtype=np.uint64)):
        sets[document] = shingles(content["text"], collection.dedup)


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Jaccard similarity of two sorted sets: the share (0 to 1) of what is in either that is in both."""
    small, large = sorted((first, second), key=len)
    if not len(small):
        return 0.0
    places = np.minimum(np.searchsorted(large, small), len(large) - 1)
    shared = int(np.count_nonzero(large[places] == small))
    return shared / (len(small) + len(large) - shared)


def band_of(dedup: DedupConfig, table: str) -> int:
    """Number of the band of a table."""
    return band_tables(dedup).index(table)
