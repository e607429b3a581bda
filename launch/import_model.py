"""Import a Hugging Face model: `python launch/import_model.py input=HF_DIR output=DIR`

Reads config.json, safetensors and the tokenizer of a Llama, Mistral, SmolLM, Qwen2 or Qwen3 model from a local folder,
and writes DIR, which launch/train.py takes as init_from=DIR, and launch/eval.py, generate.py and export.py as
run_dir=DIR. It appears only after `transformers` has computed the same logits from HF_DIR. Exit codes: 0 done, 1 the
check or the writing failed and nothing was published, 2 the input or configuration is wrong.
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

from pretrain.config import run_command
from pretrain.config.texts import PathText
from pretrain.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class ImportConfig:
    """What to import, and to which folder."""

    input: PathText = MISSING
    """Folder with config.json, the weights and the tokenizer."""
    output: PathText = MISSING
    """Folder to write."""
    bos_token: str | None = None
    """Token that begins a document; null takes it from tokenizer_config.json, as data_tools.prepare does."""
    eos_token: str | None = None
    """Token that ends a document; null takes it from tokenizer_config.json, as data_tools.prepare does."""
    overwrite: bool = False
    """Replace the content of `output`, if it has any."""


def main(config: ImportConfig) -> None:
    """Import and check the model, and print how to train it."""
    from data_tools.building.import_tokenizer import import_tokenizer
    from data_tools.config import TokenizerConfig
    from data_tools.progress import waiting
    from pretrain.convert.hugging_face import check_output, require_transformers

    require_transformers()
    folder, output = Path(config.input).expanduser(), Path(config.output).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"input={config.input} is not a folder; download the model first")
    check_output(output, config.overwrite)
    options = TokenizerConfig(path=str(folder), bos_token=config.bos_token, eos_token=config.eos_token)
    tokenizer = import_tokenizer(options)

    from pretrain.convert.hugging_face_import import import_model, model_words

    with waiting(f"importing {folder}"):
        imported, parity = import_model(folder, tokenizer, output)
    print(
        f"transformers agrees on {parity.tokens} tokens: logits differ by at most {parity.max_difference:.2g} "
        f"(allowed {parity.tolerance:.2g})"
    )
    shape = model_words(imported.config.model)
    print(f"imported to {output}. Prepare text with tokenizer.path={output}, and train from this model with:")
    print(f"init_from={output} {' '.join(shape)}")


if __name__ == "__main__":
    run_command(ImportConfig, main, doc=__doc__)
