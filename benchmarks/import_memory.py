"""Measure how much memory an import takes: `python benchmarks/import_memory.py --model 1b --out DIR`

Writes a Hugging Face folder of a model of conf/model in bf16 with random weights, in files of at most 1 GB, and imports
it with launch/import_model.py, which compares the logits with those of transformers. Prints the size of the folder, the
time, and the peak of the process's resident memory (VmHWM, which counts pages of mapped files) with the largest
anonymous part of it (RssAnon), sampled every 0.1 s. The disk needs room for the folder (2 bytes per parameter) and for
the imported weights (4).
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from safetensors.torch import save_file

from benchmarks.export_memory import VOCAB_SIZE, measure, train_tokenizer
from pretrain.config import TrainConfig, load_config
from pretrain.convert.hugging_face import (
    MAX_SHARD_BYTES,
    hugging_face_config,
    hugging_face_names,
    parameter_shapes,
    write_index,
)


def write_folder(folder: Path, model: str, sequence_length: int) -> int:
    """Write a Hugging Face folder with random weights, one file in memory at a time. Returns the bytes of weights."""
    folder.mkdir(parents=True)
    tokenizer = train_tokenizer(folder / "tokenizer.model")
    given = ["run_dir=unused", "total_steps=1", "data.manifest=none", f"model={model}"]
    config = load_config(TrainConfig, [*given, f"data.sequence_length={sequence_length}"], "config")
    config.model.vocab_size = max(VOCAB_SIZE, -(-tokenizer.vocab_size // 64) * 64)
    hugging_face_config(config, tokenizer, torch.bfloat16).save_pretrained(folder)
    names, generator = hugging_face_names(config.model), torch.Generator().manual_seed(0)
    file_of: dict[str, str] = {}
    held: dict[str, torch.Tensor] = {}
    total_bytes = n_files = 0

    def write() -> None:
        name = f"model-{n_files:05d}.safetensors"
        save_file(held, folder / name, {"format": "pt"})
        file_of.update(dict.fromkeys(held, name))

    for ours, shape in parameter_shapes(config.model).items():
        weight = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator).mul_(0.02)
        if sum(one.nbytes for one in held.values()) + weight.nbytes // 2 > MAX_SHARD_BYTES:
            write()
            held, n_files = {}, n_files + 1
        held[names[ours]] = weight.bfloat16()
        total_bytes += weight.nbytes // 2
    write()
    write_index(folder, file_of, total_bytes)
    return total_bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="1b", help="name of a model in conf/model")
    parser.add_argument("--out", type=Path, required=True, help="folder to work in; it must not exist")
    parser.add_argument("--sequence-length", type=int, default=2048)
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    try:
        n_bytes = write_folder(options.out / "folder", options.model, options.sequence_length)
        command = [sys.executable, "launch/import_model.py", f"input={options.out / 'folder'}"]
        time_s, peak, anonymous = measure([*command, f"output={options.out / 'imported'}"])
        print(
            f"{n_bytes / 2**30:.2f} GiB in {time_s:.0f} s, VmHWM {peak / 2**30:.2f} GiB, of it at most "
            f"{anonymous / 2**30:.2f} GiB anonymous",
            flush=True,
        )
    finally:
        shutil.rmtree(options.out)


if __name__ == "__main__":
    main()
