"""What curation's defaults leave of text that they must not destroy.

Programs: every module of the library of the running Python that parses must parse after all stages. Programs of
CORPORA (`train/code_*.jsonl`) must come through unchanged but for personal data. Escaped tags and placeholders are
set into prose. Lines that 28 documents share are set into documents of several kinds; they may go from pages of the
web alone.
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.curation.figures import Figure, records, sample
from data_tools.curation.choice import CurationConfig, build_stages
from data_tools.curation.dedup import DedupConfig, line_hashes
from data_tools.record import CurationStage, Record
from data_tools.stages.normalize import NormalizeConfig, NormalizeStage

_COUNT = 300
_SHARED_BY = 28
_NAMES = ("p", "br", "b", "img", "table", "source", "var", "title", "option", "a", "li", "object", "path")
_SHARED = {
    "code": "from collections.abc import Callable, Iterable, Iterator",
    "law": "违反本法规定，构成犯罪的，依法追究刑事责任；尚不构成犯罪的，依法给予行政处罚。",
    "dialogue": "Assistant: I am sorry, but I cannot help with that; please ask something else.",
    "web page": "Please accept our cookies, so that we can show you what we think you would like.",
}


def measure(corpora: Path) -> list[Figure]:
    config = CurationConfig()
    stages = [stage for stage in build_stages(config, Path("none")) if stage.name != "decontaminate"]
    return [
        _parsing(stages),
        *_programs_unchanged(corpora, stages),
        _kept("placeholders kept", corpora, "<{}>"),
        _kept("escaped tags kept", corpora, "&lt;{}&gt;"),
        *_shared_lines(corpora),
    ]


def _parses(text: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ast.parse(text)
        except (SyntaxError, ValueError):
            return False
    return True


def _parsing(stages: list[CurationStage]) -> Figure:
    kept = parsing = 0
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted([*library.glob("*.py"), *library.glob("[a-z]*/*.py")]):
        record = Record(f"library:{path.stem}", path.read_text(encoding="utf-8", errors="replace"), "library")
        if _parses(record.text) and not any(stage.process(record) for stage in stages):
            kept += 1
            parsing += _parses(record.text)
    return _figure("programs that parse after all stages, of those kept", parsing, kept, ">= 1")


def _programs_unchanged(corpora: Path, stages: list[CurationStage]) -> list[Figure]:
    figures = []
    for path in sorted((corpora / "train").glob("code_*.jsonl")):
        kept = same = 0
        for found in sample(path, _COUNT):
            record = Record(found["id"], found["text"], path.stem)
            before = record.text
            if any(stage.process(record) for stage in stages if stage.name != "pii"):
                continue
            kept += 1
            same += [line.rstrip() for line in before.split("\n") if line.strip()] == [
                line.rstrip() for line in record.text.split("\n") if line.strip()
            ]
        figures.append(_figure(f"{path.stem}: no line changed, of those kept", same, kept, ">= 0.95"))
    return figures


def _kept(name: str, corpora: Path, form: str) -> Figure:
    """Fraction of names of tags, set between two words of an article, that are there afterwards."""
    stage = NormalizeStage(NormalizeConfig())
    kept = total = 0
    for number, found in enumerate(sample(corpora / "train/wiki_vital.jsonl", _COUNT)):
        tag = _NAMES[number % len(_NAMES)]
        words = found["text"].split(" ")
        words.insert(len(words) // 2, form.format(tag))
        record = Record("1", " ".join(words), "wiki")
        stage.process(record)
        kept += f" <{tag}> " in record.text
        total += 1
    return _figure(name, kept, total, ">= 1")


def _shared_lines(corpora: Path) -> list[Figure]:
    """Fraction of the documents of each kind in which the shared line is looked for, all of them with an address."""
    sources: dict[str, tuple[str, Callable[[str], str]]] = {
        "code": ("code_python", str),
        "law": ("zh_law", str),
        "dialogue": ("chitchat", lambda text: text.replace("A: ", "User: ").replace("B: ", "Assistant: ")),
        "web page": ("wiki_vital", str),
    }
    figures = []
    for kind, (source, form) in sources.items():
        hashes = []
        for found in list(records(corpora / f"train/{source}.jsonl"))[:_SHARED_BY]:
            text = f"{form(found['text'])}\n{_SHARED[kind]}"
            record = Record(found["id"], text, source, url="https://example.org/")
            hashes.append(
                {value for value, line in line_hashes(record, DedupConfig()) if line == _SHARED[kind]}
            )
        hit = int(np.sum([bool(found) for found in hashes]))
        goal = ">= 0.95" if kind == "web page" else "<= 0"
        figures.append(
            _figure(
                f"lines shared by {_SHARED_BY} documents that count as repeated: {kind}",
                hit,
                _SHARED_BY,
                goal,
            )
        )
    return figures


def _figure(name: str, part: int, whole: int, goal: str) -> Figure:
    return Figure(name, part / max(1, whole), f"{part} of {whole}", goal, "no such stage")
