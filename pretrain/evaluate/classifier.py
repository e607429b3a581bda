"""What a classifier makes of documents: the probability of each class."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.model.decoder import Decoder


@torch.no_grad()
def class_probabilities(
    model: Decoder,
    documents: Sequence[np.ndarray],
    *,
    micro_batch_sequences: int,
    device: torch.device,
    progress: Callable[[list[int]], None] = lambda rows: None,
) -> NDArray[np.float64]:
    """The probabilities [documents, classes] that a model gives to documents: arrays of tokens with bos and eos.

    Documents of similar length are in one batch, which leaves little padding. `progress` is called with the rows that
    were done since its last call.
    """
    found = np.empty((len(documents), len(model.config.classes)))
    rows = sorted(range(len(documents)), key=lambda row: len(documents[row]))
    for first in range(0, len(rows), micro_batch_sequences):
        chosen = rows[first : first + micro_batch_sequences]
        lengths = torch.tensor([len(documents[row]) for row in chosen])
        tokens = torch.zeros(len(chosen), int(lengths.max()), dtype=torch.int64)
        for place, row in enumerate(chosen):
            tokens[place, : len(documents[row])] = torch.from_numpy(documents[row].astype(np.int64))
        logits = model.class_logits(tokens.to(device), lengths.to(device))
        found[chosen] = logits.double().softmax(-1).cpu().numpy()
        progress(chosen)
    return found
