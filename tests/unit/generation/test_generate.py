"""Sampling as defined, and generation that no batch, cache or library changes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from pretrain.errors import ConfigError
from pretrain.generation.batch import Batch, Ending, Prompt
from pretrain.generation.sampling import (
    Sampling,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    sample,
    token_probabilities,
)
from pretrain.generation.writer import Writer, prompt_seed
from pretrain.model.decoder import Decoder
from pretrain.printing import visible
from pretrain.trained import load_trained
from support import ROOT
from support.trained_run import SMALL, make_run, run_script, script

logit_rows = st.lists(st.floats(-8, 8), min_size=1, max_size=40).map(torch.tensor)
GREEDY = Sampling(temperature=0)
PROMPTS = [[1, 7, 30, 4], [1], [1, 50, 51, 52, 53, 54, 55, 56, 9], [1, 60, 8]]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate") / "run"
    make_run(folder)
    return folder


@pytest.fixture(scope="module")
def exported(run_dir: Path) -> Path:
    from pretrain.convert.hugging_face import export

    export(load_trained(run_dir), run_dir.parent / "hf", dtype=torch.float32)
    return run_dir.parent / "hf"


def model() -> Decoder:
    """Weights so large that the most probable tokens vary instead of repeating."""
    decoder = Decoder(replace(SMALL, vocab_size=64, qk_norm=True), seed=3).eval()
    with torch.no_grad():
        for name, weight in decoder.named_parameters():
            if weight.dim() > 1:
                weight.mul_(16 if name.startswith("blocks") else 4)
    return decoder


def run(
    decoder: Decoder,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    n: int = 12,
    eos_id: int = 2,
    seed: int = 0,
    vocab_size: int = 64,
) -> list[tuple[list[int], Ending | None]]:
    """The tokens of each prompt's continuation, and why it ended."""
    wanted = [
        Prompt(
            tokens=tokens,
            max_new_tokens=n,
            sampling=sampling,
            seed=prompt_seed(seed, tokens, 0),
            end_ids={eos_id},
        )
        for tokens in prompts
    ]
    batch = Batch(decoder, wanted, vocab_size)
    while batch.open_rows:
        batch.step()
    return [(row.tokens, row.ending) for row in batch.rows]


# --- the distribution ---


@given(logits=logit_rows, k=st.integers(1, 50))
def test_top_k_keeps_the_k_largest(logits: torch.Tensor, k: int) -> None:
    kept = keep_top_k(logits, k)
    inside = kept.isfinite()
    assert inside.sum() == min(k, len(logits))
    assert torch.equal(kept[inside], logits[inside])
    if not inside.all():
        assert logits[inside].min() >= logits[~inside].max()


@given(logits=logit_rows, p=st.floats(0.01, 1))
@example(logits=torch.tensor([50.0, 0.0, -50.0]), p=1.0)
def test_top_p_keeps_the_smallest_set_with_that_mass(logits: torch.Tensor, p: float) -> None:
    kept = keep_top_p(logits, p)
    inside = kept.isfinite()
    probabilities = logits.double().softmax(-1)
    assert torch.equal(kept[inside], logits[inside])
    assert probabilities[inside].sum() >= p - 1e-9
    if not inside.all():
        assert logits[inside].min() >= logits[~inside].max()
    if p < 1:
        assert probabilities[inside].sum() - probabilities[inside].min() < p + 1e-9
    else:
        assert inside.all()


@given(
    logits=logit_rows,
    temperature=st.floats(0.05, 5),
    k=st.none() | st.integers(1, 50),
    p=st.floats(0.01, 1),
)
def test_probabilities_are_those_of_what_is_kept(
    logits: torch.Tensor, temperature: float, k: int | None, p: float
) -> None:
    found = token_probabilities(logits, Sampling(temperature=temperature, top_k=k, top_p=p))
    assert found.sum() == pytest.approx(1)
    inside = found > 0
    scaled = (logits.double() / temperature).softmax(-1)
    torch.testing.assert_close(found[inside], scaled[inside] / scaled[inside].sum())
    assert k is None or inside.sum() <= k


@given(logits=logit_rows)
def test_temperature_0_is_greedy(logits: torch.Tensor) -> None:
    probabilities = token_probabilities(logits, GREEDY)
    assert probabilities.sum() == probabilities.max() == 1
    assert logits[probabilities.argmax()] == logits.max()


@given(logits=logit_rows, p=st.floats(0, 1))
def test_min_p_keeps_what_is_probable_enough(logits: torch.Tensor, p: float) -> None:
    inside = keep_min_p(logits, p).isfinite()
    probabilities = logits.double().softmax(-1)
    assert torch.equal(inside, probabilities >= p * probabilities.max())


@given(
    logits=logit_rows.filter(lambda row: len(row) > 3),
    temperature=st.floats(0.1, 5),
    k=st.none() | st.integers(1, 50),
    p=st.floats(0.01, 0.99),
    min_p=st.floats(0, 0.9),
    penalty=st.floats(0.5, 3),
)
@settings(max_examples=50)
def test_probabilities_equal_those_of_transformers(
    logits: torch.Tensor, temperature: float, k: int | None, p: float, min_p: float, penalty: float
) -> None:
    """Their processors, in the order in which they apply them. Ties at a limit may be broken either way."""
    process = pytest.importorskip("transformers.generation.logits_process")
    assume(len(logits.unique()) == len(logits))
    steps = [
        process.RepetitionPenaltyLogitsProcessor(penalty),
        process.TemperatureLogitsWarper(temperature),
        *([process.TopKLogitsWarper(k)] if k is not None else []),
        process.TopPLogitsWarper(p),
        process.MinPLogitsWarper(min_p),
    ]
    ids = torch.tensor([[0, 2, 2]])
    expected = logits.double()[None]
    for step in steps:
        expected = step(ids, expected)
    seen = torch.zeros(len(logits), dtype=torch.bool).index_fill(0, ids[0], True)
    settings_ = Sampling(repetition_penalty=penalty, temperature=temperature, top_k=k, top_p=p, min_p=min_p)
    found = token_probabilities(logits.double(), settings_, seen)
    inside, theirs = found > 0, expected[0].softmax(-1) > 0
    # What is summed up in another order may fall on the other side of a limit, for one token at most.
    assert (inside != theirs).sum() <= 1
    if torch.equal(inside, theirs):
        torch.testing.assert_close(found, expected[0].softmax(-1))


def test_the_repetition_penalty_makes_what_was_seen_less_probable() -> None:
    logits, seen = torch.tensor([2.0, -2.0, 3.0, 0.0]), torch.tensor([True, True, False, True])
    assert penalize_repetition(logits, seen, 2.0).tolist() == [1.0, -4.0, 3.0, 0.0]


def test_samples_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0])
    sampling = Sampling(temperature=0.7, top_k=3)
    drawn = torch.tensor([sample(logits, sampling, torch.Generator().manual_seed(n)) for n in range(4000)])
    shares = drawn.bincount(minlength=4) / 4000
    torch.testing.assert_close(shares.double(), token_probabilities(logits, sampling), rtol=0, atol=0.03)
    assert shares[3] == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**values)  # type: ignore[arg-type]


# --- generation ---


def test_greedy_generation_is_the_argmax_of_the_whole_sequence() -> None:
    """Without a cache: the model reads everything again for each token."""
    decoder = model()
    for prompt, (found, ending) in zip(PROMPTS, run(decoder, PROMPTS, GREEDY, eos_id=-1), strict=True):
        tokens = list(prompt)
        for _ in range(12):
            tokens.append(int(decoder.logits(torch.tensor([tokens]))[0, -1].argmax()))
        assert found == tokens[len(prompt) :]
        assert ending is Ending.LENGTH
        assert len(set(found)) > 3


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        Sampling(),
        Sampling(temperature=0.8, top_k=20, top_p=0.9),
        Sampling(min_p=0.02, repetition_penalty=1.5),
    ],
)
def test_a_batch_gives_what_each_prompt_gives_alone(sampling: Sampling) -> None:
    decoder = model()
    together = run(decoder, PROMPTS, sampling)
    alone = [run(decoder, [prompt], sampling)[0] for prompt in PROMPTS]
    assert together == alone
    assert run(decoder, PROMPTS[::-1], sampling) == alone[::-1]


def test_the_seed_decides() -> None:
    decoder = model()
    first, again = run(decoder, PROMPTS, Sampling()), run(decoder, PROMPTS, Sampling())
    torch.manual_seed(99)
    assert first == again == run(decoder, PROMPTS, Sampling())
    assert first != run(decoder, PROMPTS, Sampling(), seed=1)
    assert len({prompt_seed(s, tokens, n) for s in (0, 1) for tokens in PROMPTS for n in (0, 1)}) == 16


def test_eos_ends_a_row_and_not_the_others() -> None:
    decoder = model()
    endless = run(decoder, PROMPTS, GREEDY, eos_id=-1)
    eos = endless[0][0][4]
    found = run(decoder, PROMPTS, GREEDY, eos_id=eos)
    for row, (without, _) in zip(found, endless, strict=True):
        stop = without.index(eos) if eos in without else None
        assert row == (without[:stop], Ending.LENGTH if stop is None else Ending.STOP)
    assert found[0][1] is Ending.STOP
    assert not all(ending is Ending.STOP for _, ending in found)


def test_generation_stops_when_every_row_has_ended() -> None:
    decoder = model()
    eos = run(decoder, PROMPTS[:1], GREEDY, eos_id=-1)[0][0][4]
    prompt = Prompt(tokens=PROMPTS[0], max_new_tokens=50, sampling=GREEDY, seed=0, end_ids={eos})
    batch = Batch(decoder, [prompt], 64)
    steps = 0
    while batch.open_rows:
        assert batch.step() == [0]
        steps += 1
    assert steps == 5


def test_each_row_has_limits_of_its_own() -> None:
    decoder = model()
    prompts = [
        Prompt(tokens=tokens, max_new_tokens=n, sampling=sampling, seed=5, end_ids=set())
        for tokens, n, sampling in zip(
            PROMPTS, (3, 9, 1, 6), (GREEDY, Sampling(), Sampling(top_k=3), GREEDY), strict=True
        )
    ]
    batch = Batch(decoder, prompts, 64)
    while batch.open_rows:
        batch.step()
    for row, prompt in zip(batch.rows, prompts, strict=True):
        alone = Batch(decoder, [prompt], 64)
        while alone.open_rows:
            alone.step()
        assert row.tokens == alone.rows[0].tokens
        assert len(row.tokens) == prompt.max_new_tokens


def test_tokens_outside_the_vocabulary_are_never_chosen() -> None:
    found = run(model(), [[1, 7], [1], [1, 9]], Sampling(temperature=10.0), n=30, eos_id=-1, vocab_size=10)
    tokens = {token for row, _ in found for token in row}
    assert len(tokens) > 5
    assert max(tokens) < 10


@pytest.mark.parametrize("repetition_penalty", [1.0, 1.7])
def test_greedy_generation_equals_that_of_transformers(
    run_dir: Path, exported: Path, repetition_penalty: float
) -> None:
    """On the exported folder, in a batch that they pad on the left."""
    transformers = pytest.importorskip("transformers")
    trained = load_trained(run_dir)
    texts = ["It is a truth", "道可道", "def fibonacci(n: int)", ""]
    writer = Writer(
        trained.decoder(torch.device("cpu"), torch.float32),
        trained.tokenizer,
        sampling=Sampling(temperature=0, repetition_penalty=repetition_penalty),
        max_new_tokens=20,
    )
    ours = writer.write([writer.after(text) for text in texts])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    # Without padding, which their repetition penalty would take for tokens of the text.
    for row, text in zip(ours, texts, strict=True):
        batch = tokenizer([text], return_tensors="pt")
        found = theirs.generate(
            **batch, max_new_tokens=20, do_sample=False, repetition_penalty=repetition_penalty
        )
        expected = found[0, batch.input_ids.shape[1] :].tolist()
        assert row.tokens == expected[: len(row.tokens)]
        assert len(set(row.tokens)) > 2
        text = trained.tokenizer.decode(row.tokens)
        assert tokenizer.decode(row.tokens) == text or "\ufffd" in text  # bytes that are no UTF-8
        assert row.text == trained.tokenizer.decode_after(writer.after(text).tokens, row.tokens)
    if repetition_penalty == 1:
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        found = theirs.generate(**batch, max_new_tokens=20, do_sample=False)[:, batch.input_ids.shape[1] :]
        assert [row.tokens for row in ours] == [
            expected[: len(row.tokens)] for row, expected in zip(ours, found.tolist(), strict=True)
        ]


# --- launch/generate.py ---


def test_the_script_continues_prompts_as_they_stand(run_dir: Path) -> None:
    """Signs that mean something to Hydra are text in a prompt; --json is what a person may type."""
    prompt = 'It is, "a" truth: ${x} = [1, {2}] \\ 道'
    arguments = [f"run_dir={run_dir}", "max_new_tokens=5", "n_samples=2", "--json"]
    done = run_script("generate", f"prompt={prompt}", "prompt=a man", *arguments)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["step"] == 3
    assert [sample["prompt"] for sample in found["samples"]] == [prompt, prompt, "a man", "a man"]
    assert found["samples"][0]["tokens"] != found["samples"][1]["tokens"]
    assert all(len(sample["tokens"]) == 5 or sample["finished"] for sample in found["samples"])
    assert prompt in done.stdout


def test_the_script_writes_the_same_in_any_batch(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("It is a truth\n\n道可道\n")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "def f():\n"}) + "\n")
    generate_script = script("generate")
    found = []
    for batch_sequences in (1, 2, 16):
        samples = []
        for name in ("prompts.txt", "prompts.jsonl"):
            config = generate_script.GenerateConfig(
                run_dir=str(run_dir),
                prompt=["A man"],
                prompt_file=str(tmp_path / name),
                max_new_tokens=6,
                batch_sequences=batch_sequences,
                json=True,
            )
            generate_script.main(config)
            samples += json.loads(capsys.readouterr().out.splitlines()[-1])["samples"]
        found.append(samples)
    assert found[0] == found[1] == found[2]
    prompts = ["A man", "It is a truth", "道可道", "A man", "def f():\n"]
    assert [sample["prompt"] for sample in found[0]] == prompts


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("a.txt", "one\u2028two\x0cthree\n", ["one\u2028two\x0cthree"]),
        ("a.txt", "\ufeffone\r\n\r\ntwo", ["one", "two"]),
        ("a.txt", "one\x85two\x1cthree\rfour\n", ["one\x85two\x1cthree\rfour"]),
        ("a.jsonl", '\ufeff{"prompt": "one\u2029two\\n"}\r\n', ["one\u2029two\n"]),
    ],
)
def test_only_line_feeds_separate_prompts(
    tmp_path: Path, name: str, content: str, prompts: list[str]
) -> None:
    (tmp_path / name).write_bytes(content.encode())
    assert script("generate").read_prompts(str(tmp_path / name)) == prompts


def test_prompts_have_the_form_of_training_text(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate_script = script("generate")
    samples = []
    for prompt in ("caf\u00e9\nbar", "cafe\u0301\r\nbar", "\ufeffcaf\u00e9\n\ud83dbar", "caf\u00e9\n\x07bar"):
        config = generate_script.GenerateConfig(
            run_dir=str(run_dir), prompt=[prompt], max_new_tokens=4, json=True
        )
        generate_script.main(config)
        samples.append(json.loads(capsys.readouterr().out.splitlines()[-1])["samples"])
    assert all(sample == samples[0] for sample in samples)


def test_any_terminal_and_ctrl_c(run_dir: Path) -> None:
    """A terminal without UTF-8 gets escapes; Ctrl-C gets one sentence and exit code 130."""
    command = [sys.executable, ROOT / "launch/generate.py", f"run_dir={run_dir}", "prompt=道 – é"]
    process = subprocess.Popen(
        [*command, "max_new_tokens=2", "n_samples=20000", "batch_sequences=1"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    shown = [process.stdout.readline() for _ in range(2)]
    assert shown[1].startswith("\\u9053 \\u2013 \\xe9")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert stderr.splitlines()[-1].startswith("interrupted; ") and "Traceback" not in stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), ("", "holds no prompt"), ('{"text": "x"}', "line 1 is not a JSON object")],
)
def test_the_script_refuses_a_bad_prompt_file(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        script("generate").read_prompts(str(path))


def test_the_script_refuses_impossible_settings(tmp_path: Path) -> None:
    generate_script = script("generate")
    with pytest.raises(ConfigError, match=r"top_p=1\.5"):
        generate_script.main(generate_script.GenerateConfig(run_dir=str(tmp_path), top_p=1.5))
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        generate_script.GenerateConfig(run_dir="x", max_new_tokens=0)


def test_a_single_text_is_streamed_and_stops(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate_script = script("generate")

    def run_with(**values: object) -> tuple[str, dict]:
        config = generate_script.GenerateConfig(
            run_dir=str(run_dir), prompt=["It is"], max_new_tokens=12, json=True, **values
        )
        generate_script.main(config)
        printed, _, last = capsys.readouterr().out.strip("\n").rpartition("\n")
        return printed, json.loads(last)["samples"][0]

    printed, whole = run_with()
    assert printed.startswith("It is") and visible(whole["text"], keep="\n\t") in printed
    stop = next(character for character in whole["text"][2:] if character.isalpha())
    printed, cut = run_with(stop=[stop])
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert cut["finished"] and not printed.endswith("…")


def test_a_dialogue_on_the_terminal(run_dir: Path) -> None:
    """Line by line: each answer follows from the turns before it, and the end of the input ends the dialogue."""
    arguments = [f"run_dir={run_dir}", "max_new_tokens=6", "temperature=0"]
    once = run_script("generate", *arguments, "chat=true", "prompt=Hello", "json=true")
    answer = json.loads(once.stdout.splitlines()[-1])["samples"][0]["text"]
    done = subprocess.run(
        [sys.executable, ROOT / "launch/generate.py", *arguments, "chat=true"],
        input="Hello\nand?\n",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(visible(answer))
    assert done.stdout.count(" …\n") == 2
    assert "tokens/s" in once.stderr


def test_a_system_turn_needs_a_dialogue(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"system=.*chat=true"):
        script("generate").GenerateConfig(run_dir=str(run_dir), system="x")
