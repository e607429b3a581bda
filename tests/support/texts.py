"""Small corpora of random tokens with a reference that is easy to check by eye, and loaders that read them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pretrain.batch import IGNORED_LABEL
from pretrain.config import DataConfig, SourceConfig
from pretrain.corpus.writer import CorpusWriter
from pretrain.data.loader import TrainLoader

CHUNK = 64
BOS, EOS = 1, 2


class Text:
    """A corpus on disk, and the tokens and documents that were written to it."""

    def __init__(
        self,
        folder: Path,
        n_tokens: int,
        seed: int,
        vocab_size: int = 300,
        sha: str = "f" * 64,
        loss_mask: bool = False,
    ) -> None:
        self.manifest = str(folder / "manifest.json")
        self.stream: list[int] = []
        self.starts: list[int] = []  # offset of each document in the stream of tokens
        self.ignored: set[int] = set()  # offsets in that stream of tokens that the loss mask leaves out
        writer = CorpusWriter(
            folder,
            tokenizer_sha256=sha,
            vocab_size=vocab_size,
            bos_id=BOS,
            eos_id=EOS,
            chunk_tokens=CHUNK,
            sources=["text"],
            shard_bytes=16_384,
            loss_mask=loss_mask,
        )
        random = np.random.default_rng(seed)
        while len(self.stream) < n_tokens:
            room = n_tokens - len(self.stream)
            length = min(int(random.choice([2, 3, 9, 30, 200])), room)
            document = [BOS, *random.integers(3, vocab_size, length).tolist(), EOS][:room]
            begin, targets = len(self.stream), None
            if loss_mask:
                borders = random.choice(len(document) + 1, size=min(4, len(document) // 2 * 2), replace=False)
                targets = sorted(borders.tolist())
                learned = {at for a, b in zip(targets[::2], targets[1::2], strict=True) for at in range(a, b)}
                self.ignored |= {begin + at for at in range(len(document)) if at not in learned}
            self.starts.append(begin)
            self.stream += document
            writer.add_document(document, source="text", document_id=f"d{len(self.starts)}", targets=targets)
        writer.finish()

    def sequences(self, sequence_length: int) -> list[tuple[int, int]]:
        """(chunk, sequence) for each sequence of the corpus."""
        return [
            (at // CHUNK, at % CHUNK // sequence_length) for at in range(0, len(self.stream), sequence_length)
        ]

    def reference(self, chunk: int, sequence: int, length: int, masking: bool) -> list[list[int]]:
        """Tokens, labels, positions and document ids of one sequence, token by token."""
        begin = chunk * CHUNK + sequence * length
        end = min((chunk + 1) * CHUNK, len(self.stream))
        tokens, labels, positions, ids = [], [], [], []
        position = document = 0
        for at in range(begin, begin + length):
            if masking and at > begin and (at in self.starts or at == end):
                document, position = document + 1, 0
            tokens.append(self.stream[at] if at < end else EOS)
            crosses = masking and at + 1 in self.starts
            counts = at + 1 < end and not crosses and at + 1 not in self.ignored
            labels.append(self.stream[at + 1] if counts else IGNORED_LABEL)
            positions.append(position)
            ids.append(document)
            position += 1
        return [tokens, labels, positions, ids]


def data_config(texts: list[Text], **values: object) -> DataConfig:
    sources = [
        SourceConfig(name=f"s{k}", manifest=text.manifest, weight=1 + k) for k, text in enumerate(texts)
    ]
    defaults = {"sequence_length": 16, "window_chunks": 4, "loader_workers": 0}
    return DataConfig(sources=sources, **{**defaults, **values})


def make_loader(data: DataConfig, **values: object) -> TrainLoader:
    defaults = {
        "seed": 5,
        "global_batch_sequences": 12,
        "micro_batch_sequences": 2,
        "rank": 0,
        "world_size": 1,
        "total_steps": 10,
        "state": None,
    }
    return TrainLoader(data, **{**defaults, **values})
