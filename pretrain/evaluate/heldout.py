"""Held-out loss, perplexity and bits per byte: of packed sequences during training, of whole documents afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain.batch import IGNORED_LABEL, Batch
from pretrain.corpus.manifest import CorpusSource
from pretrain.corpus.shards import Corpus, documents_of
from pretrain.data.loader import build_batch
from pretrain.data.masking import Masking
from pretrain.data.packing import ranges_of
from pretrain.distributed import World, sum_over_ranks
from pretrain.errors import ConfigError, RunError
from pretrain.model.decoder import Decoder, LossSums

MAX_SOURCES = 32
"""Held-out text of more sources than this is only scored as a whole during training, so that its time stays bounded."""
_BUFFERED_BATCHES = 16  # windows are sorted by length within this many batches, to reduce padding


@dataclass(frozen=True)
class Scores:
    """How well a model predicts a text."""

    loss: float
    """Mean nats per predicted token."""
    perplexity: float
    """exp(loss)."""
    bits_per_byte: float | None
    """Total loss in bits per UTF-8 byte of the text; unlike the loss, it is comparable between tokenizers. None for
    masked language modeling, which predicts only some of the tokens, and for classifiers."""
    tokens: int
    """Number of predicted tokens: the text and each document's eos, or with a loss mask only the targets."""
    text_bytes: int
    """Size of the text in UTF-8, in bytes; with a loss mask, only the text of the targets."""
    documents: int
    """Number of documents."""
    accuracy: float | None = None
    """Fraction of the documents that a classifier puts into the right class; None for other models."""
    macro_f1: float | None = None
    """Mean of the F1 of the classes that occur or are predicted; None for other models."""

    def as_dict(self) -> dict[str, float]:
        """The scores by name, without one that does not exist."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class HeldOutResult:
    """Scores of all text and of each source."""

    overall: Scores
    sources: dict[str, Scores]
    """Scores by source. A source without a token that counts has none."""

    def figures(self) -> dict[str, float]:
        """The scores by name, and some of each source where there are several."""
        named: dict[str, float] = self.overall.as_dict()
        if len(self.sources) > 1:
            for source, scores in self.sources.items():
                known = scores.as_dict()
                named |= {
                    f"source/{source}/{name}": known[name]
                    for name in ("loss", "bits_per_byte", "tokens")
                    if name in known
                }
        return named


class TokenDocument(NamedTuple):
    """A document to be scored: [bos] + tokens + [eos], and the size of its text in UTF-8, in bytes."""

    source: str
    tokens: np.ndarray
    text_bytes: int
    is_target: np.ndarray | None = None
    """bool [tokens]: which tokens count, in a corpus with a loss mask; None where all do."""
    target_bytes: int = 0
    """Size in UTF-8, in bytes, of the text of the tokens that count, in a corpus with a loss mask."""
    id: str = ""
    text_hash: str = ""
    """Hash of the text, by which results of models with other tokenizers know it; empty where only tokens are known."""

    @property
    def labels(self) -> np.ndarray:
        """The tokens as int64, with IGNORED_LABEL for those that do not count."""
        tokens = self.tokens.astype(np.int64)
        return tokens if self.is_target is None else np.where(self.is_target, tokens, IGNORED_LABEL)

    def beginning(self, n_tokens: int) -> TokenDocument:
        """The document's first `n_tokens` tokens, with its byte counts scaled in proportion."""
        if n_tokens >= len(self.tokens):
            return self
        text_bytes = round(self.text_bytes * n_tokens / len(self.tokens))
        if self.is_target is None:
            return self._replace(tokens=self.tokens[:n_tokens], text_bytes=text_bytes, text_hash="")
        is_target = self.is_target[:n_tokens]
        target_bytes = round(self.target_bytes * is_target.sum() / max(1, self.is_target.sum()))
        return self._replace(
            tokens=self.tokens[:n_tokens],
            text_bytes=text_bytes,
            is_target=is_target,
            target_bytes=target_bytes,
        )


@torch.no_grad()
def evaluate_loss(
    forward: Callable[[Batch], LossSums],
    corpus: Corpus,
    *,
    sequence_length: int,
    micro_batch_sequences: int,
    max_sequences: int | None,
    world: World,
    document_masking: bool,
    key: str = "evaluation.manifest",
    masking: Masking | None = None,
) -> HeldOutResult:
    """Score the corpus's first `max_sequences` sequences, cut and batched as in training.

    With `masking`, the tokens that it hides are scored. They are the same at every call and for every run.

    The sequences are divided over the ranks; ranks that share sequences get the same ones. `forward` is collective
    under ZeRO-3, so every rank calls it equally often, with all labels ignored once it has no sequence left. Every rank
    returns the same result. `forward` returns sums only, so a sequence with tokens of several sources is passed once
    for each of them, with the labels of the others ignored, unless there are more than MAX_SOURCES. `key` names the
    corpus in errors.

    The first tokens of a sequence lack their context, so bits_per_byte is slightly higher than from `score_documents`.
    The bytes of a document that `max_sequences` cuts off count in proportion to its tokens. Raises CorruptShardError,
    and ConfigError where a loss mask leaves nothing to predict.
    """
    per_chunk, n_sequences = _sequences_of(corpus, sequence_length, max_sequences)
    named = corpus.manifest.sources
    sequences = {0: np.arange(n_sequences)}
    first_label = 1 if masking is None else 0
    if by_source := 1 < len(named) <= MAX_SOURCES:
        sequences = _sequences_by_source(corpus, sequence_length, per_chunk, n_sequences, first_label)
    per_call = micro_batch_sequences * world.n_readers
    masking = masking and masking.for_heldout()
    n_sums = 2 + len(corpus.manifest.classes) ** 2
    sums = torch.zeros(len(named), n_sums, dtype=torch.float64, device=world.device)
    for source, numbers in sequences.items():
        for first in range(0, len(numbers), per_call):
            start = first + world.reader * micro_batch_sequences
            mine = numbers[start : start + micro_batch_sequences]
            where = np.divmod(mine if len(mine) else numbers[-1:], per_chunk)
            batch = build_batch(corpus, *where, sequence_length, document_masking, masking)
            if not len(mine):
                batch = batch._replace(labels=torch.full_like(batch.labels, IGNORED_LABEL))
            elif by_source:
                found_sources = _label_sources(corpus, *where, sequence_length, first_label)
                ignored = torch.from_numpy(found_sources != source)
                batch = batch._replace(labels=batch.labels.masked_fill(ignored, IGNORED_LABEL))
            sums[source] += _row_of(forward(batch))
    of_ranks = np.array(sum_over_ranks(sums.flatten().tolist(), world)).reshape(len(named), -1)
    if of_ranks[:, 1].sum() == 0:
        raise _nothing_to_predict(corpus, n_sequences, key)
    chunk, sequence = divmod(n_sequences - 1, per_chunk)
    in_chunk = min((sequence + 1) * sequence_length, corpus.tokens_in(chunk))
    text = _text_before(corpus, chunk * corpus.chunk_tokens + in_chunk)
    return _result(named if by_source else [], of_ranks, text, of_all_text=masking is None)


def _row_of(found: LossSums) -> Tensor:
    """The sums that scores are made of: nll_sum, n_predicted and, for a classifier, its confusion matrix."""
    row = torch.stack([found.nll_sum.double(), found.n_predicted.double()])
    return row if found.confusion is None else torch.cat([row, found.confusion.flatten().double()])


def _result(
    named: Sequence[CorpusSource], sums: np.ndarray, text: np.ndarray, *, of_all_text: bool
) -> HeldOutResult:
    """The scores from rows of each source: `sums` as `_row_of` gives them, and `text`, its bytes and documents. Those
    of each source are left out where `named` is empty."""

    def scores(of_sums: np.ndarray, of_text: np.ndarray) -> Scores:
        n_classes = math.isqrt(len(of_sums) - 2)
        plain = _scores(*of_sums[:2].tolist(), *of_text.tolist(), of_all_text=of_all_text and not n_classes)
        return with_classes(plain, of_sums[2:].reshape(n_classes, n_classes))

    of_sources = zip(named, sums, text, strict=True) if named else ()
    return HeldOutResult(
        scores(sums.sum(0), text.sum(0)),
        {source.name: scores(row, of_text) for source, row, of_text in of_sources if row[1]},
    )


def with_classes(scores: Scores, confusion: np.ndarray) -> Scores:
    """The scores with those of a classifier added: `confusion` is [classes, predicted classes], empty for others."""
    if not confusion.size:
        return scores
    right, either = confusion.diagonal(), confusion.sum(0) + confusion.sum(1)
    f1 = 2 * right[either > 0] / either[either > 0]
    return replace(scores, accuracy=float(right.sum() / confusion.sum()), macro_f1=float(f1.mean()))


def _sequences_by_source(
    corpus: Corpus, sequence_length: int, per_chunk: int, n_sequences: int, first_label: int
) -> dict[int, np.ndarray]:
    """The numbers of the sequences that have labels of each source, among the first `n_sequences`."""
    found: dict[int, list[int]] = {}
    for number in range(n_sequences):
        chunk, sequence = np.array([number // per_chunk]), np.array([number % per_chunk])
        for source in np.unique(
            _label_sources(corpus, chunk, sequence, sequence_length, first_label)
        ).tolist():
            found.setdefault(source, []).append(number)
    return {source: np.array(numbers) for source, numbers in sorted(found.items())}


def _label_sources(
    corpus: Corpus, chunk: np.ndarray, sequence: np.ndarray, sequence_length: int, first_label: int
) -> np.ndarray:
    """The source of each label of the sequences: an index into the manifest's sources, int64 [B, T].

    A label is the token `first_label` places after its position: 1 where the next token is predicted, and 0 where a
    hidden one is. Labels past the end of a chunk, which are ignored, get the source of its last token.
    """
    rows = []
    for one, number in zip(chunk.tolist(), sequence.tolist(), strict=True):
        documents, n_tokens = corpus.documents(one), corpus.tokens_in(one)
        ranges = ranges_of(corpus, one, sequence_length, number)
        read = np.concatenate([np.arange(start, stop) for start, stop in ranges])
        places = np.pad(read, (0, sequence_length - len(read)), constant_values=n_tokens - 1) + first_label
        places = np.minimum(places, n_tokens - 1)
        rows.append(documents.source[np.searchsorted(documents.starts, places, side="right") - 1])
    return np.stack(rows)


def check_heldout(
    corpus: Corpus,
    *,
    sequence_length: int,
    max_sequences: int | None,
    document_masking: bool,
    key: str = "evaluation.manifest",
    masking: Masking | None = None,
) -> None:
    """Raise ConfigError where `evaluate_loss` would find a shard that cannot be read, or no token to predict.

    It reads one chunk per shard, and of the text only as far as the first token to predict. `key` names the corpus in
    the error.
    """
    masking = masking and masking.for_heldout()
    per_chunk, n_sequences = _sequences_of(corpus, sequence_length, max_sequences)
    last = (n_sequences - 1) // per_chunk
    try:
        for chunk in sorted(
            {last, *(s.first_chunk for s in corpus.manifest.shards if s.first_chunk <= last)}
        ):
            corpus.read(chunk, 0, 1)
            corpus.documents(chunk)
        for first in range(0, n_sequences, per_chunk):
            sequence = np.arange(min(per_chunk, n_sequences - first))
            where = np.full_like(sequence, first // per_chunk), sequence
            batch = build_batch(corpus, *where, sequence_length, document_masking, masking)
            if (batch.labels != IGNORED_LABEL).any():
                return
    except (RunError, OSError) as error:
        raise ConfigError(f"{key}={corpus.manifest_path} cannot be read: {error}") from error
    raise _nothing_to_predict(corpus, n_sequences, key)


def _sequences_of(corpus: Corpus, sequence_length: int, max_sequences: int | None) -> tuple[int, int]:
    """Number of sequences in a full chunk, and in the part of the corpus that is scored."""
    # A chunk whose size is not a multiple of the sequence length ends in a padded sequence.
    per_chunk = -(-corpus.chunk_tokens // sequence_length)
    n_sequences = (corpus.n_chunks - 1) * per_chunk + -(-corpus.last_chunk_tokens // sequence_length)
    return per_chunk, n_sequences if max_sequences is None else min(n_sequences, max_sequences)


def _nothing_to_predict(corpus: Corpus, n_sequences: int, key: str) -> ConfigError:
    remedy = "raise evaluation.max_sequences" if corpus.manifest.loss_mask else "give a longer held-out text"
    return ConfigError(
        f"{key}={corpus.manifest_path} has no token to predict in its first {n_sequences} sequences; {remedy}"
    )


def _text_before(corpus: Corpus, n_tokens: int) -> np.ndarray:
    """Text bytes and number of the documents that start in the corpus's first `n_tokens` tokens: a row per source.

    The bytes of a document that reaches further count in proportion.
    """
    starts: list[int] = []
    sizes: list[int] = []
    sources: list[int] = []
    chunk, end = 0, corpus.manifest.n_tokens
    while chunk < corpus.n_chunks and (not starts or starts[-1] < n_tokens):
        found = corpus.documents(chunk)
        begins = found.offsets == 0
        starts += (chunk * corpus.chunk_tokens + found.starts[begins]).tolist()
        text_bytes = found.text_bytes if found.target_bytes is None else found.target_bytes
        sizes += text_bytes[begins].tolist()
        sources += found.source[begins].tolist()
        chunk += 1
    start = np.array(starts)
    # Documents follow each other without a gap, or only with filler, which is read with the document before it.
    length = np.diff(start, append=end)
    share = np.clip((n_tokens - start) / length, 0, 1)
    n_sources = len(corpus.manifest.sources)
    text_bytes_of = np.bincount(sources, share * np.array(sizes), n_sources)
    return np.stack([text_bytes_of, np.bincount(sources, share > 0, n_sources)], axis=1)


OnScores = Callable[[TokenDocument, float, int], None]
"""Called with a document, the sum of its negative log-likelihoods in nats, and the number of its predicted tokens."""


@torch.no_grad()
def score_documents(
    model: Decoder,
    documents: Iterable[TokenDocument],
    *,
    sequence_length: int,
    micro_batch_sequences: int,
    device: torch.device,
    progress: Callable[[TokenDocument], None] | None = None,
    masking: Masking | None = None,
    on_scores: OnScores | None = None,
) -> HeldOutResult:
    """Score whole documents. Each token is predicted exactly once, from earlier tokens of its document.

    With `masking`, which a model that is not causal needs, only the tokens that it hides are predicted, from both
    sides. A token then has at least T/4 tokens of context on each side, or all that exist.

    A document longer than `sequence_length` T is read in windows of T tokens. Each window starts T/2 tokens after the
    previous one and scores only the tokens that no earlier window scored, so every token has at least T/2 tokens of
    context, or all that exist. `progress` is called with each document after it is queued, and `on_scores` once it is
    scored. Raises ValueError where there are no documents, and ConfigError where no token counts.
    """
    totals: dict[str, _Totals] = {}
    for document in documents:
        of_source = totals.setdefault(
            document.source, _Totals(model, micro_batch_sequences, device, masking, on_scores)
        )
        of_source.add(document, sequence_length)
        if progress is not None:
            progress(document)
    found = {name: total.finish() for name, total in sorted(totals.items())}
    if not found:
        raise ValueError("no documents to score")
    sources = {name: scores for name, scores in found.items() if scores is not None}
    if not sources:
        cause = "the loss mask excludes" if masking is None else "masked language modeling chose no token of"
        raise ConfigError(f"{cause} every token of the documents, so there is nothing to score")
    sums = np.array([[t.nll_sum, t.n_predicted, t.text_bytes, t.documents] for t in totals.values()]).sum(0)
    nll_sum, n_predicted, text_bytes, n_documents = sums.tolist()
    overall = _scores(nll_sum, n_predicted, text_bytes, n_documents, of_all_text=masking is None)
    return HeldOutResult(overall, sources)


class _Totals:
    """Sums over the documents of one source. Windows are buffered here until they are batched."""

    def __init__(
        self,
        model: Decoder,
        micro_batch_sequences: int,
        device: torch.device,
        masking: Masking | None,
        on_scores: OnScores | None,
    ) -> None:
        self.model, self.batch_size, self.device = model, micro_batch_sequences, device
        self.nll_sum, self.n_predicted, self.text_bytes, self.documents = 0.0, 0, 0, 0
        self._masking = masking and masking.for_heldout()
        self._on_scores = on_scores
        self._windows: list[tuple[Window, int]] = []
        """The windows that wait, each with the number of its document among those that wait."""
        self._documents: list[TokenDocument] = []

    def add(self, document: TokenDocument, sequence_length: int) -> None:
        self.text_bytes += document.text_bytes if document.is_target is None else document.target_bytes
        self.documents += 1
        tokens, labels = document.tokens.astype(np.int64), document.labels
        if self._masking is None:
            found = windows(tokens, labels, sequence_length)
        else:
            found = masked_windows(*self._masking.hidden_document(tokens, labels), sequence_length)
        self._windows += [(window, len(self._documents)) for window in found]
        self._documents.append(document)
        if len(self._windows) >= _BUFFERED_BATCHES * self.batch_size:
            self._flush()

    def finish(self) -> Scores | None:
        """The scores of the documents; None if none of their tokens counts."""
        self._flush()
        if self.n_predicted == 0:
            return None
        sums = self.nll_sum, self.n_predicted, self.text_bytes, self.documents
        return _scores(*sums, of_all_text=self._masking is None)

    def _flush(self) -> None:
        self._windows.sort(key=lambda waiting: len(waiting[0].tokens))
        of_documents = np.zeros((len(self._documents), 2))
        for first in range(0, len(self._windows), self.batch_size):
            batch = self._windows[first : first + self.batch_size]
            tokens, labels, is_padding = _pad([window for window, _ in batch])
            # Padding is on the right, where no token of a causal model sees it.
            document_ids = None if self.model.causal else is_padding.long().to(self.device)
            sums = self.model(
                tokens.to(self.device), labels.to(self.device), document_ids=document_ids, by_sequence=True
            )
            rows = torch.stack([sums.nll_sum.double(), sums.n_predicted.double()], 1).cpu().numpy()
            np.add.at(of_documents, [number for _, number in batch], rows)
        self.nll_sum += float(of_documents[:, 0].sum())
        self.n_predicted += int(of_documents[:, 1].sum())
        if self._on_scores is not None:
            for document, (nll_sum, n_predicted) in zip(self._documents, of_documents.tolist(), strict=True):
                self._on_scores(document, nll_sum, int(n_predicted))
        self._windows.clear()
        self._documents.clear()


class Window(NamedTuple):
    """A part of a document that a model reads at once, at most `sequence_length` tokens."""

    tokens: np.ndarray
    labels: np.ndarray
    """The label of each token, IGNORED_LABEL where another window scores it."""


def windows(tokens: np.ndarray, labels: np.ndarray, sequence_length: int) -> Iterator[Window]:
    """Overlapping windows of a document, whose labels are the next tokens.

    `labels` are the document's tokens, where they count. All windows together score each token after the first once.
    """
    stride = max(1, sequence_length // 2)
    scored = 1
    for start in range(0, len(tokens), stride):
        stop = min(start + sequence_length + 1, len(tokens))
        of_window = labels[start + 1 : stop].copy()
        of_window[: scored - start - 1] = IGNORED_LABEL
        yield Window(tokens[start : stop - 1], of_window)
        scored = stop
        if scored == len(tokens):
            return


def masked_windows(tokens: np.ndarray, labels: np.ndarray, sequence_length: int) -> Iterator[Window]:
    """Overlapping windows of a document with hidden tokens, whose labels are these tokens. Each is scored once."""
    stride = max(1, sequence_length // 2)
    scored = 0
    for start in range(0, len(tokens), stride):
        stop = min(start + sequence_length, len(tokens))
        # What is near the end of this window is in the middle of the next one.
        end = stop if stop == len(tokens) else start + sequence_length - sequence_length // 4
        of_window = np.full(stop - start, IGNORED_LABEL, np.int64)
        of_window[scored - start : end - start] = labels[scored:end]
        yield Window(tokens[start:stop], of_window)
        scored = end
        if stop == len(tokens):
            return


def _pad(batch: list[Window]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and labels of windows as int64 [B, T], padded on the right, and bool [B, T]: what is padding."""
    length = max(len(window.tokens) for window in batch)
    tokens = np.zeros((len(batch), length), np.int64)
    labels = np.full((len(batch), length), IGNORED_LABEL, np.int64)
    is_padding = np.ones((len(batch), length), np.bool_)
    for row, window in enumerate(batch):
        n = len(window.tokens)
        tokens[row, :n], labels[row, :n], is_padding[row, :n] = window.tokens, window.labels, False
    return torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(is_padding)


def first_tokens(documents: Iterable[TokenDocument], max_tokens: int) -> Iterator[TokenDocument]:
    """The first documents, up to `max_tokens` tokens in total; the last one is cut at that limit.

    A document is left out if no token in its kept part counts. Raises ConfigError where no document is left.
    """
    left, found = max_tokens, False
    for document in documents:
        beginning = document.beginning(left)
        if (beginning.labels[1:] != IGNORED_LABEL).any():
            found = True
            yield beginning
        left -= len(beginning.tokens)
        if left == 0:
            break
    if not found:
        raise ConfigError(
            f"max_tokens={max_tokens} ends before the first token that counts; use a larger number"
        )


def corpus_documents(corpus: Corpus) -> Iterator[TokenDocument]:
    """The documents of a prepared corpus. Raises CorruptShardError."""
    for found in documents_of(corpus):
        yield TokenDocument(
            found.source, found.tokens, found.text_bytes, found.is_target, found.target_bytes, found.id
        )


def _scores(
    nll_sum: float, n_predicted: float, text_bytes: float, documents: float, *, of_all_text: bool
) -> Scores:
    loss, text_bytes = nll_sum / n_predicted, round(text_bytes)
    bits_per_byte = nll_sum / (math.log(2) * text_bytes) if text_bytes else math.nan
    return Scores(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),  # exp would overflow for a diverged model
        bits_per_byte=bits_per_byte if of_all_text else None,
        tokens=int(n_predicted),
        text_bytes=text_bytes,
        documents=int(documents),
    )
