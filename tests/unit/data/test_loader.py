"""The batches: what they hold, against an obviously right reference; the same on any number of ranks and workers."""

from __future__ import annotations

import gc
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain.batch import IGNORED_LABEL, Batch
from pretrain.config import BadChunk, DataConfig, Packing, StageConfig
from pretrain.corpus.manifest import CorruptShardError
from pretrain.corpus.shards import Corpus
from pretrain.data.loader import build_batch
from pretrain.data.order import Location
from pretrain.data.sequences import SequenceReader
from pretrain.data.state import OrderState, Substitution, chunk_read
from pretrain.data.workers import MicroBatches, read_ahead
from pretrain.errors import ConfigError
from support.launching import loader_workers
from support.texts import BOS, CHUNK, EOS, Text, data_config, make_loader


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Text]:
    """Two corpora with a short last chunk: 33 chunks and 3 tokens more; 20 chunks and 37 more, with a loss mask."""
    folder = tmp_path_factory.mktemp("corpora")
    ordinary = Text(folder / "a", 33 * CHUNK + 3, seed=1)
    return [ordinary, Text(folder / "b", 20 * CHUNK + 37, seed=2, loss_mask=True)]


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    gc.collect()
    assert not loader_workers(os.getpid())


def same(a: Batch, b: Batch) -> bool:
    tensors = all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))
    return tensors and bool((a.samples == b.samples).all())


def rows(steps: list[list[Batch]]) -> dict[int, list[list[int]]]:
    """Global sample index -> its row of every tensor."""
    found = {}
    for batch in (micro for step in steps for micro in step):
        for row, sample in enumerate(batch.samples.tolist()):
            assert sample not in found, "a sample was read twice"
            found[sample] = [tensor[row].tolist() for tensor in batch[:4]]
    return found


# --- what a batch holds ---


@pytest.mark.parametrize("masking", [True, False])
@pytest.mark.parametrize("length", [1, 8, 16, 64])
def test_batches_equal_the_reference(texts: list[Text], length: int, masking: bool) -> None:
    """Every sequence of both corpora, also those that are cut, padded, or only padding but for one token."""
    for text in texts:
        where = text.sequences(length)
        batch = build_batch(Corpus(text.manifest), *np.array(where).T, length, masking)
        assert batch.samples.tolist() == list(range(len(where)))
        for tensor in batch[:4]:
            assert tensor.dtype == torch.int64
            assert tensor.shape == (len(where), length)
        for row, (c, s) in enumerate(where):
            assert [tensor[row].tolist() for tensor in batch[:4]] == text.reference(c, s, length, masking)


def test_a_loss_mask_lets_targets_count_alone(texts: list[Text]) -> None:
    """Over a whole corpus just the targets count, but for the first token of a chunk, which has nothing before it."""
    text = texts[1]
    chunk, sequence = np.array(text.sequences(CHUNK)).T
    batch = build_batch(Corpus(text.manifest), chunk, sequence, CHUNK, document_masking=False)
    counted = {at for at in range(len(text.stream)) if at % CHUNK and at not in text.ignored}
    assert 0 < len(counted) < len(text.stream) * 0.9
    labels = batch.labels.flatten().tolist()
    assert {at + 1 for at, label in enumerate(labels) if label != IGNORED_LABEL} == counted
    assert all(labels[at - 1] == text.stream[at] for at in counted)


@pytest.mark.parametrize("masking", [True, False])
def test_every_token_is_in_one_sequence(texts: list[Text], masking: bool) -> None:
    text = texts[1]
    chunk, sequence = np.array(text.sequences(16)).T
    batch = build_batch(Corpus(text.manifest), chunk, sequence, 16, masking)
    assert batch.tokens.flatten()[: len(text.stream)].tolist() == text.stream
    assert (batch.labels == IGNORED_LABEL).flatten()[len(text.stream) - 1 :].all()


def test_a_large_vocabulary_keeps_its_ids(tmp_path: Path) -> None:
    text = Text(tmp_path / "c", 100, seed=3, vocab_size=200_000)
    batch = build_batch(Corpus(text.manifest), np.array([0]), np.array([1]), 32, True)
    assert batch.tokens[0].tolist() == text.stream[32:64]
    assert max(text.stream) > 65_535


# --- the loader, against the order and the reference ---


def test_the_loader_reads_what_the_order_says(texts: list[Text]) -> None:
    loader = make_loader(data_config(texts), total_steps=100)
    found = rows(list(loader.steps(1)))
    assert sorted(found) == list(range(1200))
    location = loader.order.locate(np.arange(1200))
    for sample, tensors in found.items():
        source, _, chunk, sequence = (int(values[sample]) for values in location[:4])
        assert tensors == texts[source].reference(chunk, sequence, 16, masking=True)


def test_an_epoch_of_batches_holds_every_token_once(texts: list[Text]) -> None:
    text = texts[0]
    loader = make_loader(
        data_config(texts[:1], lanes=1),
        total_steps=len(text.sequences(16)),
        global_batch_sequences=1,
        micro_batch_sequences=1,
    )
    read = [tensors[0] for tensors in rows(list(loader.steps(1))).values()]
    expected = [text.reference(c, s, 16, True)[0] for c, s in text.sequences(16)]
    assert sorted(read) == sorted(expected)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(texts: list[Text], workers: int) -> None:
    alone = list(make_loader(data_config(texts)).steps(1))
    loader = make_loader(data_config(texts, loader_workers=workers))
    together = list(loader.steps(1))
    assert [len(step) for step in together] == [6] * 10
    for one, other in zip(alone, together, strict=True):
        assert all(same(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("world_size", "workers"), [(2, 1), (3, 0), (6, 0)])
def test_ranks_change_no_global_batch(texts: list[Text], world_size: int, workers: int) -> None:
    reference = [rows([step]) for step in make_loader(data_config(texts, lanes=6)).steps(1)]
    data = data_config(texts, lanes=6, loader_workers=workers)
    loaders = [make_loader(data, rank=rank, world_size=world_size) for rank in range(world_size)]
    steps = list(zip(*(loader.steps(1) for loader in loaders), strict=True))
    assert [rows(list(step)) for step in steps] == reference
    for rank, loader in enumerate(loaders):  # 12 samples per step on 6 lanes: each rank has its own lanes
        lanes = {int(s) % 6 for step in loader.steps(1) for micro in step for s in micro.samples}
        assert lanes == set(range(rank * 6 // world_size, (rank + 1) * 6 // world_size))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    world_sizes=st.lists(st.sampled_from([1, 2, 3, 6]), min_size=1, max_size=5),
    batches=st.lists(st.sampled_from([12, 24]), min_size=5, max_size=5),
    lanes=st.integers(1, 7),
    masking=st.booleans(),
)
def test_any_resume_gives_the_same_samples(
    texts: list[Text], world_sizes: list[int], batches: list[int], lanes: int, masking: bool
) -> None:
    """Stop and go on with other numbers of ranks and another global batch, the state through JSON each time."""
    data = data_config(texts, lanes=lanes, document_masking=masking)
    found: dict[int, list[list[int]]] = {}
    saved, step, consumed = None, 0, 0
    for world_size, batch in zip(world_sizes, batches, strict=False):
        for rank in range(world_size):
            state = OrderState.from_dict(json.loads(saved)) if saved else None
            loader = make_loader(
                data,
                global_batch_sequences=batch,
                rank=rank,
                world_size=world_size,
                state=state,
                total_steps=10**9,
            )
            assert loader.state.consumed_samples == consumed
            found |= rows([next(loader.steps(step + 1))])
        step, consumed = step + 1, consumed + batch
        assert loader.plan[step].end_sample == loader.plan[step].samples_seen == consumed
        saved = json.dumps(loader.state_at(step).to_dict())
    whole = make_loader(data, global_batch_sequences=consumed, total_steps=1)
    assert found == rows(list(whole.steps(1)))


@pytest.mark.parametrize("workers", [0, 2])
def test_seek_equals_reading_up_to_there(texts: list[Text], workers: int) -> None:
    loader = make_loader(data_config(texts, loader_workers=workers))
    through = list(loader.steps(1))
    for n in (7, 3, 9):  # back and forth with the same loader: what workers had read ahead is dropped
        steps = loader.steps(n + 1)
        assert all(same(a, b) for a, b in zip(through[n], next(steps), strict=True))
    assert len(list(loader.steps(9))) == 2


def test_the_run_ends_with_its_last_step(texts: list[Text]) -> None:
    assert len(list(make_loader(data_config(texts), total_steps=10).steps(1))) == 10
    assert list(make_loader(data_config(texts), total_steps=10).steps(11)) == []
    tokens = make_loader(data_config(texts), total_steps=None, total_tokens=12 * 16 * 9 + 1)
    assert len(list(tokens.steps(1))) == tokens.n_steps == 10
    far = make_loader(data_config(texts), total_steps=10**11)
    assert [batch.samples.max() for batch in next(far.steps(10**11))][-1] == 12 * 10**11 - 1


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n_epochs=st.integers(1, 2),
    lanes=st.integers(1, 40),
    packing=st.sampled_from(Packing),
    grows=st.booleans(),
    batches=st.lists(st.sampled_from([12, 24, 36]), min_size=1, max_size=4),
    ranks=st.lists(st.sampled_from([1, 2, 3, 6]), min_size=4, max_size=4),
    stops=st.lists(st.integers(1, 40), min_size=3, max_size=3),
)
def test_total_epochs_reads_every_token_exactly_so_often(
    texts: list[Text],
    n_epochs: int,
    lanes: int,
    packing: Packing,
    grows: bool,
    batches: list[int],
    ranks: list[int],
    stops: list[int],
) -> None:
    """Stop and continue with other ranks and batches, also among the last samples, the state through JSON each time."""
    stages = [StageConfig(start_tokens=16 * 60, sequence_length=32)] if grows else []
    data = by_size(texts, lanes=lanes, packing=packing, stages=stages)
    read: Counter[tuple[int, ...]] = Counter()
    saved, step, first = None, 0, 0
    for batch, world_size, until in zip(batches, ranks, [*stops[: len(batches) - 1], 10**6], strict=False):
        parts = []
        for rank in range(world_size):
            state = OrderState.from_dict(json.loads(saved)) if saved else None
            of_run = {"total_steps": None, "total_epochs": n_epochs, "state": state}
            of_rank = {"rank": rank, "world_size": world_size, "global_batch_sequences": batch}
            loader = make_loader(data, **of_run, **of_rank)
            last = min(loader.n_steps, step + until)
            batched = loader.steps(step + 1)
            parts += [next(batched) for _ in range(step, last)]
        for sample, (tokens, labels, *_) in rows(parts).items():
            if sample < loader.plan[last].end_sample:
                read.update(tokens)
                first += 1
            else:
                assert set(labels) == {IGNORED_LABEL} and set(tokens) == {EOS}, "an empty sample"
        step, saved = last, json.dumps(loader.state_at(last).to_dict())
    assert step == loader.n_steps and loader.plan[step].samples_seen == first
    expected = Counter(
        {token: n_epochs * n for token, n in Counter(sum((t.stream for t in texts), [])).items()}
    )
    del read[EOS], expected[EOS]  # sequences are padded with it
    assert read == expected


def by_size(texts: list[Text], **values: object) -> DataConfig:
    """Sources without weights of their own, as `total_epochs` needs them."""
    data = data_config(texts, **values)
    return replace(data, sources=[replace(source, weight=1.0) for source in data.sources])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_last_step_of_an_epoch_is_filled_up(texts: list[Text], workers: int) -> None:
    """133 sequences of the first text: 11 steps of 12 and a last one of 1, over two ranks that get as many rows."""
    data = by_size(texts[:1], loader_workers=workers)
    found: list[list[Batch]] = []
    for rank in (0, 1):
        loader = make_loader(data, total_steps=None, total_epochs=1, rank=rank, world_size=2)
        found += list(loader.steps(1))
    assert (loader.n_steps, loader.plan[12].samples_seen, loader.plan[12].tokens_seen) == (12, 133, 133 * 16)
    assert {len(batch.tokens) for step in found for batch in step} == {2}
    tensors = rows(found)
    filled = {sample: tensors[sample] for sample in range(133)}
    wanted = [texts[0].reference(c, s, 16, True) for c, s in texts[0].sequences(16)]
    assert sorted(filled.values()) == sorted(wanted)
    assert sum(batch.counts.padding for step in found for batch in step) == 16 - 3
    assert loader.epochs(12) == {"s0": 1.0}


def test_a_rollback_shortens_a_run_of_epochs_and_changes_nothing_else(texts: list[Text]) -> None:
    """Also where the samples that are passed over reach into the last part, or beyond the end."""
    data = by_size(texts[:1], lanes=8)
    for first_bad, n_steps in ((4, 3), (9, 2), (11, 5)):
        loader = make_loader(data, total_steps=None, total_epochs=1)
        whole = rows(list(loader.steps(1)))
        first, end = loader.pass_over(first_bad, n_steps)
        assert loader.n_steps == 12 - min(n_steps, 13 - first_bad)
        found = rows(list(loader.steps(1)))
        left = [sample for sample in whole if not first <= sample < end]
        assert found == {sample: whole[sample] for sample in left}
        state = OrderState.from_dict(json.loads(json.dumps(loader.state_at(first_bad - 1).to_dict())))
        again = make_loader(data, total_steps=None, total_epochs=1, state=state)
        assert again.n_steps == loader.n_steps
        assert rows(list(again.steps(1))) == found


def test_a_run_of_epochs_may_be_extended(texts: list[Text]) -> None:
    """By another epoch, which then ends as exactly, and by a number of steps."""
    data = by_size(texts[:1], lanes=8)
    one = make_loader(data, total_steps=None, total_epochs=1)
    state = one.state_at(one.n_steps)
    two = make_loader(data, total_steps=None, total_epochs=2, state=OrderState.from_dict(state.to_dict()))
    assert two.plan[two.n_steps].samples_seen == 266
    read = rows(list(one.steps(1)) + list(two.steps(one.n_steps + 1)))
    where = two.order.locate(np.array(sorted(read)))
    assert Counter(zip(where.epoch.tolist(), where.chunk.tolist(), where.sequence.tolist(), strict=True)) == {
        (epoch, c, s): 1 for epoch in (0, 1) for c, s in texts[0].sequences(16)
    }
    steps = make_loader(data, total_steps=20, state=OrderState.from_dict(state.to_dict()))
    assert (steps.n_steps, steps.plan[20].samples_seen) == (20, 133 + 8 * 12)
    back = make_loader(data, total_steps=None, total_epochs=1, state=steps.state_at(20))
    assert (back.n_steps, back.state.begun) == (one.n_steps, steps.state_at(20).begun)


def test_an_order_of_before_continues_as_it_was(texts: list[Text]) -> None:
    """A run that was begun with a number of steps may end with its epoch; what it has read stays as it is."""
    data = by_size(texts[:1], lanes=8)
    before = make_loader(data, total_steps=20)
    assert "closes_epochs" not in before.state_at(5).to_dict()["stages"][0]
    state = OrderState.from_dict(json.loads(json.dumps(before.state_at(5).to_dict())))
    loader = make_loader(data, total_steps=None, total_epochs=1, state=state)
    read = rows([*islice(before.steps(1), 5), *loader.steps(6)])
    where = loader.order.locate(np.array(sorted(read)))
    assert sorted(zip(where.chunk.tolist(), where.sequence.tolist(), strict=True)) == texts[0].sequences(16)


def test_a_damaged_end_of_an_epoch_is_refused(texts: list[Text]) -> None:
    loader = make_loader(by_size(texts[:1], lanes=8), total_steps=None, total_epochs=1)
    values = loader.state_at(12).to_dict()
    assert values["stages"][-1]["closes_epochs"] == 1
    values["stages"][-1]["end_sample"] += 1
    state = OrderState.from_dict(values)
    with pytest.raises(ConfigError, match=r"closes epoch 1 at sample 134, .* damaged"):
        make_loader(by_size(texts[:1], lanes=8), total_steps=None, total_epochs=1, state=state)


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_draws_no_random_number(texts: list[Text], workers: int) -> None:
    """Else a run that resumes would have other dropout than one that went through."""
    before = torch.get_rng_state()
    next(make_loader(data_config(texts, loader_workers=workers)).steps(1))
    assert torch.equal(before, torch.get_rng_state())


def test_stages_begin_where_they_are_due(texts: list[Text]) -> None:
    """From token 16 x 100 on, with the first step there, the second source alone."""
    data = data_config(texts, lanes=5, stages=[StageConfig(start_tokens=1595, weights={"s1": 2.0})])
    loader = make_loader(data)
    assert [(stage.first_sample, stage.weights) for stage in loader.state.stages] == [
        (0, (1.0, 2.0)),
        (108, (0.0, 2.0)),
    ]
    source = loader.order.locate(np.arange(300)).source
    assert 0 in source[96:108]
    assert source[108:].all()


def test_a_schedule_may_be_extended_on_resume(texts: list[Text]) -> None:
    data = data_config(texts, lanes=6)
    state = make_loader(data).state_at(8)
    extended = data_config(texts, lanes=6, stages=[StageConfig(start_tokens=16 * 96, weights={"s0": 1.0})])
    loader = make_loader(extended, state=state)
    assert not loader.order.locate(np.arange(96, 200)).source.any()
    old = make_loader(data).order.locate(np.arange(96))
    assert all((a == b).all() for a, b in zip(old, loader.order.locate(np.arange(96)), strict=True))
    with pytest.raises(ConfigError, match=r"start_tokens=1536 .*1728 tokens"):
        make_loader(extended, state=replace(state, consumed_samples=108))


GROWTH = [
    StageConfig(start_tokens=16 * 36, sequence_length=32, global_batch_sequences=6),
    StageConfig(start_tokens=16 * 72, global_batch_sequences=8),
    StageConfig(start_tokens=16 * 108, sequence_length=64, weights={"s0": 1.0, "s1": 1.0}),
]


@pytest.mark.parametrize("workers", [0, 2])
def test_sequence_length_and_batch_change_where_they_are_due(texts: list[Text], workers: int) -> None:
    loader = make_loader(data_config(texts, lanes=4, stages=GROWTH, loader_workers=workers))
    shapes = [[tuple(micro.tokens.shape) for micro in step] for step in loader.steps(1)]
    # At most 2 x 16 tokens per forward pass, as at the start.
    assert shapes[:3] == [[(2, 16)] * 6] * 3
    assert shapes[3:6] == [[(1, 32)] * 6] * 3
    assert shapes[6:9] == [[(1, 32)] * 8] * 3
    assert shapes[9:] == [[(1, 64)] * 8]
    assert [loader.plan[n].tokens_seen for n in (3, 6, 7, 9, 10)] == [576, 1152, 1408, 1920, 2432]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_no_token_is_lost_or_repeated_while_sequences_grow(texts: list[Text], packing: str) -> None:
    """Two epochs of one source in all stages: its tokens come out as often as they are in it."""
    text = texts[0]
    stages = [replace(stage, weights=None) for stage in GROWTH]
    data = data_config([text], lanes=1, stages=stages, packing=Packing[packing])
    loader = make_loader(data, total_steps=100)
    found: dict[int, dict[tuple[int, int], int]] = {0: {}, 1: {}}
    samples = np.arange(loader.plan[20].end_sample)
    reader = SequenceReader([Corpus(text.manifest)], data)
    where = loader.order.locate(samples)
    for piece in zip(*(values.tolist() for values in where), strict=True):
        epoch, chunk = piece[1:3]
        if epoch < 2:
            place = [np.array([value]) for value in (*piece[:5], 0)]
            for _, _, _, start, stop in reader._segments(Location(*place), np.array([0])):
                for token in reader._corpora[0].read(chunk, start, stop).tolist():
                    found[epoch][chunk, token] = found[epoch].get((chunk, token), 0) + 1
    expected: dict[tuple[int, int], int] = {}
    for at, token in enumerate(text.stream):
        expected[at // CHUNK, token] = expected.get((at // CHUNK, token), 0) + 1
    assert found[0] == expected
    assert found[1] == expected


def test_a_ramp_of_the_batch_reads_the_same_samples(texts: list[Text]) -> None:
    ramp = [StageConfig(start_tokens=16 * 12, global_batch_sequences=24)]
    ramped = make_loader(data_config(texts, lanes=4, stages=ramp), total_steps=4)
    constant = make_loader(data_config(texts, lanes=4), total_steps=7)
    assert [len(list(rows([step]))) for step in ramped.steps(1)] == [12, 24, 24, 24]
    assert rows(list(ramped.steps(1))) == rows(list(constant.steps(1)))


def test_a_source_that_has_been_read_max_epochs_times_is_not_drawn(texts: list[Text]) -> None:
    data = data_config(texts, lanes=2)
    data.sources[1].max_epochs = 1
    loader = make_loader(data, total_steps=40)
    found = loader.order.locate(np.arange(480))
    assert found.epoch[found.source == 1].max() == 0
    assert loader.order.epochs(480)[1] == pytest.approx(1.0, abs=0.1)
    ended = [stage for stage in loader.state.stages if stage.ended]
    assert not (found.source[ended[0].first_sample :] == 1).any()
    data.sources[0].max_epochs = 2
    with pytest.raises(ConfigError, match=r"all sources of the mixture are read max_epochs times after"):
        make_loader(data, total_steps=40)


def test_samples_passed_over_are_in_no_step(texts: list[Text]) -> None:
    stages = [StageConfig(start_tokens=16 * 60, global_batch_sequences=6)]
    loader = make_loader(data_config(texts, stages=stages), total_steps=12)
    whole = list(loader.steps(1))
    assert loader.pass_over(4, 3) == [36, 66]  # two steps of 12 and one of 6
    after = list(loader.steps(1))
    assert rows(after[:3]) == rows(whole[:3])
    assert sorted(rows(after[3:])) == list(range(66, 66 + 9 * 6))
    assert loader.plan[12].samples_seen == 36 + 54
    state = OrderState.from_dict(json.loads(json.dumps(loader.state_at(4).to_dict())))
    again = make_loader(data_config(texts, stages=stages), total_steps=12, state=state)
    assert rows(list(again.steps(5))) == rows(after[4:])


def test_what_the_loader_tells(texts: list[Text]) -> None:
    data = DataConfig(manifest=texts[0].manifest, sequence_length=16)
    loader = make_loader(data)
    assert (loader.vocab_size, loader.bos_id, loader.eos_id) == (300, BOS, EOS)
    assert loader.tokenizer_sha256 == "f" * 64
    assert loader.state.manifest_sha == [Corpus(texts[0].manifest).manifest.root_sha256]
    assert loader.state.lanes == 2  # 34 chunks: two lanes of at least 16, a divisor of 12
    assert loader.state_at(2).consumed_samples == 24
    assert loader.state.consumed_samples == 0


# --- refusals ---


def test_sequence_length_divides_the_chunk(texts: list[Text]) -> None:
    with pytest.raises(ConfigError, match=r"data\.sequence_length=24 does not divide.*64 tokens; 16 would"):
        make_loader(data_config(texts, sequence_length=24))
    with pytest.raises(ConfigError, match=r"data\.sequence_length=128 does not divide.*64 would"):
        make_loader(data_config(texts, sequence_length=128))


@pytest.mark.parametrize(
    ("vocab_size", "sha", "name"), [(300, "e" * 64, "tokenizer_sha256"), (301, "f" * 64, "vocab_size")]
)
def test_sources_share_a_tokenizer(
    texts: list[Text], tmp_path: Path, vocab_size: int, sha: str, name: str
) -> None:
    other = Text(tmp_path / "c", 100, seed=3, vocab_size=vocab_size, sha=sha)
    with pytest.raises(ConfigError, match=f"'s1' has {name} .*prepare all sources"):
        make_loader(data_config([texts[0], other]))


def test_another_corpus_is_refused(texts: list[Text], tmp_path: Path) -> None:
    other = Text(tmp_path / "c", 33 * CHUNK + 3, seed=9)
    state = make_loader(data_config(texts)).state_at(2)
    with pytest.raises(ConfigError, match="the corpus changed: source 0 has root hash"):
        make_loader(data_config([other, texts[1]]), state=state)
    moved = tmp_path / "moved"
    Path(texts[0].manifest).parent.rename(moved)  # the same content elsewhere is the same corpus
    try:
        copy = replace_manifest(texts[0], moved)
        assert make_loader(data_config([copy, texts[1]]), state=state).state.consumed_samples == 24
    finally:
        moved.rename(Path(texts[0].manifest).parent)


def replace_manifest(text: Text, folder: Path) -> Text:
    copy = object.__new__(Text)
    copy.__dict__.update(text.__dict__, manifest=str(folder / "manifest.json"))
    return copy


def test_lanes_of_a_run_are_kept(texts: list[Text]) -> None:
    state = make_loader(data_config(texts, lanes=4)).state_at(2)
    assert make_loader(data_config(texts), global_batch_sequences=18, state=state).state.lanes == 4
    with pytest.raises(ConfigError, match=r"data\.lanes=6 was 4"):
        make_loader(data_config(texts, lanes=6), state=state)


def test_a_mixture_without_weight_is_refused(texts: list[Text]) -> None:
    data = data_config(texts, stages=[StageConfig(start_tokens=1600, weights={"s0": 1.0})])
    for source in data.sources:
        source.weight = 0.0
    with pytest.raises(ConfigError, match="no positive sum"):
        make_loader(data)


# --- what goes wrong while reading ---


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_chunk_reaches_the_trainer(tmp_path: Path, workers: int) -> None:
    text = Text(tmp_path / "c", 20 * CHUNK, seed=4)
    shard = sorted((tmp_path / "c" / "shards").glob("*.tar"))[0]
    content = bytearray(shard.read_bytes())
    content[600] ^= 1  # in the tokens of chunk 0
    shard.write_bytes(content)
    loader = make_loader(data_config([text], loader_workers=workers), total_steps=10**5)
    failure = read_until_it_fails(loader.steps(1))
    assert "CorruptShardError: " in failure
    assert "shard-00000.tar: member 000000.tok has xxh3-64" in failure
    assert "Traceback" not in failure


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_chunk_is_substituted_alike_on_any_rank(tmp_path: Path, workers: int) -> None:
    text = Text(tmp_path / "c", 20 * CHUNK, seed=4)
    data = data_config([text], lanes=1, on_bad_chunk=BadChunk.substitute, loader_workers=workers)
    sound = rows(list(make_loader(data, total_steps=14).steps(1)))  # two epochs
    damage(tmp_path / "c", 600)  # in the tokens of chunk 0
    loader = make_loader(data, total_steps=14)
    steps = list(loader.steps(1))
    found = loader.state.substitutions
    assert [(entry.source, entry.epoch, entry.chunk) for entry in found] == [(0, 0, 0), (0, 1, 0)]
    assert all(entry.first_sample % 12 == 0 for entry in found), "it holds from the first sample of a step on"
    assert all("member 000000.tok has xxh3-64" in entry.reason for entry in found)
    where = loader.order.locate(np.arange(168))
    for sample, tensors in rows(steps).items():
        chunk, sequence, epoch = (
            int(values[sample]) for values in (where.chunk, where.sequence, where.epoch)
        )
        if chunk:
            assert tensors == sound[sample]
        else:
            (substitute,) = {entry.substitute for entry in found if entry.epoch == epoch}
            assert substitute > 0
            assert tensors == text.reference(substitute, sequence, 16, masking=True)


def test_a_substitute_is_kept_from_its_first_sample_on(tmp_path: Path) -> None:
    """The state says what was read: a chunk that has been mended meanwhile is still substituted, and not before."""
    text = Text(tmp_path / "c", 20 * CHUNK, seed=4)
    data = data_config([text], lanes=1, on_bad_chunk=BadChunk.substitute)
    loader = make_loader(data)
    where = loader.order.locate(np.arange(80))
    mine = np.flatnonzero(where.chunk == 0)
    entry = Substitution(
        source=0, epoch=0, chunk=0, first_sample=int(mine[2]), substitute=7, reason="it was damaged"
    )
    again = replace(entry, first_sample=int(mine[3]), substitute=9, reason="its substitute was damaged too")
    loader.state.substitutions = [entry, again]
    state = OrderState.from_dict(json.loads(json.dumps(loader.state_at(0).to_dict())))
    found = rows(list(make_loader(data, state=state).steps(1)))
    for n, sample in enumerate(mine.tolist()):
        chunk = [0, 0, 7, 9][n]
        assert found[sample] == text.reference(chunk, int(where.sequence[sample]), 16, masking=True)


def test_ranks_that_can_read_different_chunks_agree_on_a_substitute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunk 0 is bad. Rank 1 reads it first, and rank 0, which reads it a step later, cannot read its substitute."""
    text = Text(tmp_path / "c", 20 * CHUNK, seed=4)
    data = data_config([text], lanes=1, on_bad_chunk=BadChunk.substitute)
    where = make_loader(data, seed=4).order.locate(np.arange(84))
    damage(tmp_path / "c", 600)  # in the tokens of chunk 0
    first = SequenceReader([Corpus(text.manifest)], data, seed=4)._substitutes(0, 0, 0)[0]
    read_many = Corpus.read_many

    def reads_no_more(self: Corpus, ranges: list[tuple[int, int, int]]) -> list[np.ndarray]:
        if threading.current_thread().name == "rank 0" and any(chunk == first for chunk, *_ in ranges):
            raise CorruptShardError("this host cannot read it")
        return read_many(self, ranges)

    monkeypatch.setattr(Corpus, "read_many", reads_no_more)
    read = Corpus.read
    monkeypatch.setattr(
        Corpus,
        "read",
        lambda self, chunk, *to: reads_no_more(self, [(chunk, 0, 1)]) and read(self, chunk, *to),
    )
    barrier = threading.Barrier(2, timeout=30)
    proposed: dict[int, list[Substitution]] = {}
    found: dict[int, list[list[Batch]]] = {}
    loaders = [make_loader(data, seed=4, total_steps=7, rank=rank, world_size=2) for rank in (0, 1)]

    def run(rank: int) -> None:
        def exchange(mine: list[Substitution]) -> list[Substitution]:
            proposed[rank] = mine
            barrier.wait()
            both = [*proposed[0], *proposed[1]]
            barrier.wait()
            return both

        found[rank] = list(loaders[rank].steps(1, exchange))

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = loaders[0].state.substitutions
    assert made == loaders[1].state.substitutions
    of_chunk_0 = [entry for entry in made if (entry.epoch, entry.chunk) == (0, 0)]
    assert of_chunk_0[0].substitute == first != of_chunk_0[-1].substitute
    for sample, tensors in (rows(found[0]) | rows(found[1])).items():
        chunk, sequence, epoch = (int(v[sample]) for v in (where.chunk, where.sequence, where.epoch))
        entries = [entry for entry in made if (entry.epoch, entry.chunk) == (epoch, chunk)]
        assert tensors == text.reference(chunk_read(entries, chunk, sample), sequence, 16, masking=True)


def test_without_a_chunk_to_stand_in_the_run_ends(tmp_path: Path) -> None:
    text = Text(tmp_path / "c", 2 * CHUNK, seed=4)
    for at in (600, 600 + 2048):
        damage(tmp_path / "c", at)
    data = data_config([text], on_bad_chunk=BadChunk.substitute)
    failure = read_until_it_fails(make_loader(data).steps(1))
    assert re.match(r"RunError: .*xxh3-64.*and 8 chunks that would stand in for it cannot be read", failure)


def damage(corpus: Path, at: int) -> None:
    shard = sorted((corpus / "shards").glob("*.tar"))[0]
    content = bytearray(shard.read_bytes())
    content[at] ^= 1
    shard.write_bytes(content)


def read_until_it_fails(steps: Iterator[list[Batch]]) -> str:
    """The failure as text. Not by pytest.raises, whose result would keep the iterator, and so its workers, alive."""
    try:
        for _ in steps:
            pass
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "it did not fail"


def test_a_worker_that_dies_is_reported(texts: list[Text]) -> None:
    loader = make_loader(data_config(texts, loader_workers=1), total_steps=10**8)
    steps = loader.steps(1)
    next(steps)
    (worker,) = loader_workers(os.getpid())
    os.kill(worker, signal.SIGKILL)
    failure = read_until_it_fails(steps)
    assert failure.startswith(
        f"RunError: a process that reads training data died (pid {worker}, SIGKILL): killed from outside; start"
    )


def test_a_worker_that_is_killed_while_it_starts_is_reported() -> None:
    """Before it has read what it is sent, which is more than a socket takes."""

    def kill() -> None:
        while not (started := loader_workers(os.getpid())):
            time.sleep(0)
        os.kill(started[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    large = partial(np.add, np.zeros(1 << 22))
    failure = read_until_it_fails(read_ahead(large, iter([1]), n_workers=1, ahead=1))
    killer.join()
    assert re.match(r"RunError: a process that reads training data died \(pid \d+, SIGKILL\)", failure)


def test_a_worker_that_ends_by_an_error_of_its_own_is_reported(
    texts: list[Text], capfd: pytest.CaptureFixture[str]
) -> None:
    """One that nobody has foreseen: the traceback is on the terminal, and the run ends."""
    failure = read_until_it_fails(read_ahead(len, iter([4]), n_workers=1, ahead=1))
    assert re.match(
        r"RunError: .* died \(pid \d+, exit code 1\): what it has printed above says why", failure
    )
    assert "TypeError: object of type 'int' has no len()" in capfd.readouterr().err


def test_workers_are_not_forked_and_import_no_torch(texts: list[Text]) -> None:
    """A fork beside the trainer's threads hangs now and then, which no test can show at will."""
    steps = make_loader(data_config(texts, loader_workers=1), total_steps=100).steps(1)
    next(steps)
    (worker,) = loader_workers(os.getpid())
    assert "libtorch" in Path("/proc/self/maps").read_text()
    assert "libtorch" not in Path(f"/proc/{worker}/maps").read_text()


def test_the_order_is_kept_whatever_each_worker_takes() -> None:
    """The slowest is waited for, and no worker has more than its share to read."""
    items = [0.05, 0, 0, 0.02, 0, 0, 0, 0.03, 0]
    asked: list[int] = []

    def numbers() -> Iterator[float]:
        for number, item in enumerate(items):
            asked.append(number)
            yield item

    answers = read_ahead(time.sleep, numbers(), n_workers=3, ahead=2)
    assert next(answers) is None
    assert asked == [0, 1, 2, 3, 4, 5, 6]
    assert len(loader_workers(os.getpid())) == 3
    assert list(answers) == [None] * 8
    assert list(read_ahead(str, iter(range(50)), n_workers=3, ahead=2)) == [str(n) for n in range(50)]


def test_large_items_and_answers_hold_up_nobody() -> None:
    """More than a socket takes, both ways at once, while the trainer does not read."""
    items = [np.full(1 << 20, n, np.uint8) for n in range(12)]
    answers = list(read_ahead(np.copy, iter(items), n_workers=2, ahead=4))
    assert [int(answer[-1]) for answer in answers] == list(range(12))


@pytest.mark.parametrize("busy", [False, True])
def test_workers_end_with_their_iterator(busy: bool) -> None:
    """Also when the consumer leaves the loop while a worker is still reading; that one is then killed."""
    for answer in read_ahead(time.sleep, iter([0, 30 if busy else 0, 0]), n_workers=2, ahead=1):
        assert answer is None
        workers = loader_workers(os.getpid())
        break
    assert len(workers) == 2
    assert not any(map(runs, workers))


def test_workers_leave_stopping_to_the_trainer(texts: list[Text]) -> None:
    """Ctrl-C and Slurm signal every process of a job; a worker that obeyed would end the run before it is saved."""
    loader = make_loader(data_config(texts, loader_workers=1), total_steps=100)
    steps = loader.steps(1)
    next(steps)
    (worker,) = loader_workers(os.getpid())
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        subprocess.run(["kill", f"-{name}", str(worker)], check=True)
    for _ in range(98):
        next(steps)
    assert runs(worker)


def test_signals_are_blocked_in_a_worker_from_the_first_moment() -> None:
    """A request to stop may come while it starts."""
    answers = read_ahead(str, iter([1]), n_workers=1, ahead=1)
    started = threading.Thread(target=next, args=(answers,))
    started.start()
    while not (pids := loader_workers(os.getpid())):
        time.sleep(0)
    status = Path(f"/proc/{pids[0]}/status").read_text()
    started.join()
    blocked = int(re.search(r"^SigBlk:\s+(\w+)", status, re.M)[1], 16)
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        assert blocked >> (name - 1) & 1, name


def test_workers_die_with_a_killed_trainer(texts: list[Text]) -> None:
    """At once, whatever they are doing."""
    code = f"""
import os, signal, sys
sys.path.insert(0, "tests")
from support.launching import loader_workers
from pretrain.config import DataConfig
from pretrain.data.loader import TrainLoader
data = DataConfig(manifest={texts[0].manifest!r}, sequence_length=16, loader_workers=2)
loader = TrainLoader(data, 1, global_batch_sequences=4, micro_batch_sequences=4, rank=0, world_size=1,
                     total_steps=10**8, state=None)
steps = loader.steps(1)
next(steps), next(steps)  # one from each worker: both have started
workers = loader_workers(os.getpid())
for worker in workers:  # they cannot see that their connection is closed, only die
    os.kill(worker, signal.SIGSTOP)
print(*workers, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    workers = [int(pid) for pid in killed.stdout.readline().split()]
    assert killed.wait() == -signal.SIGKILL
    assert len(workers) == 2
    until = time.monotonic() + 4
    try:
        while any(runs(pid) for pid in workers):
            assert time.monotonic() < until, "a worker outlived its trainer"
            time.sleep(0.02)
    finally:
        for pid in filter(runs, workers):
            os.kill(pid, signal.SIGKILL)
    killed.stdout.close()


def runs(pid: int) -> bool:
    """Whether a process is there, and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_what_a_worker_needs_survives_pickling(texts: list[Text]) -> None:
    """Without open files, and short."""
    data = data_config(texts)
    loader = make_loader(data)
    reader = SequenceReader([Corpus(text.manifest) for text in texts], data)
    read = MicroBatches(reader, loader.order)
    nothing = np.empty(0, np.int64)
    found, _ = read((np.arange(6), nothing))
    sent = pickle.dumps(read)
    assert len(sent) < 1 << 14
    copied, samples = pickle.loads(sent)((np.arange(6), nothing))
    assert (found.packed == copied.packed).all()
    assert found.counts == copied.counts
    assert samples.tolist() == list(range(6))
