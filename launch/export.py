"""Export a model to the Hugging Face format: `python launch/export.py run_dir=DIR output=DIR`

The folder has config.json, safetensors and a tokenizer, for LlamaForCausalLM or, with QK-norm, Qwen3ForCausalLM; after
training with objective=mlm, for EuroBertForMaskedLM or, with QK-norm, a bidirectional Qwen3ForCausalLM. It appears only
after `transformers` has loaded it and produced the same logits and tokens. Exit codes: 0 done, 1 the check or the
writing failed and nothing was published, 2 the input or configuration is wrong.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretrain.command import begin

begin(__name__, interrupted="nothing was written")

from omegaconf import MISSING

from pretrain.config import Precision, Weights, Which, run_command
from pretrain.config.texts import PathText
from pretrain.errors import ConfigError


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
    dtype: Precision = Precision.auto
    """Type of the exported weights. `auto` means the precision in which the run last computed; fp32 exports the master
    weights."""
    adapters: bool = False
    """Write only the adapters of a LoRA run, in fp32 and peft's format, instead of the model with the adapters
    merged in."""
    overwrite: bool = False
    """Replace the content of `output`, if it has any."""

    def __post_init__(self) -> None:
        if self.adapters and self.dtype is not Precision.auto:
            raise ConfigError(
                f"dtype={self.dtype.value} has no effect with adapters=true, which writes fp32; leave it out"
            )


def main(config: ExportConfig) -> None:
    """Load the model, export and check it, and print how well the exported model agrees."""
    from data_tools.progress import stage, waiting
    from pretrain.convert.hugging_face import check_output, export, exported_bytes, require_transformers

    require_transformers()
    output = Path(config.output).expanduser()
    check_output(output, config.overwrite)

    from pretrain.model.kernels import DTYPES
    from pretrain.trained import load_trained

    with waiting(f"reading {config.run_dir}"):
        trained = load_trained(
            config.run_dir, config.step, config.checkpoint_target, which=config.which, weights=config.weights
        )
    if config.adapters:
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
        return
    dtype = trained.precision if config.dtype is Precision.auto else config.dtype
    name = f"writing step {trained.step} as {dtype.value}, and checking it"
    with stage(name, exported_bytes(trained, DTYPES[dtype])) as progress:
        parity = export(
            trained, output, dtype=DTYPES[dtype], overwrite=config.overwrite, progress=progress.advance
        )
    print(
        f"transformers agrees on {parity.tokens} tokens: logits differ by at most {parity.max_difference:.2g} "
        f"(allowed {parity.tolerance:.2g}), the most probable token is the same at {parity.argmax_agreement:.1%}; "
        "the tokenizer agrees"
    )
    n_bytes = sum(path.stat().st_size for path in output.iterdir())
    print(
        f"exported step {trained.step} ({trained.tokens_seen:,} tokens seen) to {output}, {n_bytes / 1e6:,.1f} MB"
    )


if __name__ == "__main__":
    run_command(ExportConfig, main, doc=__doc__)
