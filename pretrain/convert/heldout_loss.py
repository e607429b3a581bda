"""The loss on held-out text that an exported form costs, compared with the checkpoint, in bounded memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pretrain.corpus.shards import Corpus
from pretrain.data.masking import Masking
from pretrain.errors import ConfigError
from pretrain.evaluate.heldout import corpus_documents, first_tokens, score_documents
from pretrain.model.streamed import streamed_decoder
from pretrain.trained import TrainedModel

_BATCH_TOKENS = 4096
_HEAD_TOKENS = 512  # logits of so many tokens exist at a time


@dataclass(frozen=True)
class FormLoss:
    """Mean nats per token of the checkpoint and of its exported form on the same tokens, both computed in fp32."""

    text: str
    """Path of the manifest of the held-out corpus."""
    root_sha256: str
    """Hash of that corpus, which names it without a path of this machine."""
    tokens: int
    """Number of tokens that were predicted."""
    checkpoint: float
    exported: float

    @property
    def cost(self) -> float:
        """How much higher the loss of the exported form is."""
        return self.exported - self.checkpoint


def heldout_loss(
    trained: TrainedModel, exported: Mapping[str, Tensor], corpus: Corpus, max_tokens: int
) -> FormLoss:
    """Score the first `max_tokens` tokens of a held-out corpus with the weights of the run and with the exported ones.

    Raises ConfigError for a corpus with another tokenizer, and CorruptShardError.
    """
    made_with = (corpus.manifest.tokenizer_sha256, corpus.manifest.vocab_size)
    if made_with != (trained.tokenizer.sha256, trained.tokenizer.vocab_size):
        raise ConfigError(
            f"heldout={corpus.manifest_path} was prepared with a different tokenizer than the run was trained with; "
            "prepare it with tokenizer.path=run_dir, or use heldout_tokens=0"
        )
    if corpus.manifest.classes != trained.config.model.classes:
        raise ConfigError(
            f"heldout={corpus.manifest_path} has the classes {corpus.manifest.classes}, and the run was trained with "
            f"{trained.config.model.classes}; give another corpus, or heldout_tokens=0"
        )
    # With one source, all windows are in the same batches, and weights are read as rarely as possible.
    documents = [d._replace(source="") for d in first_tokens(corpus_documents(corpus), max_tokens)]
    model = replace(trained.config.model, loss_chunk_tokens=_HEAD_TOKENS)
    masking = None
    if not trained.config.causal:
        masking = Masking.of(trained.config.mlm, trained.config.seed, trained.tokenizer)
    scores = [
        score_documents(
            streamed_decoder(model, weights, trained.config.causal),
            documents,
            sequence_length=trained.sequence_length,
            micro_batch_sequences=max(1, _BATCH_TOKENS // trained.sequence_length),
            device=torch.device("cpu"),
            masking=masking,
        ).overall
        for weights in (trained.weights, exported)
    ]
    return FormLoss(
        str(corpus.manifest_path),
        corpus.manifest.root_sha256,
        scores[0].tokens,
        scores[0].loss,
        scores[1].loss,
    )
