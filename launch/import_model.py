"""Import a model of another program: `python launch/import_model.py input=FOLDER output=DIR`

FOLDER is a Hugging Face folder (Llama, Mistral, SmolLM, Qwen2 or Qwen3; safetensors or pytorch_model.bin), or a
checkpoint of torch.distributed.checkpoint, DeepSpeed ZeRO, litgpt, Megatron or GPT-NeoX that holds such a model. Where
no file beside a checkpoint describes the model, state it: model.n_layers=24 model.d_model=2048 ... DIR is what
launch/train.py takes as init_from=DIR, and launch/eval.py, generate.py and export.py as run_dir=DIR. It appears only
after `transformers` has computed the same logits. Exit codes: 0 done, 1 the check or the writing failed and nothing
was published, 2 the input or configuration is wrong.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretrain.command import begin

begin(__name__, interrupted="nothing was written")

from omegaconf import MISSING

from pretrain.config import run_command
from pretrain.config.texts import PathText
from pretrain.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class StatedModel:
    """Keys of the model that the user states; null leaves a key to what lies beside the checkpoint."""

    n_layers: int | None = None
    """Number of transformer blocks."""
    d_model: int | None = None
    """Width of the residual stream."""
    n_heads: int | None = None
    """Number of query heads."""
    n_kv_heads: int | None = None
    """Number of key and value heads."""
    d_head: int | None = None
    """Width of one attention head."""
    d_ff: int | None = None
    """Inner width of the feed-forward layer."""
    vocab_size: int | None = None
    """Number of rows of the embedding."""
    rope_theta: float | None = None
    """Base of the rotary position frequencies."""
    norm_eps: float | None = None
    """Epsilon inside RMSNorm."""
    qk_norm: bool | None = None
    """Whether queries and keys are normalized."""
    attention_bias: bool | None = None
    """Whether queries, keys and values have biases."""
    tie_embeddings: bool | None = None
    """Whether the output head is the embedding."""

    def given(self) -> dict[str, Any]:
        """The keys that are not null."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(kw_only=True, slots=True)
class ImportConfig:
    """What to import, and to which folder."""

    input: PathText = MISSING
    """Folder of the model or checkpoint."""
    output: PathText = MISSING
    """Folder to write."""
    tokenizer: PathText | None = None
    """Folder or file of the tokenizer; null means the input folder."""
    model: StatedModel = field(default_factory=StatedModel)
    sequence_length: int | None = None
    """Length in tokens that the model was trained for, where nothing beside the checkpoint states it."""
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
    from pretrain.corpus.tokenizer import TOKENIZER_NAMES

    require_transformers()
    folder, output = Path(config.input).expanduser(), Path(config.output).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"input={config.input} is not a folder; download the model first")
    check_output(output, config.overwrite)
    if config.tokenizer is None and not any((folder / name).is_file() for name in TOKENIZER_NAMES):
        raise ConfigError(f"input={config.input} has no {' or '.join(TOKENIZER_NAMES)}; give tokenizer=PATH")
    from pretrain.convert.foreign_import import import_foreign
    from pretrain.convert.hugging_face_import import import_model, model_words, tokenizer_of_export

    options = TokenizerConfig(
        path=config.tokenizer or str(folder), bos_token=config.bos_token, eos_token=config.eos_token
    )
    is_own = (config.tokenizer, config.bos_token, config.eos_token) == (None, None, None)
    tokenizer = (tokenizer_of_export(folder) if is_own else None) or import_tokenizer(options)
    given = config.model.given()
    with waiting(f"importing {folder}"):
        if any(folder.glob("*.safetensors")):
            stated = {f"model.{key}": value for key, value in given.items()}
            if config.sequence_length is not None:
                stated["sequence_length"] = config.sequence_length
            if stated:
                key = min(stated)
                raise ConfigError(
                    f"{key}={stated[key]} is not used: {folder}/config.json says what the model is"
                )
            model, parity = import_model(folder, tokenizer, output)
        else:
            model, parity = import_foreign(folder, tokenizer, output, given, config.sequence_length)
    print(
        f"transformers agrees on {parity.tokens} tokens: logits differ by at most {parity.max_difference:.2g} "
        f"(allowed {parity.tolerance:.2g})"
    )
    print(f"imported to {output}. Prepare text with tokenizer.path={output}, and train from this model with:")
    print(f"init_from={output} {' '.join(model_words(model))}")


if __name__ == "__main__":
    run_command(ImportConfig, main, doc=__doc__)
