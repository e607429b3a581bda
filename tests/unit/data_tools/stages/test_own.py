"""A user's own stage: the class that the file had when the curation began, or a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_tools.record import Record
from data_tools.stages.own import load_stage, pinned
from pretrain.errors import ConfigError

CODE = """
import re

PATTERN = re.compile("tablespoon")

class NoRecipes:
    name = "no_recipes"

    def process(self, record):
        record.count("no_recipes.seen")
        return "recipe" if PATTERN.search(record.text) else None
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my stages.py"
    path.write_text(CODE)
    return path


def test_a_class_of_a_file_is_a_stage(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    stage = load_stage(pinned("my stages.py:NoRecipes"))
    record = Record(id="1", text="two tablespoons of oil", source="s")
    assert (stage.name, stage.process(record), record.counts) == (
        "no_recipes",
        "recipe",
        {"no_recipes.seen": 1},
    )
    assert stage.process(Record(id="2", text="a letter", source="s")) is None


def test_other_bytes_than_at_the_start_are_not_run(file: Path, tmp_path: Path) -> None:
    stage = pinned(f"{file}:NoRecipes")
    file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + CODE)
    with pytest.raises(ConfigError, match="changed"):
        load_stage(stage)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("code", "class_name", "named"),
    [
        (CODE, "Missing", "Missing"),
        ("def broken(:", "NoRecipes", "SyntaxError"),
        ("raise RuntimeError('no')", "NoRecipes", "RuntimeError: no"),
        (CODE.replace("no_recipes", "../x"), "NoRecipes", r"'\.\./x'"),
        ("class NoRecipes:\n    name = 'x'", "NoRecipes", "process"),
    ],
)
def test_what_is_no_stage_is_named(file: Path, code: str, class_name: str, named: str) -> None:
    file.write_text(code)
    with pytest.raises(ConfigError, match=named):
        load_stage(pinned(f"{file}:{class_name}"))


@pytest.mark.parametrize("stage", ["x.py", "x.txt:A", "none.py:A", "a.py:not a name", ":A"])
def test_what_names_no_file_and_class_is_refused(stage: str) -> None:
    with pytest.raises(ConfigError, match=r"curation\.own_stages"):
        pinned(stage)
