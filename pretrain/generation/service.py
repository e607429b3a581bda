"""Answers requests for text one batch at a time, in a thread of its own, with a bounded queue."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pretrain.corpus.tokenizer import Tokenizer
from pretrain.generation.batch import Prompt
from pretrain.generation.writer import Answer, OnText, write
from pretrain.model.decoder import Decoder
from pretrain.printing import print_error


class BusyError(Exception):
    """As many requests wait as are allowed."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One text to write. The functions are called by the service's thread, `on_end` last and exactly once."""

    prompt: Prompt
    stop: Sequence[str]
    on_text: OnText
    on_end: Callable[[Answer | None], None]
    """Called with the answer, or with None where it failed or was cancelled before it began."""


class Service:
    """Writes texts for requests that arrive at any time.

    The thread takes what waits, up to `batch_sequences` requests, and the next ones when that batch has ended.
    """

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, *, batch_sequences: int, max_waiting: int
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._batch_sequences, self._max_waiting = batch_sequences, max_waiting
        self._waiting: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="service", daemon=True)
        self._lock = threading.Lock()
        self._n_waiting = 0
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests, all or none. Raises BusyError where that would be more than may wait."""
        with self._lock:
            if self._n_waiting + len(requests) > self._max_waiting:
                raise BusyError
            self._n_waiting += len(requests)
        for request in requests:
            self._waiting.put(request)

    def close(self) -> None:
        """End the thread after the batch that it is writing."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch = [first]
            while len(batch) < self._batch_sequences:
                try:
                    following = self._waiting.get_nowait()
                except queue.Empty:
                    break
                if following is None:
                    self._waiting.put(None)
                    break
                batch.append(following)
            with self._lock:
                self._n_waiting -= len(batch)
            self._answer(batch)

    def _answer(self, batch: list[Request]) -> None:
        wanted = [request for request in batch if request.on_text("")]  # the others have been cancelled
        answers: list[Answer] = []
        try:
            if wanted:
                rows = [(request.prompt, request.stop, request.on_text) for request in wanted]
                answers = write(self._model, self._tokenizer, rows)
        except Exception as error:  # such as too little memory: the next batch may be smaller
            print_error("error", f"a batch of {len(wanted)} requests failed: {type(error).__name__}: {error}")
        found = dict(zip(map(id, wanted), answers, strict=False))
        for request in batch:
            request.on_end(found.get(id(request)))
