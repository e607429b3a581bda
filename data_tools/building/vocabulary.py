"""The second step of a preparation: train a sentencepiece model on a sample of the training documents."""

from __future__ import annotations

import atexit
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceTrainer

from data_tools.building.gather import Gathered, part_path, read_digests, read_part
from data_tools.config import TokenizerConfig
from data_tools.progress import waiting
from pretrain.corpus.tokenizer import MASK_NAMES
from pretrain.errors import ConfigError
from pretrain.files import write_atomically

UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3
DEFAULT_VOCAB_SIZE = 16384
SMALLEST_VOCAB_SIZE = 512
# With less text per entry, some entries would be too rare for their embeddings to be trained.
SAMPLE_BYTES_PER_ENTRY = 256
CJK_SHARE = 0.1  # from this fraction on, the text counts as Chinese, Japanese or Korean
# Twice the default width, so that a deep indentation or a long name in code can be one token.
LONGEST_PIECE_CHARS = 32
# Longer lines are split, because the trainer would skip them.
_LINE_CHARS = 2000
_LINE_BYTES = 4 * _LINE_CHARS + 16
_LINES = re.compile(r"[^\n]*\n+|[^\n]+")
_TOO_HIGH = re.compile(r"Vocabulary size (?:is )?too high.*?<= *(\d+)", re.DOTALL)
_TOO_LOW = re.compile(r"smaller than required_chars\. *\d+ vs (\d+)", re.DOTALL)


def train_tokenizer(config: TokenizerConfig, gathered: Gathered, work: Path, path: Path) -> None:
    """Train a model and write it to `path`. Raises ConfigError where the vocabulary does not fit the text.

    sentencepiece uses one thread and no sampling here, so the same documents give the same bytes.
    """
    coverage = config.character_coverage
    if coverage is None:
        coverage = 0.9995 if gathered.cjk_share >= CJK_SHARE else 0.9999
    size = config.vocab_size
    if size is None:
        wanted = gathered.sample_bytes // SAMPLE_BYTES_PER_ENTRY // 64 * 64
        size = min(max(wanted, SMALLEST_VOCAB_SIZE), DEFAULT_VOCAB_SIZE)
    try:
        with waiting(f"training the tokenizer on {gathered.sample_bytes / 1e6:.1f} MB"):
            model = _train(config, size, coverage, _trainer_lines(gathered, work))
    except RuntimeError as error:
        smallest, largest = _bounds(str(error))
        if smallest is None and largest is None:
            raise ConfigError(
                f"sentencepiece cannot train on this text: {' '.join(str(error).split())}"
            ) from error
        if config.vocab_size is not None:
            raise ConfigError(_misfit(size, smallest, largest)) from error
        size = largest if largest is not None else min(2 * (smallest or 0), DEFAULT_VOCAB_SIZE)
        model = _train(config, size, coverage, _trainer_lines(gathered, work))
    write_atomically(path, model)


def _misfit(size: int, smallest: int | None, largest: int | None) -> str:
    if largest is not None:
        return (
            f"tokenizer.vocab_size={size} is too large for this text: the largest possible is {largest}; "
            "give less, or leave it out"
        )
    return (
        f"tokenizer.vocab_size={size} is too small for the characters of this text: the smallest possible is "
        f"{smallest}; give more, or a smaller tokenizer.character_coverage"
    )


def _bounds(message: str) -> tuple[int | None, int | None]:
    """The smallest and largest possible vocabulary that an error message of the trainer names."""
    low, high = _TOO_LOW.search(message), _TOO_HIGH.search(message)
    return int(low.group(1)) if low else None, int(high.group(1)) if high else None


def _train(config: TokenizerConfig, vocab_size: int, coverage: float, lines: Iterator[str]) -> bytes:
    """Train a model in a thread, so that Ctrl-C ends the command at once.

    The trainer releases the interpreter lock. If it ran in the main thread, KeyboardInterrupt would be raised only
    after it ends, or the trainer would turn it into an error of its own.
    """
    result: list[bytes | Exception] = []

    def work() -> None:
        try:
            result.append(_trained(config, vocab_size, coverage, lines))
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=work, daemon=True)
    try:
        thread.start()
        thread.join()
    except KeyboardInterrupt:
        atexit.register(_end_at_once, 128 + signal.SIGINT)
        raise
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def _end_at_once(exit_code: int) -> None:
    """End the process without the interpreter's own cleanup, which aborts while the trainer's threads run."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(exit_code)


def _trained(config: TokenizerConfig, vocab_size: int, coverage: float, lines: Iterator[str]) -> bytes:
    """The trained model."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type=config.model_type.value,
        vocab_size=vocab_size,
        character_coverage=coverage,
        byte_fallback=True,
        unk_id=UNK_ID,
        bos_id=BOS_ID,
        eos_id=EOS_ID,
        pad_id=PAD_ID,
        control_symbols=[MASK_NAMES[0]],  # no text encodes to it; the objective mlm needs it
        # With these options nothing is lost: decode(encode(text)) == text.
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        max_sentencepiece_length=LONGEST_PIECE_CHARS,
        max_sentence_length=_LINE_BYTES,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _sample(gathered: Gathered, work: Path) -> Iterator[str]:
    """The texts of the tokenizer's sample."""
    times, below, _ = np.array(gathered.sample, np.uint64).T
    for number in range(len(gathered.parts)):
        path = part_path(work, number)
        order, split, _, source = read_digests(path).T
        copies = (times[source] + (order < below[source])) * (split >= gathered.heldout_below)
        if copies.any():
            for text, count in zip(read_part(path).texts, copies.tolist(), strict=True):
                yield from repeat(text, count)


def _trainer_lines(gathered: Gathered, work: Path) -> Iterator[str]:
    """The lines of the sample, each with the newlines that follow it.

    A space at the end keeps the trainer from stripping these newlines. It is a separate word, so it enters no piece.
    """
    for text in _sample(gathered, work):
        for line in _LINES.findall(text):
            for start in range(0, len(line), _LINE_CHARS):
                yield line[start : start + _LINE_CHARS] + " "
