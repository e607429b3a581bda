"""Duplicates: hashes of texts, tables, clusters; precision and recall on groups made of real documents."""

from __future__ import annotations

import inspect
import random
import sysconfig
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.curation import dedup
from data_tools.curation.dedup import (
    DedupConfig,
    Signatures,
    band_hashes,
    choose_kept,
    components,
    exact_hash,
    line_hashes,
    n_ranges,
    n_tables,
    pairs_in,
    read_range,
    repeated_lines_in,
    shingles,
)
from data_tools.record import Record

CONFIG = DedupConfig()
CHINESE = (
    "道可道,非常道;名可名,非常名。无名天地之始,有名万物之母。故常无欲,以观其妙;常有欲,以观其徼。此两者同出而异名,同谓之玄,玄之又玄,众妙之门。"
    "天下皆知美之为美,斯恶已;皆知善之为善,斯不善已。故有无相生,难易相成,长短相较,高下相倾,音声相和,前后相随。是以圣人处无为之事,行不言之教。"
    "不尚贤,使民不争;不贵难得之货,使民不为盗;不见可欲,使民心不乱。是以圣人之治,虚其心,实其腹,弱其志,强其骨。常使民无知无欲,使夫智者不敢为也。"
)


@pytest.fixture(scope="module")
def real_texts() -> list[str]:
    """Docstrings of the standard library: English prose about the same matters, none a copy of another."""
    texts = set()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:120]:
        blocks = path.read_text(encoding="utf-8").split('"""')[1::2]
        texts |= {inspect.cleandoc(block) for block in blocks if len(block.split()) >= 60}
    return sorted(texts)


def changed(text: str, share: float, rng: random.Random) -> str:
    """The text with a share of its words replaced."""
    words = text.split(" ")
    for place in rng.sample(range(len(words)), max(1, int(share * len(words)))):
        words[place] = f"other{rng.randrange(10**6)}"
    return " ".join(words)


def clusters_of(texts: list[str], config: DedupConfig, folder: Path, n_ranks: int = 3) -> list[set[int]]:
    """Groups of texts, by their numbers, as the phases find them; the texts are dealt to `n_ranks` tasks."""
    numbers = []
    for rank in range(n_ranks):
        signatures = Signatures(config)
        for document, index in enumerate(range(rank, len(texts), n_ranks)):
            signatures.add(document, Record("", texts[index], "s"))
        signatures.write(folder, rank)
    pairs = [
        pairs_in(read_range(folder, table, n_ranks, part, 4))
        for table in range(n_tables(config))
        for part in range(4)
    ]
    documents, labels = components(np.concatenate(pairs))
    numbers = [(int(d) >> 32) + n_ranks * (int(d) & 0xFFFFFFFF) for d in documents]
    groups: dict[int, set[int]] = {}
    for number, label in zip(numbers, labels.tolist(), strict=True):
        groups.setdefault(label, set()).add(number)
    return list(groups.values())


def similarity(a: str, b: str) -> float:
    left, right = set(shingles(a, CONFIG).tolist()), set(shingles(b, CONFIG).tolist())
    return len(left & right) / max(1, len(left | right))


def test_precision_and_recall_on_groups_of_real_documents(real_texts: list[str], tmp_path: Path) -> None:
    """Groups of an original and two copies with 1% of the words changed; the other documents have no copy."""
    rng = random.Random(1)
    originals = rng.sample(real_texts, 150)
    texts, truth = [], []
    for index, text in enumerate(originals):
        copies = [text] + ([changed(text, 0.01, rng) for _ in range(2)] if index < 60 else [])
        truth.append(set(range(len(texts), len(texts) + len(copies))))
        texts += copies
    found = clusters_of(texts, CONFIG, tmp_path)
    wanted = {frozenset(pair) for group in truth for pair in _pairs(group)}
    got = {frozenset(pair) for group in found for pair in _pairs(group)}
    # What was found beside the groups must really be alike: real documents, too, share text.
    # Less than 0.5 where two are in a group because each is like a third (three of `mimetypes` in Python 3.13).
    wrong = [pair for pair in got - wanted if similarity(*(texts[i] for i in pair)) < 0.4]
    assert not wrong
    recall = len(got & wanted) / len(wanted)
    expected = [similarity(*(texts[i] for i in pair)) for pair in wanted]
    probability = sum(1 - (1 - s**8) ** 14 for s in expected) / len(expected)
    assert recall > probability - 0.08  # 180 pairs: three standard deviations of a mean are below that
    assert probability > 0.9


def _pairs(group: set[int]) -> list[tuple[int, int]]:
    ordered = sorted(group)
    return [(a, b) for i, a in enumerate(ordered) for b in ordered[i + 1 :]]


def test_chinese_copies_are_found(tmp_path: Path) -> None:
    """Half of a text is another text; a few characters changed are not."""
    near = CHINESE.replace("圣人之治", "聖人之治").replace("难易相成", "難易相成")
    other = CHINESE[: len(CHINESE) // 3] + "".join(reversed(CHINESE)) + "另外的文字。" * 5
    assert clusters_of([CHINESE, "x", near, other], CONFIG, tmp_path) == [{0, 2}]


def test_white_space_and_case(tmp_path: Path) -> None:
    assert exact_hash("a  b\n c ") == exact_hash("a b c") != exact_hash("A b c")
    assert len(band_hashes("One two three four five six", CONFIG)) == 14
    again = band_hashes("one two\nthree, four five SIX!", CONFIG)
    assert np.array_equal(band_hashes("One two three four five six", CONFIG), again)
    assert band_hashes("too short a text", CONFIG) is None
    assert clusters_of(["too short", "other", "too  short"], CONFIG, tmp_path) == [{0, 2}]


def test_the_order_of_words_counts() -> None:
    forth, back = shingles("a b c d e f", CONFIG), shingles("f e d c b a", CONFIG)
    assert len(forth) == 2
    assert not set(forth.tolist()) & set(back.tolist())


def test_bands_estimate_the_similarity(real_texts: list[str]) -> None:
    """Of single hashes (bands of one) the share that agrees is the Jaccard similarity, within three deviations."""
    config = DedupConfig(bands=2000, band_hashes=1)
    rng = random.Random(2)
    for text in rng.sample(real_texts, 5):
        copy = changed(text, 0.03, rng)
        agree = float(np.mean(band_hashes(text, config) == band_hashes(copy, config)))
        s = similarity(text, copy)
        assert 0.1 < s < 0.95
        assert abs(agree - s) < 3 * (s * (1 - s) / 2000) ** 0.5 + 1e-9


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=40))
@settings(max_examples=200, deadline=None)
def test_components_are_those_of_the_graph(edges: list[tuple[int, int]]) -> None:
    parent = list(range(31))

    def root(node: int) -> int:
        while parent[node] != node:
            node = parent[node]
        return node

    for a, b in edges:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    documents, labels = components(np.array(edges, dtype=np.uint64).reshape(-1, 2))
    assert documents.tolist() == sorted({node for edge in edges for node in edge})
    assert [int(documents[label]) for label in labels] == [root(int(node)) for node in documents]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), max_size=30))
def test_one_of_each_cluster_is_kept(rows: list[tuple[int, int]]) -> None:
    labels, ranks = (np.array([row[i] for row in rows], dtype=int) for i in (0, 1))
    kept = choose_kept(labels, ranks)
    for label in set(labels.tolist()):
        inside = np.flatnonzero(labels == label)
        best = min(inside, key=lambda i: (ranks[i], i))
        assert [i for i in inside if kept[i]] == [best]


@given(st.lists(st.lists(st.integers(0, 2**64 - 1), max_size=12), min_size=1, max_size=3), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_ranges_cover_a_table_once(tables: list[list[int]], parts: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for rank, values in enumerate(tables):
            rows = np.array(sorted((value, i) for i, value in enumerate(values)), dtype=np.uint64)
            dedup.save_array(dedup.table_path(folder, 0, rank), rows.reshape(-1, 2))
        read = [read_range(folder, 0, len(tables), part, parts) for part in range(parts)]
        assert n_ranges(folder, 0, len(tables)) == 1
    whole = np.concatenate(read)
    expected = sorted((v, rank << 32 | i) for rank, values in enumerate(tables) for i, v in enumerate(values))
    assert [tuple(row) for row in whole.tolist()] == expected
    assert all(a[0] <= b[0] for a, b in pairwise(whole.tolist()))


def test_lines_of_many_documents() -> None:
    config = DedupConfig(min_line_chars=10, max_line_documents=2)
    text = "Subscribe to our newsletter\nshort\n  SUBSCRIBE to our  newsletter \n版权所有不得转载"
    found = line_hashes(Record("1", text, "s", url="https://example.org/"), config)
    assert [line for _, line in found] == [
        "Subscribe to our newsletter",
        "  SUBSCRIBE to our  newsletter ",
        "版权所有不得转载",
    ]
    assert found[0][0] == found[1][0]
    rows = np.array([(1, 7), (1, 8), (2, 3), (2, 5), (2, 9), (4, 1)], dtype=np.uint64)
    assert repeated_lines_in(rows, 2).tolist() == [[2, 3]]
    assert repeated_lines_in(rows[:0], 2).shape == (0, 2)
