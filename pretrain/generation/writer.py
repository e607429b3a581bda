"""Writes text with a model: prompts and dialogues in, continuations out, in batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from pretrain.corpus.chat import SYSTEM, USER, Chat, Message
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.generation.batch import Batch, Continuation, Ending, Prompt
from pretrain.generation.sampling import Sampling
from pretrain.generation.text import TextStream
from pretrain.model.decoder import Decoder

OnText = Callable[[str], bool]
"""Called with each new piece of a text, which may be empty. Returns False if nobody wants the rest."""


@dataclass(frozen=True)
class Answer:
    """The continuation of one prompt."""

    text: str
    tokens: list[int]
    """The generated tokens. They may go on after the text, up to the end of the text at which it stopped."""
    ending: Ending


class Writer:
    """A model, its tokenizer, and how the next tokens are chosen."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        sampling: Sampling,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        seed: int = 0,
        chat: Chat | None = None,
        system: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self._model, self._sampling, self._stop, self._seed = model, sampling, stop, seed
        self._chat = chat
        self._system: list[Message] = [] if system is None else [{"role": SYSTEM, "content": system}]

    def after(self, text: str, number: int = 0) -> Prompt:
        """A prompt for the `number`-th continuation of a text, which begins a document."""
        return self._prompt(
            [self.tokenizer.bos_id, *self.tokenizer.encode(text)], number, {self.tokenizer.eos_id}
        )

    def answer_to(self, said: str | Sequence[Message], number: int = 0) -> Prompt:
        """A prompt for what the assistant says after a user's text, or after the turns of a dialogue.

        Needs `chat`. Raises DialogueError where the chat template refuses the turns.
        """
        assert self._chat is not None
        turns = [{"role": USER, "content": said}] if isinstance(said, str) else said
        tokens = self._chat.encode_prompt([*self._system, *turns])
        return self._prompt(tokens, number, self._chat.end_ids)

    def _prompt(self, tokens: list[int], number: int, end_ids: Collection[int]) -> Prompt:
        return Prompt(
            tokens=tokens,
            max_new_tokens=self.max_new_tokens,
            sampling=self._sampling,
            seed=prompt_seed(self._seed, tokens, number),
            end_ids=end_ids,
        )

    def write(
        self,
        prompts: Sequence[Prompt],
        progress: Callable[[int], None] | None = None,
        on_text: OnText | None = None,
    ) -> list[Answer]:
        """Continue all prompts in one batch; `on_text` gets the pieces of the first one."""
        wanted = [(prompt, self._stop, on_text if n == 0 else None) for n, prompt in enumerate(prompts)]
        return write(self._model, self.tokenizer, wanted, progress)


def write(
    model: Decoder,
    tokenizer: Tokenizer,
    requests: Sequence[tuple[Prompt, Sequence[str], OnText | None]],
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Continue prompts in one batch. Each comes with the texts to stop at, and with what takes its pieces of text.

    `progress` is called after each step with the number of rows that got a token.
    """
    batch = Batch(model, [prompt for prompt, _, _ in requests], tokenizer.vocab_size)
    streams = [TextStream(tokenizer, prompt.tokens, stop) for prompt, stop, _ in requests]
    pieces: list[list[str]] = [[] for _ in requests]
    while batch.open_rows:
        rows = batch.step()
        for number in rows:
            row, on_text = batch.rows[number], requests[number][2]
            piece = _next_piece(row, streams[number])
            pieces[number].append(piece)
            if on_text is not None and not on_text(piece) and row.ending is None:
                row.ending = Ending.CANCELLED
        if progress is not None:
            progress(len(rows))
    return [
        Answer("".join(found), row.tokens, row.ending or Ending.CANCELLED)
        for found, row in zip(pieces, batch.rows, strict=True)
    ]


def _next_piece(row: Continuation, stream: TextStream) -> str:
    """The text that a row's newest token adds. Ends the row where that reaches a text to stop at."""
    piece = "" if row.ending is Ending.STOP else stream.add(row.tokens[-1])
    if row.ending is not None:
        piece += stream.finish()
    if stream.stopped:
        row.ending = Ending.STOP
    return piece


def prompt_seed(seed: int, tokens: Sequence[int], number: int) -> int:
    """Seed of the `number`-th continuation of a prompt. It does not depend on the other prompts."""
    digest = hashlib.sha256(f"{seed}:{number}:{list(tokens)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
