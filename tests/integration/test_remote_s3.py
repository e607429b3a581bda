"""A corpus on a real S3 server, behind a proxy that goes wrong: what is read, what refuses, and a whole run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs

from pretrain import remote
from pretrain.corpus.manifest import CorruptShardError, load_manifest
from pretrain.corpus.shards import Corpus
from pretrain.errors import ConfigError
from pretrain.remote import DeniedError, MissingError, ReadError
from support.faulty_server import FAULTS, FaultyServer, always, at_rate
from support.launching import Ranks
from support.served_corpus import assert_same, options, write_corpus
from support.tiny import TinyCorpus, make_corpus, run_arguments
from support.training import losses, samples_by_step

pytestmark = pytest.mark.integration


@pytest.fixture
def proxy(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    """In front of the store; who connects from now on comes this way."""
    with FaultyServer(os.environ["AWS_ENDPOINT_URL"]) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        s3fs.S3FileSystem.clear_instance_cache()
        yield server
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def folder(s3: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, also in the store under `small`."""
    folder = write_corpus(tmp_path_factory.mktemp("corpus"))
    s3fs.S3FileSystem().put(str(folder), f"{s3}/small", recursive=True)
    return folder


@pytest.fixture(scope="module")
def corpus(s3: str, tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    """A corpus to train on, also in the store under `tiny`."""
    corpus = make_corpus(tmp_path_factory.mktemp("tiny") / "tiny")
    s3fs.S3FileSystem().put(str(corpus.folder), f"{s3}/tiny", recursive=True)
    return corpus


def test_all_faults_together_change_nothing(
    folder: Path, s3: str, proxy: FaultyServer, tmp_path: Path
) -> None:
    proxy.script = at_rate(0.4, *FAULTS)
    corpus = Corpus(f"{s3}/small/manifest.json", options=options(tmp_path, read_timeout_s=20))
    corpus.prefetch(range(corpus.n_chunks))
    assert_same(corpus, folder)
    assert {request.fault for request in proxy.asked("small")} == {None, *FAULTS}


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (
            "404",
            CorruptShardError,
            r"chunk 0: s3://bucket/small/shards/shard-00000\.tar .*does not exist.* 5 attempts",
        ),
        ("wrong", CorruptShardError, r"chunk 0: .*member 000000\.tok has xxh3-64 .* 6 attempts"),
        ("short", CorruptShardError, r"chunk 0: .*member 000000\.(tok|doc) has \d+ bytes, .* 6 attempts"),
        ("403", DeniedError, r"denies access .*credentials.* 5 attempts"),
        ("503", ReadError, r"the store failed .* attempts in \d s"),
        ("reset", ReadError, r"the store failed .* attempts in \d s"),
        ("cut", ReadError, r"the store failed .* attempts in \d s"),
        ("hang", ReadError, r"within 0\.3 s.* attempts in \d s"),
    ],
)
def test_what_lasts_ends_in_time(
    folder: Path, s3: str, proxy: FaultyServer, tmp_path: Path, fault: str, kind: type[Exception], words: str
) -> None:
    limit = 3 if kind is ReadError else 60
    corpus = Corpus(f"{s3}/small/manifest.json", options=options(tmp_path, read_timeout_s=limit))
    proxy.script = always(fault, r"\.tar")
    with pytest.raises(kind, match=words):
        corpus.read(0, 0, 1)
    proxy.script = None
    assert len(corpus.read(0, 0, 9)) == 9


def test_each_attempt_is_one_request(folder: Path, s3: str, proxy: FaultyServer, tmp_path: Path) -> None:
    """Neither s3fs nor botocore tries again by itself: it would be outside of our count, pauses and time."""
    corpus = Corpus(f"{s3}/small/manifest.json", options=options(tmp_path, read_timeout_s=60))
    corpus.read(0, 0, 1)
    proxy.script = always("404", "shard-00001")
    before = len(proxy.requests)
    with pytest.raises(CorruptShardError, match="after 5 attempts"):
        corpus.read(corpus.manifest.shards[1].first_chunk, 0, 1)
    assert len(proxy.requests) - before == MissingError.max_attempts


def test_a_server_says_when_to_come_again(folder: Path, s3: str, proxy: FaultyServer) -> None:
    proxy.script = always("429")
    with pytest.raises(OSError, match=r"Injected|429") as caught:
        remote.read_once(f"{s3}/small/manifest.json", 0, 10, 30)
    assert remote._classify(caught.value, 30)[0::2] == (ReadError, 1.0)


@pytest.mark.parametrize("url", ["s3://bucket/none/manifest.json", "s3://no-such-bucket/manifest.json"])
def test_a_wrong_url_is_a_configuration_error(s3: str, url: str) -> None:
    with pytest.raises(ConfigError, match=f"{url} cannot be read: .*does not exist"):
        load_manifest(url)


def test_wrong_keys_are_a_configuration_error_that_shows_none(
    folder: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(ConfigError, match="check the URL and the credentials") as caught:
        load_manifest(f"{s3}/small/manifest.json")
    assert "secret" not in str(caught.value)
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_run_from_a_store_that_goes_wrong_is_the_run_from_a_disk(
    corpus: TinyCorpus, s3: str, proxy: FaultyServer, tmp_path: Path
) -> None:
    """Corpus, held-out corpus and tokenizer from S3: the same samples, the same losses, bit by bit."""
    local, run_dir = tmp_path / "local", tmp_path / "run"
    train(run_arguments(corpus, local), tmp_path / "logs-local")
    proxy.script = at_rate(0.3, *FAULTS)
    urls = [f"data.manifest={s3}/tiny/manifest.json", f"evaluation.manifest={s3}/tiny/heldout/manifest.json"]
    reading = [f"data.cache_dir={tmp_path}/cache", "data.read_timeout_s=30"]
    train(run_arguments(corpus, run_dir, *urls, *reading), tmp_path / "logs-run")
    assert losses(run_dir) == losses(local)
    assert samples_by_step(run_dir) == samples_by_step(local)
    assert (run_dir / "tokenizer.model").read_bytes() == (corpus.folder / "tokenizer.model").read_bytes()
    assert len({request.fault for request in proxy.asked(r"tiny/.*\.tar")}) > 4
    assert list((tmp_path / "cache").glob("corpus-*/*.chunk"))


def test_a_run_whose_store_is_gone_ends_with_a_sentence(
    corpus: TinyCorpus, s3: str, proxy: FaultyServer, tmp_path: Path
) -> None:
    proxy.script = always("503", r"tiny/shards/.*\.tar")
    urls = [f"data.manifest={s3}/tiny/manifest.json", "evaluation.manifest=null"]
    reading = [f"data.cache_dir={tmp_path}/cache", "data.read_timeout_s=4"]
    arguments = run_arguments(corpus, tmp_path / "run", *urls, *reading)
    with Ranks(1, "launch/train.py", *arguments, log_dir=tmp_path / "logs") as processes:
        assert processes.wait() == [1], processes.output()
        (line,) = [line for line in processes.output().splitlines() if line.startswith("error: ")]
    assert "s3://bucket/tiny/shards/shard-00000.tar cannot be read: the store failed" in line
    assert "attempts in" in line


def train(arguments: list[str], logs: Path) -> None:
    with Ranks(2, "launch/train.py", *arguments, log_dir=logs) as processes:
        codes = processes.wait()
    assert codes == [0, 0], processes.output()
