"""Fills masks: the most probable tokens at each mask token of a text, from a model trained with objective=mlm."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pretrain.corpus.tokenizer import Tokenizer
from pretrain.model.decoder import Decoder


@dataclass(frozen=True)
class Candidate:
    """A token that could stand at a mask."""

    token: int
    text: str
    """What the token adds to the text at this place."""
    probability: float


@torch.no_grad()
def fill_masks(model: Decoder, tokenizer: Tokenizer, text: str, n_candidates: int) -> list[list[Candidate]]:
    """The most probable tokens of each mask in `text`, the best first. Each mask is filled on its own.

    The text is read as a whole document. Special tokens, and ids that only pad the embedding, are no candidates.
    """
    ids = [tokenizer.bos_id, *tokenizer.encode_masked(text), tokenizer.eos_id]
    masks = [place for place, token in enumerate(ids) if token == tokenizer.mask_id]
    hidden = model.hidden(torch.tensor([ids], device=model.embed.weight.device))
    (logits,) = model.head(hidden[0, masks])
    ordinary = torch.from_numpy(tokenizer.ordinary_ids()).to(logits.device)
    best = logits.float().softmax(-1)[:, ordinary].topk(min(n_candidates, len(ordinary)), dim=-1)
    return [
        [
            Candidate(token, tokenizer.decode_after(ids[1:place], [token]), probability)
            for token, probability in zip(ordinary[rows].tolist(), values.tolist(), strict=True)
        ]
        for place, values, rows in zip(masks, best.values, best.indices, strict=True)
    ]
