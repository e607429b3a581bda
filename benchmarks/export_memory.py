"""Measure how much memory an export takes: `python benchmarks/export_memory.py --model 7b --out DIR`

Writes a checkpoint of a model of conf/model in this program's own format, with random weights and without training, and
exports it in each of the given forms by launch/export.py, one after the other; each export is deleted after it has been
measured. Prints for each: the size of the checkpoint and of the export, the time, and the peak of the process's
resident memory (VmHWM, which counts pages of mapped files) with the largest anonymous part of it (RssAnon), sampled
every 0.1 s. The disk needs room for the checkpoint (4 bytes per parameter) and for one export.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer

from pretrain.checkpoint.folder import COMPLETE, FORMAT_VERSION, STATE, checkpoint_path, hash_file
from pretrain.checkpoint.state import FileEntry
from pretrain.config import TrainConfig, load_config, to_dict
from pretrain.convert.hugging_face import parameter_shapes
from pretrain.corpus.tokenizer import Tokenizer

FILE_BYTES = 1 << 30
FORMS = ("hugging_face:bf16", "hugging_face:int8", "gguf:fp16", "gguf:int8")
EVERY_S = 0.1
VOCAB_SIZE = 32_000


def train_tokenizer(path: Path) -> Tokenizer:
    """A sentencepiece model of this project's documentation."""
    texts = (file.read_text() for file in sorted((ROOT / "docs").glob("*.md")))
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=2000,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        pad_id=3,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return Tokenizer.trusted(path)


def write_checkpoint(run_dir: Path, model: str, sequence_length: int, tokenizer: Tokenizer) -> int:
    """Write a run folder with random weights, one file in memory at a time. Returns the checkpoint's bytes."""
    given = [f"model={model}", f"run_dir={run_dir}", "total_steps=1", "data.manifest=none"]
    config = load_config(TrainConfig, [*given, f"data.sequence_length={sequence_length}"], "config")
    config.model.vocab_size = max(VOCAB_SIZE, -(-tokenizer.vocab_size // 64) * 64)
    folder = checkpoint_path(run_dir, 1)
    folder.mkdir(parents=True)
    (run_dir / tokenizer.file_name).write_bytes(tokenizer.content)
    shapes = parameter_shapes(config.model)
    entries = {}
    for number, names in enumerate(_files(shapes), 1):
        generator = torch.Generator().manual_seed(number)
        file = folder / f"shard-00001-model-{number:05d}.safetensors"
        save_file({f"weight.{name}": _weight(shapes[name], generator) for name in names}, file)
        entries[file.name] = FileEntry(bytes=file.stat().st_size, xxh3_128=hash_file(file))
    state = {
        "format_version": FORMAT_VERSION,
        "step": 1,
        "tokens_seen": 0,
        "samples_seen": 0,
        "optimizer_step": 0,
        "sequence_length": sequence_length,
        "order": {},
        "tokenizer_sha256": tokenizer.sha256,
        "attempt": 0,
        "run_id": "noresume",
        "wandb_run_id": "noresume",
        "world_size": 1,
        "precision": "bf16",
        "config": to_dict(config),
        "tensors": {name: list(shape) for name, shape in shapes.items()},
    }
    (folder / STATE).write_text(json.dumps(state))
    entries[STATE] = FileEntry(bytes=(folder / STATE).stat().st_size, xxh3_128=hash_file(folder / STATE))
    listed = {name: asdict(entry) for name, entry in entries.items()}
    (folder / COMPLETE).write_text(json.dumps({"format_version": FORMAT_VERSION, "files": listed}))
    return sum(entry.bytes for entry in entries.values())


def _files(shapes: dict[str, torch.Size]) -> Iterator[list[str]]:
    """The names of the weights in each file."""
    names: list[str] = []
    for name in shapes:
        names.append(name)
        if 4 * sum(shapes[one].numel() for one in names) >= FILE_BYTES:
            yield names
            names = []
    if names:
        yield names


def _weight(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape)
    return torch.randn(shape.numel(), generator=generator).mul_(0.02)


def measure(command: list[str]) -> tuple[float, int, int]:
    """Run a command. Returns its time in seconds, and the peaks of VmHWM and RssAnon in bytes."""
    start, peaks = time.monotonic(), {"VmHWM": 0, "RssAnon": 0}
    process = subprocess.Popen(command, cwd=ROOT)
    while process.poll() is None:
        with suppress(OSError):  # it has just ended
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in peaks:
                    peaks[name] = max(peaks[name], int(value.split()[0]) * 1024)
        time.sleep(EVERY_S)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
    return time.monotonic() - start, peaks["VmHWM"], peaks["RssAnon"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="7b", help="name of a model in conf/model")
    parser.add_argument("--out", type=Path, required=True, help="folder to work in; it must not exist")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), help="FORMAT:DTYPE, one or more")
    parser.add_argument("--sequence-length", type=int, default=2048)
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    try:
        tokenizer = train_tokenizer(options.out / "tokenizer.model")
        n_bytes = write_checkpoint(options.out / "run", options.model, options.sequence_length, tokenizer)
        print(f"checkpoint: {n_bytes / 2**30:.1f} GiB", flush=True)
        for form in options.forms:
            format, _, dtype = form.partition(":")
            output = options.out / "exported"
            command = [
                sys.executable,
                "launch/export.py",
                f"run_dir={options.out / 'run'}",
                f"output={output}",
            ]
            time_s, peak, anonymous = measure(
                [*command, f"format={format}", f"dtype={dtype}", "heldout_tokens=0"]
            )
            size = sum(path.stat().st_size for path in output.iterdir())
            print(
                f"{form}: {size / 2**30:.1f} GiB in {time_s:.0f} s, VmHWM {peak / 2**30:.2f} GiB, of it at most "
                f"{anonymous / 2**30:.2f} GiB anonymous",
                flush=True,
            )
            shutil.rmtree(output)
    finally:
        shutil.rmtree(options.out)


if __name__ == "__main__":
    main()
