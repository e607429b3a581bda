"""Average the weights of several checkpoints: `python launch/average.py run_dir=DIR output=DIR last=5`

Writes a folder that launch/eval.py, generate.py and export.py take as run_dir=, and launch/train.py as init_from=. Give
the steps with steps=[1000,1100] or their number, counted from the end, with last=. Then it prints the loss on held-out
text of the mean, of the last of the checkpoints and, if the run has one, of its moving average. Exit codes: 0 done, 1
writing failed and nothing was published, 2 the configuration is wrong.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretrain.command import begin

begin(__name__, interrupted="nothing was written")

from omegaconf import MISSING

from pretrain.config import Precision, Weights, run_command
from pretrain.config.texts import ManifestText
from pretrain.errors import ConfigError
from pretrain.printing import visible
from pretrain.remote import is_url

if TYPE_CHECKING:
    from pretrain.corpus.shards import Corpus
    from pretrain.trained import TrainedModel


@dataclass(kw_only=True, slots=True)
class AverageConfig:
    """What to average, and where to write it."""

    run_dir: str = MISSING
    """Folder of the run."""
    output: str = MISSING
    """Folder to write."""
    last: int | None = None
    """Number of checkpoints, counted from the newest."""
    steps: list[int] = field(default_factory=list)
    """Steps of the checkpoints, instead of `last`."""
    checkpoint_target: str | None = None
    """URL of the run's checkpoints, if they are at a URL. A URL that the run folder names is opened only if it is also
    given here."""
    heldout: ManifestText | None = None
    """Manifest of the held-out corpus; null means the one that decided in the run (evaluation.by), if it is on a
    disk."""
    max_tokens: int = 100_000
    """Number of tokens of held-out text, taken from its start; 0 evaluates nothing."""
    overwrite: bool = False
    """Replace the content of `output`, if it has any."""

    def __post_init__(self) -> None:
        if (self.last is None) == (not self.steps):
            raise ConfigError(f"last={self.last} and steps={self.steps}: give exactly one of them")
        if self.last is not None and self.last < 2:
            raise ConfigError(f"last={self.last} must be 2 or more")
        if self.steps and (len(set(self.steps)) != len(self.steps) or len(self.steps) < 2):
            raise ConfigError(f"steps={self.steps} must name two or more different steps")
        if self.max_tokens < 0:
            raise ConfigError(f"max_tokens={self.max_tokens} is negative; allowed: 0 or more")


def main(config: AverageConfig) -> None:
    """Find the checkpoints, average them, and write the result."""
    from data_tools.progress import waiting
    from pretrain.convert.averaging import average, last_steps
    from pretrain.convert.hugging_face import check_output

    output = Path(config.output).expanduser()
    check_output(output, config.overwrite)
    steps = sorted(config.steps)
    if config.last is not None:
        steps = last_steps(config.run_dir, config.last, config.checkpoint_target)
    with waiting(f"averaging {len(steps)} checkpoints"):
        average(config.run_dir, steps, output, config.checkpoint_target)
    print(f"wrote the mean of the steps {', '.join(map(str, steps))} to {output}")
    if config.max_tokens:
        compare(config, output, steps[-1])


def compare(config: AverageConfig, output: Path, last: int) -> None:
    """Print the held-out loss of the mean, of the last checkpoint and of its moving average, if there is such text.

    One model at a time is in memory.
    """
    from pretrain.trained import open_trained

    with open_trained(config.run_dir, last, config.checkpoint_target) as trained:
        corpus = heldout_of(config, trained)
        has_ema = trained.has_ema
    if corpus is None:
        return
    with open_trained(output) as mean:
        print_loss("mean", mean, corpus, config.max_tokens)
    for name, weights in ((f"step {last}", Weights.trained), (f"step {last}, moving average", Weights.ema)):
        if weights is Weights.trained or has_ema:
            with open_trained(config.run_dir, last, config.checkpoint_target, weights=weights) as trained:
                print_loss(name, trained, corpus, config.max_tokens)


def print_loss(name: str, trained: TrainedModel, corpus: Corpus, max_tokens: int) -> None:
    """Evaluate a model on the first tokens of a held-out corpus, and print its loss."""
    from data_tools.progress import waiting
    from pretrain.device import own_device
    from pretrain.evaluate.heldout import corpus_documents, first_tokens, score_documents
    from pretrain.model.kernels import DTYPES
    from pretrain.trained import precision_on

    device = own_device()
    with waiting(f"evaluating {name}"):
        found = score_documents(
            trained.decoder(device, DTYPES[precision_on(device, Precision.auto)]),
            first_tokens(corpus_documents(corpus), max_tokens),
            sequence_length=trained.sequence_length,
            micro_batch_sequences=8,
            device=device,
        ).overall
    print(
        f"{name}: held-out loss {found.loss:.4f}, {found.bits_per_byte:.4f} bits per byte, {found.tokens:,} tokens"
    )


def heldout_of(config: AverageConfig, trained: TrainedModel) -> Corpus | None:
    """The held-out corpus that is given, or else the run's own; None with a line that says why there is none.

    A URL that only the run folder names is not opened.
    """
    from pretrain.corpus.shards import Corpus

    evaluation = trained.config.evaluation
    path = config.heldout
    if path is None and evaluation.decides is not None:
        path = evaluation.corpora[evaluation.decides]
        if is_url(path) or not Path(path).is_file():
            print(f"not evaluated: {visible(path)} is not on this disk; give heldout=DIR")
            return None
    if path is None:
        print("not evaluated: the run has no held-out text; give heldout=DIR")
        return None
    corpus = Corpus(path)
    if corpus.manifest.tokenizer_sha256 != trained.tokenizer.sha256:
        raise ConfigError(
            f"heldout={path} was prepared with a different tokenizer than run_dir was trained with"
        )
    return corpus


if __name__ == "__main__":
    run_command(AverageConfig, main, doc=__doc__)
