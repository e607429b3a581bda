"""How a dialogue is written as tokens: the one template of fine-tuning data and of prompts to a fine-tuned model.

    [bos] user⏎ What is a shard? [eos] assistant⏎ A tar file. [eos] user⏎ ...

Every turn is a marker, its role as a line of ordinary text, then its content and eos. A marker is one only where it
follows bos or eos, which no text encodes to: what a user writes cannot pass for another turn. Markers and contents are
encoded one by one, so a prompt has the tokens that the dialogue had in training.
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
    """Of ROLES."""
    content: str


class EncodedDialogue(NamedTuple):
    """A dialogue as a document of a corpus."""

    tokens: list[int]
    targets: list[int]
    """[start, stop, start, stop, ...]: what the model is to learn, the assistant's contents and the eos after each."""


def marker(role: str) -> str:
    """The text that begins a turn."""
    return f"{role}\n"


def encode_dialogue(tokenizer: Tokenizer, messages: Iterable[Message]) -> EncodedDialogue:
    """The tokens of all turns, and which of them are to be predicted."""
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
