"""Tasks put to a model: likelihoods by their definition, cut prompts, written answers, and the command as a whole."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_tools.text import clean
from pretrain.corpus.chat import OWN_TEMPLATE, Chat
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.errors import ConfigError
from pretrain.evaluate.compare import compare, results_in
from pretrain.evaluate.results import read_results
from pretrain.evaluate.tasks.encoding import CannotEncodeError, Encoder
from pretrain.evaluate.tasks.likelihood import Request, log_likelihoods, rows_of
from pretrain.evaluate.tasks.questions import Question, Solved
from pretrain.generation.sampling import Sampling
from pretrain.generation.writer import Writer
from pretrain.model.decoder import Decoder
from pretrain.trained import load_trained
from support.trained_run import TEXTS, make_run, script, train_tokenizer, write_heldout

CPU = torch.device("cpu")
REVIEWS = [
    {"id": str(n), "text": f"a truth {n} universally acknowledged", "label": "pos" if n % 3 else "neg"}
    for n in range(24)
]
SENTIMENT = {
    "kind": "classification",
    "data": "reviews.jsonl",
    "prompt": "{text}:",
    "labels": {"pos": " good", "neg": " a little known view"},
    "examples": "reviews.jsonl",
    "n_examples": 1,
}
QUIZ = {"kind": "multiple_choice", "data": "quiz.jsonl", "prompt": "Q: {q}\nA: "}
WRITE = {"kind": "generation", "data": "write.jsonl", "prompt": "{q}", "metrics": ["bleu", "rouge", "f1"],
         "max_new_tokens": 6}  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks") / "run"
    make_run(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("files")
    quiz = [
        {"q": f"{n} and 1", "choices": [f"is {n + 1}", f"is {n}", "unk"], "answer": n % 2} for n in range(9)
    ]
    asked = [{"q": f"It is a truth {n}", "references": [f"that {n} man"]} for n in range(7)] + [
        {"q": "no reference"}
    ]
    for name, items in (("reviews", REVIEWS), ("quiz", quiz), ("write", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    for name, keys in (("sentiment", SENTIMENT), ("quiz", QUIZ), ("write", WRITE)):
        (folder / f"{name}.json").write_text(json.dumps(keys))
    return [str(folder / f"{name}.json") for name in ("sentiment", "quiz", "write")]


# --- likelihoods ---


@given(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=6), min_size=1, max_size=12))
def test_every_request_is_read_off_one_row(lists: list[list[int]]) -> None:
    requests = [Request(tokens, 1) for tokens in lists]
    rows = rows_of(requests)
    assert sorted(number for row in rows for number in row.requests) == list(range(len(lists)))
    for row in rows:
        for number in row.requests:
            inputs = lists[number][:-1]
            assert list(row.tokens[: len(inputs)]) == inputs
    texts = {tuple(row.tokens) for row in rows}
    assert len(texts) == len(rows)
    assert not any(a != b and b[: len(a)] == a for a in texts for b in texts)
    assert all(len(a.tokens) >= len(b.tokens) for a, b in pairwise(rows))


@pytest.mark.parametrize("micro_batch_sequences", [1, 3, 64])
def test_likelihoods_are_those_of_each_request_alone(run_dir: Path, micro_batch_sequences: int) -> None:
    model = load_trained(run_dir).decoder(CPU, torch.float32)
    model.config.loss_chunk_tokens = 4
    draw = np.random.default_rng(0)
    requests = []
    for _ in range(6):
        context = draw.integers(4, 60, draw.integers(1, 9)).tolist()
        requests += [Request(context + draw.integers(4, 60, n).tolist(), n) for n in (1, 1, 3)]
    found = log_likelihoods(model, requests, micro_batch_sequences=micro_batch_sequences, device=CPU)
    assert found == pytest.approx([alone(model, request) for request in requests], rel=1e-5)


def alone(model: Decoder, request: Request) -> float:
    ids = torch.tensor([request.tokens])
    with torch.no_grad():
        log_p = model.logits(ids[:, :-1])[0].log_softmax(-1)
    return float(log_p.gather(-1, ids[0, 1:, None])[-request.n_scored :].double().sum())


# --- questions as tokens ---


def question(prompt: str, choices: list[str], examples: list[Solved] | None = None) -> Question:
    return Question(
        id="x",
        hash="h",
        prompt=prompt,
        examples=examples or [],
        choices=choices,
        right=0,
        references=[],
        texts=[],
    )


def test_a_space_belongs_to_the_choice(tokenizer: Tokenizer) -> None:
    encoder = Encoder(tokenizer, 64, "\n\n", clean)
    before, after = (encoder.choices(question(*texts)) for texts in (("A: ", ["man"]), ("A:", [" man"])))
    assert before == after
    (request,) = before
    whole = [tokenizer.bos_id, *tokenizer.encode("A: man")]
    assert request.tokens == whole
    assert request.n_scored == len(whole) - 1 - len(tokenizer.encode("A:"))


def test_examples_come_first_and_the_beginning_is_cut_off(tokenizer: Tokenizer) -> None:
    asked = question("so?", ["man", "truth"], [Solved("a?", " b"), Solved("c?", " d")])
    long, short = Encoder(tokenizer, 64, "\n", clean), Encoder(tokenizer, 8, "\n", clean)
    whole = [tokenizer.bos_id, *tokenizer.encode("a? b\nc? d\nso?man")]
    assert long.choices(asked)[0].tokens == whole
    assert short.choices(asked)[0].tokens == whole[-9:]
    assert (long.n_truncated, short.n_truncated) == (0, 1)
    assert short.prompt(asked, 3) == [tokenizer.bos_id, *tokenizer.encode("a? b\nc? d\nso?")][-5:]
    with pytest.raises(ConfigError, match="max_new_tokens: 8 leaves no room"):
        short.prompt(asked, 8)


def test_the_form_of_text_is_that_of_training(tokenizer: Tokenizer) -> None:
    one, other = (
        Encoder(tokenizer, 64, sep, clean).choices(question("caf\u0065\u0301", ["x"], [Solved("a", "b")]))
        for sep in ("\r\n", "\n")
    )
    assert one == other


@pytest.mark.parametrize(
    ("choices", "says"), [(["a", "many words " * 9], "a choice of"), (["\x07x", "x"], "the same tokens")]
)
def test_choices_that_cannot_be_asked(tokenizer: Tokenizer, choices: list[str], says: str) -> None:
    with pytest.raises(CannotEncodeError, match=says):
        Encoder(tokenizer, 8, "\n", clean).choices(question("so", list(map(clean, choices))))


def test_a_choice_that_the_tokenizer_lacks(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "unk_id", tokenizer.encode("~")[-1])
    with pytest.raises(CannotEncodeError, match="'~', which the tokenizer cannot encode"):
        Encoder(tokenizer, 64, "\n", clean).choices(question("so", ["a", "~"]))


def test_a_dialogue(tokenizer: Tokenizer) -> None:
    chat = Chat(tokenizer, OWN_TEMPLATE)
    encoder = Encoder(tokenizer, 64, "\n\n", clean, chat)
    turns = [("user", "a?"), ("assistant", "b"), ("user", "so?")]
    prompt = chat.encode_prompt([{"role": role, "content": text} for role, text in turns])
    asked = question("so?", [" man", "truth"], [Solved("a?", "b")])
    assert encoder.prompt(asked, 4) == prompt
    assert encoder.choices(asked)[0].tokens == prompt + tokenizer.encode("man")
    with pytest.raises(CannotEncodeError, match="special token"):
        encoder.prompt(question("<s>", []), 4)
    chat.close()


# --- the command ---


def evaluate(run_dir: Path, *arguments: str) -> None:
    sys.argv = ["eval.py", f"run_dir={run_dir}", "precision=fp32", *arguments]
    module = script("eval")
    from pretrain.config import run_command

    with pytest.raises(SystemExit) as ended:
        run_command(module.EvalConfig, module.main)
    assert ended.value.code == 0


def test_the_command_scores_tasks_and_text(
    run_dir: Path, tasks: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus"
    write_heldout(load_trained(run_dir).tokenizer, corpus)
    (corpus / "tokenizer.model").write_bytes((run_dir / "tokenizer.model").read_bytes())
    arguments = [f"tasks=[{','.join(tasks)}]", f"input=[{corpus}]", f"corpus={corpus}", "json=true"]
    for name, batch in (("one", 1), ("other", 5)):
        evaluate(run_dir, *arguments, f"output={tmp_path / name}", f"micro_batch_sequences={batch}")
    printed = capsys.readouterr()
    said = json.loads(printed.out.splitlines()[-1])
    assert set(said["tasks"]) == {"sentiment", "quiz", "write"}
    assert said["tasks"]["write"]["unscored"] == 1
    assert "no score has 1 of 8 items: 'write.jsonl:8' has no reference" in printed.err
    one, other = (results_in(tmp_path / name) for name in ("one", "other"))
    assert sorted(one) == ["quiz", "sentiment", "text", "write"]
    for name, (results,) in one.items():
        again = other[name][0]
        for mine, theirs in zip(results.items, again.items, strict=True):
            assert (mine.id, mine.hash, mine.prediction) == (theirs.id, theirs.hash, theirs.prediction)
            assert mine.scores == pytest.approx(theirs.scores, rel=1e-4)
    assert all(row.is_paired and not row.is_real for row in compare(one, other))
    assert one["text"][0].scores["loss"].value == pytest.approx(said["loss"])
    assert one["text"][0].scores["bits_per_byte"].value == pytest.approx(said["bits_per_byte"])
    assert one["sentiment"][0].overlap is not None
    assert one["sentiment"][0].overlap.too_short == len(REVIEWS)
    assert sum(row["items"] for row in one["sentiment"][0].by_label.values()) == len(REVIEWS)
    check_items(run_dir, one)


def test_text_is_compared_by_document(run_dir: Path, tmp_path: Path) -> None:
    """Of two models, of which the other one has seen the same text with other ids."""
    other = tmp_path / "run"
    make_run(other, step=5)
    text = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"{TEXTS[0]} {n}" * (1 + n % 3)}) for n in range(12)]
    text.write_text("\n".join(lines))
    for name, run in (("a", run_dir), ("b", other)):
        evaluate(run, f"input=[{text}]", f"output={tmp_path / name}", "max_documents=10")
    a, b = (results_in(tmp_path / name) for name in "ab")
    (found,) = compare(a, b)
    assert (found.score, found.is_paired, found.n_items) == ("bits_per_byte", True, 10)
    losses = [sum(item.statistics["loss"][0] for item in side["text"][0].items) for side in (a, b)]
    n_bytes = sum(item.statistics["bits_per_byte"][1] for item in a["text"][0].items)
    assert found.difference == pytest.approx((losses[1] - losses[0]) / np.log(2) / n_bytes)


def check_items(run_dir: Path, found: dict[str, Any]) -> None:
    """What the results say of items is what the model says when it is asked directly."""
    trained = load_trained(run_dir)
    model, tokenizer = trained.decoder(CPU, torch.float32), trained.tokenizer
    writer = Writer(model, tokenizer, sampling=Sampling(temperature=0), max_new_tokens=6)
    (answer,) = writer.write([writer.after("It is a truth 3")])
    assert found["write"][0].items[3].prediction == clean(answer.text).strip()
    context = tokenizer.encode("Q: 3 and 1\nA:")
    scores = []
    for choice in ("is 4", "is 3", "unk"):
        whole = tokenizer.encode(f"Q: 3 and 1\nA: {choice}")
        scores.append(alone(model, Request([tokenizer.bos_id, *whole], len(whole) - len(context))))
    assert found["quiz"][0].items[3].prediction == ("is 4", "is 3", "unk")[int(np.argmax(scores))]
    gold = found["quiz"][0].items[3].statistics["gold_bits_per_byte"]
    assert gold == pytest.approx([-scores[1] / np.log(2), 4], rel=1e-5)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"tasks": ["{task}"]}, "give output=DIR"),
        ({}, "give input="),
        ({"input": ["x"], "corpus": "x"}, "corpus= is where"),
        ({"tasks": ["{task}"], "output": "x", "max_items": 0}, "max_items=0"),
    ],
)
def test_what_the_command_refuses(tasks: list[str], keys: dict[str, Any], says: str) -> None:
    given = {key: [tasks[0]] if value == ["{task}"] else value for key, value in keys.items()}
    with pytest.raises(ConfigError, match=says):
        script("eval").EvalConfig(run_dir="run", **given)


def test_two_tasks_of_one_name_and_a_run_without_it(run_dir: Path, tasks: list[str], tmp_path: Path) -> None:
    module = script("eval")
    with pytest.raises(ConfigError, match="has the name quiz, which is taken"):
        module.read_tasks(module.EvalConfig(run_dir="run", tasks=[tasks[1]] * 2, output="x"))
    mlm = tmp_path / "mlm"
    make_run(mlm, objective="mlm")
    with pytest.raises(ConfigError, match="objective=mlm, which fills masks"):
        module.main(module.EvalConfig(run_dir=str(mlm), tasks=[tasks[1]], output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file(run_dir: Path, tasks: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    module = script("eval")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"output=.* is not a folder"):
            module.main(module.EvalConfig(run_dir=str(run_dir), tasks=[tasks[1]], output=str(output)))


def test_results_of_another_format_are_refused(run_dir: Path, tasks: list[str], tmp_path: Path) -> None:
    evaluate(run_dir, f"tasks=[{tasks[1]}]", f"output={tmp_path}", "max_items=2")
    raw = json.loads((tmp_path / "quiz.json").read_text())
    assert len(raw["items"]) == 2
    (tmp_path / "quiz.json").write_text(json.dumps(raw | {"format": 9}))
    with pytest.raises(ConfigError, match="has the format 9"):
        read_results(tmp_path / "quiz.json")
