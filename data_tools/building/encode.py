"""The third step of a preparation: tokenize the parts in parallel processes.

The tokens of each part are written to a file tokens-00000.npz, which is either complete or absent:

    tokens     [tokens of all its documents], uint16 or uint32
    starts     int64 [documents + 1], where each document begins in `tokens`
    documents  int64 [documents, 3]: source index, text bytes, 1 where held out
    order      uint64 [documents]
    text       JSON: ids of all documents, and the held-out documents as they are written to documents.jsonl.gz

and for dialogues and labeled documents, the tokens to be predicted:

    targets        int64 [2 n], start, stop, start, stop, ... of the targets in `tokens`
    target_starts  int64 [documents + 1], where each document begins in `targets`
    target_bytes   int64 [documents], UTF-8 bytes of the targets' text

Dialogues that cannot become tokens are left out of all of these, and counted in `text`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import compress
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.building.classes import encode_labeled
from data_tools.building.gather import (
    Gathered,
    PartTexts,
    check_bad,
    json_array,
    nothing_left,
    part_path,
    read_digests,
    read_part,
    save_arrays,
)
from data_tools.config import ChatConfig, Longer, PrepareConfig
from data_tools.progress import stage
from data_tools.reading import dialogue
from data_tools.reading.dialogue import Dialogue
from pretrain.corpus.chat import Chat, EncodedDialogue, SpecialTokenError
from pretrain.corpus.chat_template import CHAT_TEMPLATE_NAME, DialogueError, read_template
from pretrain.corpus.manifest import token_dtype
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.errors import ConfigError


class WorkerDiedError(RuntimeError):
    """A process that tokenizes ended without an error message."""


@dataclass(kw_only=True, slots=True)
class LeftOutDialogues:
    """Gathered dialogues that did not become tokens, or not as a whole."""

    dropped: dict[str, int] = field(default_factory=dict)
    """Their number by reason: bad_record, special_token, too_many_tokens, no_answer."""
    bytes: int = 0
    """UTF-8 bytes of their text."""
    heldout: int = 0
    """How many of them would have been held out."""
    problem: str = ""
    """A sentence on the first bad record."""
    cut: int = 0
    """Dialogues and labeled documents that were cut to the largest number of tokens; they are not among the others."""

    def add(self, other: LeftOutDialogues) -> None:
        for reason, count in other.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + count
        self.bytes += other.bytes
        self.heldout += other.heldout
        self.problem = self.problem or other.problem
        self.cut += other.cut


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
    left_out: LeftOutDialogues = field(default_factory=LeftOutDialogues)
    """What is not in this part, though it was gathered."""


@dataclass(frozen=True, slots=True)
class _Job:
    text: Path
    tokens: Path
    tokenizer: Path
    heldout_below: int
    chat: ChatConfig | None
    classes: list[str]
    """The classes of labeled documents."""
    max_tokens: int
    """Largest number of tokens of a labeled document."""


_tokenizers: dict[Path, Tokenizer] = {}  # one per file, loaded in this process
_chats: dict[Path, Chat] = {}


def tokens_path(work: Path, number: int) -> Path:
    """Path of the tokens of a part."""
    return work / f"tokens-{number:05d}.npz"


def load_encoded(path: Path) -> EncodedPart:
    """Read a tokenized part."""
    with np.load(path, allow_pickle=False) as saved:
        text = json.loads(saved["text"].tobytes())
        arrays = {name: saved[name] for name in saved.files if name != "text"}
    left_out = LeftOutDialogues(**text.get("left_out", {}))
    return EncodedPart(**arrays, ids=text["ids"], heldout=text["heldout"], left_out=left_out)


def encode_parts(
    gathered: Gathered,
    work: Path,
    tokenizer: Path,
    workers: int,
    chat: ChatConfig | None = None,
    max_tokens: int = 0,
) -> LeftOutDialogues:
    """Tokenize the parts that have no tokens yet, as dialogues where `chat` is given: their template lies beside the
    tokenizer. Labeled documents have at most `max_tokens` tokens. Returns what is left out of all parts. Raises
    WorkerDiedError, and ConfigError for a broken template."""
    below = gathered.heldout_below
    jobs = {
        number: _Job(
            part_path(work, number),
            tokens_path(work, number),
            tokenizer,
            below,
            chat,
            gathered.classes,
            max_tokens,
        )
        for number in range(len(gathered.parts))
    }
    missing = {number: job for number, job in jobs.items() if not job.tokens.exists()}
    with stage("tokenizing", sum(gathered.parts)) as progress:
        progress.skip(sum(size for number, size in enumerate(gathered.parts) if number not in missing))
        for number in _run(missing, min(workers, len(missing))):
            progress.advance(gathered.parts[number])
    total = LeftOutDialogues()
    for number in range(len(gathered.parts)) if chat is not None or gathered.classes else ():
        total.add(load_encoded(tokens_path(work, number)).left_out)
    return total


def take_out(config: PrepareConfig, gathered: Gathered, left_out: LeftOutDialogues) -> None:
    """Take dialogues that did not become tokens out of the counts. Raises ConfigError where none is left, or more are
    bad than the configuration allows."""
    funnel = gathered.funnel
    for reason, count in left_out.dropped.items():
        funnel.dropped[reason] = funnel.dropped.get(reason, 0) + count
    funnel.kept -= sum(left_out.dropped.values())
    funnel.kept_bytes -= left_out.bytes
    funnel.heldout -= left_out.heldout
    if gathered.classes:
        funnel.shortened = left_out.cut
    else:
        funnel.cut = left_out.cut
    if left_out.problem:
        check_bad(config, funnel, left_out.problem)
    if funnel.kept == funnel.heldout:
        raise ConfigError(nothing_left(config, funnel))


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
    part, left_out = read_part(job.text), LeftOutDialogues()
    order, split, text_bytes, source = read_digests(job.text).T
    is_heldout = split < job.heldout_below
    ids, languages = part.ids, part.languages
    if job.chat is not None:
        kept, texts, arrays = _encode_dialogues(job, tokenizer, part, is_heldout, left_out)
        ids, languages = list(compress(ids, kept)), list(compress(languages, kept))
        order, source, is_heldout = order[kept], source[kept], is_heldout[kept]
        text_bytes = np.array([len(text["text"].encode()) for text in texts], np.int64)
        heldout = list(compress(texts, is_heldout))
    elif job.classes:
        numbers = [job.classes.index(label) for label in part.labels]
        labeled = encode_labeled(tokenizer, part.texts, text_bytes, numbers, job.max_tokens)
        arrays, text_bytes, left_out.cut = labeled
        pairs = zip(part.texts, part.labels, strict=True)
        heldout = [{"text": text, "label": label} for text, label in compress(pairs, is_heldout)]
    else:
        encoded = tokenizer.encode_documents(part.texts)
        arrays = {"tokens": encoded.tokens, "starts": encoded.starts}
        heldout = [{"text": text} for text in compress(part.texts, is_heldout)]
    for fields, language in zip(heldout, compress(languages, is_heldout), strict=True):
        if language:
            fields["language"] = language
    content: dict[str, Any] = {"ids": ids, "heldout": heldout}
    if job.chat is not None or job.classes:
        content["left_out"] = asdict(left_out)
    save_arrays(
        job.tokens,
        **arrays,
        documents=np.column_stack([source, text_bytes, is_heldout]).astype(np.int64),
        order=order,
        text=json_array(content),
    )


def _encode_dialogues(
    job: _Job, tokenizer: Tokenizer, part: PartTexts, is_heldout: np.ndarray, left_out: LeftOutDialogues
) -> tuple[np.ndarray, list[dict[str, Any]], dict[str, np.ndarray]]:
    """Encode dialogues, and count what is left out.

    Returns which documents are left, the fields of each of these if it is held out, and the arrays of tokens and
    targets.
    """
    assert job.chat is not None
    chat = _chats.get(job.tokenizer)
    if chat is None:
        template = read_template(job.tokenizer.parent / CHAT_TEMPLATE_NAME)
        chat = _chats[job.tokenizer] = Chat(tokenizer, template, job.chat.date)
    kept, texts, encoded = np.zeros(len(part.ids), np.bool_), [], []
    for number, (document_id, text) in enumerate(zip(part.ids, part.texts, strict=True)):
        found = dialogue.load(text)
        one, reason = None, "bad_record"
        try:
            one, found = _within(job.chat, chat, found, left_out)
            reason = "too_many_tokens"
        except SpecialTokenError:
            reason = "special_token"
        except DialogueError as error:
            left_out.problem = left_out.problem or f"{document_id} {error}"
        if one is not None and not one.targets:
            one, reason = None, "no_answer"
        if one is None:
            left_out.dropped[reason] = left_out.dropped.get(reason, 0) + 1
            left_out.bytes += len(dialogue.plain(found.messages).encode())
            left_out.heldout += int(is_heldout[number])
            continue
        kept[number] = True
        encoded.append(one)
        tools = {"tools": found.tools} if found.tools else {}
        texts.append({"text": dialogue.plain(found.messages), "messages": found.messages, **tools})
    starts = np.cumsum([0, *(len(one.tokens) for one in encoded)], dtype=np.int64)
    targets = [np.array(one.targets, np.int64) + start for one, start in zip(encoded, starts, strict=False)]
    dtype = token_dtype(tokenizer.vocab_size)
    nothing = [np.empty(0, np.int64)]
    arrays = {
        "tokens": np.concatenate([np.array(one.tokens, dtype) for one in encoded] or [np.empty(0, dtype)]),
        "starts": starts,
        "targets": np.concatenate(targets or nothing),
        "target_starts": np.cumsum([0, *map(len, targets)], dtype=np.int64),
        "target_bytes": np.array([one.target_bytes for one in encoded], dtype=np.int64),
    }
    return kept, texts, arrays


def _within(
    config: ChatConfig, chat: Chat, whole: Dialogue, left_out: LeftOutDialogues
) -> tuple[EncodedDialogue | None, Dialogue]:
    """A dialogue with at most `max_tokens` tokens: the whole one or, if it may be cut, the turns up to the last one to
    be predicted that fits. None where there is none."""
    roles = [role.value for role in config.loss_roles]

    def encode(n_messages: int) -> EncodedDialogue:
        messages = whole.messages[:n_messages]
        return chat.encode_dialogue(messages, whole.tools, loss_roles=roles, loss_end=config.loss_end)

    encoded, limit = encode(len(whole.messages)), config.max_tokens
    if limit is None or len(encoded.tokens) <= limit:
        return encoded, whole
    if config.longer is Longer.drop:
        return None, whole
    ends = [n for n in range(1, len(whole.messages)) if whole.messages[n - 1]["role"] in roles]
    n_fitting = bisect_right(ends, limit, key=lambda n: len(encode(n).tokens))
    if not n_fitting:
        return None, whole
    left_out.cut += 1
    n_messages = ends[n_fitting - 1]
    return encode(n_messages), whole._replace(messages=whole.messages[:n_messages])
