"""Export a model for other programs: `python launch/export.py run_dir=DIR output=DIR`

The folder has config.json, safetensors and a tokenizer for a class of `transformers`; with format=gguf it has one file
for llama.cpp. A README.md describes the model. The folder appears only after other programs have read it and produced
the same logits and tokens; docs/exporting.md says which. A model may be larger than memory.
Exit codes: 0 done, 1 a check or the writing failed and nothing was published, 2 the input or configuration is wrong.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretrain.command import begin

begin(__name__, interrupted="nothing was written")

from omegaconf import MISSING

from pretrain.config import Weights, Which, run_command
from pretrain.config.texts import ManifestText, PathText
from pretrain.convert.form import Format, Stored, form_of
from pretrain.errors import ConfigError
from pretrain.printing import visible

if TYPE_CHECKING:
    from pretrain.convert.export import Exported
    from pretrain.corpus.shards import Corpus
    from pretrain.trained import TrainedModel


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """What to export, and to which folder."""

    run_dir: PathText = MISSING
    """Folder of the run."""
    output: PathText = MISSING
    """Folder to write."""
    step: int | None = None
    """Step of the checkpoint to use; null means the one that `which` says."""
    which: Which = Which.newest
    """Checkpoint to use where no step is given: `newest`, or `best`, the one with the lowest held-out loss."""
    weights: Weights = Weights.trained
    """Weights to use: `trained`, or `ema`, their moving average (ema.decay)."""
    checkpoint_target: PathText | None = None
    """URL of the run's checkpoints, if they are at a URL. A URL that the run folder names is opened only if it is also
    given here."""
    format: Format = Format.hugging_face
    """A Hugging Face folder, or a GGUF file for llama.cpp and the like."""
    dtype: Stored = Stored.auto
    """Type of the exported weights. `auto` means the precision in which the run last computed, and fp16 in GGUF; fp32
    exports the master weights; int8 has one scale for each row (torchao), in GGUF for each 32 values (Q8_0)."""
    heldout: ManifestText | None = None
    """Manifest of a prepared held-out corpus on which the loss that the form costs is measured; null means that of the
    run, if it is on this machine."""
    heldout_tokens: int = 8192
    """Number of tokens of the held-out corpus that are scored, from its start; 0 measures no loss."""
    device_watts: float | None = None
    """Power of the device of one rank in watts, for the estimate of energy in README.md; null takes the maximum in the
    data sheet of a known GPU."""
    adapters: bool = False
    """Write only the adapters of a LoRA run, in fp32 and peft's format, instead of the model with the adapters
    merged in."""
    overwrite: bool = False
    """Replace the content of `output`, if it has any."""

    def __post_init__(self) -> None:
        if self.heldout_tokens < 0:
            raise ConfigError(f"heldout_tokens={self.heldout_tokens} is negative; allowed: 0 or more")
        if self.device_watts is not None and not self.device_watts > 0:
            raise ConfigError(f"device_watts={self.device_watts} must be greater than 0")
        if self.adapters and self.dtype is not Stored.auto:
            raise ConfigError(
                f"dtype={self.dtype.value} has no effect with adapters=true, which writes fp32; leave it out"
            )


def main(config: ExportConfig) -> None:
    """Load the model, export and check it, and print how well the exported model agrees."""
    from data_tools.progress import stage, waiting
    from pretrain.convert.hugging_face import check_output, require_transformers

    require_transformers()
    output = Path(config.output).expanduser()
    check_output(output, config.overwrite)

    from contextlib import ExitStack

    from pretrain.convert.export import export_form, written_bytes
    from pretrain.trained import open_trained

    with ExitStack() as stack:
        with waiting(f"reading {config.run_dir}"):
            trained = stack.enter_context(
                open_trained(
                    config.run_dir,
                    config.step,
                    config.checkpoint_target,
                    which=config.which,
                    weights=config.weights,
                )
            )
        if config.adapters:
            export_adapters_only(config, trained, output)
            return
        form = form_of(config.format, config.dtype, trained.precision)
        heldout = heldout_corpus(config, trained)
        name = f"writing step {trained.step} as {form.name}, and checking it"
        with stage(name, written_bytes(trained, form)) as progress:
            exported = export_form(
                trained,
                Path(config.run_dir),
                output,
                form,
                heldout=heldout,
                heldout_tokens=config.heldout_tokens,
                device_watts=config.device_watts,
                overwrite=config.overwrite,
                progress=progress.advance,
            )
    print_result(exported)
    print(
        f"exported step {trained.step} ({trained.tokens_seen:,} tokens seen) to {output}, "
        f"{exported.n_bytes / 1e6:,.1f} MB"
    )


def export_adapters_only(config: ExportConfig, trained: TrainedModel, output: Path) -> None:
    """Write the adapters in the format of peft, and print how well they agree with the merged model."""
    from data_tools.progress import waiting
    from pretrain.convert.adapters import export_adapters

    with waiting(f"writing the adapters of step {trained.step}, and checking them"):
        found = export_adapters(
            trained, config.run_dir, output, target=config.checkpoint_target, overwrite=config.overwrite
        )
    print(
        f"exported {found.adapters} adapters of step {trained.step} to {output}; peft, with them on the base, "
        f"agrees with the merged model: logits differ by at most {found.parity.max_difference:.2g} "
        f"(allowed {found.parity.tolerance:.2g})"
    )


def heldout_corpus(config: ExportConfig, trained: TrainedModel) -> Corpus | None:
    """The held-out corpus to score; None where there is none. Raises ConfigError where the given one is unusable."""
    from pretrain.corpus.shards import Corpus
    from pretrain.remote import is_url

    if config.heldout_tokens == 0:
        return None
    if config.heldout is not None:
        return Corpus(config.heldout)
    evaluation = trained.config.evaluation
    of_run = evaluation.corpora.get(evaluation.decides or "")
    if of_run is None or is_url(of_run) or not Path(of_run).is_file():
        return None  # a URL that only the run names is not opened
    return Corpus(of_run)


def print_result(exported: Exported) -> None:
    """What was checked, and what the form costs."""
    parity, loss, name = exported.parity, exported.loss, exported.form.name
    print(f"weights as read back differ by at most {exported.weight_error:.2g} of their size")
    if parity is not None:
        print(
            f"transformers agrees on {parity.tokens} tokens: logits differ by at most {parity.max_difference:.2g} "
            f"(allowed {parity.tolerance:.2g}), the most probable token is the same at {parity.argmax_agreement:.1%}; "
            "the tokenizer agrees"
        )
    else:
        print(
            "the logits of transformers were not compared: it reads this form whole, and the model is large"
        )
    if loss is not None:
        print(
            f"held-out loss as {name}: {loss.exported:.5f} nats per predicted token, {loss.cost:+.5f} against the "
            f"checkpoint ({loss.tokens:,} tokens of {visible(loss.text)})"
        )
    else:
        print(f"what {name} costs was not measured; give heldout=MANIFEST of a prepared held-out corpus")


if __name__ == "__main__":
    run_command(ExportConfig, main, doc=__doc__)
