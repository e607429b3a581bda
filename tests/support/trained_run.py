"""Makes a run folder with a real checkpoint and tokenizer in about a second, for tests of programs that read runs."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import sentencepiece
import torch
import torch.distributed as dist

from pretrain.checkpoint import tensors as checkpoint
from pretrain.config import ModelConfig, TrainConfig, load_config, to_dict
from pretrain.corpus.tokenizer import CHECK_TEXT, Tokenizer
from pretrain.corpus.writer import CorpusWriter
from pretrain.distributed import Partition, World
from pretrain.model.decoder import Decoder
from support import ROOT
from support.run_states import run_state

torch.set_num_threads(
    1
)  # more threads gain nothing for such small tensors, and cost much time on a busy machine

TEXTS = [
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in "
    "want of a wife.",
    "道可道,非常道。名可名,非常名。無名天地之始;有名萬物之母。",
    "def fibonacci(n: int) -> list[int]:\n    a, b = 0, 1\n    out = []\n    for _ in range(n):\n"
    "        out.append(a)\n        a, b = b, a + b\n    return out\n",
    "However little known the feelings or views of such a man may be on his first entering a neighborhood, "
    "this truth is so well fixed in the minds of the surrounding families.\n\nIt was 1813; 12,345.67 pounds.",
    "if 0 < x > 1: return '</span>' + '< 0x0A', 0123456789ABCDEF, unk, pad",
]
SMALL = ModelConfig(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48)


def train_tokenizer(
    path: Path, model_type: str = "bpe", vocab_size: int = 400, character_coverage: float = 0.98
) -> Tokenizer:
    """Train a sentencepiece model with this project's settings. By default it writes many characters as bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXTS for line in text.split("\n") if line] * 3),
        model_writer=model,
        model_type=model_type,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=character_coverage,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        control_symbols=["<mask>"],
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return Tokenizer.trusted(path)


def make_run(
    run_dir: Path,
    model: ModelConfig = SMALL,
    *,
    step: int = 3,
    sequence_length: int = 64,
    objective: str = "causal",
) -> Decoder:
    """Write a run folder like that of a training run. Returns its model, in which no two tensors are equal."""
    run_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(run_dir / "tokenizer.model")
    if model.vocab_size is None:
        model.vocab_size = -(-tokenizer.vocab_size // 64) * 64
    config = load_config(
        TrainConfig,
        [
            f"run_dir={run_dir}",
            "total_steps=3",
            "data.manifest=unused",
            f"data.sequence_length={sequence_length}",
            f"objective={objective}",
        ],
        "config",
    )
    config.model = model
    decoder = Decoder(model, seed=step, causal=config.causal)
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for weight in decoder.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
            else:  # gives each norm different weights
                weight.copy_(0.5 + torch.rand(weight.shape, generator=generator))
    _save(run_dir, config, decoder, tokenizer, step)
    return decoder.eval()


def script(name: str) -> ModuleType:
    """A script of launch/ as a module, so that tests can call it in their own process."""
    spec = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(
    name: str, *arguments: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script of launch/ as a user would. `env` is added to the environment."""
    command = [sys.executable, str(ROOT / "launch" / f"{name}.py"), *arguments]
    variables = {**os.environ, **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=variables)


def _save(run_dir: Path, config: TrainConfig, decoder: Decoder, tokenizer: Tokenizer, step: int) -> None:
    weights = {name: p.detach() for name, p in decoder.named_parameters()}
    state = run_state(
        step,
        {name: weight.shape for name, weight in weights.items()},
        tokens_seen=step * config.global_batch_sequences * config.data.sequence_length,
        sequence_length=config.data.sequence_length,
        precision="fp32",
        tokenizer_sha256=tokenizer.sha256,
        config=json.loads(json.dumps(to_dict(config))),
    )
    partitions = {f"weight.{name}": Partition(w.flatten().clone(), w.numel()) for name, w in weights.items()}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        checkpoint.save(run_dir, step, partitions, state, World(0, 1, 0, torch.device("cpu")))
    finally:
        dist.destroy_process_group()


def train_with_options(path: Path, **options: Any) -> Tokenizer:
    """Train a sentencepiece model on `CHECK_TEXT` as another program would, with the given options only."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CHECK_TEXT.split("\n") * 3),
        model_writer=model,
        vocab_size=420,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())
    return Tokenizer.trusted(path)


def write_heldout(tokenizer: Tokenizer, folder: Path) -> Path:
    """Write TEXTS as a held-out corpus. Returns the path of its manifest."""
    writer = CorpusWriter(
        folder,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        chunk_tokens=256,
        sources=["books"],
    )
    for number, text in enumerate(TEXTS):
        tokens = tokenizer.encode_document(text)
        writer.add_document(tokens, source="books", document_id=str(number), text_bytes=len(text.encode()))
    writer.finish()
    return folder / "manifest.json"
