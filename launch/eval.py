"""Score held-out text: `python launch/eval.py run_dir=DIR input=[PATH,...]`

Prints the loss, perplexity and bits per byte of each source and of all text. With json=true the last line on stdout is
the same as JSON. A model trained with objective=mlm is scored on masked tokens, the same at each call, and has no bits
per byte. An input is a file or folder of text as for data_tools.prepare (.jsonl, .jsonl.gz, .parquet, .txt, .md, .tar),
or a prepared corpus (its folder or manifest.json). Exit codes: 0 done, 2 the input or configuration is wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretrain.command import begin

begin(__name__, interrupted="nothing was written")

from omegaconf import MISSING

from pretrain.config import Precision, Weights, Which, run_command
from pretrain.config.texts import PathText
from pretrain.errors import ConfigError
from pretrain.printing import visible

if TYPE_CHECKING:
    from pretrain.evaluate.heldout import HeldOutResult, TokenDocument
    from pretrain.trained import TrainedModel

MANIFEST = "manifest.json"
MAX_CHARS = 1 << 40  # documents of any length are scored


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """What to score, and how."""

    run_dir: PathText = MISSING
    """Folder of the run whose model is scored."""
    input: list[PathText] = MISSING
    """Files or folders of text, or prepared corpora."""
    step: int | None = None
    """Step of the checkpoint to use; null means the one that `which` says."""
    which: Which = Which.newest
    """Checkpoint to use where no step is given: `newest`, or `best`, the one with the lowest held-out loss."""
    weights: Weights = Weights.trained
    """Weights to use: `trained`, or `ema`, their moving average (ema.decay)."""
    checkpoint_target: PathText | None = None
    """URL of the run's checkpoints, if they are at a URL. A URL that the run folder names is opened only if it is also
    given here."""
    max_documents: int | None = None
    """Number of documents to score from the start of each input; null scores all of them."""
    max_tokens: int | None = None
    """Number of tokens to score from the start of each input; null scores all of them. The document that reaches the
    limit is cut there, and its bytes count in proportion. The documents of a prepared corpus are shuffled, so its start
    is a fair sample."""
    sequence_length: int | None = None
    """Context of the model in tokens; null means the one used in training."""
    micro_batch_sequences: int = 8
    """Number of windows of text per forward pass."""
    precision: Precision = Precision.auto
    """Precision of the computation. `auto` means bf16 where the device computes it in hardware, and fp32 otherwise."""
    text_field: str = "text"
    """Field of a JSON line, or column of a Parquet file, that holds the text."""
    json: bool = False
    """Print the result as JSON on the last line of stdout."""

    def __post_init__(self) -> None:
        if self.input != MISSING and not self.input:
            raise ConfigError("input=[] is empty; give input=[PATH,...]")
        for name in ("max_documents", "max_tokens", "sequence_length", "micro_batch_sequences"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be greater than 0")


@dataclass
class Work:
    """The documents of all inputs, and the size of their text in bytes, for the progress display."""

    documents: list[Iterator[TokenDocument]]
    text_bytes: int


def main(config: EvalConfig) -> None:
    """Load the model, score every document, and print the table."""
    from data_tools.progress import stage
    from pretrain.data.masking import Masking
    from pretrain.device import own_device
    from pretrain.evaluate.heldout import score_documents
    from pretrain.model.kernels import DTYPES
    from pretrain.trained import load_trained, precision_on

    for entry in config.input:
        if not Path(entry).expanduser().exists():
            raise ConfigError(f"input={entry} does not exist")
    trained = load_trained(
        config.run_dir, config.step, config.checkpoint_target, which=config.which, weights=config.weights
    )
    masking = None
    if not trained.config.causal:
        masking = Masking.of(trained.config.mlm, trained.config.seed, trained.tokenizer)
    work = find_documents(config, trained)
    device = own_device()
    precision = precision_on(device, config.precision)
    documents = (document for documents in work.documents for document in documents)
    with stage("evaluating", work.text_bytes) as progress:
        result = score_documents(
            trained.decoder(device, DTYPES[precision]),
            documents,
            sequence_length=config.sequence_length or trained.sequence_length,
            micro_batch_sequences=config.micro_batch_sequences,
            device=device,
            progress=lambda document: progress.advance(document.text_bytes),
            masking=masking,
        )
    print_table(result, trained, config, precision)
    if config.json:
        print(json.dumps(as_json(result, trained, config, precision)))


def find_documents(config: EvalConfig, trained: TrainedModel) -> Work:
    """The documents to score, tokenized while they are read. Raises ConfigError for an empty or unsuitable input."""
    from pretrain.evaluate.heldout import first_tokens

    work = Work([], 0)
    for entry in config.input:
        path = Path(entry).expanduser()
        corpus = path / MANIFEST if (path / MANIFEST).is_file() else path
        documents, text_bytes = (
            read_corpus(corpus, trained) if corpus.name == MANIFEST else read_text(entry, config, trained)
        )
        documents = islice(documents, config.max_documents)
        if config.max_tokens is not None:
            documents = first_tokens(documents, config.max_tokens)
        work.documents.append(documents)
        work.text_bytes += text_bytes
    return work


def read_corpus(manifest: Path, trained: TrainedModel) -> tuple[Iterator[TokenDocument], int]:
    """The documents of a prepared corpus and the size of their text."""
    from pretrain.corpus.shards import Corpus
    from pretrain.evaluate.heldout import corpus_documents

    corpus = Corpus(manifest)
    made_with = (corpus.manifest.tokenizer_sha256, corpus.manifest.vocab_size)
    if made_with != (trained.tokenizer.sha256, trained.tokenizer.vocab_size):
        raise ConfigError(
            f"input={manifest} was prepared with a different tokenizer than run_dir was trained with; "
            "give the text itself, or prepare it with tokenizer.path=run_dir"
        )
    return corpus_documents(corpus), sum(source.text_bytes for source in corpus.manifest.sources)


def read_text(entry: str, config: EvalConfig, trained: TrainedModel) -> tuple[Iterator[TokenDocument], int]:
    """The documents of text files and the size of their text."""
    import numpy as np

    from data_tools.config import PrepareConfig
    from data_tools.reading.sources import Document, find_files, read_documents
    from data_tools.text import clean
    from pretrain.evaluate.heldout import TokenDocument

    options = PrepareConfig(input=[entry], output="", text_field=config.text_field, max_chars=MAX_CHARS)

    def texts() -> Iterator[tuple[str, str]]:
        for file in find_files(options):
            for document in read_documents(file, options):
                if not isinstance(document, Document):
                    raise ConfigError(f"input={entry}: {document.where} ({document.reason})")
                if text := clean(document.text):  # the form in which the model has seen text
                    yield document.source, text

    found = list(islice(texts(), config.max_documents))
    if not found:
        raise ConfigError(f"input={entry} holds no text")
    documents = (
        TokenDocument(source, np.array(trained.tokenizer.encode_document(text)), len(text.encode()))
        for source, text in found
    )
    return documents, sum(len(text.encode()) for _, text in found)


def print_table(
    result: HeldOutResult, trained: TrainedModel, config: EvalConfig, precision: Precision
) -> None:
    """The scores of each source, and of all together."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    title = f"step {trained.step}, {trained.tokens_seen:,} tokens seen, computed in {precision.value}"
    bounds = {"documents": config.max_documents, "tokens": config.max_tokens}
    given = [f"{bound:,} {unit}" for unit, bound in bounds.items() if bound is not None]
    caption = f"of each input at most {' and '.join(given)}" if given else None
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    table.add_column("source")
    for name in ("loss", "perplexity", "bits/byte", "tokens", "bytes", "documents"):
        table.add_column(name, justify="right")
    rows = list(result.sources.items())
    for number, (name, scores) in enumerate([*rows, ("all", result.overall)], 1):
        bits = "" if scores.bits_per_byte is None else f"{scores.bits_per_byte:.4f}"
        numbers = (f"{scores.loss:.4f}", f"{scores.perplexity:,.2f}", bits)
        counts = (f"{scores.tokens:,}", f"{scores.text_bytes:,}", f"{scores.documents:,}")
        table.add_row(Text(visible(name, limit=200)), *numbers, *counts, end_section=number == len(rows))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.width = max(
        console.width, console.measure(table).minimum
    )  # a narrow terminal wraps lines; nothing is cut
    console.print(table)


def as_json(
    result: HeldOutResult, trained: TrainedModel, config: EvalConfig, precision: Precision
) -> dict[str, object]:
    """The content of the last line of output with json=true."""
    return {
        "run_dir": config.run_dir,
        "step": trained.step,
        "tokens_seen": trained.tokens_seen,
        "precision": precision.value,
        "max_documents": config.max_documents,
        "max_tokens": config.max_tokens,
        **result.overall.as_dict(),
        "sources": {name: scores.as_dict() for name, scores in result.sources.items()},
    }


if __name__ == "__main__":
    sys.argv[1:] = ["json=true" if argument == "--json" else argument for argument in sys.argv[1:]]
    run_command(EvalConfig, main, doc=__doc__)
