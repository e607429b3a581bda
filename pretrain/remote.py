"""Files at a URL (s3://, gs://, https://, ...): reads that retry transient failures and give up after a time limit.

A read is attempted repeatedly, with exponential backoff and full jitter between attempts (Brooker, "Exponential Backoff
And Jitter", AWS 2015). Transient failures (no answer, 5xx, 429, a broken connection) are retried until the time limit.
Failures that are probably permanent (missing file, access denied, wrong bytes) are retried only a few times. No error
or warning shows the user, password, query or fragment of a URL.

Every URL is opened through `file_system`. It allows a few kinds of stores, rejects fsspec's chained URLs, and follows
no redirect to another host.
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
"""URL schemes that can be read and written; docs/remote.md describes them."""
MAX_REDIRECTS = 3
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 20.0
_ATTEMPT_FRACTION = 0.1  # the part of a read's time limit that a single attempt may take
_SAY_AFTER_S, _SAY_EVERY_S = 5.0, 30.0
_PASSING_ERRNOS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EAGAIN}
_PASSING_STATUS = {408, 409, 425, 429}  # the HTTP statuses from 400 to 499 that are transient
_LOCAL_ATTEMPTS = 5
_log = logging.getLogger(__name__)
_jitter = random.SystemRandom()  # independent of the seeded generators, which training must not disturb
_said_at = -_SAY_EVERY_S


class ReadError(RunError):
    """A file at a URL could not be read within the time limit."""

    max_attempts = 1 << 30


class MissingError(ReadError):
    """The store says that there is no such file."""

    max_attempts = 5


class DeniedError(ReadError):
    """The store denies access: no credentials, wrong credentials, or no permission to read."""

    max_attempts = 5


class DamagedError(ReadError):
    """The store returned bytes that differ from the expected ones, or too few."""

    max_attempts = 6


class _HttpError(Exception):
    """An HTTP response without the requested content."""

    def __init__(self, status: int, retry_after: str | None) -> None:
        super().__init__(f"HTTP status {status}")
        self.status, self.retry_after = status, retry_after


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOptions:
    """How corpora at a URL are read. `DataConfig` documents the fields under the same names."""

    read_timeout_s: float = 300
    cache_dir: str | None = None
    cache_gib: float = 16
    prefetch_chunks: int = 8

    @classmethod
    def of(cls, data: DataConfig) -> ReadOptions:
        """The options from a run's configuration."""
        return cls(
            read_timeout_s=data.read_timeout_s,
            cache_dir=data.cache_dir,
            cache_gib=data.cache_gib,
            prefetch_chunks=data.prefetch_chunks,
        )


# ---- names -----------------------------------------------------------------------------------------------------------


def is_url(path: str | Path) -> bool:
    """Whether a path is a URL that does not name a local file."""
    return isinstance(path, str) and "://" in path and not path.startswith(("file://", "local://"))


def as_path(path: str | Path) -> str | Path:
    """A remote URL unchanged; a local path or a file:// URL as a Path."""
    if is_url(path):
        return path
    if isinstance(path, str) and path.startswith(("file://", "local://")):
        return Path(unquote(path.split("://", 1)[1]))
    return Path(path)


def folder_of(path: str | Path) -> str | Path:
    """The folder that contains a file, as a URL or a path like `path`."""
    return path.rsplit("/", 1)[0] if isinstance(path, str) else path.parent


def check_url(key: str, url: str) -> None:
    """Raise ConfigError where a URL cannot be used for the configuration key `key`.

    A URL cannot be used where it may contain a secret, which would be written to logs, where its scheme is not
    supported, or where the package for its store is not installed.
    """
    parts = _check_kind(url, f"{key}=")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(
            f"{key}={redact_url(url)} holds a user, a password, a query or a fragment, which would be written to "
            "logs; leave it out and pass credentials in the environment (docs/remote.md)"
        )
    file_system(url, f"{key}=")


# ---- stores ----------------------------------------------------------------------------------------------------------


def file_system(url: str, key: str = "", **options: Any) -> tuple[Any, str]:
    """This process's fsspec file system for a URL, and the path of the URL within it. Raises ConfigError.

    `key` is put before the URL in an error. fsspec keeps one file system per process and set of options, and creates a
    new one in a forked process.
    """
    from fsspec.core import url_to_fs

    _check_kind(url, key)
    # Without this, gcsfs asks for each bucket's type over gRPC, which does not survive a fork, and reads hierarchical
    # and zonal buckets over gRPC too.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        return url_to_fs(url, **guards(url), **options)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{key}{redact_url(url)} cannot be used: {redact(str(error))}") from error


def guards(url: str) -> dict[str, Any]:
    """Options for fsspec that keep a URL's server from redirecting this process to another host."""
    return {"get_client": _http_session} if url.startswith(("http://", "https://")) else {}


def open_file(key: str, path: str, mode: str = "rb", **options: Any) -> Any:
    """A local file, or one at a URL, opened by fsspec. Raises ConfigError, which names `key`, and OSError."""
    import fsspec

    if is_url(path):
        check_url(key, path)
        found, name = file_system(path)
    else:
        found, name = fsspec.filesystem("file"), str(as_path(path))
    return found.open(name, mode, **options)


def _check_kind(url: str, key: str = "") -> SplitResult:
    """The parts of a URL. Raises ConfigError where it is malformed or its scheme is not supported."""
    try:
        parts = urlsplit(url)
        # `port` raises ValueError where the network location is not a host and port.
        is_named = parts.netloc.startswith("arn:") or parts.port != 0
    except ValueError:
        is_named = False
    usable = is_named and bool(parts.netloc) and url.startswith(tuple(f"{kind}://" for kind in SCHEMES))
    # fsspec reads `a::b` as one store inside another, and some parsers silently drop control characters.
    if not usable or "::" in url or re.search(r"[\x00-\x1f\x7f]", url):
        raise ConfigError(
            f"{key}{redact_url(url)} cannot be used: a URL is {', '.join(f'{kind}://' for kind in SCHEMES[:-1])} or "
            f"{SCHEMES[-1]}://, then a host or bucket, then a path without '::'"
        )
    return parts


async def _http_session(**options: Any) -> Any:
    """An aiohttp session that replaces fsspec's: it does not decompress, and it refuses redirects to other hosts."""
    import aiohttp

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(_refuse_other_host)
    options = {"headers": {"Accept-Encoding": "identity"}, "auto_decompress": False, **options}
    return aiohttp.ClientSession(**options, trace_configs=[trace])


async def _refuse_other_host(session: Any, context: Any, params: Any) -> None:
    """Allow a redirect only to the same host, port and scheme, because the user trusts only that host."""
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
        where = "an invalid address"
    params.response.close()
    raise PermissionError(f"the server redirects to {where}; name that in the URL if you trust it")


def _impatient_file_system(url: str) -> tuple[Any, str]:
    """Like `file_system`, but without the store's own retries, because this module counts and times the attempts."""
    if not url.startswith(("s3://", "s3a://")):
        return file_system(url)
    once = {"retries": {"mode": "standard", "total_max_attempts": 1}, "max_pool_connections": 32}
    store, path = file_system(url, config_kwargs=once, use_listings_cache=False)
    store.retries = 1
    return store, path


# ---- one attempt -----------------------------------------------------------------------------------------------------


def read_once(url: str, start: int, stop: int, timeout_s: float) -> bytes:
    """Make one attempt to read bytes [start, stop) of a file. A file that ends earlier gives fewer bytes."""
    from fsspec.asyn import sync

    store, path = _impatient_file_system(url)
    if url.startswith(("http://", "https://")):
        return sync(store.loop, _get_http, store, path, start, stop, timeout=timeout_s)
    if store.async_impl:
        return sync(store.loop, store._cat_file, path, start=start, end=stop, timeout=timeout_s)
    return store.cat_file(path, start=start, end=stop)


async def _get_http(store: Any, url: str, start: int, stop: int) -> bytes:
    """Like fsspec's HTTP read, but it never takes more bytes than requested, and it keeps the server's Retry-After."""
    session = await store.set_session()
    options = dict(store.kwargs)
    options["headers"] = {
        **options.get("headers", {}),
        "Range": f"bytes={start}-{stop - 1}",
        "Accept-Encoding": "identity",
    }
    async with session.get(store.encode_url(url), **options) as response:
        if response.status == 200 and start:
            raise DamagedError("the server answers a request for a part of the file with the whole file")
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
    """Bytes [start, stop) of a file that pass `check`.

    `check` returns what is wrong with the bytes, or None; wrong bytes are read again. Raises ReadError or one of its
    subclasses after at most `time_limit_s` seconds.
    """

    def attempt(timeout_s: float) -> bytes:
        content = read_once(url, start, stop, timeout_s)
        problem = check(content)
        if problem is not None:
            raise DamagedError(problem)
        return content

    return persist(redact(url), attempt, time_limit_s)


def read_whole(url: str, max_bytes: int, time_limit_s: float, check: Callable[[bytes], str | None]) -> bytes:
    """The whole content of a file of at most `max_bytes` bytes that passes `check`, as for `read_range`.

    Raises ConfigError where the file is missing or larger, or access is denied, and ReadError.
    """

    def check_all(content: bytes) -> str | None:
        return check(content) if len(content) <= max_bytes else None

    try:
        content = read_range(url, 0, max_bytes + 1, time_limit_s, check_all)
    except (MissingError, DeniedError) as error:
        raise ConfigError(str(error)) from error
    if len(content) > max_bytes:
        raise ConfigError(
            f"{redact(url)} has more than {max_bytes:,} bytes, the most that such a file can have; check the URL"
        )
    return content


def exists(path: str | Path, time_limit_s: float = 300) -> bool:
    """Whether a non-empty file exists. Raises ReadError where that cannot be determined."""
    if not isinstance(path, str):
        return path.is_file()
    try:
        read_range(path, 0, 1, time_limit_s, lambda _: None)
    except MissingError:
        return False
    return True


def persist(what: str, attempt: Callable[[float], T], time_limit_s: float) -> T:
    """The value of `attempt(timeout_s)`, retried as often as the kind of its failure allows (`max_attempts`).

    Logs a warning every half minute. Raises the last failure as a ReadError, or one of its subclasses, whose text names
    `what`, the number of attempts and the time that they took.
    """
    started, failures = time.monotonic(), Counter[type[ReadError]]()
    timeout_s = time_limit_s * _ATTEMPT_FRACTION
    for number in count(1):
        try:
            return attempt(timeout_s)
        except ConfigError:
            raise
        except Exception as error:  # every kind of store raises its own exceptions
            kind, reason, wish_s = _classify(error, timeout_s)
            error.__traceback__ = (
                None  # an fsspec frame refers to the exception: the cycle would keep all frames alive
            )
        failures[kind] += 1
        waited = time.monotonic() - started
        # Seconds until the last moment at which a full attempt can start.
        left = time_limit_s - timeout_s - waited
        if failures[kind] >= kind.max_attempts or left <= 0:
            times = f"{number} attempts" if number > 1 else "one attempt"
            raise kind(f"{what} cannot be read: {reason}; given up after {times} in {waited:.0f} s")
        _say_that_it_waits(what, reason, number, waited, time_limit_s)
        time.sleep(min(max(_pause(number), wish_s), left))
    raise AssertionError("not reached")


def _pause(number: int) -> float:
    """Seconds to wait after attempt `number`, counted from 1."""
    return _jitter.uniform(0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(number - 1, 30)))


def _classify(error: Exception, timeout_s: float) -> tuple[type[ReadError], str, float]:
    """The error class for a failure, its reason as text, and the seconds that the server wants us to wait."""
    status, wish = _http_answer(error)
    # The reason is untrusted text from the server.
    reason = visible(redact(f"{type(error).__name__}: {error}".splitlines()[0])[:300].rstrip(": "))
    if isinstance(error, ReadError):
        return type(error), str(error), 0
    if isinstance(error, TimeoutError):
        return ReadError, f"no complete answer within {timeout_s:.3g} s", 0
    if status in (404, 410) or isinstance(error, FileNotFoundError):
        return MissingError, "the store says that it does not exist", 0
    if status == 416:
        return DamagedError, "it is shorter than it should be", 0
    refused = status is not None and 400 <= status < 500 and status not in _PASSING_STATUS
    refused |= str(error).startswith("Forbidden: ")  # how gcsfs reports a denied access
    if refused or isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return (
            DeniedError,
            f"the store denies access ({reason}); check the URL and the credentials in the environment",
            0,
        )
    return ReadError, f"the store failed ({reason})", wish


def _http_answer(error: Exception) -> tuple[int | None, float]:
    """The HTTP status that caused an exception, or None, and the seconds of its Retry-After header, or 0."""
    if isinstance(error, _HttpError):
        return error.status, _seconds(error.retry_after)
    answer = getattr(error.__cause__, "response", None)
    if isinstance(answer, dict):  # botocore's ClientError
        metadata = answer.get("ResponseMetadata", {})
        return metadata.get("HTTPStatusCode"), _seconds(metadata.get("HTTPHeaders", {}).get("retry-after"))
    status = getattr(error, "code", None)  # gcsfs's HttpError
    return (status if isinstance(status, int) else None), 0


def _seconds(retry_after: str | None) -> float:
    """Seconds from now in a Retry-After header, which holds a number of seconds or a date (RFC 9110, 10.2.3)."""
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
    """`action()`, retried a few times where it raises an OSError that can be transient on a network file system."""
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
