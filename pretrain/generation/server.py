"""A small HTTP server for trying a model: OpenAI-style completions and chat completions, with streaming.

    GET  /health                 {"status": "ok"}
    GET  /v1/models              the one model
    POST /v1/completions         continues texts
    POST /v1/chat/completions    writes what the assistant says next

What the network sends is bounded: bodies, prompts, texts per request, and requests that wait. Bodies must be declared
as JSON and the Host header must be one of ours, so that a web page that the user visits cannot use the server.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, StreamingResponse
from starlette.responses import Response as HttpResponse
from starlette.routing import Route

from pretrain.corpus.chat import Chat
from pretrain.corpus.chat_template import DialogueError
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.generation.batch import Ending, Prompt
from pretrain.generation.protocol import ChatBody, CompletionBody, Response
from pretrain.generation.sampling import Sampling
from pretrain.generation.service import BusyError, Request, Service
from pretrain.generation.writer import Answer, prompt_seed

MAX_BODY_BYTES = 1 << 20
DEFAULT_NEW_TOKENS = 128
_END = object()
Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True, kw_only=True)
class Served:
    """What the server offers."""

    name: str
    """Name of the model in responses."""
    tokenizer: Tokenizer
    chat: Chat
    """What writes dialogues."""
    context_tokens: int
    """Largest number of tokens of a prompt and its continuation together."""
    max_new_tokens: int
    """Largest number of tokens in a continuation."""
    clean: Callable[[str], str]
    """Brings a prompt into the form of training text."""


@dataclass
class Text:
    """One of the texts that a request asks for, while it is written."""

    prompt: Prompt
    before: str = ""
    """Text that is sent before what is written."""
    answer: Answer | None = None
    is_cancelled: bool = False


def build_app(service: Service, served: Served, hosts: list[str]) -> Starlette:
    """The server's application. Requests whose Host header is none of `hosts` are refused."""
    handlers = _Handlers(service, served)
    return Starlette(
        routes=[
            Route("/health", handlers.health),
            Route("/v1/models", handlers.models),
            Route("/v1/completions", handlers.complete, methods=["POST"]),
            Route("/v1/chat/completions", handlers.chat, methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)],
        exception_handlers={HTTPException: _on_http_error},
    )


def _on_http_error(request: HttpRequest, error: Exception) -> HttpResponse:
    assert isinstance(error, HTTPException)
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    body = {"error": {"message": error.detail, "type": kind, "param": None, "code": error.status_code}}
    return JSONResponse(body, error.status_code, headers=error.headers)


class _Handlers:
    def __init__(self, service: Service, served: Served) -> None:
        self._service, self._served = service, served
        self._started_s = int(time.time())

    async def health(self, request: HttpRequest) -> HttpResponse:
        return JSONResponse({"status": "ok"})

    async def models(self, request: HttpRequest) -> HttpResponse:
        model = {
            "id": self._served.name,
            "object": "model",
            "created": self._started_s,
            "owned_by": "pretrain",
        }
        return JSONResponse({"object": "list", "data": [model]})

    async def complete(self, request: HttpRequest) -> HttpResponse:
        body = await _parsed(request, CompletionBody)
        tokenizer = self._served.tokenizer
        texts = []
        for prompt in map(self._served.clean, body.prompts):
            tokens = [tokenizer.bos_id, *tokenizer.encode(prompt)]
            texts += self._texts(
                tokens, body, body.max_tokens, end_ids={tokenizer.eos_id}, before=prompt if body.echo else ""
            )
        return await self._answer(request, texts, body, is_chat=False)

    async def chat(self, request: HttpRequest) -> HttpResponse:
        body = await _parsed(request, ChatBody)
        served = self._served
        turns = [{"role": turn.role, "content": served.clean(turn.content)} for turn in body.messages]
        try:
            tokens = served.chat.encode_prompt(turns)
        except DialogueError as error:
            raise HTTPException(400, f"the dialogue {error}") from error
        asked = body.max_completion_tokens or body.max_tokens
        texts = self._texts(tokens, body, asked, end_ids=served.chat.end_ids)
        return await self._answer(request, texts, body, is_chat=True)

    def _texts(
        self,
        tokens: list[int],
        body: CompletionBody | ChatBody,
        asked: int | None,
        *,
        end_ids: Collection[int],
        before: str = "",
    ) -> list[Text]:
        """The texts to write after one prompt."""
        served = self._served
        left = served.context_tokens - len(tokens)
        limit = min(left, served.max_new_tokens)
        if left < 1 or (asked is not None and asked > limit):
            raise HTTPException(
                400,
                f"the prompt has {len(tokens)} tokens and max_tokens is {asked}, but the model takes "
                f"{served.context_tokens} tokens in all, of which it may write {served.max_new_tokens}",
            )
        sampling = Sampling(
            repetition_penalty=body.repetition_penalty,
            temperature=body.temperature,
            top_k=body.top_k,
            top_p=body.top_p,
            min_p=body.min_p,
        )
        seed = secrets.randbits(63) if body.seed is None else body.seed
        return [
            Text(
                Prompt(
                    tokens=tokens,
                    max_new_tokens=asked or min(limit, DEFAULT_NEW_TOKENS),
                    sampling=sampling,
                    seed=prompt_seed(seed, tokens, number),
                    end_ids=end_ids,
                ),
                before,
            )
            for number in range(body.n)
        ]

    async def _answer(
        self, request: HttpRequest, texts: list[Text], body: CompletionBody | ChatBody, is_chat: bool
    ) -> HttpResponse:
        identity = f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        response = Response(identity, int(time.time()), self._served.name, is_chat)
        pieces = self._written(texts, body.stops)
        if body.stream:
            events = _events(pieces, texts, response, body.with_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        found = [[text.before] for text in texts]
        async for index, piece in pieces:
            found[index].append(piece)
            if await request.is_disconnected():
                _cancel(texts)
        if any(text.answer is None for text in texts):
            raise HTTPException(500, "the text could not be written; the server's log says why")
        return JSONResponse(response.whole([*map("".join, found)], [*map(_ending, texts)], _usage(texts)))

    def _written(self, texts: list[Text], stops: list[str]) -> AsyncIterator[tuple[int, str]]:
        """Queue the texts, and return their pieces as they are written. Raises HTTPException if too many wait."""
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

        def send(index: int, what: object) -> bool:
            try:
                loop.call_soon_threadsafe(arrived.put_nowait, (index, what))
            except RuntimeError:  # the server has ended
                return False
            return not texts[index].is_cancelled

        def request(index: int, text: Text) -> Request:
            def end(answer: Answer | None) -> None:
                text.answer = answer
                send(index, _END)

            return Request(
                prompt=text.prompt, stop=stops, on_text=lambda piece: send(index, piece), on_end=end
            )

        try:
            self._service.submit([request(index, text) for index, text in enumerate(texts)])
        except BusyError as error:
            raise HTTPException(
                429, "too many requests are waiting; try again in a few seconds", {"Retry-After": "5"}
            ) from error
        return _until_all_end(arrived, len(texts))


async def _until_all_end(
    arrived: asyncio.Queue[tuple[int, Any]], n_open: int
) -> AsyncIterator[tuple[int, str]]:
    while n_open:
        index, what = await arrived.get()
        if what is _END:
            n_open -= 1
        elif what:
            yield index, what


async def _events(
    pieces: AsyncIterator[tuple[int, str]], texts: list[Text], response: Response, with_usage: bool
) -> AsyncIterator[str]:
    """The server-sent events of a stream."""

    def event(content: object) -> str:
        return f"data: {json.dumps(content)}\n\n"

    try:
        for index, text in enumerate(texts):
            yield event(response.piece(index, text.before, first=True))
        async for index, piece in pieces:
            yield event(response.piece(index, piece))
        if any(text.answer is None for text in texts):
            yield event({"error": {"message": "the text could not be written", "type": "server_error"}})
            return
        for index, text in enumerate(texts):
            yield event(response.piece(index, "", _ending(text)))
        if with_usage:
            yield event(response.usage(_usage(texts)))
        yield "data: [DONE]\n\n"
    finally:
        _cancel(texts)


def _cancel(texts: list[Text]) -> None:
    for text in texts:
        text.is_cancelled = True


def _ending(text: Text) -> str:
    assert text.answer is not None
    return "stop" if text.answer.ending is Ending.STOP else "length"


def _usage(texts: list[Text]) -> dict[str, int]:
    prompts = sum(len(text.prompt.tokens) for text in texts)
    written = sum(len(text.answer.tokens) for text in texts if text.answer is not None)
    return {"prompt_tokens": prompts, "completion_tokens": written, "total_tokens": prompts + written}


async def _parsed(request: HttpRequest, kind: type[Body]) -> Body:
    """The body of a request. Raises HTTPException where it is too long, no JSON, or has other fields."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "the body must be declared as JSON: content-type: application/json")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body has more than {MAX_BODY_BYTES:,} bytes")
    try:
        return kind.model_validate_json(bytes(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise HTTPException(400, f"{place}: {first['msg']}" if place else first["msg"]) from error
