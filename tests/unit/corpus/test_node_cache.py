"""The node's cache: shared without asking twice, bounded, and right whatever is killed, damaged or full."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import multiprocessing
import os
import random
import resource
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pretrain.corpus import node_cache
from pretrain.corpus.manifest import CorruptShardError
from pretrain.corpus.node_cache import NodeCache, default_folder
from pretrain.corpus.shards import Corpus
from pretrain.errors import ConfigError
from support.faulty_server import FaultyServer, always, at_rate
from support.served_corpus import CHUNK_TOKENS, N_CHUNKS, assert_same, options

ROOT_HASH = "a" * 64
BLOCK = 4096
# Processes that start at once, from a clean one without threads. What they import is loaded once.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pretrain.corpus.shards", "fsspec.implementations.http", "test_node_cache"])


def fine(content: bytes) -> str | None:
    return None if content == content[:1] * len(content) else "not all alike"


def cached_bytes(cache: Path) -> int:
    found = 0
    for path in cache.glob("corpus-*/*"):
        try:
            found += -(-path.stat().st_size // BLOCK) * BLOCK
        except FileNotFoundError:  # evicted meanwhile
            continue
    return found


def forbidden() -> bytes:
    raise AssertionError("it is there already")


# --- one process ---


def test_what_is_kept_is_found(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, ROOT_HASH, 1 << 20)
    assert cache.load("x", fine) is None
    assert not cache.has("x")
    assert cache.get("x", fine, lambda: b"a" * 9) == b"a" * 9
    for again in (cache, NodeCache(tmp_path, ROOT_HASH, 1 << 20)):
        assert again.has("x")
        assert again.load("x", fine, 2, 5) == b"aaa"
        assert again.load("x", fine, 2, 5) == b"aaa"
        assert again.get("x", fine, forbidden) == b"a" * 9
    other = NodeCache(tmp_path, "b" * 64, 1 << 20)
    assert other.load("x", fine) is None
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [".lock", "x"]


def test_a_failed_fetch_leaves_nothing(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, ROOT_HASH, 1 << 20)
    with pytest.raises(ZeroDivisionError):
        cache.get("x", fine, lambda: bytes(1 // 0))
    assert not list(tmp_path.glob("corpus-*/*"))
    assert cache.get("x", fine, lambda: b"a") == b"a"


def test_the_least_recently_used_go(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, ROOT_HASH, 10 * BLOCK)
    for number in range(10):
        cache.get(str(number), fine, lambda: b"a" * BLOCK)
        path = next(tmp_path.glob(f"corpus-*/{number}"))
        os.utime(path, (1000 + number, 1000 + number))
    assert cache.load("0", fine, 0, 1) == b"a"  # used just now
    opened = next(tmp_path.glob("corpus-*/1")).open("rb")
    cache.get("new", fine, lambda: b"b" * (BLOCK + 1))  # two blocks
    assert cached_bytes(tmp_path) <= 10 * BLOCK
    assert sorted(p.name for p in tmp_path.glob("corpus-*/*")) == ["0", "4", "5", "6", "7", "8", "9", "new"]
    assert opened.read() == b"a" * BLOCK
    opened.close()
    assert cache.load("1", fine) is None
    assert cache.get("1", fine, lambda: b"c") == b"c"


def test_the_limit_is_for_all_corpora_together(tmp_path: Path) -> None:
    first, second = (NodeCache(tmp_path, letter * 64, 4 * BLOCK) for letter in "ab")
    for number in range(8):
        for cache in (first, second):
            cache.get(str(number), fine, lambda: b"a" * BLOCK)
            assert cached_bytes(tmp_path) <= 4 * BLOCK


def test_what_is_larger_than_the_cache_is_kept_in_memory(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, ROOT_HASH, BLOCK)
    cache.get("small", fine, lambda: b"a")
    cache.get("large", fine, lambda: b"b" * (BLOCK + 1))
    assert cache.load("small", fine) == b"a"
    assert cache.load("large", fine, 0, 2) == b"bb"
    assert [p.name for p in tmp_path.glob("corpus-*/*")] == ["small"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_file_is_fetched_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    NodeCache(tmp_path, ROOT_HASH, 1 << 20).get("x", fine_of_nine, lambda: b"a" * 9)
    path = next(tmp_path.glob("corpus-*/x"))
    path.write_bytes({"flip": b"aaaabaaaa", "truncate": b"aaa", "empty": b""}[damage])
    cache = NodeCache(tmp_path, ROOT_HASH, 1 << 20)
    assert cache.load("x", fine_of_nine, 0, 1) is None
    assert "is damaged and fetched again" in caplog.text
    assert cache.get("x", fine_of_nine, lambda: b"a" * 9) == b"a" * 9
    assert path.read_bytes() == b"a" * 9


def fine_of_nine(content: bytes) -> str | None:
    return None if content == b"a" * 9 else "it is not nine times a"


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path / "cache", ROOT_HASH, 1 << 20)
    (tmp_path / "precious").write_bytes(b"p")
    corpus = next((tmp_path / "cache").glob("corpus-*"))
    (corpus / "x").symlink_to(tmp_path / "precious")
    (corpus / "y.part").symlink_to(tmp_path / "precious")
    assert cache.load("x", fine) is None
    assert cache.get("y", fine, lambda: b"y") == b"y"
    assert (tmp_path / "precious").read_bytes() == b"p"


def test_a_folder_open_to_others_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError, match=r"data\.cache_dir=.* others"):
        NodeCache(tmp_path, ROOT_HASH, 1 << 20)


def test_where_the_cache_is_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/there")
    assert default_folder() == Path("/there/pretrain")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder().name == f"pretrain-cache-{os.getuid()}"


def test_a_folder_that_cannot_be_made_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    cache = NodeCache(tmp_path / "file" / "cache", ROOT_HASH, 1 << 20)
    for _ in range(2):
        assert cache.get("x", fine, lambda: b"a") == b"a"
    assert cache.load("x", fine) == b"a"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_memory_is_bounded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_cache, "MEMORY_BYTES", 30)
    cache = NodeCache(tmp_path, ROOT_HASH, 1)
    for number in range(10):
        cache.get(str(number), fine, lambda: b"a" * 10)
    assert [number for number in range(10) if cache.has(str(number))] == [7, 8, 9]


# --- full disk ---


def _fill(cache_folder: str, answers: multiprocessing.queues.Queue) -> None:
    """A real failure to write, without a full disk: the kernel lets this process write no file beyond 5,000 bytes."""
    said = []
    logging.getLogger("pretrain.corpus.node_cache").addHandler(_Handler(said))
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    cache = NodeCache(Path(cache_folder), ROOT_HASH, 1 << 30)
    contents = [cache.get(name, fine, lambda: b"a" * 6000) for name in "xyz"]
    answers.put((contents == [b"a" * 6000] * 3, [cache.load(n, fine, 0, 1) for n in "xyz"], said))


class _Handler(logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__()
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def test_where_nothing_more_can_be_written_it_goes_on_in_memory(tmp_path: Path) -> None:
    answers = SERVER.Queue()
    process = SERVER.Process(target=_fill, args=(str(tmp_path), answers))
    process.start()
    right, found, said = answers.get(timeout=60)
    process.join()
    assert right
    assert found == [b"a"] * 3
    assert len(said) == 1
    assert "File too large" in said[0]
    assert not list(tmp_path.glob("corpus-*/*"))


# --- many processes ---


def _read_all(url: str, cache: str, answers: multiprocessing.queues.Queue) -> None:
    corpus = Corpus(url, options=options(Path(cache), prefetch_chunks=2))
    order = random.sample(range(corpus.n_chunks), corpus.n_chunks)
    corpus.prefetch(order)
    found = {chunk: corpus.read(chunk, 0, CHUNK_TOKENS) for chunk in order}
    answers.put(np.concatenate([found[chunk] for chunk in sorted(found)]))


def test_the_processes_of_a_node_ask_once_for_each_chunk(small_corpus: Path, tmp_path: Path) -> None:
    expected = np.concatenate(
        [Corpus(small_corpus / "manifest.json").read(c, 0, CHUNK_TOKENS) for c in range(N_CHUNKS)]
    )
    with FaultyServer(small_corpus, always("drip", r"\.tar")) as server:
        answers = SERVER.Queue()
        arguments = (f"{server.url}/manifest.json", str(tmp_path), answers)
        processes = [SERVER.Process(target=_read_all, args=arguments) for _ in range(4)]
        for process in processes:
            process.start()
        for _ in processes:
            np.testing.assert_array_equal(answers.get(timeout=120), expected)
        for process in processes:
            process.join()
        asked = Counter((request.path, request.range) for request in server.asked(r"\.(tar|idx)"))
        assert len(asked) == N_CHUNKS + len(list((small_corpus / "shards").glob("*.idx")))
        assert set(asked.values()) == {1}
    assert not list(tmp_path.glob("corpus-*/*.part"))


def _read_until_killed(url: str, cache: str, gib: float) -> None:
    corpus = Corpus(url, options=options(Path(cache), prefetch_chunks=4, cache_gib=gib))
    while True:
        order = random.sample(range(corpus.n_chunks), corpus.n_chunks)
        corpus.prefetch(order)
        for chunk in order:
            assert len(corpus.read(chunk, 0, 9)) > 0


def test_kill_9_at_any_moment_leaves_nothing_wrong(small_corpus: Path, tmp_path: Path) -> None:
    """A cache for a third of the corpus, so that files come and go all the time; two processes, one is killed."""
    limit = 25 * BLOCK
    with FaultyServer(small_corpus, at_rate(0.2, "drip", "wrong", "cut", "reset", at_most=10**9)) as server:
        arguments = (f"{server.url}/manifest.json", str(tmp_path), limit / (1 << 30))
        steady = SERVER.Process(target=_read_until_killed, args=arguments)
        steady.start()
        for _ in range(25):
            process = SERVER.Process(target=_read_until_killed, args=arguments)
            process.start()
            time.sleep(random.uniform(0.05, 0.4))
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            assert process.exitcode == -signal.SIGKILL
            assert cached_bytes(tmp_path) <= limit
        assert steady.is_alive()
        assert len(server.asked(r"\.tar")) > 100
        steady.kill()
        steady.join()
        server.script = None
        corpus = Corpus(arguments[0], options=options(tmp_path, cache_gib=arguments[2]))
        assert_same(corpus, small_corpus)
    assert cached_bytes(tmp_path) <= limit
    assert not list(tmp_path.glob("corpus-*/*.part"))


def _hold(path: str, ready: multiprocessing.synchronize.Event) -> None:
    with open(path, "wb") as file:
        file.truncate(5 * BLOCK)
        fcntl.flock(file, fcntl.LOCK_EX)
        ready.set()
        time.sleep(600)


def test_a_process_that_stands_still_with_a_chunk_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_cache, "_WAIT_S", 0.2)
    cache = NodeCache(tmp_path, ROOT_HASH, 6 * BLOCK)
    part, ready = next(tmp_path.glob("corpus-*")) / "x.part", SERVER.Event()
    holder = SERVER.Process(target=_hold, args=(str(part), ready))
    holder.start()
    assert ready.wait(60)
    assert cache.get("x", fine, lambda: b"a") == b"a"
    cache.get("y", fine, lambda: b"y" * BLOCK)  # what it holds is counted, and not taken from it
    assert cached_bytes(tmp_path) == 6 * BLOCK
    assert cache.get("z", fine, lambda: b"z" * 2 * BLOCK) == b"z" * 2 * BLOCK
    assert part.exists()
    holder.kill()
    holder.join()
    assert (
        NodeCache(tmp_path, ROOT_HASH, 6 * BLOCK).get("z", fine, lambda: b"z" * 2 * BLOCK) == b"z" * 2 * BLOCK
    )
    assert not part.exists()
    assert {p.name for p in tmp_path.glob("corpus-*/*")} >= {"z"}


# --- fetching ahead ---


def test_a_chunk_on_its_way_is_waited_for(small_corpus: Path, tmp_path: Path) -> None:
    """One at a time, so that most are still in the queue when they are read, from several threads."""
    last = N_CHUNKS - 1
    with FaultyServer(small_corpus, lambda path, _: "drip" if ".tar" in path else None) as server:
        corpus = Corpus(f"{server.url}/manifest.json", options=options(tmp_path, prefetch_chunks=1))
        ahead = [*range(20), last]
        corpus.prefetch(ahead)
        corpus.prefetch(ahead)
        assert corpus._remote._queue.qsize() <= len(ahead)
        threads = [threading.Thread(target=corpus.read, args=(c, 0, 1)) for c in (last, 0, 1, 10, 10, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for chunk in ahead:
            assert_same_chunk(corpus, small_corpus, chunk)
        asked = [(request.path, request.range) for request in server.asked(r"\.tar")]
        assert len(asked) == len(set(asked)) == len(ahead)
        assert asked.index(max(asked)) < len(ahead) - 1  # the last overtook the queue


def test_no_more_are_fetched_at_a_time_than_wanted(small_corpus: Path, tmp_path: Path) -> None:
    gate, waiting, most = threading.Event(), [0], [0]

    def script(path: str, before: int) -> str | None:
        if ".tar" in path:
            waiting[0] += 1
            most[0] = max(most[0], waiting[0])
            gate.wait(0.05)
            waiting[0] -= 1
        return None

    with FaultyServer(small_corpus, script) as server:
        corpus = Corpus(f"{server.url}/manifest.json", options=options(tmp_path, prefetch_chunks=3))
        corpus.prefetch(range(30))
        assert_same_chunk(corpus, small_corpus, 29)
        deadline = time.monotonic() + 60
        while not all(list(tmp_path.glob(f"corpus-*/{c:06d}.chunk")) for c in range(30)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert 3 <= most[0] <= 4  # and the one that reads


def assert_same_chunk(corpus: Corpus, small_corpus: Path, chunk: int) -> None:
    expected = Corpus(small_corpus / "manifest.json").read(chunk, 0, CHUNK_TOKENS)
    np.testing.assert_array_equal(corpus.read(chunk, 0, CHUNK_TOKENS), expected)


def test_a_corpus_that_goes_takes_its_threads_along(small_corpus: Path, tmp_path: Path) -> None:
    """Also where it has failed: no exception holds it."""
    before = set(threading.enumerate())
    with FaultyServer(small_corpus, always("404", r"shard-00000\.tar")) as server:
        corpus = Corpus(f"{server.url}/manifest.json", options=options(tmp_path))
        corpus.prefetch([0, 20, 21])
        corpus.read(21, 0, 1)
        with contextlib.suppress(CorruptShardError):
            corpus.read(0, 0, 1)
        threads = [t for t in threading.enumerate() if t not in before and t.name == "prefetch"]
        assert threads
        del corpus
        for thread in threads:
            thread.join(10)
        assert not any(thread.is_alive() for thread in threads)


def test_a_corpus_on_a_disk_has_no_cache_and_no_threads(small_corpus: Path, tmp_path: Path) -> None:
    before = threading.active_count()
    corpus = Corpus(small_corpus / "manifest.json", options=options(tmp_path / "cache"))
    corpus.prefetch(range(corpus.n_chunks))
    corpus.read(0, 0, 1)
    assert threading.active_count() == before
    assert not (tmp_path / "cache").exists()
