"""Turns a continuation's tokens into text as they arrive, and stops at given texts."""

from __future__ import annotations

from collections.abc import Sequence

from pretrain.corpus.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not, or not yet, a character
_CONTEXT_TOKENS = 16


class TextStream:
    """The text of one continuation.

    The pieces that `add` and `finish` return are, put together, `Tokenizer.decode_after` of the prompt and all tokens,
    up to the one of the texts in `stop` that is complete first. A piece is given out once later tokens cannot change
    it: bytes of an incomplete character and what may be the beginning of a text to stop at are held back.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self._given = list(prompt[-_CONTEXT_TOKENS:])
        """Tokens whose text is complete; only the last of them, which give a decoder its context."""
        self._pending: list[int] = []
        self._held = ""
        self.stopped = False
        """Whether the text has reached one of the texts to stop at."""

    def add(self, token: int) -> str:
        """The text that is certain after one more token."""
        self._pending.append(token)
        text = self._tokenizer.decode_after(self._given, self._pending)
        if text.endswith(_REPLACEMENT):
            return ""
        self._given = [*self._given, *self._pending][-_CONTEXT_TOKENS:]
        self._pending = []
        return self._until_stop(text)

    def finish(self) -> str:
        """The text that is left after the last token."""
        if self.stopped:
            return ""
        text = self._tokenizer.decode_after(self._given, self._pending) if self._pending else ""
        piece = self._until_stop(text)
        rest, self._held = self._held, ""
        return piece + rest

    def _until_stop(self, text: str) -> str:
        text = self._held + text
        # The one that is complete first counts, however the text is cut into pieces.
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        n_held = max(
            (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
        )
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]
