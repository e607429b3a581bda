"""Third stage: tokenize the parts, several at a time in processes of their own.

Each part gives tokens-00000.npz, complete or absent:

    tokens     [tokens of all its documents], uint16 or uint32
    starts     int64 [documents + 1], where each document begins in `tokens`
    documents  int64 [documents, 3]: source index, text bytes, whether held out
    order      uint64 [documents]
    text       JSON: ids of all documents, and the held-out ones as they stand in documents.jsonl.gz

and, of dialogues, what is to be predicted:

    targets        int64 [2 n], where targets start and stop in `tokens`, in turn
    target_starts  int64 [documents + 1], where each document begins in `targets`
    target_bytes   int64 [documents], UTF-8 bytes of the targets' text
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.building.gather import Gathered, json_array, part_path, read_part, save_arrays
from data_tools.config import DocumentFormat
from data_tools.progress import stage
from data_tools.reading import dialogue
from pretrain.corpus.chat import ASSISTANT, encode_dialogue
from pretrain.corpus.manifest import token_dtype
from pretrain.corpus.tokenizer import Tokenizer


class WorkerDiedError(RuntimeError):
    """A process that tokenizes has ended without a word."""


@dataclass(frozen=True, slots=True)
class EncodedPart:
    """One tokenized part in memory."""

    tokens: np.ndarray
    starts: np.ndarray
    documents: np.ndarray
    order: np.ndarray
    ids: list[str]
    heldout: list[dict[str, Any]]
    """Of each held-out document, what documents.jsonl.gz has beside id and source."""
    targets: np.ndarray | None = None
    target_starts: np.ndarray | None = None
    target_bytes: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class _Job:
    text: Path
    tokens: Path
    tokenizer: Path
    heldout_below: int
    format: DocumentFormat


_tokenizers: dict[Path, Tokenizer] = {}  # of this process


def tokens_path(work: Path, number: int) -> Path:
    """The tokens of a part."""
    return work / f"tokens-{number:05d}.npz"


def load_encoded(path: Path) -> EncodedPart:
    """Read a tokenized part."""
    with np.load(path, allow_pickle=False) as saved:
        text = json.loads(saved["text"].tobytes())
        arrays = {name: saved[name] for name in saved.files if name != "text"}
    return EncodedPart(**arrays, ids=text["ids"], heldout=text["heldout"])


def encode_parts(
    gathered: Gathered, work: Path, tokenizer: Path, workers: int, format: DocumentFormat
) -> None:
    """Tokenize the parts that are not yet. Raises WorkerDiedError."""
    below = gathered.heldout_below
    jobs = {
        number: _Job(part_path(work, number), tokens_path(work, number), tokenizer, below, format)
        for number in range(len(gathered.parts))
    }
    missing = {number: job for number, job in jobs.items() if not job.tokens.exists()}
    with stage("tokenizing", sum(gathered.parts)) as progress:
        progress.skip(sum(size for number, size in enumerate(gathered.parts) if number not in missing))
        for number in _run(missing, min(workers, len(missing))):
            progress.advance(gathered.parts[number])


def _run(jobs: dict[int, _Job], workers: int) -> Iterator[int]:
    """Do all jobs, and give the number of each when it is done."""
    if workers <= 1:
        for number, job in jobs.items():
            _encode_part(job)
            yield number
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy this process's threads' locks
    resource_tracker.ensure_running()  # started later, with the first process, it would let Ctrl-C through
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker) as pool:
        try:
            running: dict[Future[None], int] = {}
            waiting = iter(jobs.items())
            while True:
                while len(running) < 2 * workers and (following := next(waiting, None)):
                    with _holding_interrupts():
                        future = pool.submit(_encode_part, following[1])
                    running[future] = following[0]
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    future.result()
                    yield running.pop(future)
        except BrokenProcessPool as error:
            raise WorkerDiedError(
                "a process that tokenizes was ended, most often for lack of memory; the same command goes on from "
                "here, perhaps with fewer workers="
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _holding_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back for a moment. A process started meanwhile never gets it: its parent sees to that."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker() -> None:
    """End with the parent, however it ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _encode_part(job: _Job) -> None:
    tokenizer = _tokenizers.get(job.tokenizer)
    if tokenizer is None:
        tokenizer = _tokenizers[job.tokenizer] = Tokenizer.trusted(job.tokenizer)
    documents = list(read_part(job.text))
    if job.format is DocumentFormat.chat:
        texts, arrays = _encode_dialogues(tokenizer, [document.text for document in documents])
    else:
        texts = [{"text": document.text} for document in documents]
        encoded = tokenizer.encode_documents([document.text for document in documents])
        arrays = {"tokens": encoded.tokens, "starts": encoded.starts}
    heldout = [document.split < job.heldout_below for document in documents]
    rows = [
        (document.source, len(text["text"].encode()), held_out)
        for document, text, held_out in zip(documents, texts, heldout, strict=True)
    ]
    for document, text in zip(documents, texts, strict=True):
        if document.language:
            text["language"] = document.language
    content = {
        "ids": [document.id for document in documents],
        "heldout": list(compress(texts, heldout)),
    }
    save_arrays(
        job.tokens,
        **arrays,
        documents=np.array(rows, dtype=np.int64),
        order=np.array([document.order for document in documents], dtype=np.uint64),
        text=json_array(content),
    )


def _encode_dialogues(
    tokenizer: Tokenizer, dialogues: list[str]
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Texts and messages, and the arrays of tokens and targets."""
    all_messages = [dialogue.load(text) for text in dialogues]
    encoded = [encode_dialogue(tokenizer, messages) for messages in all_messages]
    starts = np.cumsum([0, *(len(one.tokens) for one in encoded)], dtype=np.int64)
    targets = [np.array(one.targets, np.int64) + start for one, start in zip(encoded, starts, strict=False)]
    target_bytes = [
        sum(len(message.content.encode()) for message in messages if message.role == ASSISTANT)
        for messages in all_messages
    ]
    texts = [
        {"text": dialogue.plain(messages), "messages": [message._asdict() for message in messages]}
        for messages in all_messages
    ]
    dtype = token_dtype(tokenizer.vocab_size)
    return texts, {
        "tokens": np.concatenate([np.array(one.tokens, dtype) for one in encoded]),
        "starts": starts,
        "targets": np.concatenate(targets),
        "target_starts": np.cumsum([0, *map(len, targets)], dtype=np.int64),
        "target_bytes": np.array(target_bytes, dtype=np.int64),
    }
