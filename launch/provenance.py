"""Trace the training data: `python launch/provenance.py run_dir=DIR step=N [rank=R]`, or `run_dir=DIR document=ID`

step=N prints the documents in each sequence of a step, with their text. document=ID prints the steps that read a
document. Both need only the newest checkpoint and the corpora, for a run of any length. With json=true the last line
on stdout is JSON. Exit codes: 0 done, 1 a corpus is damaged, 2 an argument or the run is wrong.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretrain.command import begin

begin(__name__)

from omegaconf import MISSING

from pretrain.config import run_command
from pretrain.config.texts import ManifestText, PathText, VerbatimText
from pretrain.errors import ConfigError
from pretrain.printing import visible

if TYPE_CHECKING:
    from pretrain.corpus.tokenizer import Tokenizer
    from pretrain.data.history import Piece, ReadHistory


@dataclass(kw_only=True, slots=True)
class ProvenanceConfig:
    """What to look up."""

    run_dir: PathText = MISSING
    """Folder of the run."""
    step: int | None = None
    """Number of the optimizer update, counted from 1. Give this or `document`."""
    rank: int | None = None
    """Show only what this rank read; null shows the whole batch."""
    world_size: int | None = None
    """Number of ranks at that step; null means the number of ranks that wrote the newest checkpoint."""
    document: VerbatimText | None = None
    """Id of the document to look up."""
    max_chars: int = 300
    """Number of characters that are printed of each piece of text."""
    manifests: list[ManifestText] = field(default_factory=list)
    """Paths or URLs of the corpora's manifest.json files, in the order of the run's sources. Required where the run
    read a corpus from a URL."""
    checkpoint_target: PathText | None = None
    """URL of the run's checkpoints, if they are at a URL. A URL that the run folder names is opened only if it is also
    given here."""
    json: bool = False
    """Print the result as JSON on the last line of stdout."""

    def check(self) -> None:
        """Raise ConfigError unless exactly one of `step` and `document` is given, and for a negative limit."""
        if (self.step is None) == (self.document is None):
            raise ConfigError(f"step={self.step} and document={self.document}: give exactly one of them")
        if self.max_chars < 0:
            raise ConfigError(f"max_chars={self.max_chars} is negative; allowed: 0 or more")


def main(config: ProvenanceConfig) -> None:
    """Look up the step or the document, and print what was found."""
    config.check()
    from pretrain.corpus.tokenizer import Tokenizer, tokenizer_in
    from pretrain.data.history import ReadHistory

    run_dir = Path(config.run_dir)
    history, tokenizer_sha256 = ReadHistory.of_run(run_dir, config.manifests, config.checkpoint_target)
    tokenizer = Tokenizer(tokenizer_in(run_dir), tokenizer_sha256)
    found = _document(config, history, tokenizer) if config.document else _step(config, history, tokenizer)
    if config.json:
        # The escapes of `visible` are valid JSON for the same values.
        print(visible(json.dumps(found, ensure_ascii=False)))


def _step(config: ProvenanceConfig, history: ReadHistory, tokenizer: Tokenizer) -> dict[str, Any]:
    assert config.step is not None
    sequences = history.read_in(config.step, config.rank, config.world_size)
    values = []
    for read in sequences:
        pieces = []
        print(f"sample {read.sample}, epoch {read.epoch}")
        for piece in read.pieces:
            text = history.text(piece, tokenizer)
            print(f"  {_name(piece)}")
            _print_text(text, config.max_chars)
            pieces.append(asdict(piece) | {"text": text[: config.max_chars]})
        values.append({"sample": read.sample, "epoch": read.epoch, "pieces": pieces})
    return {"step": config.step, "rank": config.rank, "sequences": values}


def _document(config: ProvenanceConfig, history: ReadHistory, tokenizer: Tokenizer) -> dict[str, Any]:
    assert config.document is not None
    reads = history.reads_of(config.document)
    steps = sorted({read.step for read in reads if read.step is not None})
    shown = ", ".join(map(str, steps)) or "none"
    print(f"{visible(config.document)}: read at steps {shown} of the {history.step} in the newest checkpoint")
    for read in reads:
        where = f"step {read.step}" if read.step is not None else "skipped by a rollback"
        print(f"{where}, sample {read.sample}, epoch {read.epoch}: {_name(read.piece)}")
        _print_text(history.text(read.piece, tokenizer), config.max_chars)
    return {"document": config.document, "steps": steps, "reads": [asdict(read) for read in reads]}


def _name(piece: Piece) -> str:
    return visible(
        f"{piece.document} ({piece.corpus}/{piece.source}), tokens {piece.first_token} to "
        f"{piece.first_token + piece.n_tokens - 1}"
    )


def _print_text(text: str, max_chars: int) -> None:
    shown = text[:max_chars] + ("…" if len(text) > max_chars else "")
    for line in shown.splitlines():
        print(f"    | {visible(line, keep=chr(9))}")


if __name__ == "__main__":
    run_command(ProvenanceConfig, main, doc=__doc__)
