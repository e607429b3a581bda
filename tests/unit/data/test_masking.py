"""What masked language modeling hides: a pure function of (seed, sample, position), in the fractions that are asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.batch import IGNORED_LABEL, Batch
from pretrain.config import MlmConfig, Packing
from pretrain.corpus.shards import Corpus
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.data.loader import build_batch
from pretrain.data.masking import Masking
from pretrain.errors import ConfigError
from support.texts import CHUNK, Text, data_config, make_loader

MASK, VOCAB = 3, 300
MASKING = Masking(MlmConfig(), 7, MASK, np.arange(4, VOCAB))
SIZES = st.tuples(st.integers(1, 6), st.integers(1, 40))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Text]:
    """Two corpora with a short last chunk, the second with a loss mask."""
    folder = tmp_path_factory.mktemp("corpora")
    ordinary = Text(folder / "a", 33 * CHUNK + 3, seed=1)
    return [ordinary, Text(folder / "b", 20 * CHUNK + 37, seed=2, loss_mask=True)]


def hidden(
    masking: Masking, text: np.ndarray, samples: np.ndarray, allowed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels after masking; by default every token of the text may be chosen."""
    tokens = text.astype(np.int32)
    labels = tokens.copy() if allowed is None else np.where(allowed, tokens, IGNORED_LABEL).astype(np.int32)
    masking.apply(tokens, labels, samples)
    return tokens, labels


# --- the function ---


@given(SIZES, st.integers(0, 2**40), st.randoms())
def test_a_sample_has_its_masks_in_any_batch(size: tuple[int, int], first: int, random) -> None:
    text = np.random.default_rng(0).integers(0, VOCAB, size)
    samples = np.arange(size[0]) + first
    tokens, labels = hidden(MASKING, text, samples)
    rows = list(range(size[0]))
    random.shuffle(rows)
    for row in rows:
        alone = hidden(MASKING, text[[row]], samples[[row]])
        assert (alone[0][0] == tokens[row]).all() and (alone[1][0] == labels[row]).all()
    shorter = hidden(MASKING, text[:, : size[1] // 2], samples)
    assert (shorter[0] == tokens[:, : size[1] // 2]).all()


@given(SIZES, st.integers(0, 2**40))
def test_only_what_may_be_chosen_is_hidden_and_labels_are_the_text(size: tuple[int, int], first: int) -> None:
    drawn = np.random.default_rng(1)
    text, allowed = drawn.integers(0, VOCAB, size), drawn.random(size) < 0.7
    everything = replace(MASKING, config=MlmConfig(fraction=1.0))
    for masking in (MASKING, everything):
        tokens, labels = hidden(masking, text, np.arange(size[0]) + first, allowed)
        chosen = labels != IGNORED_LABEL
        assert not (chosen & (~allowed | (text < 4))).any()
        assert (labels[chosen] == text[chosen]).all()
        assert (tokens[~chosen] == text[~chosen]).all()
        changed = tokens[chosen & (tokens != text)]
        assert ((changed == MASK) | ((changed >= 4) & (changed < VOCAB))).all()
    assert (chosen == (allowed & (text >= 4))).all()  # of `everything`


@pytest.mark.parametrize(
    ("fraction", "mask", "random"), [(0.15, 0.8, 0.1), (0.4, 1.0, 0.0), (0.3, 0.0, 1.0), (0.2, 0.3, 0.3)]
)
def test_fractions_are_those_asked_for(fraction: float, mask: float, random: float) -> None:
    """Within five standard deviations of a binomial distribution, for positions of one sample and of many."""
    config = MlmConfig(fraction=fraction, mask_fraction=mask, random_fraction=random)
    masking = replace(MASKING, config=config)
    for shape in ((1, 200_000), (200_000, 1), (400, 500)):
        text = np.full(shape, 299)
        tokens, labels = hidden(masking, text, np.arange(shape[0]))
        chosen = labels != IGNORED_LABEL
        n = int(chosen.sum())
        # A random token is the text itself in one case of 296.
        replaced = random * (1 - 1 / 296)
        for count, of, p in (
            (n, text.size, fraction),
            (int((tokens[chosen] == MASK).sum()), n, mask),
            (int(((tokens != MASK) & (tokens != text)).sum()), n, replaced),
        ):
            assert abs(count - of * p) <= 5 * np.sqrt(of * p * (1 - p)), (shape, count, of, p)


def test_random_tokens_are_all_that_stand_for_text() -> None:
    """And each as often as another: a chi-squared test, five standard deviations wide."""
    ordinary = np.array([4, 9, 17, 100, 205])  # with gaps, as vocabularies have
    config = MlmConfig(fraction=1.0, mask_fraction=0.0, random_fraction=1.0)
    tokens, _ = hidden(Masking(config, 7, MASK, ordinary), np.full((100, 1000), 9), np.arange(100))
    found, counts = np.unique(tokens, return_counts=True)
    assert found.tolist() == ordinary.tolist()
    chi_squared = ((counts - 20_000) ** 2 / 20_000).sum()
    assert chi_squared < 4 + 5 * np.sqrt(8)


def test_seeds_and_samples_have_independent_masks() -> None:
    text = np.full((1, 20_000), 299)
    runs = [(7, 0), (7, 1), (8, 0), (7, 2**40)]
    masks = [
        hidden(replace(MASKING, seed=seed), text, np.array([n]))[1][0] != IGNORED_LABEL for seed, n in runs
    ]
    for k, one in enumerate(masks):
        for other in masks[:k]:
            assert abs((one & other).mean() - 0.15**2) < 5 * np.sqrt(0.15**2 / 20_000)
    neighbors = (masks[0][1:] & masks[0][:-1]).mean()
    assert neighbors == pytest.approx(0.15**2, abs=0.006)


def test_the_masks_of_a_release_stay_what_they_are() -> None:
    """A run that resumes with a later version must see the same masks."""
    tokens, labels = hidden(MASKING, np.arange(100, 220)[None], np.array([12345]))
    places = np.flatnonzero(labels[0] != IGNORED_LABEL)
    found = dict(zip(places.tolist(), tokens[0, places].tolist(), strict=True))
    assert found == {
        4: 3,
        5: 3,
        17: 3,
        18: 3,
        20: 3,
        25: 3,
        32: 3,
        50: 3,
        70: 3,
        78: 3,
        81: 88,
        96: 3,
        102: 3,
        105: 3,
        117: 3,
    }


# --- what the loader hands out ---


def rows(batches: list[Batch]) -> dict[int, list[list[int]]]:
    return {
        sample: [tensor[row].tolist() for tensor in batch[:4]]
        for batch in batches
        for row, sample in enumerate(batch.samples.tolist())
    }


@pytest.mark.parametrize("packing", list(Packing))
def test_ranks_workers_micro_batches_and_resumes_change_no_mask(texts: list[Text], packing: Packing) -> None:
    plain = rows([b for step in make_loader(data_config(texts, packing=packing)).steps(1) for b in step])
    expected: dict[int, list[list[int]]] = {}
    for world_size, micro, workers, first in ((1, 2, 0, 1), (2, 3, 1, 1), (4, 1, 0, 1), (2, 6, 0, 6)):
        found = {}
        for rank in range(world_size):
            data = data_config(texts, packing=packing, loader_workers=workers, lanes=12)
            options = {"rank": rank, "world_size": world_size, "micro_batch_sequences": micro}
            state = None if first == 1 else make_loader(data, masking=MASKING).state_at(first - 1)
            loader = make_loader(data, masking=MASKING, state=state, **options)
            found |= rows([batch for step in loader.steps(first) for batch in step])
        expected = expected or found
        assert found == {n: row for n, row in expected.items() if n >= 12 * (first - 1)}
    assert len(expected) == 120
    assert plain.keys() == expected.keys()


@pytest.mark.parametrize("document_masking", [True, False])
def test_batches_are_the_text_with_tokens_hidden(texts: list[Text], document_masking: bool) -> None:
    """Every sequence of both corpora: labels are the text of the chosen positions, which stay within the loss mask."""
    everything = replace(MASKING, config=MlmConfig(fraction=1.0, mask_fraction=1.0, random_fraction=0.0))
    for text in texts:
        chunk, sequence = np.array(text.sequences(16)).T
        batch = build_batch(Corpus(text.manifest), chunk, sequence, 16, document_masking, everything)
        labels = batch.labels.flatten().tolist()
        places = [at for at, label in enumerate(labels) if label != IGNORED_LABEL]
        learned = [at for at in range(len(text.stream)) if at not in text.ignored and text.stream[at] > MASK]
        assert places == learned
        assert [labels[at] for at in places] == [text.stream[at] for at in places]
        assert (batch.tokens.flatten()[places] == MASK).all()
        others = sorted(set(range(len(text.stream))) - set(places))
        assert batch.tokens.flatten()[others].tolist() == [text.stream[at] for at in others]
        for row, (c, s) in enumerate(text.sequences(16)):
            ids = text.reference(c, s, 16, masking=True)[3]
            padding = [c * CHUNK + s * 16 + at >= len(text.stream) for at in range(16)]
            expected = ids if document_masking else [int(is_padding) for is_padding in padding]
            assert batch.document_ids[row].tolist() == expected


def test_a_document_has_its_masks_wherever_it_stands() -> None:
    document = np.random.default_rng(0).integers(4, VOCAB, 500)
    tokens, labels = MASKING.hidden_document(document, document)
    again = MASKING.hidden_document(document.copy(), document.copy())
    assert (tokens == again[0]).all() and (labels == again[1]).all()
    assert 30 < (labels != IGNORED_LABEL).sum() < 130
    other = MASKING.hidden_document(document + 1, document + 1)
    assert ((other[1] == IGNORED_LABEL) != (labels == IGNORED_LABEL)).any()


# --- what is refused ---


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"fraction": 0.0}, ["mlm.fraction=0.0"]),
        ({"fraction": 1.5}, ["mlm.fraction=1.5", "0 to 1"]),
        ({"mask_fraction": -0.1}, ["mlm.mask_fraction=-0.1"]),
        ({"mask_fraction": 0.8, "random_fraction": 0.3}, ["mask_fraction=0.8", "random_fraction=0.3"]),
    ],
)
def test_impossible_fractions_are_named(values: dict[str, float], words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        MlmConfig(**values)
    assert all(word in str(raised.value) for word in words)


def test_a_tokenizer_without_a_mask_token_is_refused() -> None:
    before = Path(__file__).parents[2] / "support" / "before" / "corpus" / "tokenizer.model"
    with pytest.raises(ConfigError, match=r"needs a mask token.* prepare the corpus again"):
        Masking.of(MlmConfig(), 1, Tokenizer.trusted(before))
