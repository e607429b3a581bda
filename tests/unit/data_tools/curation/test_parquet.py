"""Curated text as Parquet: the same documents as in JSON lines, whatever happens while they are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from data_tools import curate as command
from data_tools.config import PrepareConfig, TokenizerConfig
from data_tools.curate import curate
from data_tools.curation.executors import TaskProgress
from data_tools.curation.parquet import ParquetRows
from data_tools.prepare import prepare
from pretrain.corpus.manifest import load_manifest
from pretrain.errors import ConfigError
from support.curating import CHINESE, PROSE, config
from support.preparing import content

ODD = "nul \0, half \ud800, joined \U0001f469\u200d\U0001f469, mark \ufeff, e\u0301, line\u2028end, \a and \t tab"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Prose, odd characters, and a last part that only repeats the first."""
    records: list[dict[str, Any]] = [
        {
            "id": f"提案 {n}",
            "text": f"Number {n}. {PROSE if n % 2 else CHINESE} {ODD} {n}",
            "source": "a\u2028b",
        }
        for n in range(24)
    ]
    records[3] |= {"license": "CC0", "url": "https://example.org/提案?a=1"}
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records + records[:20]))
    return path


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run tasks here, and those that were done not again."""

    def run_phase(name: str, task: Any, n_tasks: int, folder: Path, *_: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for rank in range(n_tasks):
            if not (done := folder / f"{rank}.done").exists():
                task.run(rank, TaskProgress(folder / f"{rank}.bytes"))
                done.touch()

    monkeypatch.setattr(command, "run_phase", run_phase)


def curated(text: Path, output: Path, *more: str) -> int:
    options = (
        "unit_bytes=30000",
        "curation.stages=[quality]",
        "curation.quality.mode=annotate",
        "curation.dedup.near=false",
        *more,
    )
    return curate(config(text, output, *options))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    found = []
    for path in sorted((folder / "documents").glob("*.parquet")):
        for row in pyarrow.parquet.read_table(path).to_pylist():
            if row["signals"] is not None:
                row["signals"] = json.loads(row["signals"])
            found.append({name: value for name, value in row.items() if value is not None})
    return found


def lines_of(folder: Path) -> list[dict[str, Any]]:
    paths = sorted((folder / "documents").glob("*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_bytes().split(b"\n") if line]


def test_both_formats_hold_the_same_documents_and_give_the_same_corpus(text: Path, tmp_path: Path) -> None:
    lines, rows = tmp_path / "lines", tmp_path / "rows"
    assert curated(text, lines) == 0
    assert curated(text, rows, "output_format=parquet") == 0
    assert rows_of(rows) == lines_of(lines) != []
    parts = sorted((rows / "documents").iterdir())
    facts = [pyarrow.parquet.read_metadata(path) for path in parts]
    assert [fact.num_rows for fact in facts][-1] == 0, "the last part has duplicates only"
    assert facts[0].row_group(0).column(1).compression == "ZSTD"
    roots = []
    for folder in (lines, rows):
        options = PrepareConfig(
            input=[str(folder / "documents")],
            output=str(tmp_path / f"{folder.name}-corpus"),
            workers=1,
            tokenizer=TokenizerConfig(vocab_size=512),
        )
        assert prepare(options) == 0
        roots.append(load_manifest(Path(options.output) / "manifest.json").root_sha256)
    assert roots[0] == roots[1]


def test_interrupted_it_goes_on_to_the_same_bytes(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert curated(text, whole, "output_format=parquet") == 0
    finish, finished = ParquetRows.finish, list[ParquetRows]()

    def interrupted(rows: ParquetRows) -> None:
        finish(rows)
        finished.append(rows)
        if len(finished) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ParquetRows, "finish", interrupted)
        assert curated(text, broken, "output_format=parquet") == 130
    assert not (broken / "documents").exists()
    assert [path.name for path in broken.glob(".work/*/documents/part-*")] == ["part-00000.parquet"]
    assert curated(text, broken, "output_format=parquet") == 0
    assert content(broken) == content(whole)


def test_a_later_curation_is_told_that_rows_cannot_be_compared(text: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert curated(text, output) == 0
    assert curated(text, output, "output_format=parquet", "overwrite=true") == 0
    with pytest.raises(ConfigError, match=r"dedup\.against=.*output_format=parquet.*output_format=jsonl"):
        curated(text, tmp_path / "more", f"curation.dedup.against=[{output}]")


def test_the_format_is_part_of_the_recipe(text: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert curated(text, output) == 0
    assert "output_format" not in json.loads((output / "report.json").read_text())["recipe"]["options"]
    with pytest.raises(ConfigError, match="another recipe"):
        curated(text, output, "output_format=parquet")
