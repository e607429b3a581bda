"""The text of items in a corpus: what is found, what is not, and what is too short to look for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.stages.decontamination.runs import CHARACTERS, WORDS, blocks, runs
from pretrain.errors import ConfigError
from pretrain.evaluate.tasks.overlap import Wanted, open_corpus, texts_of
from support.trained_run import TEXTS, train_tokenizer, write_heldout

SENTENCE = "It is a truth universally acknowledged, that a single man in possession of a good fortune"


def test_items_are_found_in_the_shards(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(tmp_path / "tokenizer.model")
    write_heldout(tokenizer, tmp_path / "corpus")
    items = [
        [f"Question: {SENTENCE.upper()}!", "no"],  # case and signs do not matter
        ["What is the capital of a country that does not exist on any map we know?"],
        ["道可道非常道名可名非常名無名天地之始有名萬物之母"],
        ["天地玄黃宇宙洪荒日月盈昃辰宿列張寒來暑往"],
        ["a single man"],  # too short
        ["any such man may be on his first"],  # 8 words of a text are looked for as they are
        ["However little known the feelings or views of a man may be"],  # 12 words, one of which is left out
        [SENTENCE],  # as in another item
    ]
    wanted = Wanted(items, runs)
    corpus, own = open_corpus(tmp_path / "corpus")
    texts = list(texts_of(corpus, own))
    assert texts == TEXTS
    for text in blocks(texts):
        for key, hashes in runs(text, wanted.keys).items():
            wanted.look_in(key, hashes)
    assert wanted.in_corpus() == [True, False, True, False, None, False, False, True]


def test_a_folder_without_a_corpus(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"corpus=.* holds no manifest\.json"):
        open_corpus(tmp_path)


words = st.lists(st.sampled_from("one two three four five six".split()), max_size=30)


@given(words, words)
def test_runs_are_those_of_all_windows(one: list[str], other: list[str]) -> None:
    """By definition: two texts share a run of n words if they share n words in a row."""
    n = max(1, abs(next(iter(runs(" ".join(one))), WORDS)))

    def windows(row: list[str]) -> set[str]:
        return {"".join(row[at : at + n]) for at in range(len(row) - n + 1)}

    found, theirs = runs(" ".join(one), [n]).get(n, []), runs(" ".join(other), [n]).get(n, [])
    assert len(set(found)) == len(windows(one))
    assert len(set(found) & set(theirs)) == len(windows(one) & windows(other))


text = st.text(st.sampled_from("ab c道可é"), max_size=40)


@given(st.lists(text, max_size=6), text, st.integers(1, 3))
def test_joined_texts_have_the_runs_of_each(parts: list[str], item: str, n: int) -> None:
    """An item shares the same runs with them as with the texts one by one: none goes over the end of a text."""

    def found(texts: Iterable[str]) -> set[tuple[int, int]]:
        rows = [runs(text, [n, -n]) for text in texts]
        return {(key, value) for row in rows for key, hashes in row.items() for value in hashes.tolist()}

    assert found(blocks(parts)) & found([item]) == found(parts) & found([item])


def test_lengths_of_runs() -> None:
    assert list(runs(SENTENCE)) == [WORDS]
    assert list(runs("one two three four five six seven eight")) == [8]
    assert list(runs("one two three four five six seven")) == []
    assert list(runs("天" * 40)) == [-CHARACTERS]
    assert list(runs("天地玄黃宇宙洪荒日月盈昃")) == [-12]
    assert runs(SENTENCE, [-20, 13]).keys() == {13}
