"""Duplicates: hashes of texts, tables, clusters; precision and recall on groups made of real documents."""

from __future__ import annotations

import inspect
import random
import sysconfig
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.curation import dedup, similar
from data_tools.curation.addresses import same_address
from data_tools.curation.collection import Collection
from data_tools.curation.compare import compare_task, decide, near_removals, settle
from data_tools.curation.dedup import (
    NO_DOCUMENT,
    DedupConfig,
    Signatures,
    exact_hash,
    line_hashes,
    load_array,
    n_ranges,
    n_rows,
    read_range,
    repeated_lines_in,
    shingles,
    sketch,
)
from data_tools.curation.executors import TaskProgress
from data_tools.curation.phases import REASONS, Layout, to_line
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


def prose(texts: list[str], rng: random.Random) -> str:
    """400 words of several texts."""
    return " ".join(" ".join(rng.sample(texts, 20)).split()[:400])


def deduplicated(
    texts: list[str], config: DedupConfig, folder: Path, n_ranks: int = 3, **more: Any
) -> np.ndarray:
    """What the middle phase removes, [REMOVAL] with the numbers of the texts, which are dealt to `n_ranks` tasks.

    `more` are fields of all records, such as `source`, as functions of the number of the text.
    """
    layout, collection = Layout(folder), Collection(config, folder, n_ranks, [])
    (folder / "kept").mkdir(parents=True)
    for rank in range(n_ranks):
        signatures, at = Signatures(config), 0
        with layout.kept(rank).open("wb") as file:
            for number in range(rank, len(texts), n_ranks):
                record = Record(id=str(number), text=texts[number], source="a")
                for name, field in more.items():
                    setattr(record, name, field(number))
                signatures.add(record, at)
                at += file.write(to_line(record))
        signatures.write(folder, rank)
    settle(collection, layout)
    task, _ = compare_task(collection, layout)
    for job in range(len(task.jobs)):
        task.run(job, TaskProgress(folder / "progress"))
    decide(task)
    removals = np.concatenate([load_array(layout.removed(rank)) for rank in range(n_ranks)])
    for name in ("document", "kept"):
        inside = removals[name] != NO_DOCUMENT
        removals[name][inside] = ((removals[name] >> 32) + n_ranks * (removals[name] & 0xFFFFFFFF))[inside]
    return np.sort(removals, order="document")


def names_of(removals: np.ndarray) -> list[tuple[int, int, str]]:
    """(document, the kept one, reason) of each removal."""
    return [(int(row["document"]), int(row["kept"]), REASONS[row["reason"]]) for row in removals]


def similarity(a: str, b: str) -> float:
    left, right = set(shingles(a, CONFIG).tolist()), set(shingles(b, CONFIG).tolist())
    return len(left & right) / max(1, len(left | right))


def check_kept(texts: list[str], removals: np.ndarray, minimum: float = 0.8) -> None:
    """Every removed document is as similar to a kept one as its removal says."""
    gone = set(removals["document"].tolist())
    for row in removals:
        assert row["kept"] not in gone
        assert row["similarity"] == similarity(texts[row["document"]], texts[row["kept"]]) >= minimum


def test_recall_and_precision_on_groups_of_real_documents(real_texts: list[str], tmp_path: Path) -> None:
    """Originals and two copies of each, with 1% and 2% of the words changed; some have no copy."""
    rng = random.Random(1)
    texts = []
    for index, text in enumerate(rng.sample(real_texts, 150)):
        texts += [text, changed(text, 0.01, rng), changed(text, 0.02, rng)] if index < 60 else [text]
    removals = deduplicated(texts, CONFIG, tmp_path)
    check_kept(texts, removals)
    gone = set(removals["document"].tolist())
    sets = [set(shingles(text, CONFIG).tolist()) for text in texts]
    every = [
        (a, b)
        for a, left in enumerate(sets)
        for b, right in enumerate(sets[:a])
        if len(left & right) >= 0.8 * len(left | right)
    ]
    assert len(every) > 100
    assert sum(a in gone or b in gone for a, b in every) >= 0.98 * len(every)


def test_items_that_share_a_frame_are_no_duplicates(real_texts: list[str], tmp_path: Path) -> None:
    """Half of each item is the same, so that every band joins some of them; only real copies go."""
    rng = random.Random(3)
    words = " ".join(real_texts).split()
    frame = " ".join(words[:60])
    texts = [f"{frame} {' '.join(rng.sample(words, 40))}" for _ in range(120)]
    assert 0.3 < similarity(texts[0], texts[1]) < 0.6
    texts += [changed(texts[number], 0.01, rng) for number in range(0, 120, 20)]
    removals = deduplicated(texts, replace(CONFIG, band_hashes=3), tmp_path, n_ranks=1)
    check_kept(texts, removals)
    assert removals["document"].tolist() == [120, 121, 122, 123, 124, 125]


def test_a_chain_ends_at_the_kept_document(real_texts: list[str], tmp_path: Path) -> None:
    """Each version of a page is like the one before, and the last is like none of the first."""
    rng = random.Random(4)
    words = prose(real_texts, rng).split()
    versions = []
    for _ in range(12):
        versions.append(" ".join(words))
        words[rng.randrange(300)] = f"other{rng.randrange(10**6)}"
        words[rng.randrange(300)] = f"other{rng.randrange(10**6)}"
    assert similarity(versions[0], versions[-1]) < 0.8 < similarity(versions[0], versions[1])
    removals = deduplicated([*versions, versions[4]], CONFIG, tmp_path, n_ranks=1)
    check_kept([*versions, versions[4]], removals)
    assert 0 < len(removals) < 12
    # The copy of a dropped version stands with the document that stands for that version.
    row = removals[removals["document"] == 12][0]
    assert (row["kept"], REASONS[row["reason"]]) == (0, "exact_duplicate")
    assert row["similarity"] == similarity(versions[0], versions[4]) < 1


def test_the_preferred_source_is_kept(real_texts: list[str], tmp_path: Path) -> None:
    rng = random.Random(5)
    text = prose(real_texts, rng)
    texts = [text, changed(text, 0.01, rng), text]
    config = replace(CONFIG, priority=["book"])
    removals = deduplicated(texts, config, tmp_path, source=lambda number: "book" if number == 2 else "web")
    assert names_of(removals) == [(0, 2, "exact_duplicate"), (1, 2, "near_duplicate")]


def test_a_group_that_is_larger_than_its_leaders(
    real_texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies of few texts all share bands; memory is bounded by leaders, chunks and batches of the smallest size."""
    for name in ("_LEADERS", "_CHUNK_ROWS", "_BATCH_PAIRS", "_BATCH_SHINGLES"):
        monkeypatch.setattr(similar, name, 2)
    rng = random.Random(6)
    text = prose(real_texts, rng)
    texts = [changed(text, 0.001, rng) for _ in range(30)]
    removals = deduplicated(texts, CONFIG, tmp_path)
    check_kept(texts, removals)
    assert removals["document"].tolist() == list(range(1, 30))


URLS = [
    "http://www.example.com:80/a/?utm_source=x&b=2&a=1#top",
    "https://example.com/a?a=1&b=2",
    "https://EXAMPLE.com/a/?a=1&b=2&fbclid=x",
    "https://news.example.com/",
    "https://example.com/A",
    "https://example.co.uk/a",
    None,
    "https://[::1",
]


def test_one_document_per_address(tmp_path: Path) -> None:
    texts = [f"page {number}" for number in range(len(URLS))]
    removals = deduplicated(texts, replace(CONFIG, url=True), tmp_path, n_ranks=1, url=URLS.__getitem__)
    assert names_of(removals) == [(1, 0, "same_url"), (2, 0, "same_url")]
    assert removals["similarity"].tolist() == [0, 0]


def test_a_number_of_documents_per_domain(tmp_path: Path) -> None:
    """Pages of preferred sources first; the address decides between the others. No address is no limit."""
    texts = [f"page {number}" for number in range(len(URLS))]
    config = replace(CONFIG, max_documents_per_domain=2, priority=["good"])
    kept = []
    for turn in (0, 1):  # in two orders
        urls = [URLS[number ^ turn] for number in range(len(URLS))]
        fields = {
            "url": urls.__getitem__,
            "source": lambda n, urls=urls: "good" if urls[n] == URLS[4] else "web",
        }
        removals = deduplicated(texts, config, tmp_path / str(turn), **fields)
        assert [reason for _, _, reason in names_of(removals)] == ["domain_limit"] * 3
        gone = set(removals["document"].tolist())
        kept.append({same_address(urls[n] or "") for n in range(len(urls)) if n not in gone})
    assert kept[0] == kept[1] > {"example.com/A", "example.co.uk/a", ""}


def test_what_is_over_the_limit_of_its_domain_stands_for_nothing(tmp_path: Path) -> None:
    """The limit comes before equal texts are looked for, or the last copy of a text might go."""
    urls = ["https://big.com/1", "https://big.com/2", "https://small.com/1"]
    config = replace(CONFIG, max_documents_per_domain=1, url=True)
    for number, texts in enumerate((["same", "other", "same"], ["other", "same", "same"])):
        removals = deduplicated(texts, config, tmp_path / str(number), n_ranks=1, url=urls.__getitem__)
        gone = dict(zip(removals["document"].tolist(), names_of(removals), strict=True))
        assert gone.keys() & {0, 1}
        assert "same" in {text for place, text in enumerate(texts) if place not in gone}
    # The second page of an address that is over the limit is over the limit too.
    urls = ["https://big.com/1", "https://big.com/2", "https://big.com/1", "https://big.com/2"]
    removals = deduplicated(["a", "b", "c", "d"], config, tmp_path / "more", n_ranks=1, url=urls.__getitem__)
    assert sorted(reason for _, _, reason in names_of(removals)) == [
        "domain_limit",
        "domain_limit",
        "same_url",
    ]


def test_chinese_copies_are_found(tmp_path: Path) -> None:
    """Half of a text is another text; sentences in another order and a few characters changed are not."""
    near = CHINESE.replace("圣人之治", "聖人之治").replace("难易相成", "難易相成")
    sentences = CHINESE.split("。")
    moved = "。".join([*sentences[4:], *sentences[:4]])
    other = CHINESE[: len(CHINESE) // 3] + "".join(reversed(CHINESE)) + "另外的文字。" * 5
    removals = deduplicated([CHINESE, "x", near, other, moved], CONFIG, tmp_path)
    assert removals["document"].tolist() == [2, 4]


def test_white_space_and_case(tmp_path: Path) -> None:
    assert exact_hash("a  b\n c ") == exact_hash("a b c") != exact_hash("A b c")
    again = shingles("one two\nthree, four five SIX!", CONFIG)
    assert np.array_equal(shingles("One two three four five six", CONFIG), again)
    assert not len(shingles("too short a text", CONFIG))
    removals = deduplicated(["too short", "other", "too  short"], CONFIG, tmp_path)
    assert names_of(removals) == [(2, 0, "exact_duplicate")]
    assert removals["similarity"].tolist() == [1.0]


@pytest.mark.parametrize(
    ("text", "n_words", "is_unspaced"),
    [
        ("यह किताब बहुत अच्छी है और सब पढ़ते हैं", 9, False),
        ("இந்த நூல் மிகவும் நன்றாக உள்ளது", 5, False),
        ("سَلام می\u200cخواهم کتاب خوب را ببینم", 6, False),
        ("Cafe\u0301 s a b c", 5, False),
        ("หนังสือเล่มนี้", 9, True),
        ("この本は面白い", 7, True),
        ("道可道非常道", 6, True),
    ],
)
def test_marks_belong_to_the_words_of_a_shingle(text: str, n_words: int, is_unspaced: bool) -> None:
    width = CONFIG.shingle_chars if is_unspaced else CONFIG.shingle_words
    assert len(shingles(text, CONFIG)) == n_words - width + 1


def test_the_order_of_words_counts() -> None:
    forth, back = shingles("a b c d e f", CONFIG), shingles("f e d c b a", CONFIG)
    assert len(forth) == 2
    assert not set(forth.tolist()) & set(back.tolist())


def test_sketches_estimate_the_similarity(real_texts: list[str]) -> None:
    """The share of hashes that agree is the Jaccard similarity, within three deviations, and 1/256 of the rest."""
    config = DedupConfig(bands=600, band_hashes=3)
    rng = random.Random(2)
    for text in rng.sample(real_texts, 5):
        copy = changed(text, 0.03, rng)
        left, right = (sketch(shingles(each, config), config) for each in (text, copy))
        estimate = (float(np.mean(left == right)) - 1 / 256) * 256 / 255
        s = similarity(text, copy)
        assert 0.1 < s < 0.95
        assert abs(estimate - s) < 3 * (s * (1 - s) / 1800) ** 0.5 + 1e-9


@given(st.lists(st.sets(st.integers(0, 50), min_size=1), min_size=2, max_size=2))
def test_jaccard_is_that_of_the_sets(sets: list[set[int]]) -> None:
    first, second = (np.array(sorted(found), dtype=np.uint64) for found in sets)
    assert similar.jaccard(first, second) == len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(80, 100)), max_size=60))
@settings(max_examples=200, deadline=None)
def test_documents_are_decided_in_the_order_of_preference(found: list[tuple[int, int, int]]) -> None:
    """As one who goes through the documents in order would: a document goes if it is like a kept one before it."""
    pairs = {(min(a, b), max(a, b)): like / 100 for a, b, like in found if a != b}
    edges = np.array([(a, b, like) for (a, b), like in pairs.items()], dtype=similar.EDGE)
    expected: dict[int, tuple[int, float]] = {}
    for document in range(31):
        before = [(a, like) for (a, b), like in pairs.items() if b == document and a not in expected]
        if before:
            expected[document] = min(before, key=lambda one: (-one[1], one[0]))
    removals = near_removals(edges)
    assert [(row["document"], (row["kept"], row["similarity"])) for row in removals] == list(expected.items())


@given(st.lists(st.lists(st.integers(0, 2**64 - 1), max_size=12), min_size=1, max_size=3), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_ranges_cover_a_table_once(tables: list[list[int]], parts: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for rank, values in enumerate(tables):
            rows = np.array(sorted((value, i) for i, value in enumerate(values)), dtype=np.uint64)
            dedup.save_array(dedup.table_path(folder, "exact", rank), rows.reshape(-1, 2))
        read = [read_range(folder, "exact", len(tables), part, parts) for part in range(parts)]
        assert n_ranges(n_rows(folder, "exact", len(tables))) == 1
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
