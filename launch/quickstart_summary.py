"""Print the final summary of launch/quickstart.sh: `python launch/quickstart_summary.py output=DIR`

It compares the held-out loss with the unigram entropy of the same text. That is the loss of the best model that knows
only how often each token occurs in this text. Exit codes: 0 done, 1 a run of a length that the quickstart chose has
learned little more than that, 2 there is no finished quickstart.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretrain.command import begin

begin(__name__)

import numpy as np
from omegaconf import MISSING

from pretrain.config import run_command
from pretrain.config.texts import PathText
from pretrain.corpus.shards import Corpus
from pretrain.errors import ConfigError, RunError
from pretrain.reliability.journal import read_metrics

AVERAGED_STEPS = 5
"""Losses in the table are means over this many steps, because a single loss depends on its batch."""
CLEARLY_BELOW_FRAC = 0.05
"""A held-out loss that is lower than the unigram entropy by this fraction shows that the model uses context."""


@dataclass(kw_only=True, slots=True)
class SummaryConfig:
    """Which quickstart to summarize."""

    output: PathText = MISSING
    """Folder that launch/quickstart.sh has written (its --out)."""


def unigram_entropy(corpus: Corpus, n_tokens: int) -> float:
    """Unigram entropy in nats per token of the corpus's first `n_tokens`, over the tokens that count in the loss.

    These are all tokens except bos. No model that ignores context can have a lower loss on this text.
    """
    counts = np.zeros(corpus.manifest.vocab_size, dtype=np.int64)
    for chunk in range(-(-n_tokens // corpus.chunk_tokens)):
        length = min(corpus.tokens_in(chunk), n_tokens - chunk * corpus.chunk_tokens)
        counts += np.bincount(corpus.read(chunk, 0, length), minlength=len(counts))
    counts[corpus.manifest.bos_id] = 0
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum())


def mean_loss(losses: list[float | None], step: int) -> float:
    """Mean training loss of the last AVERAGED_STEPS steps up to `step`, or of all where there are fewer.

    A step with nothing to predict has no loss and does not count.
    """
    window = [loss for loss in losses[max(0, step - AVERAGED_STEPS) : step] if loss is not None]
    return sum(window) / len(window) if window else math.nan


def stage_lines(path: Path) -> list[tuple[str, str]]:
    """The name and duration of each stage in stages.tsv. A stage without a time was not run again."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    return [(name, f"{seconds} s" if seconds else "reused") for name, seconds in rows]


def corpus_line(corpus: Corpus) -> str:
    manifest = corpus.manifest
    documents = sum(source.documents for source in manifest.sources)
    text_bytes = sum(source.text_bytes for source in manifest.sources)
    return f"{documents:,} documents, {text_bytes / 1e6:.1f} MB of text, {manifest.n_tokens:,} tokens"


def section(title: str, rows: list[tuple[str, str]]) -> None:
    print(f"\n{title}")
    for name, value in rows:
        print(f"  {name:<26}{value}")


def heldout_rows(
    result: dict[str, float], n_tokens: int, of_tokens: int, entropy: float
) -> list[tuple[str, str]]:
    below = 1 - result["loss"] / entropy
    return [
        ("scored", f"its first {n_tokens:,} of {of_tokens:,} tokens; its documents are shuffled"),
        ("loss", f"{result['loss']:.3f} nats per token, perplexity {result['perplexity']:.1f}"),
        ("", f"{result['bits_per_byte']:.3f} bits per byte"),
        (
            "unigram entropy of these",
            f"{entropy:.3f} nats per token (frequencies of the same tokens, no context)",
        ),
        ("the model is", f"{abs(below):.0%} {'below' if below >= 0 else 'ABOVE'} the unigram entropy"),
    ]


def training_rows(losses: list[float | None], stop_step: int) -> list[tuple[str, str]]:
    return [
        ("first steps", f"{mean_loss(losses, min(AVERAGED_STEPS, len(losses))):.3f}"),
        (f"stopped at step {stop_step}", f"{mean_loss(losses, stop_step):.3f}"),
        (f"resumed, to step {len(losses)}", f"{mean_loss(losses, len(losses)):.3f}"),
    ]


def summarize(config: SummaryConfig) -> None:
    """Print the summary. Raises RunError where the model has learned too little."""
    out = Path(config.output)
    run_dir = out / "run"
    if not (out / "evaluation.json").exists():
        raise ConfigError(f"{out} has no finished quickstart; run: bash launch/quickstart.sh --out {out}")
    result = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    length = json.loads((out / "steps.json").read_text(encoding="utf-8"))
    training = Corpus(out / "corpus" / "manifest.json")
    heldout = Corpus(out / "corpus" / "heldout" / "manifest.json")
    scored_tokens = min(result["max_tokens"], heldout.manifest.n_tokens)
    entropy = unigram_entropy(heldout, scored_tokens)

    section("Stages", stage_lines(out / "stages.tsv"))
    section("Text", [("trained on", corpus_line(training)), ("held out", corpus_line(heldout))])
    section(
        f"Training loss, nats per token (mean of {AVERAGED_STEPS} steps)",
        training_rows([record["loss"] for record in read_metrics(run_dir)], length["stop_step"]),
    )
    section("Held-out text", heldout_rows(result, scored_tokens, heldout.manifest.n_tokens, entropy))
    section(
        "Results",
        [
            ("corpus, tokenizer, card", str(out / "corpus")),
            ("run: metrics, checkpoints", str(run_dir)),
            ("Hugging Face model", str(out / "export")),
            ("logs of the stages", str(out / "logs")),
        ],
    )
    print(
        f"""
Next, with the environment's Python (source {Path(sys.prefix) / "bin" / "activate"}):
  python launch/generate.py run_dir={run_dir} prompt="import "
  python -m data_tools.show {out / "corpus"}
  bash launch/quickstart.sh --corpus YOUR_FOLDER --out OTHER_DIR"""
    )
    if length["after_s"] is not None and result["loss"] > (1 - CLEARLY_BELOW_FRAC) * entropy:
        raise RunError(
            f"the held-out loss {result['loss']:.3f} is not clearly below the unigram entropy {entropy:.3f}: the model "
            "has learned little more than how often each token occurs; give more --minutes, or more text"
        )


if __name__ == "__main__":
    run_command(SummaryConfig, summarize, doc=__doc__)
