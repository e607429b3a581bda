"""Questions as tokens, as plain text or as a dialogue, cut on the left to what the model reads at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pretrain.corpus.chat import ASSISTANT, USER, Chat
from pretrain.corpus.chat_template import DialogueError
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.errors import ConfigError
from pretrain.evaluate.tasks.likelihood import Request
from pretrain.evaluate.tasks.questions import Question


class CannotEncodeError(Exception):
    """Carries why a question cannot be put to this model."""


@dataclass
class Encoder:
    """Writes questions for one model. It counts what it cut."""

    tokenizer: Tokenizer
    sequence_length: int
    """Number of tokens that the model reads at once."""
    separator: str
    """What stands between a solved example and the next prompt."""
    clean: Callable[[str], str]
    chat: Chat | None = None
    """Writes the prompt as the user's turn of a dialogue; None writes plain text that begins a document."""
    n_truncated: int = 0
    """Number of questions whose beginning was cut off."""

    def choices(self, question: Question) -> list[Request]:
        """A request for each choice of a question. Raises CannotEncodeError."""
        pairs = [self._with(question, choice) for choice in question.choices]
        for choice, (_, answer) in zip(question.choices, pairs, strict=True):
            if not answer or self.tokenizer.unk_id in answer:
                raise CannotEncodeError(f"has the choice {choice!r}, which the tokenizer cannot encode")
            if len(answer) > self.sequence_length:
                raise CannotEncodeError(
                    f"has a choice of {len(answer)} tokens, and the model reads {self.sequence_length}"
                )
        if len({tuple(context + answer) for context, answer in pairs}) < len(pairs):
            raise CannotEncodeError("has two choices with the same tokens")
        # The first token that is read is never predicted.
        self.n_truncated += any(len(context + answer) > self.sequence_length + 1 for context, answer in pairs)
        return [
            Request((context + answer)[-self.sequence_length - 1 :], len(answer)) for context, answer in pairs
        ]

    def prompt(self, question: Question, max_new_tokens: int) -> list[int]:
        """The tokens after which the model writes its answer. Raises CannotEncodeError."""
        room = self.sequence_length - max_new_tokens
        if room < 1:
            raise ConfigError(
                f"max_new_tokens: {max_new_tokens} leaves no room for a prompt, since the model reads "
                f"{self.sequence_length} tokens; use a smaller number"
            )
        tokens = self._dialogue(question) if self.chat is not None else self._begun(self._text(question))
        self.n_truncated += len(tokens) > room
        return tokens[-room:]

    def _with(self, question: Question, choice: str) -> tuple[list[int], list[int]]:
        """The tokens of the prompt and those that the choice adds."""
        if self.chat is not None:
            return self._dialogue(question), self.tokenizer.encode(choice.strip())  # as templates trim it
        text = self._text(question)
        # Most tokenizers join a space to the word after it, so it belongs to the choice; lm-eval does the same.
        prompt = text.rstrip()
        context, whole = self._begun(prompt), self._begun(self.clean(text + choice))
        return context, whole[len(context) :]

    def _begun(self, text: str) -> list[int]:
        return [self.tokenizer.bos_id, *self.tokenizer.encode(text)]

    def _text(self, question: Question) -> str:
        shown = [example.prompt + example.answer + self.separator for example in question.examples]
        return self.clean("".join(shown) + question.prompt)

    def _dialogue(self, question: Question) -> list[int]:
        assert self.chat is not None
        turns = [
            {"role": role, "content": text}
            for example in question.examples
            for role, text in ((USER, example.prompt), (ASSISTANT, example.answer))
        ]
        try:
            return self.chat.encode_prompt([*turns, {"role": USER, "content": question.prompt}])
        except DialogueError as error:
            raise CannotEncodeError(str(error)) from error
