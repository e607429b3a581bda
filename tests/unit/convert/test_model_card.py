"""The model card says what is known and how it is known, and displays hostile names as text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pretrain.arithmetic import flops_per_token
from pretrain.convert.form import Form, Format, Stored
from pretrain.convert.heldout_loss import FormLoss
from pretrain.convert.hugging_face import Parity
from pretrain.convert.model_card import CardFacts, model_card
from pretrain.corpus.manifest import CorpusSource
from pretrain.corpus.writer import CorpusWriter
from pretrain.gpus import MAX_WATTS, PEAK_OF
from pretrain.trained import TrainedModel, load_trained
from support.trained_run import SMALL, make_run

FORM = Form(Format.hugging_face, Stored.bf16)
FACTS = CardFacts(
    form=FORM,
    weight_error=0.0019,
    parity=Parity(tokens=64, max_difference=1.5e-7, tolerance=2e-4, argmax_agreement=1.0),
    loss=FormLoss("/home/me/heldout/manifest.json", "ab" * 32, tokens=4096, checkpoint=2.5, exported=2.503),
    device_watts=None,
)
HOSTILE = CorpusSource(
    name="a|b <script>alert(1)</script> ![x](http://evil/p.png)\n# head",
    license="[MIT](http://evil) <img src=x onerror=y>\x1b[31m",
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    folder = tmp_path_factory.mktemp("run")
    make_run(folder, replace(SMALL))
    return load_trained(folder)


@pytest.fixture
def trained(original: TrainedModel, tmp_path: Path) -> TrainedModel:
    """Its corpus has the source above; another corpus is at a URL."""
    writer = CorpusWriter(
        tmp_path / "corpus",
        tokenizer_sha256=original.tokenizer.sha256,
        vocab_size=original.tokenizer.vocab_size,
        bos_id=1,
        eos_id=2,
        chunk_tokens=64,
        sources=[HOSTILE, CorpusSource(name="unused", license="none")],
    )
    writer.add_document([1, *[5] * 198, 2], source=HOSTILE.name, document_id="d", text_bytes=400)
    writer.finish()
    config = replace(
        original.config, data=replace(original.config.data, manifest=str(tmp_path / "corpus/manifest.json"))
    )
    return replace(original, config=config)


def lines_of(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def record_run(run_dir: Path, peak_source: str | None, last_step: int = 3) -> None:
    """Two attempts of a run of 3 steps: 2 ranks to step 2, then 4 ranks."""
    steps = [(1, 1, 3.0), (1, 2, 3.0), (2, 3, 5.0)]
    lines_of(
        run_dir / "metrics.jsonl",
        [
            {
                "kind": "step",
                "attempt": a,
                "step": s,
                "step_time_s": t,
                "step_tokens": 2048,
                "sequence_length": 64,
            }
            for a, s, t in steps
            if s <= last_step
        ]
        + [
            {
                "kind": "evaluation",
                "attempt": 1,
                "step": 2,
                "heldout/loss": 3.25,
                "heldout/bits_per_byte": 1.5,
                "heldout/time_s": 2.0,
            },
        ],
    )
    started = [(1, "started", 2, {}), (2, "resumed", 4, {"step": 2})]
    events: list[dict[str, Any]] = []
    for attempt, name, ranks, more in started:
        events.append({"event": "monitoring", "attempt": attempt, "peak_source": peak_source})
        events.append({"event": name, "attempt": attempt, "world_size": ranks, **more})
    lines_of(run_dir / "events.jsonl", events)


def row(card: str, name: str) -> list[str]:
    """The cells of the row that begins with this name."""
    (found,) = [line for line in card.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in found.strip("|").split("|")][1:]


def test_figures_of_the_run(trained: TrainedModel, tmp_path: Path) -> None:
    record_run(tmp_path, "H100 SXM peak")
    card = model_card(trained, tmp_path, FACTS)
    flops = 3 * 2048 * flops_per_token(trained.config.model, 64)
    assert row(card, "training compute")[0] == f"{flops:.3g} FLOP"
    assert row(card, "training compute")[1].startswith("estimated")
    hours = (2 * 6.0 + 4 * 5.0) / 3600
    assert row(card, "device hours")[0] == f"{hours:,.4g}"
    assert row(card, "device hours")[1].startswith("measured")
    assert row(card, "device")[0] == "H100 SXM"
    assert row(card, "energy")[0] == f"{hours * 0.7:,.4g} kWh"
    assert "700 W" in row(card, "energy")[1]
    assert row(card, "held-out loss") == ["3.25", "measured in training, at step 2"]
    assert row(card, r"held-out bits\_per\_byte")[0] == "1.5"
    assert row(card, "what the form costs")[0] == "+0.00300 nats per token"
    assert row(card, "weights read back from the files")[0] == "differ by at most 0.0019 of their size"
    assert row(card, "logits of transformers")[0] == "differ by at most 1.5e-07 (allowed 0.0002)"
    assert row(card, "parameters")[0] == f"{sum(w.numel() for w in trained.weights.values()):,}"
    assert row(card, "sha256 of its file in the run")[0] == f"`{trained.tokenizer.sha256}`"
    assert "The model saw 6,144 tokens" in card
    assert "held-out corpus `abababababab`" in card
    assert "/home/me" not in card
    assert "time" not in card.partition("## Evaluation")[2].partition("##")[0]
    assert "| 200 |" in card


def test_power_that_nobody_knows_is_not_guessed(trained: TrainedModel, tmp_path: Path) -> None:
    record_run(tmp_path, "measured peak")
    card = model_card(trained, tmp_path, FACTS)
    assert row(card, "energy")[0] == "unknown"
    assert row(card, "device")[0] == "not in the table of GPUs"
    card = model_card(trained, tmp_path, replace(FACTS, device_watts=65.0))
    assert row(card, "energy")[0] == f"{32 / 3600 * 0.065:,.4g} kWh"
    assert "as stated at the export" in row(card, "energy")[1]


def nothing(run_dir: Path) -> None:
    pass


def damaged(run_dir: Path) -> None:
    record_run(run_dir, None)
    (run_dir / "events.jsonl").write_text('{"event": 3}\n')


def without_ranks(run_dir: Path) -> None:
    record_run(run_dir, None)
    lines_of(run_dir / "events.jsonl", [{"event": "started", "attempt": 1}])


@pytest.mark.parametrize("files", [nothing, damaged, without_ranks])
def test_a_run_whose_files_are_not_at_hand(
    trained: TrainedModel, tmp_path: Path, files: Callable[[Path], None]
) -> None:
    files(tmp_path)
    card = model_card(trained, tmp_path, replace(FACTS, loss=None, parity=None))
    assert row(card, "device hours, device, energy")[0] == "unknown"
    flops = 6144 * flops_per_token(trained.config.model, 64)
    assert row(card, "training compute")[0] == f"{flops:.3g} FLOP"
    assert row(card, "logits of transformers")[0] == "unknown"


def test_steps_after_the_checkpoint_do_not_count(trained: TrainedModel, tmp_path: Path) -> None:
    record_run(tmp_path, "T4 peak")
    card = model_card(replace(trained, step=2), tmp_path, FACTS)
    assert row(card, "device hours")[0] == f"{2 * 6.0 / 3600:,.4g}"


def test_names_and_licenses_are_displayed_as_text(trained: TrainedModel, tmp_path: Path) -> None:
    card = model_card(trained, tmp_path, FACTS)
    assert "unused" not in card  # no document is from it
    assert "<script" not in card
    assert "<img" not in card
    assert "\x1b" not in card
    assert not re.search(r"(?<!\\)\]\(http", card)
    (line,) = [line for line in card.splitlines() if "alert" in line]
    assert line.count(" | ") == 3  # the bars of the table only
    assert r"\[MIT\]" in line


def test_a_corpus_at_a_url_is_not_opened(trained: TrainedModel, tmp_path: Path) -> None:
    data = replace(trained.config.data, manifest="http://127.0.0.1:9/manifest.json")
    card = model_card(replace(trained, config=replace(trained.config, data=data)), tmp_path, FACTS)
    assert "Not at hand when this was written" in card


def test_every_known_gpu_has_a_power() -> None:
    assert set(MAX_WATTS) == set(PEAK_OF)
    assert all(50 < watts <= 1000 for watts in MAX_WATTS.values())
