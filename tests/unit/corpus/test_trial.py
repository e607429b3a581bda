"""A tokenizer is tried in a process that may die."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from pretrain.corpus import tokenizer_trial as trial
from pretrain.errors import ConfigError
from support import ROOT


def made(**parts: object) -> bytes:
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer.to_str().encode()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "pretrain" / "tried"


def test_a_good_one_is_tried_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial.try_tokenizer(made(), "x.json")
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(trial, "problem_of", lambda _: "was tried again")
    trial.try_tokenizer(made(), "x.json")
    with pytest.raises(ConfigError, match="was tried again"):
        trial.try_tokenizer(made() + b" ", "x.json")


def test_what_is_no_tokenizer_is_left_to_who_opens_it() -> None:
    for content in (b"", b"{", b"{}", b"no model", json.dumps({"model": []}).encode()):
        assert trial.problem_of(content) is None


def test_one_that_grows_without_end_takes_no_memory_here(cache: Path) -> None:
    """Each of 3 normalizers makes 3,000 letters a of one."""
    growing = made(normalizer=normalizers.Sequence([normalizers.Replace("a", "a" * 3000)] * 3))
    with pytest.raises(
        ConfigError, match=r"^the tokenizer x\.json is not used: a process that tried it "
    ) as told:
        trial.try_tokenizer(growing, "x.json")
    assert "\n" not in str(told.value)
    assert not cache.exists()


def test_one_that_panics_is_one_sentence() -> None:
    """The package gives up a search that goes back too often, and its Rust code panics."""
    search = tokenizers.Regex(r"(\w+\s?)+$")
    problem = trial.problem_of(made(pre_tokenizer=pre_tokenizers.Split(search, "isolated")))
    assert problem is not None and problem.startswith("failed (") and "\n" not in problem


def test_a_piece_that_is_no_text_is_told(tmp_path: Path) -> None:
    """A model as a fuzzer has made it of an honest one."""
    path = ROOT / "tests/support/fuzz/crashers" / "sentencepiece" / "piece-that-is-no-utf-8"
    with pytest.raises(ConfigError, match="UnicodeDecodeError"):
        trial.try_tokenizer(path.read_bytes(), path)


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import os; os.kill(os.getpid(), 11)", "crashed (SIGSEGV)"),
        ("import os; os.abort()", "crashed (SIGABRT)"),
        (f"import os; os.kill(os.getpid(), {int(signal.SIGXCPU)})", f"took more than {trial.MAX_CPU_S} s"),
        ("bytearray(1 << 60)", f"took more than {trial.MAX_MEMORY_BYTES >> 30} GiB"),
    ],
)
def test_how_it_died_is_told(code: str, problem: str) -> None:
    """With processes that stand in for a parser that is harmed."""
    assert trial.problem_of(b"", (sys.executable, "-c", code)) == problem


def test_where_nothing_can_be_noted_it_is_tried_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    trial.try_tokenizer(made(), "x.json")
