"""Corpora behind a URL: whatever a store does, no wrong byte is used, nothing waits for ever, and nothing is left over.

The server and its faults are real (faulty_server.py), on loopback.
"""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.pool
import os
import re
import shutil
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import fsspec
import numpy as np
import pytest

from data_tools.reading.units import ReadConfig, Unit, read_unit, units_of
from data_tools.stages.decontamination.decontaminate import read_items
from pretrain import remote
from pretrain.config import DataConfig
from pretrain.corpus import shards
from pretrain.corpus.manifest import CorruptShardError, load_manifest
from pretrain.corpus.shards import Corpus
from pretrain.data.loader import TrainLoader
from pretrain.errors import ConfigError
from pretrain.remote import ReadError, is_url, persist, redact
from support.faulty_server import FAULTS, FaultyServer, always, at_rate
from support.served_corpus import CHUNK_TOKENS, assert_same, everything, options


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(remote, "LONGEST_PAUSE_S", 0.5)


# --- what is read is what there is ---


def test_a_corpus_is_read_from_a_url(small_corpus: Path, tmp_path: Path) -> None:
    with FaultyServer(small_corpus) as server:
        corpus = Corpus(f"{server.url}/manifest.json", options=options(tmp_path))
        assert_same(corpus, small_corpus)
        assert len(server.asked(r"\.tar")) == corpus.n_chunks  # one request for both members of a chunk
        whole = corpus.read(3, 0, CHUNK_TOKENS)
        np.testing.assert_array_equal(corpus.read(3, 100, 200), whole[100:200])
        assert len(server.asked(r"\.tar")) == corpus.n_chunks
        with pytest.raises(IndexError):
            corpus.read(corpus.n_chunks, 0, 1)


def test_a_file_url_is_a_path(small_corpus: Path) -> None:
    corpus = Corpus(f"file://{small_corpus}/manifest.json")
    assert corpus.manifest_path == small_corpus / "manifest.json"
    assert_same(corpus, small_corpus)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_at_a_high_rate_changes_nothing(small_corpus: Path, tmp_path: Path, fault: str) -> None:
    with FaultyServer(small_corpus, at_rate(0.3, fault)) as server:
        corpus = Corpus(f"{server.url}/manifest.json", options=options(tmp_path, prefetch_chunks=16))
        corpus.prefetch(range(corpus.n_chunks))
        assert_same(corpus, small_corpus)
        assert {request.fault for request in server.requests} == {None, fault}


def test_all_faults_together_change_nothing(small_corpus: Path, tmp_path: Path) -> None:
    with FaultyServer(small_corpus, at_rate(0.5, *FAULTS)) as server:
        corpus = Corpus(f"{server.url}/manifest.json", options=options(tmp_path, prefetch_chunks=16))
        corpus.prefetch(range(corpus.n_chunks))
        assert_same(corpus, small_corpus)
        faults = [request.fault for request in server.requests if request.fault]
        assert set(faults) == set(FAULTS)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_and_threads_can_use_it(small_corpus: Path, tmp_path: Path, method: str) -> None:
    with FaultyServer(small_corpus, at_rate(0.2, "reset", "503")) as server:
        corpus = Corpus(f"{server.url}/manifest.json", options=options(tmp_path))
        expected = corpus.read(0, 0, 9).tolist()
        assert len(ForkingPickler.dumps(corpus)) < 1000
        context = multiprocessing.get_context(method)
        with context.Pool(2) as pool:
            parts = pool.starmap(read_chunk, [(corpus, chunk) for chunk in range(corpus.n_chunks)])
        with multiprocessing.pool.ThreadPool(8) as threads:
            again = threads.starmap(read_chunk, [(corpus, chunk) for chunk in range(corpus.n_chunks)])
        assert parts[0][:9] == expected
        assert parts == again
        assert_same(corpus, small_corpus)


def test_a_child_forked_while_chunks_are_on_their_way_reads_by_itself(
    small_corpus: Path, tmp_path: Path
) -> None:
    def script(path: str, before: int) -> str | None:
        return "hang" if "shard-00000.tar" in path and before == 0 else None

    with FaultyServer(small_corpus, script) as server:
        corpus = Corpus(f"{server.url}/manifest.json", options=options(tmp_path))
        corpus.read(30, 0, 1)
        corpus.prefetch([0, 1])
        while len(server.asked(r"shard-00000\.tar")) < 2:
            time.sleep(0.01)
        process = multiprocessing.get_context("fork").Process(target=read_chunk, args=(corpus, 0))
        process.start()
        process.join(60)
        assert process.exitcode == 0
        assert_same(corpus, small_corpus)


def read_chunk(corpus: Corpus, chunk: int) -> list[int]:
    return corpus.read(chunk, 0, CHUNK_TOKENS).tolist()


def test_only_the_first_process_asks_for_the_manifest_of_a_known_corpus(
    small_corpus: Path, tmp_path: Path
) -> None:
    with FaultyServer(small_corpus) as server:
        corpus = Corpus(f"{server.url}/manifest.json", options=options(tmp_path))
        again = ForkingPickler.loads(ForkingPickler.dumps(corpus))
        assert again.manifest == corpus.manifest
        assert again.options == corpus.options
        assert len(server.asked("manifest")) == 1


def test_googles_store_is_read_too(
    small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real client, and of the store what it asks for."""
    monkeypatch.setenv(
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false"
    )  # as remote.py does, before the first import
    gcsfs = pytest.importorskip("gcsfs", reason="gcsfs, of the extra `gcs`, is not installed")
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    with FaultyServer(small_corpus, at_rate(0.3, "reset", "wrong", "short", "cut", "drip")) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        gcsfs.GCSFileSystem.clear_instance_cache()
        corpus = Corpus("gs://bucket/manifest.json", options=options(tmp_path, prefetch_chunks=16))
        corpus.prefetch(range(corpus.n_chunks))
        assert_same(corpus, small_corpus)
        for fault, kind in (("404", CorruptShardError), ("403", remote.DeniedError)):
            server.script = always(fault, r"\.tar")
            corpus = Corpus(
                "gs://bucket/manifest.json", options=options(tmp_path / fault, read_timeout_s=1000)
            )
            with pytest.raises(kind, match="after 5 attempts"):
                corpus.read(0, 0, 1)


# --- what lasts ends in time, in a sentence ---


def test_a_missing_shard_is_named(small_corpus: Path, tmp_path: Path) -> None:
    with FaultyServer(small_corpus, always("404", r"shard-00001\.tar")) as server:
        url = f"{server.url}/manifest.json"
        corpus = Corpus(url, options=options(tmp_path, read_timeout_s=1000))
        chunk = corpus.manifest.shards[1].first_chunk
        with pytest.raises(CorruptShardError, match=r"shard-00001\.tar .* not exist.* 5 attempts") as caught:
            corpus.read(chunk, 0, 1)
        assert (caught.value.source_path, caught.value.chunk) == (url, chunk)
        sent = ForkingPickler.loads(ForkingPickler.dumps(caught.value))
        assert (str(sent), sent.source_path, sent.chunk) == (str(caught.value), url, chunk)
        assert len(corpus.read(chunk - 1, 0, 9)) == 9


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("wrong", r"member 000002\.(tok|doc) has xxh3-64"),
        ("short", r"member 000002\.(tok|doc) has \d+ bytes"),
    ],
)
def test_bytes_that_stay_wrong_are_never_used(
    small_corpus: Path, tmp_path: Path, fault: str, words: str
) -> None:
    with FaultyServer(small_corpus, always(fault, r"\.tar")) as server:
        corpus = Corpus(f"{server.url}/manifest.json", options=options(tmp_path, read_timeout_s=1000))
        for read in (lambda: corpus.read(2, 0, 1), lambda: corpus.documents(2)):
            with pytest.raises(CorruptShardError, match=rf"chunk 2: .*{words}.*after 6 attempts") as caught:
                read()
            assert caught.value.chunk == 2
        assert not list(tmp_path.glob("corpus-*/*.chunk*"))


def test_a_wrong_index_is_no_index(small_corpus: Path, tmp_path: Path) -> None:
    with FaultyServer(small_corpus, always("wrong", r"\.idx")) as server:
        corpus = Corpus(f"{server.url}/manifest.json", options=options(tmp_path))
        with pytest.raises(CorruptShardError, match=r"shard-00000\.idx .*different sha256") as caught:
            corpus.read(0, 0, 1)
        assert caught.value.chunk == 0
        assert not server.asked(r"\.tar")


@pytest.mark.parametrize(
    ("fault", "timeout_s", "words"),
    [
        # An attempt has a tenth of this time. An answer that comes has to be heard within it on a busy machine too.
        ("503", 6, "HTTP status 503"),
        ("reset", 6, "the store failed"),
        ("hang", 2, r"within 0\.2 s"),
    ],
)
def test_a_store_that_stays_away_is_waited_for_so_long(
    small_corpus: Path, tmp_path: Path, fault: str, timeout_s: int, words: str
) -> None:
    """It is no damaged chunk: nothing else of that store could be read instead."""
    with FaultyServer(small_corpus) as server:
        corpus = Corpus(f"{server.url}/manifest.json", options=options(tmp_path, read_timeout_s=timeout_s))
        server.script = always(fault)
        expected = rf"{server.url}/shards/shard-00000\.idx .*{words}.*after \d+ attempts in \d+ s"
        with pytest.raises(ReadError, match=expected) as caught:
            corpus.read(0, 0, 1)
        assert not isinstance(caught.value, CorruptShardError)
        corpus.prefetch([0, 1])
        with pytest.raises(ReadError, match=expected):  # what is fetched ahead in vain does not stay
            corpus.read(0, 0, 1)
        server.script = None
        assert len(corpus.read(0, 0, 9)) == 9


def test_a_server_that_is_gone_is_a_store_that_is_away(small_corpus: Path, tmp_path: Path) -> None:
    with FaultyServer(small_corpus) as server:
        corpus = Corpus(f"{server.url}/manifest.json", options=options(tmp_path, read_timeout_s=1))
    with pytest.raises(ReadError, match=r"ClientConnectorError"):
        corpus.read(0, 0, 1)


@pytest.mark.parametrize("status", ["401", "403", "400"])
def test_a_refusal_is_told_apart(small_corpus: Path, tmp_path: Path, status: str) -> None:
    with FaultyServer(small_corpus, always(status, "shards")) as server:
        corpus = Corpus(f"{server.url}/manifest.json", options=options(tmp_path, read_timeout_s=1000))
        with pytest.raises(remote.DeniedError, match=r"credentials.* 5 attempts"):
            corpus.read(0, 0, 1)


def test_a_server_without_ranges_is_not_believed(small_corpus: Path, tmp_path: Path) -> None:
    class NoRanges(FaultyServer):
        def choose(self, path: str, range_: str) -> str | None:
            return "200" if "shard-00000.tar" in path else super().choose(path, range_)

    with NoRanges(small_corpus) as server:
        corpus = Corpus(f"{server.url}/manifest.json", options=options(tmp_path))
        with pytest.raises(CorruptShardError, match="with the whole file"):
            corpus.read(0, 0, 1)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.json", b"", "does not exist"),
        ("other.json", b"<html>", "is not a corpus manifest"),
        ("large.json", b"x" * 3000, "more than 2,000 bytes"),
    ],
)
def test_what_is_no_manifest_is_a_configuration_error(
    tmp_path: Path, name: str, content: bytes, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.corpus.manifest.MAX_MANIFEST_BYTES", 2000)
    if content:
        (tmp_path / name).write_bytes(content)
    with FaultyServer(tmp_path) as server, pytest.raises(ConfigError, match=words):
        load_manifest(f"{server.url}/{name}")


def test_an_unknown_kind_of_store_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere://x/manifest\.json "):
        load_manifest("nowhere://x/manifest.json")


@pytest.mark.parametrize(
    "url",
    [
        "data://text/plain,{}",
        "ftp://host/manifest.json",
        "sftp://host/manifest.json",
        "smb://host/manifest.json",
        "jar://a/manifest.json",
        "github://owner:name@/manifest.json",
        "memory://manifest.json",
        "HTTP://host/manifest.json",
        "zip://manifest.json::http://host/a.zip",
        "simplecache::http://host/manifest.json",
        "http://host/a::s3://b/manifest.json",
        "http:///manifest.json",
        "http://[x]/manifest.json",
        "http://user:pa/zzz@host/manifest.json",
        "http://host/a\nb/manifest.json",
    ],
)
def test_other_kinds_of_urls_are_refused_before_anything_is_opened(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda *_, **__: pytest.fail("it was opened"))
    for attempt in (load_manifest, lambda given: remote.check_url("data.manifest", given)):
        with pytest.raises(ConfigError, match=r"cannot be used|holds a user") as caught:
            attempt(url)
        assert "zzz" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["s3://a_bucket/k", "s3://arn:aws:s3:eu-1:1:accesspoint/b/k", "http://[1:2:3:4:5:6:7:8]:8/k"]
)
def test_honest_urls_are_taken(url: str) -> None:
    remote._check_kind(url)


# --- redirects ---


def test_a_server_may_send_to_another_place_of_its_own(small_corpus: Path, tmp_path: Path) -> None:
    with FaultyServer(small_corpus) as server:
        server.redirects = {
            "/old/manifest.json": "/older/manifest.json",
            "/older/manifest.json": "/manifest.json",
        }
        assert load_manifest(f"{server.url}/old/manifest.json") == load_manifest(
            small_corpus / "manifest.json"
        )


@pytest.mark.parametrize(
    "target", ["{}/manifest.json?sig=hidden", "//{}/manifest.json", "gopher:x", "http://[", "/a"]
)
def test_a_server_sends_nobody_to_another_host(small_corpus: Path, target: str) -> None:
    with FaultyServer(small_corpus) as server, FaultyServer(small_corpus) as other:
        at = other.url if "sig" in target else other.url.removeprefix("http://")
        server.redirects["/a"] = target.format(at)
        with pytest.raises(ConfigError, match="after 5 attempts") as caught:
            load_manifest(f"{server.url}/a", 10)
        assert other.n_answers == 0
        assert "hidden" not in str(caught.value)
        if "manifest" in target:
            assert f" to {other.url};" in str(caught.value)


def test_text_is_not_read_from_another_host_either(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    with FaultyServer(tmp_path) as server, FaultyServer(tmp_path) as other:
        assert len(units_of([f"{server.url}/a.jsonl"], 1 << 20)) == 1
        server.redirects["/a.jsonl"] = f"{other.url}/a.jsonl"
        unit = Unit(f"{server.url}/a.jsonl", "a", "a", "jsonl")
        problems: list[str] = []
        assert list(read_unit(unit, ReadConfig(), lambda one: problems.append(one.why))) == []
        assert len(problems) == 1
        with pytest.raises(ConfigError, match="input="):
            units_of([f"{server.url}/a.jsonl"], 1 << 20)
        with pytest.raises(ConfigError, match=r"cannot be read: .*a\.jsonl"):
            list(read_items(f"{server.url}/a.jsonl", ["text"]))
        assert other.n_answers == 0


# --- retries ---


def test_waiting_is_told_of_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(remote, "_SAY_AFTER_S", 0)
    monkeypatch.setattr(remote, "_said_at", -1000.0)
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)
    attempts = []

    def attempt(timeout_s: float) -> str:
        attempts.append(timeout_s)
        if len(attempts) < 8:
            raise OSError("see https://user:secret@host/x?signature=abc")
        return "done"

    with caplog.at_level(logging.WARNING):
        assert persist("s3://bucket/x", attempt, 100) == "done"
    (line,) = caplog.messages
    assert re.match(
        r"waiting for s3://bucket/x for 0 s \(1 attempts, until 100 s\): the store failed \(OSError", line
    )
    assert "secret" not in line
    assert "abc" not in line
    assert attempts == [10.0] * 8  # one attempt gets a tenth


def test_pauses_grow_and_stay_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for number, most in ((1, 0.25), (2, 0.5), (4, 2), (20, 20), (10_000, 20)):
        pauses = [remote._pause(number) for _ in range(200)]
        assert 0 <= min(pauses) < most / 4
        assert most / 2 < max(pauses) <= most


def test_a_server_says_when_to_come_again() -> None:
    assert remote._seconds("3") == 3
    assert (
        0 < remote._seconds(time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 90))) <= 90
    )
    for nonsense in (None, "", "soon", "-1", "9" * 400, "Wed, 21 Oct 2015 07:28:00 GMT"):
        assert remote._seconds(nonsense) in (0, float("inf"))
    assert remote._classify(remote._HttpError(429, "7"), 1)[0::2] == (ReadError, 7)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://bucket/key is not there", "s3://bucket/key is not there"),
        ("https://me:secret@host/a", "https://***@host/a"),
        ("url='https://host/a?X-Amz-Signature=secret&b=c' x?", "url='https://host/a?*** x?"),
        ("https://token@host/a?sig=s https://host/b", "https://***@host/a?*** https://host/b"),
        ("write to me@host.org", "write to me@host.org"),
    ],
)
def test_credentials_are_not_shown(text: str, expected: str) -> None:
    assert redact(text) == expected


def test_errors_show_no_credentials(small_corpus: Path, tmp_path: Path) -> None:
    with FaultyServer(small_corpus) as server:
        url = server.url.replace("http://", "http://me:secret@")
        corpus = Corpus(f"{url}/manifest.json", options=options(tmp_path, read_timeout_s=1))
        for fault in ("403", "404", "503", "wrong"):
            server.script = always(fault, r"\.tar")
            with pytest.raises((ReadError, CorruptShardError), match=r"http://\*\*\*@127") as caught:
                corpus.read(0, 0, 1)
            assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "expected"),
    [("s3://b/m", True), ("https://h/m", True), ("file:///m", False), ("/m", False), (Path("s3://x"), False)],
)
def test_what_is_behind_a_url(path: str | Path, expected: bool) -> None:
    assert is_url(path) is expected


# --- local files on a network's disk ---


def test_a_short_read_of_a_local_file_is_tried_again(
    small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, (expected, _) = (
        copy_of(small_corpus, tmp_path),
        everything(Corpus(small_corpus / "manifest.json")),
    )
    tar = tmp_path / "corpus/shards/shard-00000.tar"
    corpus.read(0, 0, 1)
    shutil.copy(tar, tmp_path / "whole")
    os.truncate(tar, 600)
    pauses = []

    def mend(pause: float) -> None:  # during the second pause
        pauses.append(pause)
        if len(pauses) == 2:
            os.replace(tmp_path / "whole", tar)

    with monkeypatch.context() as patched:
        patched.setattr(remote.time, "sleep", mend)
        found = corpus.read(1, 0, CHUNK_TOKENS)
    np.testing.assert_array_equal(found, expected[CHUNK_TOKENS : 2 * CHUNK_TOKENS])
    tar.rename(tmp_path / "moved")
    assert len(corpus.read(1, 0, 9)) == 9  # from the file that was opened anew
    os.truncate(tmp_path / "moved", 600)
    (tmp_path / "moved").rename(tar)
    with pytest.raises(CorruptShardError, match=r"member 000001\.doc .* 0 of") as caught:
        corpus.documents(1)
    assert (caught.value.chunk, caught.value.source_path) == (1, str(tmp_path / "corpus/manifest.json"))


@pytest.mark.parametrize("number", [5, 116])  # EIO, ESTALE
def test_an_error_of_a_local_file_that_passes_is_tried_again(
    small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A mock, named as one: no disk here fails on request. It fails as often as may be, then once more."""
    corpus, failures, pread = copy_of(small_corpus, tmp_path), [number] * 5, os.pread

    def failing(*arguments: int) -> bytes:
        if failures:
            raise OSError(failures.pop(), "injected")
        return pread(*arguments)

    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(shards.os, "pread", failing)
    assert len(corpus.read(0, 0, 9)) == 9
    failures += [number] * 6
    with pytest.raises(CorruptShardError, match=r"member 000001\.tok .*: injected"):
        corpus.read(1, 0, 9)
    assert not failures


def copy_of(small_corpus: Path, tmp_path: Path) -> Corpus:
    return Corpus(Path(shutil.copytree(small_corpus, tmp_path / "corpus")) / "manifest.json")


# --- ahead of need ---


def test_a_run_asks_for_chunks_before_it_reads_them(small_corpus: Path, tmp_path: Path) -> None:
    """After the first step the chunks of the sixteen next ones are on their way, and no chunk is asked for twice."""
    with FaultyServer(small_corpus) as server:
        data = DataConfig(
            manifest=f"{server.url}/manifest.json",
            sequence_length=128,
            lanes=1,
            window_chunks=4,
            loader_workers=0,
            cache_dir=str(tmp_path),
        )
        loader = TrainLoader(
            data,
            0,
            global_batch_sequences=2,
            micro_batch_sequences=1,
            rank=0,
            world_size=1,
            total_steps=60,
            state=None,
        )

        def chunks_of(last_step: int) -> set[int]:
            return set(loader.order.locate(np.arange(loader.plan[last_step].end_sample)).chunk.tolist())

        steps = loader.steps(1)
        next(steps)
        deadline = time.monotonic() + 10
        while len(server.asked(r"\.tar")) < len(chunks_of(17)):
            assert time.monotonic() < deadline, "the chunks of the steps ahead were not asked for"
            time.sleep(0.01)
        assert len(server.asked(r"\.tar")) == len(chunks_of(17)) > len(chunks_of(1))
        assert len(list(steps)) == 59
        assert len(server.asked(r"\.tar")) == len(chunks_of(60))
