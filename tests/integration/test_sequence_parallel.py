"""Sequence parallelism against data parallelism on the same batches, and a whole run with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import tensors as checkpoint
from pretrain.config import TrainConfig, load_config
from pretrain.data.history import ReadHistory
from pretrain.data.loader import TrainLoader
from pretrain.distributed import World, init_world
from pretrain.errors import ConfigError
from pretrain.reliability.journal import read_metrics
from support.checkpoints import read_tensors
from support.launching import run_ranks
from support.tiny import events, make_corpus, python_documents, run_arguments
from support.training import assert_each_sample_once

TRAIN = "launch/train.py"
STEPS = 4

# Name -> (ZeRO stage, precision, overrides).
CASES = {
    "plain": (0, "fp32", []),
    "zero3": (3, "fp32", []),
    "bf16": (3, "bf16", []),
    "one-document": (1, "fp32", ["data.document_masking=false"]),
    "recomputed": (3, "fp32", ["model.activation_checkpointing=full", "model.loss_chunk_tokens=16"]),
}
# (ranks, ranks that share a sequence, name), each compared with 2 ranks that share none.
SHARED = [(2, 2, name) for name in CASES] + [(4, 2, "zero3"), (4, 4, "zero3")]

# fp32: sums come in another order; Adam divides by their roots. bf16: 8 bits of mantissa. Seen: 2e-7, 2e-4.
TOLERANCE = {"fp32": 5e-6, "bf16": 4e-3}


def compose(*overrides: str) -> TrainConfig:
    keys = ["run_dir=x", "data.manifest=y", "total_steps=100", "model.n_heads=8", "model.n_kv_heads=4"]
    return load_config(TrainConfig, [*keys, *overrides], "config")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["engine.sequence_parallel_ranks=0"], ["engine.sequence_parallel_ranks=0", "greater than 0"]),
        (
            ["engine=zero3_ulysses", "engine.sequence_parallel_ranks=8"],
            ["engine.sequence_parallel_ranks=8", "model.n_kv_heads=4", "allowed: 1, 2, 4"],
        ),
        (
            ["engine.sequence_parallel_ranks=2", "model.n_kv_heads=1"],
            ["model.n_kv_heads=1", "allowed: 1"],
        ),
        (["engine.sequence_parallel_ranks=4", "data.sequence_length=1022"], ["data.sequence_length=1022"]),
    ],
)
def test_mistakes_are_named_in_one_sentence(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        compose(*overrides)
    assert all(word in str(raised.value) for word in words), raised.value


def test_ranks_that_share_sequences_count_as_one_reader() -> None:
    config = compose(
        "engine.sequence_parallel_ranks=4", "global_batch_sequences=8", "micro_batch_sequences=1"
    )
    assert [config.reader_ranks(n) for n in (4, 8, 16)] == [1, 2, 4]
    assert [config.grad_accum_steps(n) for n in (4, 8, 16)] == [8, 4, 2]
    with pytest.raises(ConfigError, match="does not divide the 6 ranks"):
        config.grad_accum_steps(6)
    worlds = [World(rank, 8, rank, torch.device("cpu"), sequence_ranks=4) for rank in range(8)]
    assert [world.reader for world in worlds] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [world.rank for world in worlds if world.is_first_reader] == [0, 4]
    assert {world.n_readers for world in worlds} == {2}


def test_ranks_that_share_sequences_are_on_one_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(
        ConfigError, match=r"engine.sequence_parallel_ranks=2 does not divide the 3 ranks of a host"
    ):
        init_world(60, 2)


# ---- real ranks ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case with and without shared sequences; and one that is resumed without."""
    root = tmp_path_factory.mktemp("sequence")
    for n_ranks in (2, 4):
        jobs = []
        wanted = {(name, by) for ranks, by, name in SHARED if ranks == n_ranks}
        if n_ranks == 2:
            wanted |= {(name, 1) for name in CASES}
        for name, shared_by in sorted(wanted):
            stage, precision, overrides = CASES[name]
            where = root / f"{name}-{n_ranks}-{shared_by}"
            job = {"stage": stage, "precision": precision, "overrides": overrides, "shared_by": shared_by}
            jobs.append(job | {"steps": STEPS, "out": f"{where}.json", "save": str(where)})
        if n_ranks == 2:
            half = {"stage": 3, "precision": "fp32", "steps": STEPS // 2}
            saved = str(root / "half")
            jobs.append(half | {"shared_by": 2, "out": str(root / "half.json"), "save": saved})
            more = {"load": str(checkpoint.checkpoint_path(root / "half", STEPS // 2))}
            jobs.append(half | more | {"shared_by": 1, "out": str(root / "resumed.json")})
        run_ranks(
            n_ranks,
            "tests/support/workers/sequence_parallel_worker.py",
            json.dumps(jobs),
            log_dir=root / "logs",
        )
    return root


def result(root: Path, name: str) -> dict:
    return json.loads((root / f"{name}.json").read_text())


@pytest.mark.integration
@pytest.mark.parametrize(("ranks", "shared_by", "name"), SHARED)
def test_shared_sequences_train_as_whole_ones_do(
    trained: Path, ranks: int, shared_by: int, name: str
) -> None:
    whole, shared = result(trained, f"{name}-2-1"), result(trained, f"{name}-{ranks}-{shared_by}")
    tolerance = TOLERANCE[CASES[name][1]]
    assert shared["losses"] == pytest.approx(whole["losses"], abs=tolerance)
    assert shared["losses"][-1] < shared["losses"][0] - 0.2  # it learns, so agreement says something
    assert shared["norms"] == pytest.approx(whole["norms"], rel=tolerance)
    assert shared["heldout"] == pytest.approx(whole["heldout"], abs=tolerance)
    assert shared["predicted"] == whole["predicted"]


@pytest.mark.integration
@pytest.mark.parametrize(("ranks", "shared_by", "name"), [c for c in SHARED if CASES[c[2]][1] == "fp32"])
def test_weights_and_moments_agree(trained: Path, ranks: int, shared_by: int, name: str) -> None:
    folders = [trained / f"{name}-2-1", trained / f"{name}-{ranks}-{shared_by}"]
    a, b = (read_tensors(checkpoint.checkpoint_path(folder, STEPS)) for folder in folders)
    assert a.keys() == b.keys()
    for (
        key
    ) in a:  # Adam moves a weight by up to 3e-3 a step: where its gradient is mostly rounding, by chance
        torch.testing.assert_close(
            b[key], a[key], rtol=0, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.integration
def test_documents_are_kept_apart_across_the_border_of_two_ranks(trained: Path) -> None:
    masked, unmasked = result(trained, "zero3-2-2"), result(trained, "one-document-2-2")
    assert abs(masked["losses"][-1] - unmasked["losses"][-1]) > 1e-3


@pytest.mark.integration
def test_a_run_goes_on_without_sharing(trained: Path) -> None:
    losses = result(trained, "half")["losses"] + result(trained, "resumed")["losses"]
    assert losses == pytest.approx(result(trained, "zero3-2-1")["losses"], abs=TOLERANCE["fp32"])


@pytest.mark.integration
def test_a_whole_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    texts = [text[:3000] for text in list(python_documents().values())[1:7]]
    documents = [(str(n), text) for n, text in enumerate(texts)]
    # So small that its last chunk, which is not full, is read within the run.
    corpus = make_corpus(tmp_path / "corpus", documents=documents)
    more = ["engine.sequence_parallel_ranks=2", "model.n_kv_heads=2", "engine.precision=fp32"]
    more += ["data.loader_workers=0", "data.packing=best_fit", "micro_batch_sequences=auto"]
    run_ranks(2, TRAIN, *run_arguments(corpus, run_dir, *more), log_dir=tmp_path)
    assert_each_sample_once(run_dir)
    records = read_metrics(run_dir)
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    config = load_config(TrainConfig, run_arguments(corpus, run_dir, *more), "config")
    steps = TrainLoader(
        config.data,
        config.seed,
        global_batch_sequences=config.global_batch_sequences,
        micro_batch_sequences=1,
        rank=0,
        world_size=1,
        total_steps=config.total_steps,
        state=None,
    ).steps(1)
    padding = [sum(batch.counts.padding for batch in batches) for batches in steps]
    assert sum(padding) > 0
    assert [record["padding_tokens"] for record in records] == padding, "counted once, not by each rank"
    (found,) = [e for e in events(run_dir) if e["event"] == "micro_batch_found"]
    assert found["micro_batch_sequences"] == 8, "all sequences of the one group"
    history, _ = ReadHistory.of_run(run_dir)
    assert history.read_in(3, rank=0) == history.read_in(3, rank=1)
    assert len(history.read_in(3, rank=0)) == 8
