"""The chunks of a corpus at a URL. A chunk is fetched whole, ahead of use, checked, and kept in the node's cache.

A chunk's two members, `.tok` and `.doc`, are adjacent in their shard, so one range request fetches both. A chunk is
requested only once: other threads of this process and, through the cache, other processes of the node wait for it.
Transient failures are retried (`remote.py`). Permanent ones raise CorruptShardError, and a store that fails for longer
than `data.read_timeout_s` raises ReadError.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import xxhash

from pretrain.corpus.manifest import (
    DOCUMENTS,
    MANIFEST_NAME,
    TOKENS,
    CorruptShardError,
    Manifest,
    index_bytes,
    load_manifest,
    member_name,
    parse_index,
)
from pretrain.corpus.node_cache import NodeCache, default_folder
from pretrain.remote import DamagedError, MissingError, ReadOptions, read_range, redact

_INDEXES = 64  # largest number of parsed indexes that one process keeps

Task = Callable[[], None]


class RemoteChunks:
    """The chunks of one corpus. All threads of a process may share this object. A forked child needs its own, so `pid`
    is the process that this one belongs to."""

    def __init__(self, folder: str, manifest: Manifest, options: ReadOptions) -> None:
        self.pid = os.getpid()
        self._folder, self._manifest, self._options = folder, manifest, options
        self._first_chunks = np.array([shard.first_chunk for shard in manifest.shards])
        self._cache = open_cache(manifest.root_sha256, options)
        self._indexes: OrderedDict[int, np.ndarray] = OrderedDict()
        self._under_way: dict[int, Future[bytes]] = {}
        self._lock = threading.Lock()
        self._queue: SimpleQueue[Task | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def read(self, chunk: int, kind: int, start: int, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of a member of a checked chunk; without `stop`, to the member's end.

        Raises CorruptShardError, and ReadError where the store fails for too long.
        """
        row = self._row(chunk)
        offset, length = (int(value) for value in row[kind, :2])
        base = offset - int(row[TOKENS, 0])
        low, high = base + start, base + (length if stop is None else stop)
        content = self._cache.load(_chunk_name(chunk), partial(_chunk_problem, row, chunk), low, high)
        return self._whole(chunk)[low:high] if content is None else content

    def prefetch(self, chunks: Sequence[int]) -> None:
        """Start to fetch chunks in this order, at most `prefetch_chunks` at a time, and return.

        Failures are not reported here; `read` raises them.
        """
        for chunk in chunks:
            if self._cache.has(_chunk_name(chunk)):
                continue
            with self._lock:
                if chunk in self._under_way:
                    continue
                future = self._under_way[chunk] = Future()
            self._queue.put(partial(self._run, chunk, future))
        while len(self._threads) < self._options.prefetch_chunks and self._under_way:
            # The threads are daemons so that a process can end without waiting for a store.
            thread = threading.Thread(target=_work, args=(self._queue,), name="prefetch", daemon=True)
            self._threads.append(thread)
            thread.start()

    def __del__(self) -> None:
        for _ in self._threads:
            self._queue.put(None)

    def _whole(self, chunk: int) -> bytes:
        """A whole chunk. If another thread is fetching it, wait for that thread; otherwise fetch it here at once."""
        with self._lock:
            future = self._under_way.get(chunk)
            mine = future is None or future.cancel()
            if mine:
                future = self._under_way[chunk] = Future()
        assert future is not None
        if mine:
            self._run(chunk, future)
        try:
            return future.result()
        finally:
            del future  # otherwise its exception and this frame would keep each other alive

    def _run(self, chunk: int, future: Future[bytes]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(self._fetch(chunk))
        except BaseException as error:
            future.set_exception(error)
        finally:
            with self._lock:
                if self._under_way.get(chunk) is future:
                    del self._under_way[chunk]
            # Otherwise its exception and this frame would keep each other alive, and the threads with them.
            del future

    def _fetch(self, chunk: int) -> bytes:
        row, number = self._row(chunk), self._shard_of(chunk)
        url = f"{self._folder}/{self._manifest.shards[number].name}"
        start, stop = int(row[TOKENS, 0]), int(row[DOCUMENTS, 0] + row[DOCUMENTS, 1])
        check = partial(_chunk_problem, row, chunk)
        fetch = partial(read_range, url, start, stop, self._options.read_timeout_s, check)
        try:
            return self._cache.get(_chunk_name(chunk), check, fetch)
        except (MissingError, DamagedError) as error:
            raise CorruptShardError(f"chunk {chunk}: {error}") from error

    def _row(self, chunk: int) -> np.ndarray:
        """uint64 [2, 3]: (offset, length, xxh3-64) of the two members."""
        number = self._shard_of(chunk)
        with self._lock:
            index = self._indexes.get(number)
            if index is not None:
                self._indexes.move_to_end(number)
        if index is None:
            index = self._read_index(number)
            with self._lock:
                self._indexes[number] = index
                if len(self._indexes) > _INDEXES:
                    self._indexes.popitem(last=False)
        return index[chunk - self._manifest.shards[number].first_chunk]

    def _shard_of(self, chunk: int) -> int:
        return int(np.searchsorted(self._first_chunks, chunk, side="right")) - 1

    def _read_index(self, number: int) -> np.ndarray:
        info = self._manifest.shards[number]
        url, size = f"{self._folder}/{info.index_name}", index_bytes(info)

        def check(content: bytes) -> str | None:
            same = hashlib.sha256(content).hexdigest() == info.index_sha256
            return None if same else "it has a different sha256 than its manifest says"

        fetch = partial(read_range, url, 0, size, self._options.read_timeout_s, check)
        try:
            content = self._cache.get(info.index_name, check, fetch)
        except (MissingError, DamagedError) as error:
            raise CorruptShardError(str(error)) from error
        return parse_index(content, self._manifest, number, redact(url))


def _work(queue: SimpleQueue[Task | None]) -> None:
    while (task := queue.get()) is not None:
        task()
        del task  # otherwise the last task would keep its owner alive


def _chunk_name(chunk: int) -> str:
    return f"{chunk:06d}.chunk"


def _chunk_problem(row: np.ndarray, chunk: int, content: bytes) -> str | None:
    """What is wrong with the bytes of a chunk (two members and the tar header between them), or None."""
    base = int(row[TOKENS, 0])
    for kind in (TOKENS, DOCUMENTS):
        offset, length, expected = (int(value) for value in row[kind])
        member = content[offset - base : offset - base + length]
        if len(member) != length:
            return f"its member {member_name(chunk, kind)} has {len(member)} bytes, its index says {length}"
        found = xxhash.xxh3_64_intdigest(member)
        if found != expected:
            name = member_name(chunk, kind)
            return f"its member {name} has xxh3-64 {found:016x}, its index says {expected:016x}"
    return None


def open_cache(root_sha256: str, options: ReadOptions) -> NodeCache:
    """The node's cache for one corpus."""
    folder = Path(options.cache_dir).expanduser() if options.cache_dir else default_folder()
    return NodeCache(folder, root_sha256, int(options.cache_gib * (1 << 30)))


def load_remote_manifest(
    url: str, options: ReadOptions, root_sha256: str | None, manifest: Manifest | None = None
) -> Manifest:
    """The manifest at a URL, or from the node's cache where its root hash is known.

    A `manifest` that the caller has already read is put in the cache for the other processes of the node. Raises
    ConfigError where the manifest is missing or invalid, and ReadError where the store fails.
    """
    if root_sha256 is not None:
        cache = open_cache(root_sha256, options)
        content = cache.load(MANIFEST_NAME, partial(_manifest_problem, root_sha256))
        if content is not None:
            return Manifest.from_json(content)
    manifest = manifest or load_manifest(url, options.read_timeout_s)
    content = manifest.to_json().encode()
    cache = open_cache(manifest.root_sha256, options)
    cache.get(MANIFEST_NAME, partial(_manifest_problem, manifest.root_sha256), lambda: content)
    return manifest


def _manifest_problem(root_sha256: str, content: bytes) -> str | None:
    try:
        same = Manifest.from_json(content).root_sha256 == root_sha256
    except ValueError:  # ConfigError is a ValueError
        same = False
    return None if same else "it is not the corpus's manifest"
