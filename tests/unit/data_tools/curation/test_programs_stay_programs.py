"""What defaults must not destroy: programs parse after all stages, and shared lines go from web prose only."""

from __future__ import annotations

import ast
import json
import sysconfig
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("py3langid")

from data_tools.curate import curate
from data_tools.curation.choice import CurationConfig, build_stages
from data_tools.curation.dedup import DedupConfig, line_hashes
from data_tools.record import Record
from data_tools.report.funnel import funnel_table
from data_tools.stages.web_prose import is_dialogue, is_law, is_web_prose
from support.curating import PROSE, config
from support.short_programs import PROGRAMS

LIBRARY = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))


def broken(paths: list[Path]) -> list[str]:
    """Files that parse before all stages with their defaults, and not after them; dropped files do no harm."""
    stages = build_stages(CurationConfig(), Path("none"))
    stages = [
        stage for stage in stages if stage.name != "decontaminate"
    ]  # it has no evaluation sets by default
    found = []
    for path in paths:
        record = Record(f"{path.stem}", path.read_text(encoding="utf-8"), "library")
        with warnings.catch_warnings(action="ignore"):
            ast.parse(record.text)
            if any(stage.process(record) for stage in stages):
                continue
            try:
                ast.parse(record.text)
            except SyntaxError as error:
                found.append(f"{path.name}:{error.lineno}: {error.text}")
    return found


def test_programs_of_the_library_still_parse() -> None:
    assert broken(LIBRARY[:: len(LIBRARY) // 12]) == []


@pytest.mark.long
def test_all_programs_of_the_library_still_parse() -> None:
    assert len(LIBRARY) > 100
    assert broken(LIBRARY) == []


def page(text: str, **more: object) -> Record:
    return Record("1", text, str(more.pop("source", "crawl")), **more)


LAW = "第一条 为了保护合法权益，制定本法。\n第二条 本法适用于境内活动。\n违反的，依法追究责任。\n第三条 即日施行。"
CONTRACT = "Article 1. The parties agree.\nArticle 2. It ends in May.\nEach bears its costs.\nArticle 3. It is signed."
DIALOGUE = "User: Hello?\nAssistant: I am sorry, I cannot help with that.\nUser: Why?\nAssistant: I am only a program."


def test_shared_lines_are_looked_for_in_web_prose_only() -> None:
    address = "https://example.org/a"
    assert is_web_prose(page(PROSE, url=address), [])
    assert is_web_prose(page(PROSE, source="crawl_2024"), ["crawl_*"])
    assert not is_web_prose(page(PROSE), [])
    assert not is_web_prose(page(PROGRAMS["python_docstring"], url=address), [])
    for text in (LAW, CONTRACT, DIALOGUE):
        assert not is_web_prose(page(text, url=address), [])


def test_laws_and_dialogues_are_told_by_their_lines() -> None:
    assert [is_law(text) for text in (LAW, CONTRACT, DIALOGUE, PROSE)] == [True, True, False, False]
    assert [is_dialogue(text) for text in (LAW, CONTRACT, DIALOGUE, PROSE)] == [False, False, True, False]
    assert is_dialogue("A: Hello\nB: I cannot help with that.")
    assert not is_dialogue("It is cheap.\nPrice: 3\nColor: red\nSize: 4\nWeight: 5\n")  # nobody speaks twice
    assert is_law(
        "中华人民共和国义务教育法\n\n第六十三条　本法自2006年9月1日起施行。\n违反的，依法追究责任。"
    )


def test_lines_of_other_documents_have_no_hashes() -> None:
    config = DedupConfig()
    assert len(line_hashes(page(PROSE, url="https://example.org/"), config)) == 1
    assert line_hashes(page(PROSE), config) == []
    assert line_hashes(page(PROSE, url="https://example.org/"), DedupConfig(repeated_lines=False)) == []


class Ignored:
    """Takes the place of the display of progress."""

    def advance(self, n_bytes: int) -> None: ...
    def finish(self, n_bytes: int) -> None: ...


def run_here(name: str, task: Any, n_tasks: int, *more: object) -> None:
    """All tasks of a phase, in this process: three phases would start three."""
    for rank in range(n_tasks):
        task.run(rank, Ignored())


def test_the_funnel_says_how_many_lines_went_from_how_many_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_tools.curate.run_phase", run_here)
    line = "Please accept our cookies, so that we can show you what you would like."
    texts = {"web": [f"Page {number} of the town.\n{line}\n{line}" for number in range(12)]}
    texts["book"] = [f"Page {number} of the book.\n{line}" for number in range(12)]
    with (tmp_path / "text.jsonl").open("w") as file:
        for source, of_source in texts.items():
            for number, text in enumerate(of_source):
                url = {"url": f"https://example.org/{number}"} if source == "web" else {}
                file.write(json.dumps({"source": source, "text": text} | url) + "\n")
    options = ("curation.stages=[language]", "curation.dedup.near=false")
    assert curate(config(tmp_path / "text.jsonl", tmp_path / "out", *options)) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["tally"]["counts"]["dedup.repeated_lines"] == 22
    assert report["tally"]["changed"]["dedup.repeated_lines"] == 11
    rows = [row.split() for row in funnel_table(report).split("\n")]
    assert ["dedup.repeated_lines", "22", "11"] in rows
    kept = (tmp_path / "out/documents/part-00000.jsonl").read_text()
    assert kept.count(line) == 2 + 12
