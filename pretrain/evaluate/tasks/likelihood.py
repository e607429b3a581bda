"""How likely a model finds given continuations of given prompts, in batches whose size changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from pretrain.model.decoder import Decoder


class Request(NamedTuple):
    """Tokens of which the last ones are scored, given those before."""

    tokens: Sequence[int]
    n_scored: int
    """At least 1, and less than the number of tokens."""


class Row(NamedTuple):
    """What the model reads at once, and the requests that can be read off it."""

    tokens: Sequence[int]
    requests: list[int]


def rows_of(requests: Sequence[Request]) -> list[Row]:
    """The fewest rows from which all requests can be read, the longest ones first.

    A causal model's output at a token depends on nothing after it. So a request whose input begins that of another one,
    as the labels of one prompt do, needs no row of its own.
    """
    inputs = [tuple(request.tokens[:-1]) for request in requests]
    rows: list[Row] = []
    for number in sorted(range(len(requests)), key=inputs.__getitem__, reverse=True):
        # In this order, what begins with an input comes right before it.
        if rows and tuple(rows[-1].tokens[: len(inputs[number])]) == inputs[number]:
            rows[-1].requests.append(number)
        else:
            rows.append(Row(inputs[number], [number]))
    return sorted(rows, key=lambda row: -len(row.tokens))


@torch.no_grad()
def log_likelihoods(
    model: Decoder,
    requests: Sequence[Request],
    *,
    micro_batch_sequences: int,
    device: torch.device,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """The log probability in nats of the scored tokens of each request: float64 [requests].

    `progress` is called with the number of requests that are done.
    """
    found = np.zeros(len(requests))
    rows = rows_of(requests)
    for first in range(0, len(rows), micro_batch_sequences):
        batch = rows[first : first + micro_batch_sequences]
        tokens = torch.zeros(
            len(batch), len(batch[0].tokens), dtype=torch.int64
        )  # the first one is the longest
        owners: list[int] = []
        places: list[tuple[int, int]] = []
        targets: list[int] = []
        for number, row in enumerate(batch):
            # Padding is on the right, where no token of a causal model sees it.
            tokens[number, : len(row.tokens)] = torch.tensor(row.tokens)
            for request in row.requests:
                wanted, n = requests[request].tokens, requests[request].n_scored
                places += [(number, place - 1) for place in range(len(wanted) - n, len(wanted))]
                targets += wanted[len(wanted) - n :]
                owners += [request] * n
        hidden = model.hidden(tokens.to(device))
        np.add.at(found, owners, _log_probabilities(model, hidden, places, targets))
        if progress is not None:
            progress(sum(len(row.requests) for row in batch))
    return found


def _log_probabilities(
    model: Decoder, hidden: torch.Tensor, places: list[tuple[int, int]], targets: list[int]
) -> np.ndarray:
    """The log probability of each target at its place in hidden [B, T, D]: float64 [places]."""
    # The labels of one prompt begin at the same place, whose logits are computed once.
    distinct, which = np.unique(np.array(places), axis=0, return_inverse=True)
    order = np.argsort(which.reshape(-1), kind="stable")
    which, wanted = which.reshape(-1)[order], np.array(targets)[order]
    found = np.zeros(len(targets))
    step = model.config.loss_chunk_tokens
    for first in range(0, len(distinct), step):
        rows, columns = torch.from_numpy(distinct[first : first + step].T.copy()).to(hidden.device)
        log_p = model.head(hidden[rows, columns])[0].float().log_softmax(-1)
        mine = slice(*np.searchsorted(which, [first, first + step]).tolist())
        at = torch.from_numpy(which[mine] - first).to(hidden.device)
        found[order[mine]] = (
            log_p[at, torch.from_numpy(wanted[mine]).to(hidden.device)].double().cpu().numpy()
        )
    return found
