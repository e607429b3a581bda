"""Small corpora of whole documents that are packed into sequences, with what was written to them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_tools.building.best_fit import best_fit
from pretrain.corpus.manifest import Packed
from pretrain.corpus.writer import CorpusWriter, Documents
from support.texts import BOS, EOS

LENGTH = 16
"""Tokens per packed sequence."""
VOCABULARY = 300


class Whole(NamedTuple):
    """A document that was written."""

    tokens: list[int]
    targets: list[int]
    """Start and stop of the only span that counts in the loss."""
    source: str

    @property
    def labels(self) -> list[int]:
        """The tokens that are to be predicted. The first token of a document never is: nothing is before it."""
        return self.tokens[max(1, self.targets[0]) : self.targets[1]]


def whole_documents(sizes: Sequence[int], seed: int = 0) -> dict[str, Whole]:
    """Documents of these numbers of tokens by id. Each ends with targets: half of its tokens, and at least one."""
    random = np.random.default_rng(seed)
    found = {}
    for number, size in enumerate(sizes):
        # Not all end with eos, as not all chat templates do.
        tokens = [BOS, *random.integers(3, VOCABULARY, size).tolist(), *[EOS] * (number % 2)][-size:]
        found[f"d{number}"] = Whole(tokens, [size // 2, size], "ab"[number % 2])
    return found


def write_whole(
    folder: Path,
    documents: dict[str, Whole],
    *,
    chunk_tokens: int = 4 * LENGTH,
    length: int = LENGTH,
    loss_mask: bool = True,
    together: int = 1,
) -> str:
    """Write the documents as `data_tools.prepare` does, `together` at a time. Returns the path of the manifest."""
    writer = CorpusWriter(
        folder,
        tokenizer_sha256="f" * 64,
        vocab_size=VOCABULARY,
        bos_id=BOS,
        eos_id=EOS,
        chunk_tokens=chunk_tokens,
        sources=["a", "b"],
        loss_mask=loss_mask,
        packed=Packed(sequence_tokens=length),
    )
    names = list(documents)
    order = best_fit(np.array([len(documents[name].tokens) for name in names]), length).tolist()
    for first in range(0, len(order), together):
        chosen = [names[row] for row in order[first : first + together]]
        block = [documents[name] for name in chosen]
        starts = np.cumsum([0, *(len(one.tokens) for one in block)])
        added = Documents(
            tokens=np.concatenate([one.tokens for one in block]).astype(np.uint16),
            starts=starts,
            source=np.array(["ab".index(one.source) for one in block]),
            ids=chosen,
            text_bytes=3 * np.diff(starts),
        )
        if loss_mask:
            added.targets = np.concatenate(
                [start + np.array(one.targets) for start, one in zip(starts, block, strict=False)]
            )
            added.target_bytes = 2 * np.diff(starts)
        writer.add_documents(added)
    writer.finish()
    return str(folder / "manifest.json")
