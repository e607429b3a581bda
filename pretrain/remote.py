"""Files behind a URL (s3://, gs://, https://, ...): bounded reads that wait out what passes, and give up in time.

One read is many attempts, with exponential backoff and full jitter between them (Brooker, "Exponential Backoff And
Jitter", AWS 2015). What a store may get over (no answer, 5xx, 429, a broken connection) is tried again until
the time is over; what it will hardly get over (not there, not allowed, wrong bytes) a few times only.
No error and no warning shows what a URL holds of user, password, query or fragment.

Every URL is opened by way of `file_system`, which knows a few kinds of stores and no chains of them, and follows no
server to another host.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import SplitResult, unquote, urlsplit

from pretrain.config import DataConfig
from pretrain.errors import ConfigError, RunError
from pretrain.printing import visible
from pretrain.redaction import redact, redact_url

T = TypeVar("T")
SCHEMES = ("s3", "s3a", "gs", "gcs", "http", "https")
"""Kinds of stores that are read and written; docs/remote.md describes them."""
MAX_REDIRECTS = 3
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 20.0
_ATTEMPT_FRACTION = 0.1  # of the time for a read, which one attempt gets at most
_SAY_AFTER_S, _SAY_EVERY_S = 5.0, 30.0
_PASSING_ERRNOS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EAGAIN}
_PASSING_STATUS = {408, 409, 425, 429}  # of 400 to 499
_LOCAL_ATTEMPTS = 5
_log = logging.getLogger(__name__)
_jitter = random.SystemRandom()  # no seeded generator is touched
_said_at = -_SAY_EVERY_S


class ReadError(RunError):
    """A file behind a URL could not be read within the time that was given."""

    max_attempts = 1 << 30


class MissingError(ReadError):
    """The store says that there is no such file."""

    max_attempts = 5


class DeniedError(ReadError):
    """The store refuses: no credentials, wrong ones, or no right to read."""

    max_attempts = 5


class DamagedError(ReadError):
    """The store answers with other bytes than there should be, or with fewer."""

    max_attempts = 6


class _HttpError(Exception):
    """An answer of an HTTP server that is no content."""

    def __init__(self, status: int, retry_after: str | None) -> None:
        super().__init__(f"HTTP status {status}")
        self.status, self.retry_after = status, retry_after


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOptions:
    """How corpora behind a URL are read; see the keys of the same names in `DataConfig`."""

    read_timeout_s: float = 300
    cache_dir: str | None = None
    cache_gib: float = 16
    prefetch_chunks: int = 8

    @classmethod
    def of(cls, data: DataConfig) -> ReadOptions:
        """What a run's configuration says."""
        return cls(
            read_timeout_s=data.read_timeout_s,
            cache_dir=data.cache_dir,
            cache_gib=data.cache_gib,
            prefetch_chunks=data.prefetch_chunks,
        )


# ---- names -----------------------------------------------------------------------------------------------------------


def is_url(path: str | Path) -> bool:
    """Whether a path is a URL of something else than a local file."""
    return isinstance(path, str) and "://" in path and not path.startswith(("file://", "local://"))


def as_path(path: str | Path) -> str | Path:
    """A URL as it is, all else as a local path: a path, or a file:// URL."""
    if is_url(path):
        return path
    if isinstance(path, str) and path.startswith(("file://", "local://")):
        return Path(unquote(path.split("://", 1)[1]))
    return Path(path)


def folder_of(path: str | Path) -> str | Path:
    """The folder of a file, as a URL or a path."""
    return path.rsplit("/", 1)[0] if isinstance(path, str) else path.parent


def check_url(key: str, url: str) -> None:
    """Raise ConfigError where a URL holds what may be a secret, which would go into logs, is of an unknown kind, or
    its store cannot be reached with what is installed."""
    parts = _check_kind(url, f"{key}=")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(
            f"{key}={redact_url(url)} holds a user, a password, a query or a fragment, which would be written to logs; "
            "leave them out and give credentials by the environment (docs/remote.md)"
        )
    file_system(url, f"{key}=")


# ---- stores ----------------------------------------------------------------------------------------------------------


def file_system(url: str, key: str = "", **options: Any) -> tuple[Any, str]:
    """fsspec's file system for a URL, of this process, and the URL as that file system wants it. Raises ConfigError.

    `key`: what an error says before the URL. fsspec keeps one per process and options, and makes another in a forked
    process.
    """
    from fsspec.core import url_to_fs

    _check_kind(url, key)
    # Else gcsfs asks for each bucket's kind by gRPC, which survives no fork, and reads others than plain ones by it.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        return url_to_fs(url, **guards(url), **options)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{key}{redact_url(url)} cannot be used: {redact(str(error))}") from error


def guards(url: str) -> dict[str, Any]:
    """What fsspec is to be told for a URL, so that its server cannot send this process to another host."""
    return {"get_client": _http_session} if url.startswith(("http://", "https://")) else {}


def open_file(key: str, path: str, mode: str = "rb", **options: Any) -> Any:
    """A file, here or behind a URL, opened for reading by fsspec. Raises ConfigError, and OSError."""
    import fsspec

    if is_url(path):
        check_url(key, path)
        found, name = file_system(path)
    else:
        found, name = fsspec.filesystem("file"), str(as_path(path))
    return found.open(name, mode, **options)


def _check_kind(url: str, key: str = "") -> SplitResult:
    """The parts of a URL that may be opened. Raises ConfigError."""
    try:
        parts = urlsplit(url)
        is_named = (
            parts.netloc.startswith("arn:") or parts.port != 0
        )  # else: what is there is no host and port
    except ValueError:
        is_named = False
    usable = is_named and bool(parts.netloc) and url.startswith(tuple(f"{kind}://" for kind in SCHEMES))
    # fsspec takes `a::b` for one store within another; control characters are dropped by some parsers.
    if not usable or "::" in url or re.search(r"[\x00-\x1f\x7f]", url):
        raise ConfigError(
            f"{key}{redact_url(url)} cannot be used: a URL is {', '.join(f'{kind}://' for kind in SCHEMES[:-1])} or "
            f"{SCHEMES[-1]}://, a host or bucket, and a path without '::'"
        )
    return parts


async def _http_session(**options: Any) -> Any:
    """aiohttp's session, in place of fsspec's: bytes come as the server has them, and from the host that was named."""
    import aiohttp

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(_refuse_other_host)
    options = {"headers": {"Accept-Encoding": "identity"}, "auto_decompress": False, **options}
    return aiohttp.ClientSession(**options, trace_configs=[trace])


async def _refuse_other_host(session: Any, context: Any, params: Any) -> None:
    """A server may send to another place of its own, not to another host, port or scheme: who named it trusts it."""
    import yarl

    context.n_redirects = getattr(context, "n_redirects", 0) + 1
    headers = params.response.headers
    try:
        target = params.url.join(yarl.URL(headers.get("Location") or headers.get("URI") or ""))
        is_same = target.origin() == params.url.origin()
        if is_same and context.n_redirects <= MAX_REDIRECTS:
            return
        where = "one place after another" if is_same else f"{target.origin()}"
    except ValueError:
        where = "what is no address"
    params.response.close()
    raise PermissionError(f"the server sends on to {where}; name that in the URL if you trust it")


def _impatient_file_system(url: str) -> tuple[Any, str]:
    """As `file_system`, but with one request per attempt: attempts are counted, timed and told of here."""
    if not url.startswith(("s3://", "s3a://")):
        return file_system(url)
    once = {"retries": {"mode": "standard", "total_max_attempts": 1}, "max_pool_connections": 32}
    store, path = file_system(url, config_kwargs=once, use_listings_cache=False)
    store.retries = 1
    return store, path


# ---- one attempt -----------------------------------------------------------------------------------------------------


def read_once(url: str, start: int, stop: int, timeout_s: float) -> bytes:
    """One attempt to read bytes [start, stop) of a file; fewer where it ends before."""
    from fsspec.asyn import sync

    store, path = _impatient_file_system(url)
    if url.startswith(("http://", "https://")):
        return sync(store.loop, _get_http, store, path, start, stop, timeout=timeout_s)
    if store.async_impl:
        return sync(store.loop, store._cat_file, path, start=start, end=stop, timeout=timeout_s)
    return store.cat_file(path, start=start, end=stop)


async def _get_http(store: Any, url: str, start: int, stop: int) -> bytes:
    """As fsspec's own, but it takes no more bytes than were asked for, and knows what the server said."""
    session = await store.set_session()
    options = dict(store.kwargs)
    options["headers"] = {
        **options.get("headers", {}),
        "Range": f"bytes={start}-{stop - 1}",
        "Accept-Encoding": "identity",
    }
    async with session.get(store.encode_url(url), **options) as response:
        if response.status == 200 and start:
            raise DamagedError("the server answers a request for a part of the file with all of it")
        if response.status not in (200, 206):
            raise _HttpError(response.status, response.headers.get("Retry-After"))
        content = bytearray()
        while len(content) < stop - start:
            block = await response.content.read(stop - start - len(content))
            if not block:
                break
            content += block
        return bytes(content)


# ---- many attempts ---------------------------------------------------------------------------------------------------


def read_range(
    url: str, start: int, stop: int, time_limit_s: float, check: Callable[[bytes], str | None]
) -> bytes:
    """Bytes [start, stop) of a file, of which `check` says None; else it says what is wrong, and they are read again.

    Raises ReadError, by its kinds, after at most `time_limit_s` seconds.
    """

    def attempt(timeout_s: float) -> bytes:
        content = read_once(url, start, stop, timeout_s)
        problem = check(content)
        if problem is not None:
            raise DamagedError(problem)
        return content

    return persist(redact(url), attempt, time_limit_s)


def read_whole(url: str, max_bytes: int, time_limit_s: float, check: Callable[[bytes], str | None]) -> bytes:
    """All of a file that has at most `max_bytes`, of which `check` says None.

    Raises ConfigError where it is not there, may not be read, or has more, and ReadError.
    """

    def check_all(content: bytes) -> str | None:
        return check(content) if len(content) <= max_bytes else None

    try:
        content = read_range(url, 0, max_bytes + 1, time_limit_s, check_all)
    except (MissingError, DeniedError) as error:
        raise ConfigError(str(error)) from error
    if len(content) > max_bytes:
        raise ConfigError(
            f"{redact(url)} has more than the {max_bytes:,} bytes that are expected at most; it is not what it "
            "should be"
        )
    return content


def exists(path: str | Path, time_limit_s: float = 300) -> bool:
    """Whether there is such a file, which is not empty. Raises ReadError where its store does not say."""
    if not isinstance(path, str):
        return path.is_file()
    try:
        read_range(path, 0, 1, time_limit_s, lambda _: None)
    except MissingError:
        return False
    return True


def persist(what: str, attempt: Callable[[float], T], time_limit_s: float) -> T:
    """The value of `attempt(timeout_s)`, tried again while it fails as the errors above say.

    A warning is given every half minute that this takes. Raises the last failure as a kind of ReadError that names
    `what`, how often it was tried and for how long.
    """
    started, failures = time.monotonic(), Counter[type[ReadError]]()
    timeout_s = time_limit_s * _ATTEMPT_FRACTION
    for number in count(1):
        try:
            return attempt(timeout_s)
        except ConfigError:
            raise
        except Exception as error:  # each kind of store has exceptions of its own
            kind, reason, wish_s = _classify(error, timeout_s)
            error.__traceback__ = None  # a frame of fsspec in it holds it, and with it all frames up to here
        failures[kind] += 1
        waited = time.monotonic() - started
        left = time_limit_s - timeout_s - waited  # until the last moment for a whole attempt
        if failures[kind] >= kind.max_attempts or left <= 0:
            times = f"{number} attempts" if number > 1 else "one attempt"
            raise kind(f"{what} cannot be read: {reason}; given up after {times} in {waited:.0f} s")
        _say_that_it_waits(what, reason, number, waited, time_limit_s)
        time.sleep(min(max(_pause(number), wish_s), left))
    raise AssertionError("not reached")


def _pause(number: int) -> float:
    """Seconds to wait after attempt `number`, from 1."""
    return _jitter.uniform(0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(number - 1, 30)))


def _classify(error: Exception, timeout_s: float) -> tuple[type[ReadError], str, float]:
    """What kind of failure this is, in words, and for how many seconds the server wants to be left alone."""
    status, wish = _http_answer(error)
    # What the server says is a stranger's text.
    reason = visible(redact(f"{type(error).__name__}: {error}".splitlines()[0])[:300].rstrip(": "))
    if isinstance(error, ReadError):
        return type(error), str(error), 0
    if isinstance(error, TimeoutError):
        return ReadError, f"no whole answer within {timeout_s:.3g} s", 0
    if status in (404, 410) or isinstance(error, FileNotFoundError):
        return MissingError, "the store says that it is not there", 0
    if status == 416:
        return DamagedError, "it is shorter than it should be", 0
    refused = status is not None and 400 <= status < 500 and status not in _PASSING_STATUS
    refused |= str(error).startswith("Forbidden: ")  # gcsfs
    if refused or isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return (
            DeniedError,
            f"the store refuses ({reason}); check the URL and the credentials in the environment",
            0,
        )
    return ReadError, f"the store failed ({reason})", wish


def _http_answer(error: Exception) -> tuple[int | None, float]:
    """HTTP status behind an exception, if known, and the seconds of its Retry-After, else 0."""
    if isinstance(error, _HttpError):
        return error.status, _seconds(error.retry_after)
    answer = getattr(error.__cause__, "response", None)
    if isinstance(answer, dict):  # botocore's ClientError
        metadata = answer.get("ResponseMetadata", {})
        return metadata.get("HTTPStatusCode"), _seconds(metadata.get("HTTPHeaders", {}).get("retry-after"))
    status = getattr(error, "code", None)  # gcsfs's HttpError
    return (status if isinstance(status, int) else None), 0


def _seconds(retry_after: str | None) -> float:
    """Of the header Retry-After: a number of seconds or a date (RFC 9110, 10.2.3)."""
    if retry_after is None:
        return 0
    from email.utils import parsedate_to_datetime

    try:
        if retry_after.isdecimal():
            return float(retry_after)
        return max(parsedate_to_datetime(retry_after).timestamp() - time.time(), 0)
    except (ValueError, TypeError, OverflowError):
        return 0


def _say_that_it_waits(what: str, reason: str, number: int, waited: float, limit: float) -> None:
    global _said_at
    now = time.monotonic()
    if waited >= _SAY_AFTER_S and now - _said_at >= _SAY_EVERY_S:
        _said_at = now
        _log.warning(
            "waiting for %s for %.0f s (%d attempts, until %.0f s): %s", what, waited, number, limit, reason
        )


# ---- local files -----------------------------------------------------------------------------------------------------


def retry_local(action: Callable[[], T]) -> T:
    """`action()`, a few times more where it raises an OSError that a network file system may get over."""
    for pause in _local_pauses():
        try:
            return action()
        except OSError as error:
            if error.errno not in _PASSING_ERRNOS:
                raise
        time.sleep(pause)
    return action()


def _local_pauses() -> Iterator[float]:
    return (_pause(number) for number in range(1, _LOCAL_ATTEMPTS))
