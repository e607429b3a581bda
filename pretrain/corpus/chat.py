"""The chat template: how a dialogue is written as tokens, in fine-tuning data and in prompts to a fine-tuned model.

    [bos] user⏎ What is a shard? [eos] assistant⏎ A tar file. [eos] user⏎ ...

Every turn is a marker (its role as a line of ordinary text), then its content, then eos. Text counts as a marker only
directly after bos or eos, and no text encodes to those, so a user's text cannot pass for another turn. Markers and
contents are encoded separately, so a prompt gets the same tokens as the dialogue had in training.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from pretrain.corpus.tokenizer import Tokenizer

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROLES = (SYSTEM, USER, ASSISTANT)


class Message(NamedTuple):
    """One turn of a dialogue."""

    role: str
    """One of ROLES."""
    content: str


class EncodedDialogue(NamedTuple):
    """A dialogue as a document of a corpus."""

    tokens: list[int]
    targets: list[int]
    """[start, stop, ...]: the tokens that count in the loss, which are the content and eos of each assistant turn."""


def marker(role: str) -> str:
    """The text that starts a turn of this role."""
    return f"{role}\n"


def encode_dialogue(tokenizer: Tokenizer, messages: Iterable[Message]) -> EncodedDialogue:
    """The tokens of all turns, and which of them count in the loss."""
    tokens, targets = [tokenizer.bos_id], []
    for message in messages:
        tokens += tokenizer.encode(marker(message.role))
        start = len(tokens)
        tokens += [*tokenizer.encode(message.content), tokenizer.eos_id]
        if message.role == ASSISTANT:
            targets += [start, len(tokens)]
    return EncodedDialogue(tokens, targets)


def encode_prompt(tokenizer: Tokenizer, messages: Iterable[Message]) -> list[int]:
    """The tokens after which a model writes the assistant's next turn, up to eos."""
    return encode_dialogue(tokenizer, messages).tokens + tokenizer.encode(marker(ASSISTANT))
