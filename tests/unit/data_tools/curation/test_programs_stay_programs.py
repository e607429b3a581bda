"""What defaults must not destroy: programs parse after all stages, and shared lines go from web prose only."""

from __future__ import annotations

import ast
import sysconfig
import warnings
from pathlib import Path

import pytest

pytest.importorskip("py3langid")

from data_tools.curation.dedup import DedupConfig, line_hashes
from data_tools.curation.phases import CurationConfig, build_stages
from data_tools.curation.web_prose import is_dialogue, is_law, is_web_prose
from data_tools.record import Record
from support.curating import PROSE
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
    assert not is_dialogue("Price: 3\nColor: red\nSize: 4\nWeight: 5\n")  # nobody speaks twice


def test_lines_of_other_documents_have_no_hashes() -> None:
    config = DedupConfig()
    assert len(line_hashes(page(PROSE, url="https://example.org/"), config)) == 1
    assert line_hashes(page(PROSE), config) == []
    assert line_hashes(page(PROSE, url="https://example.org/"), DedupConfig(repeated_lines=False)) == []
