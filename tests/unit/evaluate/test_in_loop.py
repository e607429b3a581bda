"""Tasks that are scored during training: the same scores as from the finished model, on any number of ranks."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.text import clean
from pretrain.batch import Batch
from pretrain.config import TrainConfig, load_config
from pretrain.config.records import EvaluationConfig
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.distributed import World
from pretrain.errors import ConfigError
from pretrain.evaluate.results import scored
from pretrain.evaluate.tasks import in_loop
from pretrain.evaluate.tasks.in_loop import LoopTask, evaluate_tasks, prepare
from pretrain.evaluate.tasks.questions import questions_of
from pretrain.evaluate.tasks.running import Subject, ask
from pretrain.evaluate.tasks.task import load_task
from pretrain.generation.sampling import Sampling
from pretrain.model.decoder import Decoder, LossSums
from pretrain.trained import load_trained
from support.trained_run import make_run

CPU = torch.device("cpu")
REVIEWS = [{"text": f"a man {n} in want", "label": "pos" if n % 3 else "neg"} for n in range(40)]
QUIZ = [{"q": f"{n} and 1", "choices": [f"is {n + 1}", "no", "a truth"], "answer": n % 3} for n in range(11)]
SENTIMENT = {
    "kind": "classification",
    "data": "reviews.jsonl",
    "prompt": "{text}:",
    "labels": {"pos": " good", "neg": " a little view"},
    "examples": "reviews.jsonl",
    "n_examples": 1,
}
KINDS = {
    "sentiment": SENTIMENT,
    "quiz": {"kind": "multiple_choice", "data": "quiz.jsonl", "prompt": "{q} "},
    "write": {"kind": "generation", "data": "quiz.jsonl", "prompt": "{q}", "references": "choices"},
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tasks")
    for name, items in (("reviews", REVIEWS), ("quiz", QUIZ)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    for name, keys in KINDS.items():
        (folder / f"{name}.json").write_text(json.dumps(keys))
    return {name: str(folder / f"{name}.json") for name in KINDS}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Tokenizer]:
    folder = tmp_path_factory.mktemp("run")
    make_run(folder)
    trained = load_trained(folder)
    return trained.decoder(CPU, torch.float32), trained.tokenizer


def prepared(paths: dict[str, str], tokenizer: Tokenizer, *names: str, max_items: int = 20) -> list[LoopTask]:
    return prepare(
        [paths[name] for name in names], tokenizer, sequence_length=64, max_items=max_items, clean=clean
    )


def forward_of(decoder: Decoder, shapes: list[tuple[int, ...]]) -> Any:
    def forward(batch: Batch) -> LossSums:
        shapes.append(tuple(batch.tokens.shape))
        return decoder(*batch[:4], by_sequence=True)

    return forward


def test_scores_are_those_of_the_command(paths: dict[str, str], model: tuple[Decoder, Tokenizer]) -> None:
    decoder, tokenizer = model
    shapes: list[tuple[int, ...]] = []
    world = World(rank=0, size=1, local_rank=0, device=CPU)
    tasks = prepared(paths, tokenizer, "sentiment", "quiz")
    found = evaluate_tasks(forward_of(decoder, shapes), tasks, micro_batch_sequences=7, world=world)
    for name in ("sentiment", "quiz"):
        task = load_task(paths[name])
        subject = Subject(
            model=decoder,
            tokenizer=tokenizer,
            sequence_length=64,
            micro_batch_sequences=3,
            device=CPU,
            clean=clean,
            sampling=Sampling(temperature=0),
            seed=0,
        )
        outcome = ask(task, questions_of(task, clean, 20)[0], subject, lambda _: None)
        for score, expected in scored(outcome.statistics).items():
            if score in in_loop.RECORDED:
                assert found[f"{name}/{score}"] == pytest.approx(expected.value, rel=1e-4)
                error = found[f"{name}/{score}_standard_error"]
                assert error == pytest.approx(expected.standard_error, rel=0.25)  # 200 resamples, not 1,000
    assert len(shapes) == -(-(20 * 2 + 11 * 3) // 7)
    assert set(shapes) == {(7, 64)}


def test_every_rank_makes_as_many_passes(
    paths: dict[str, str], model: tuple[Decoder, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a rank that has no choice left. The sums of all ranks are what one rank has."""
    decoder, tokenizer = model
    tasks = prepared(paths, tokenizer, "quiz")
    given: list[np.ndarray] = []

    def keep(values: list[float], _world: World) -> list[float]:
        given.append(np.array(values))
        return values

    monkeypatch.setattr(in_loop, "sum_over_ranks", keep)
    passes = []
    for rank in (0, 1, 2):
        shapes: list[tuple[int, ...]] = []
        world = World(rank=rank, size=3, local_rank=rank, device=CPU)
        evaluate_tasks(forward_of(decoder, shapes), tasks, micro_batch_sequences=8, world=world)
        passes.append(shapes)
    assert passes == [[(8, 64)] * 2] * 3  # 33 choices of 24 at once
    evaluate_tasks(
        forward_of(decoder, []),
        tasks,
        micro_batch_sequences=8,
        world=World(rank=0, size=1, local_rank=0, device=CPU),
    )
    assert sum(given[:3]) == pytest.approx(given[3], rel=1e-5)
    assert all((one != 0).any() for one in given)


def test_what_cannot_be_scored_in_training(paths: dict[str, str], model: tuple[Decoder, Tokenizer]) -> None:
    tokenizer = model[1]
    with pytest.raises(ConfigError, match=r"evaluation\.tasks: .*write\.json has kind: generation"):
        prepared(paths, tokenizer, "write")
    with pytest.raises(ConfigError, match="has the name quiz, which is taken"):
        prepared(paths, tokenizer, "quiz", "quiz")
    with pytest.raises(ConfigError, match=r"evaluation\.task_items=0"):
        EvaluationConfig(task_items=0)


def test_the_items_are_the_same_at_each_start(
    paths: dict[str, str], model: tuple[Decoder, Tokenizer]
) -> None:
    one, other = (prepared(paths, model[1], "sentiment", max_items=9) for _ in range(2))
    assert one == other
    assert len(one[0].questions) == 9
    assert "9 items, 18 choices" in one[0].note
    few = partial(prepare, [paths["quiz"]], model[1], max_items=9, clean=clean)
    assert "the beginning of" in few(sequence_length=7)[0].note


def test_a_model_that_fills_masks_answers_no_questions() -> None:
    words = ["run_dir=r", "total_steps=1", "data.manifest=m", "objective=mlm", "evaluation.tasks=[quiz.json]"]
    with pytest.raises(ConfigError, match=r"evaluation\.tasks=\['quiz\.json'\] needs objective=causal"):
        load_config(TrainConfig, words, "config")
