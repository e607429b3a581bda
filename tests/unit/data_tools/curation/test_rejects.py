"""What a curation dropped, and what other thresholds would have kept: the same as curating again says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_tools.curate import curate
from data_tools.rejects import RejectsConfig, main
from pretrain.errors import ConfigError
from support.curating import PROSE, config

FEW = ("executor.workers=1", "curation.stages=[normalize,language,quality]", "curation.dedup.near=false")
WORDS = PROSE.split()


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """English texts of 10 to 130 words, some of them of one word only."""
    path = tmp_path_factory.mktemp("raw") / "raw.jsonl"
    texts = [f"Number {n}. {' '.join(WORDS[: 10 * n])}" for n in range(1, 13)]
    texts += [f"spam {n} " * 200 for n in range(3)]
    path.write_text("".join(json.dumps({"id": f"d{n}", "text": text}) + "\n" for n, text in enumerate(texts)))
    return path


@pytest.fixture(scope="module")
def curated(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("curated") / "out"
    assert curate(config(raw, output, *FEW)) == 0
    return output


def rows(capsys: pytest.CaptureFixture[str], **options: Any) -> tuple[dict[str, list[str]], str]:
    """The rows of the table by reason, and all of the output."""
    main(RejectsConfig(**options))
    shown = capsys.readouterr().out
    table = [line.split() for line in shown.split("\n\n")[0].splitlines()[1:]]
    return {row[1]: row for row in table}, shown


def n_documents(output: Path) -> int:
    return sum(len(path.read_bytes().splitlines()) for path in (output / "documents").iterdir())


def test_reasons_are_counted_and_documents_shown(curated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, shown = rows(capsys, curated=str(curated), show=2)
    assert sum(int(row[2]) for row in table.values()) == 15 - n_documents(curated)
    assert int(table["low_words"][2]) >= 3
    assert shown.count("\nquality low_words: id d") == 2
    assert "quality.words" in shown
    only, _ = rows(capsys, curated=str(curated), reason="low_words")
    assert only.keys() == {"low_words"}


@pytest.mark.parametrize("n_words", [20, 35, 1])
def test_other_thresholds_keep_what_curating_again_keeps(
    raw: Path, curated: Path, tmp_path: Path, n_words: int, capsys: pytest.CaptureFixture[str]
) -> None:
    _, shown = rows(capsys, curated=str(curated), quality={"english": {"min_words": n_words}})
    again = tmp_path / "again"
    assert curate(config(raw, again, *FEW, f"curation.quality.english.min_words={n_words}")) == 0
    more = n_documents(again) - n_documents(curated)
    assert f"\n{more} of {15 - n_documents(curated)} documents would be kept" in shown


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"stage": "harm"}, "harm .*quality"),
        ({"reason": "no_reason"}, "no_reason"),
        ({"quality": {"english": {"min_wrds": 1}}}, "min_wrds"),
        ({"quality": {"english": {"min_words": 1}}, "stage": "pii"}, "stage=pii"),
        ({"curated": "nowhere"}, "nowhere"),
    ],
)
def test_what_is_not_there_is_named(curated: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        main(RejectsConfig(**({"curated": str(curated)} | options)))


def test_wrong_options_are_named() -> None:
    for options, named in (({"show": -1}, "show=-1"), ({"quality": 3}, "quality=3")):
        with pytest.raises(ConfigError, match=named):
            RejectsConfig(curated="x", **options)
