"""The bodies of the HTTP server's requests and responses, in the form of OpenAI's completions and chat completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MaxLen, MinLen
from pydantic import BaseModel, ConfigDict

MAX_CHOICES = 16
"""Largest number of texts that one request may ask for."""
MAX_STOPS = 16

Stop = Annotated[str, MinLen(1), MaxLen(1000)]


class _Body(BaseModel):
    """Fields that both kinds of request have. A field that is not known is refused, since it would have no effect."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    """Ignored: the server has one model."""
    user: str | None = None
    """Ignored."""
    max_tokens: Annotated[int, Ge(1)] | None = None
    temperature: Annotated[float, Ge(0), Le(100)] = 1.0
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    top_k: Annotated[int, Ge(1)] | None = None
    min_p: Annotated[float, Ge(0), Le(1)] = 0.0
    repetition_penalty: Annotated[float, Gt(0), Le(100)] = 1.0
    n: Annotated[int, Ge(1), Le(MAX_CHOICES)] = 1
    stop: Stop | Annotated[list[Stop], MaxLen(MAX_STOPS)] | None = None
    seed: Annotated[int, Ge(0), Le(2**63 - 1)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> list[str]:
        """The texts to stop at."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class StreamOptions(BaseModel):
    """What a stream has besides the text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class CompletionBody(_Body):
    """The body of POST /v1/completions."""

    prompt: str | Annotated[list[str], MinLen(1), MaxLen(MAX_CHOICES)] = ""
    echo: bool = False

    @property
    def prompts(self) -> list[str]:
        """The texts to continue."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class ChatMessage(BaseModel):
    """One turn of a dialogue."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "user", "assistant"]
    content: str


class ChatBody(_Body):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], MinLen(1), MaxLen(1000)]
    max_completion_tokens: Annotated[int, Ge(1)] | None = None
    """The newer name of `max_tokens`."""


class Response:
    """Writes the responses to one request: the whole one, and the pieces of a stream."""

    def __init__(self, identity: str, created_s: int, model: str, is_chat: bool) -> None:
        self._head = {"id": identity, "created": created_s, "model": model}
        self._is_chat = is_chat

    def whole(self, texts: list[str], endings: list[str], usage: dict[str, int]) -> dict[str, Any]:
        """The response that holds all texts."""
        choices = [
            {"index": index, "finish_reason": ending, "logprobs": None, **self._content(text)}
            for index, (text, ending) in enumerate(zip(texts, endings, strict=True))
        ]
        kind = "chat.completion" if self._is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": usage}

    def piece(self, index: int, text: str, ending: str | None = None, first: bool = False) -> dict[str, Any]:
        """One event of a stream: more of one text, and why it has ended."""
        choice: dict[str, Any] = {"index": index, "finish_reason": ending, "logprobs": None}
        if self._is_chat:
            role = {"role": "assistant"} if first else {}
            choice["delta"] = {**role, "content": text} if text or first else {}
        else:
            choice["text"] = text
        return {**self._event(), "choices": [choice]}

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last event of a stream that was asked for with `include_usage`."""
        return {**self._event(), "choices": [], "usage": usage}

    def _event(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk" if self._is_chat else "text_completion"}

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
