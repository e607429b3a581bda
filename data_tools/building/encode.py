"""The third step of a preparation: tokenize the parts in parallel processes.

The tokens of each part are written to a file tokens-00000.npz, which is either complete or absent:

    tokens     [tokens of all its documents], uint16 or uint32
    starts     int64 [documents + 1], where each document begins in `tokens`
    documents  int64 [documents, 3]: source index, text bytes, 1 where held out
    order      uint64 [documents]
    text       JSON: ids of all documents, and the held-out documents as they are written to documents.jsonl.gz

and for dialogues, the tokens to be predicted:

    targets        int64 [2 n], start, stop, start, stop, ... of the targets in `tokens`
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

from data_tools.building.gather import Gathered, json_array, part_path, read_digests, read_part, save_arrays
from data_tools.config import DocumentFormat
from data_tools.progress import stage
from data_tools.reading import dialogue
from pretrain.corpus.chat import ASSISTANT, encode_dialogue
from pretrain.corpus.manifest import token_dtype
from pretrain.corpus.tokenizer import Tokenizer


class WorkerDiedError(RuntimeError):
    """A process that tokenizes ended without an error message."""


@dataclass(frozen=True, slots=True)
class EncodedPart:
    """One tokenized part in memory."""

    tokens: np.ndarray
    """Tokens of all documents, as in the file."""
    starts: np.ndarray
    """Offset of each document in `tokens`, and the end."""
    documents: np.ndarray
    """Source index, text bytes and held-out flag of each document."""
    order: np.ndarray
    """Hash that decides the position of each document."""
    ids: list[str]
    """Id of each document."""
    heldout: list[dict[str, Any]]
    """Fields of each held-out document in documents.jsonl.gz, without id and source."""
    targets: np.ndarray | None = None
    """Starts and stops of the targets in `tokens`; None without a loss mask."""
    target_starts: np.ndarray | None = None
    """Offset of each document in `targets`, and the end."""
    target_bytes: np.ndarray | None = None
    """UTF-8 bytes of the text of each document's targets."""


@dataclass(frozen=True, slots=True)
class _Job:
    text: Path
    tokens: Path
    tokenizer: Path
    heldout_below: int
    format: DocumentFormat


_tokenizers: dict[Path, Tokenizer] = {}  # one per file, loaded in this process


def tokens_path(work: Path, number: int) -> Path:
    """Path of the tokens of a part."""
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
    """Tokenize the parts that have no tokens yet. Raises WorkerDiedError."""
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
    """Run all jobs, and yield the number of each when it is done."""
    if workers <= 1:
        for number, job in jobs.items():
            _encode_part(job)
            yield number
        return
    context = multiprocessing.get_context(
        "spawn"
    )  # a fork would copy locks that threads of this process hold
    resource_tracker.ensure_running()  # starting it later would unblock Ctrl-C
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
                "a process that tokenizes was killed, most often for lack of memory; run the same command again to "
                "continue, perhaps with fewer workers="
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _holding_interrupts() -> Iterator[None]:
    """Block Ctrl-C while processes are started. They never receive it, because their parent handles it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker() -> None:
    """Make this process end when its parent does, however it ends."""
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
    part = read_part(job.text)
    order, split, text_bytes, source = read_digests(job.text).T
    is_heldout = split < job.heldout_below
    if job.format is DocumentFormat.chat:
        texts, arrays = _encode_dialogues(tokenizer, part.texts)
        heldout = list(compress(texts, is_heldout))
    else:
        encoded = tokenizer.encode_documents(part.texts)
        arrays = {"tokens": encoded.tokens, "starts": encoded.starts}
        heldout = [{"text": text} for text in compress(part.texts, is_heldout)]
    for fields, language in zip(heldout, compress(part.languages, is_heldout), strict=True):
        if language:
            fields["language"] = language
    save_arrays(
        job.tokens,
        **arrays,
        documents=np.column_stack([source, text_bytes, is_heldout]).astype(np.int64),
        order=order,
        text=json_array({"ids": part.ids, "heldout": heldout}),
    )


def _encode_dialogues(
    tokenizer: Tokenizer, dialogues: list[str]
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Encode dialogues. Returns the fields of the held-out documents, and the arrays of tokens and targets."""
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
