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
from hypothesis import example, given
from hypothesis import strategies as st

from pretrain.errors import ConfigError
from pretrain.evaluate.generation import (
    Continuation,
    Prompt,
    Sampling,
    generate,
    keep_top_k,
    keep_top_p,
    prompt_seed,
    sample,
    token_probabilities,
)
from pretrain.model.decoder import Decoder
from support import ROOT
from support.trained_run import SMALL, make_run, run_script, script

logit_rows = st.lists(st.floats(-8, 8), min_size=1, max_size=40).map(torch.tensor)
GREEDY = Sampling(temperature=0)
PROMPTS = [[1, 7, 30, 4], [1], [1, 50, 51, 52, 53, 54, 55, 56, 9], [1, 60, 8]]


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
) -> list[Continuation]:
    return generate(
        decoder,
        [Prompt(tokens, prompt_seed(seed, tokens, 0)) for tokens in prompts],
        max_new_tokens=n,
        sampling=sampling,
        eos_id=eos_id,
        vocab_size=64,
    )


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


def test_samples_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0])
    sampling = Sampling(temperature=0.7, top_k=3)
    generators = [torch.Generator().manual_seed(n) for n in range(4000)]
    drawn = sample(logits.expand(4000, -1), sampling, generators)
    shares = drawn.bincount(minlength=4) / 4000
    torch.testing.assert_close(shares.double(), token_probabilities(logits, sampling), rtol=0, atol=0.03)
    assert shares[3] == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [({"temperature": -0.1}, "temperature=-0.1"), ({"top_k": 0}, "top_k=0"), ({"top_p": 0.0}, "top_p=0.0")],
)
def test_impossible_settings_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**values)  # type: ignore[arg-type]


# --- generation ---


def test_greedy_generation_is_the_argmax_of_the_whole_sequence() -> None:
    """Without a cache: the model reads everything again for each token."""
    decoder = model()
    for prompt, found in zip(PROMPTS, run(decoder, PROMPTS, GREEDY, eos_id=-1), strict=True):
        tokens = list(prompt)
        for _ in range(12):
            tokens.append(int(decoder.logits(torch.tensor([tokens]))[0, -1].argmax()))
        assert found.tokens == tokens[len(prompt) :]
        assert not found.finished
        assert len(set(found.tokens)) > 3


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(temperature=0.8, top_k=20, top_p=0.9)])
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
    eos = endless[0].tokens[4]
    found = run(decoder, PROMPTS, GREEDY, eos_id=eos)
    for row, without in zip(found, endless, strict=True):
        stop = without.tokens.index(eos) if eos in without.tokens else None
        assert row == Continuation(without.tokens[:stop], finished=stop is not None)
    assert found[0].finished
    assert not all(row.finished for row in found)


def test_generation_stops_when_every_row_has_ended() -> None:
    steps: list[int] = []
    decoder = model()
    eos = run(decoder, PROMPTS[:1], GREEDY, eos_id=-1)[0].tokens[4]
    generate(
        decoder,
        [Prompt(PROMPTS[0], 0)],
        max_new_tokens=50,
        sampling=GREEDY,
        eos_id=eos,
        vocab_size=64,
        progress=steps.append,
    )
    assert len(steps) == 5
    assert steps[-1] == 0


def test_tokens_outside_the_vocabulary_are_never_chosen() -> None:
    decoder = model()
    found = generate(
        decoder,
        [Prompt(tokens, 0) for tokens in PROMPTS],
        max_new_tokens=30,
        sampling=Sampling(temperature=10.0),
        eos_id=-1,
        vocab_size=10,
    )
    tokens = {token for row in found for token in row.tokens}
    assert len(tokens) > 5
    assert max(tokens) < 10


def test_greedy_generation_equals_that_of_transformers(tmp_path: Path) -> None:
    """On the exported folder, in a batch that they pad on the left."""
    transformers = pytest.importorskip("transformers")
    from pretrain.convert.hugging_face import export
    from pretrain.trained import load_trained

    make_run(tmp_path / "run")
    trained = load_trained(tmp_path / "run")
    export(trained, tmp_path / "hf", dtype=torch.float32)
    texts = ["It is a truth", "道可道", "def fibonacci(n: int)", ""]
    ours = generate(
        trained.decoder(torch.device("cpu"), torch.float32),
        [Prompt([1, *trained.tokenizer.encode(text)], 0) for text in texts],
        max_new_tokens=20,
        sampling=GREEDY,
        eos_id=2,
        vocab_size=trained.tokenizer.vocab_size,
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    found = theirs.generate(**batch, max_new_tokens=20, do_sample=False)[:, batch.input_ids.shape[1] :]
    for row, expected in zip(ours, found.tolist(), strict=True):
        assert row.tokens == expected[: len(row.tokens)]
        assert len(set(row.tokens)) > 2
        text = trained.tokenizer.decode(row.tokens)
        assert tokenizer.decode(row.tokens) == text or "\ufffd" in text  # bytes that are no UTF-8


# --- launch/generate.py ---


def test_the_script_continues_prompts_as_they_stand(tmp_path: Path) -> None:
    """Signs that mean something to Hydra are text in a prompt; --json is what a person may type."""
    make_run(tmp_path / "run")
    prompt = 'It is, "a" truth: ${x} = [1, {2}] \\ 道'
    arguments = [f"run_dir={tmp_path / 'run'}", "max_new_tokens=5", "n_samples=2", "--json"]
    done = run_script("generate", f"prompt={prompt}", "prompt=a man", *arguments)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["step"] == 3
    assert [sample["prompt"] for sample in found["samples"]] == [prompt, prompt, "a man", "a man"]
    assert found["samples"][0]["tokens"] != found["samples"][1]["tokens"]
    assert all(len(sample["tokens"]) == 5 or sample["finished"] for sample in found["samples"])
    assert prompt in done.stdout


def test_the_script_writes_the_same_in_any_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "prompts.txt").write_text("It is a truth\n\n道可道\n")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "def f():\n"}) + "\n")
    generate_script = script("generate")
    found = []
    for batch_sequences in (1, 2, 16):
        samples = []
        for name in ("prompts.txt", "prompts.jsonl"):
            config = generate_script.GenerateConfig(
                run_dir=str(tmp_path / "run"),
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


def test_prompts_have_the_form_of_training_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run")
    generate_script = script("generate")
    samples = []
    for prompt in ("caf\u00e9\nbar", "cafe\u0301\r\nbar", "\ufeffcaf\u00e9\n\ud83dbar", "caf\u00e9\n\x07bar"):
        config = generate_script.GenerateConfig(
            run_dir=str(tmp_path / "run"), prompt=[prompt], max_new_tokens=4, json=True
        )
        generate_script.main(config)
        samples.append(json.loads(capsys.readouterr().out.splitlines()[-1])["samples"])
    assert all(sample == samples[0] for sample in samples)


def test_any_terminal_and_ctrl_c(tmp_path: Path) -> None:
    """A terminal without UTF-8 gets escapes; Ctrl-C gets one sentence and exit code 130."""
    make_run(tmp_path / "run")
    command = [sys.executable, ROOT / "launch/generate.py", f"run_dir={tmp_path / 'run'}", "prompt=道 – é"]
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
