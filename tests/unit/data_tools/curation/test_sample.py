"""A dry run shows what stages do to documents spread over the input, and leaves no corpus."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("ftfy")
pytest.importorskip("py3langid")

from data_tools.curate import _is_finished as is_finished
from data_tools.curate import curate
from data_tools.curation import sample
from data_tools.curation.choice import CurationConfig
from data_tools.curation.sample import difference, shown, spread, summary, try_stages
from data_tools.reading.units import ReadConfig
from pretrain.errors import ConfigError
from support.curating import PROSE, config


def write(path: Path, texts: list[str]) -> Path:
    lines = [json.dumps({"id": f"{path.stem}-{number}", "text": text}) for number, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("n", [1, 7, 20, 150])
@pytest.mark.parametrize("most_read", [0, 1 << 20])
def test_records_are_spread_over_the_input(
    tmp_path: Path, n: int, most_read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "_MOST_READ_BYTES", most_read)
    write(tmp_path / "a.jsonl", [f"{number} {PROSE}" for number in range(60)])
    write(tmp_path / "b.jsonl", [f"{number} {PROSE}" for number in range(40)])
    found = [record.id for record in spread([str(tmp_path)], ReadConfig(), n)]
    assert len(found) == len(set(found)) == min(n, 100)
    if n == 20:
        assert sum(name.startswith("a") for name in found) in (11, 12, 13)
        numbers = [int(name[2:]) for name in found if name.startswith("a")]
        assert max(numbers) - min(numbers) > 40


def test_records_of_one_packed_file_are_spread_over_it(tmp_path: Path) -> None:
    import gzip

    path = write(tmp_path / "a.jsonl", [f"{number} {PROSE}" for number in range(1000)])
    packed = tmp_path / "p.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    found = [int(record.id[2:]) for record in spread([str(packed)], ReadConfig(), 10)]
    assert len(found) == 10
    assert all(90 <= b - a <= 110 for a, b in pairwise(found))


def test_each_step_has_its_stage_its_reason_and_both_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [f"<p>{PROSE}</p>\n\n© 2020 Us", "too short", PROSE])
    marked, short, good = try_stages([str(path)], ReadConfig(), CurationConfig(), 3)
    assert [(step.stage, step.what) for step in marked.steps] == [
        ("normalize", "normalize.html 2"),
        ("boilerplate", "boilerplate.lines 1"),
    ]
    assert marked.steps[1].before.endswith("© 2020 Us")
    assert marked.steps[1].after == PROSE
    assert [(step.stage, step.what, step.after) for step in short.steps] == [("quality", "low_words", None)]
    assert good.steps == []
    text = shown(marked)
    assert "boilerplate changed it: boilerplate.lines 1" in text
    assert "    -© 2020 Us" in text.split("\n")
    assert "quality dropped it: low_words\n    too short" in shown(short)
    assert "3 documents: 1 unchanged, 1 dropped" in summary([marked, short, good])


def test_a_difference_shows_the_sentence_that_changed() -> None:
    before = f"{PROSE} Write to a@b.org. {PROSE}"
    lines = difference(before, before.replace("a@b.org", "X"))
    assert [line for line in lines if line[0] in "+-"] == ["- Write to a@b.org.", "+ Write to X."]
    assert difference("same \n", "same\n") == []


def test_the_command_writes_nothing_but_the_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(
        tmp_path / "a.jsonl", [PROSE.replace("Tuesday", "<b>Tuesday</b>"), "\u001b]0;bad\u0007 but short"]
    )
    output = tmp_path / "out"
    assert curate(config(path, output, "sample=5")) == 0
    assert [file.name for file in output.iterdir()] == ["sample.txt"]
    printed = capsys.readouterr().out
    assert "normalize changed it: normalize.html 2" in printed
    assert "\u001b" not in printed
    assert "quality dropped it" in (output / "sample.txt").read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="sample=0"):
        config(path, output, "sample=0")


def test_a_folder_with_a_sample_can_be_curated_into(tmp_path: Path) -> None:
    (tmp_path / "sample.txt").write_text("before")
    assert not is_finished(tmp_path, {}, False)
    (tmp_path / "other.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        is_finished(tmp_path, {}, False)
