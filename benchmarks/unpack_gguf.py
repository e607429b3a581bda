"""Write a GGUF file of others as a Hugging Face folder in fp32: `python benchmarks/unpack_gguf.py FILE.gguf FOLDER`

launch/import_model.py then takes the folder. So published weights can be tried where only packages that ship such a
file are at hand. `transformers` reads weights, configuration and tokenizer, and multiplies quantized weights out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="the GGUF file")
    parser.add_argument("folder", type=Path, help="folder to write; it must not exist")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    source = {"gguf_file": options.file.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(options.file.parent, dtype=torch.float32, **source)
    config = model.config.to_dict()
    del config["quantization_config"]  # with it, transformers saves no weights
    config["architectures"] = [type(model).__name__]
    (options.folder / "config.json").write_text(json.dumps(config, indent=1))
    head = "lm_head.weight" if config["tie_word_embeddings"] else None
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items() if name != head}
    save_file(weights, options.folder / "model.safetensors", {"format": "pt"})
    AutoTokenizer.from_pretrained(options.file.parent, **source).save_pretrained(options.folder)


if __name__ == "__main__":
    main()
