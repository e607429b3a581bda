"""A small real corpus and the smallest useful run on it, for tests that train."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from pretrain.corpus.tokenizer import Tokenizer
from pretrain.corpus.writer import CorpusWriter
from support import ROOT

SEQUENCE_LENGTH = 64
GLOBAL_BATCH = 8


@dataclass(frozen=True)
class TinyCorpus:
    """Paths of a small corpus."""

    folder: Path

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.json"

    @property
    def heldout(self) -> Path:
        return self.folder / "heldout" / "manifest.json"


def train_tokenizer(folder: Path, texts: list[str], vocab_size: int) -> Tokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.splitlines()),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        control_symbols=["<mask>"],
        minloglevel=2,
    )
    return Tokenizer.trusted(folder / "tokenizer.model")


def python_documents() -> dict[str, str]:
    """650 KB of Python source by file name: an old state of this project, so that no later edit changes a test."""
    lines = (
        (ROOT / "tests" / "support" / "python_documents.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    )
    return {record["id"]: record["text"] for record in map(json.loads, lines)}


def make_corpus(
    folder: Path, vocab_size: int = 512, documents: list[tuple[str, str]] | None = None
) -> TinyCorpus:
    """Make a corpus of documents (id, text) in chunks of 1,024 tokens, by default from `python_documents`."""
    if documents is None:
        documents = list(python_documents().items())
    texts = [text for _, text in documents]
    tokenizer = train_tokenizer(folder, texts, vocab_size)
    for where, chosen in ((folder, slice(2, None)), (folder / "heldout", slice(0, 2))):
        writer = CorpusWriter(
            where,
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            chunk_tokens=1024,
            sources=["code"],
        )
        for document_id, text in documents[chosen]:
            writer.add_document(
                tokenizer.encode_document(text),
                source="code",
                document_id=document_id,
                text_bytes=len(text.encode()),
            )
        writer.finish()
    return TinyCorpus(folder)


def run_arguments(corpus: TinyCorpus, run_dir: Path, *more: str) -> list[str]:
    """Hydra overrides for a run of 12 steps of 512 tokens each, with a checkpoint every 4 steps."""
    return [
        f"run_dir={run_dir}",
        f"data.manifest={corpus.manifest}",
        f"evaluation.manifest={corpus.heldout}",
        "evaluation.max_sequences=16",
        f"data.sequence_length={SEQUENCE_LENGTH}",
        "data.window_chunks=4",
        f"global_batch_sequences={GLOBAL_BATCH}",
        "micro_batch_sequences=2",
        "total_steps=12",
        "model.n_layers=2",
        "model.d_model=64",
        "model.n_heads=2",
        "model.n_kv_heads=1",
        "model.d_ff=160",
        "optim.lr=3e-3",
        "schedule.warmup_steps=2",
        "checkpoint.every_steps=4",
        "checkpoint.keep_last=9",
        "checkpoint.keep_every_steps=4",  # so that no save is skipped because the previous one is slow
        "watchdog.step_s=60",
        "logging.every_steps=4",
        "logging.wandb=disabled",
        "logging.sample_ledger=true",
        "logging.peak_flops_per_second=1e12",
        *more,
    ]


def events(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
