"""Which language curation takes a text for: programs, articles of several languages, and prose on programming.

Besides the sources of CORPORA, functions with docstrings of the running Python's library are programs. Two folders are
read where they are there: CORPORA/programs (each file one program, named by its style, such as the demos of Debian's
package ruby-rouge) and CORPORA/articles (one JSONL file per language code, records with `text`).
"""

from __future__ import annotations

import ast
import random
import sysconfig
import warnings
from collections.abc import Iterable
from pathlib import Path

from benchmarks.curation.figures import Figure, sample
from data_tools.record import CODE, Record
from data_tools.stages.language import LanguageConfig, LanguageStage

_COUNT = 400
_ARTICLES = {
    "wiki_vital": "en",
    "wiki_vital_es": "es",
    "wiki_vital_fr": "fr",
    "zh_law": "zh",
    "zh_peoplesdaily98": "zh",
}
_ON_PROGRAMMING = (
    "python_doc",
    "manpages_en",
    "git_doc",
    "perl_doc",
    "postgres_doc",
    "linux_doc",
    "zh_linux_doc",
)
_OTHER_PROSE = (
    "brown",
    "fortunes",
    "spam_mail",
    "factbook",
    "chitchat",
    "zh_reviews_raw",
)
_FEWEST_LETTERS = 200


def measure(corpora: Path) -> list[Figure]:
    stage = LanguageStage(LanguageConfig())

    def told(texts: Iterable[str]) -> list[str]:
        found = []
        for text in texts:
            stage.process(record := Record("1", text, "s"))
            found.append(record.language)
        return found

    def of(source: str) -> list[str]:
        return [found["text"] for found in sample(corpora / f"train/{source}.jsonl", _COUNT)]

    figures = [_share("functions with docstrings told as code", told(_functions()), CODE)]
    if (folder := corpora / "programs").is_dir():
        texts = [path.read_text(encoding="utf-8") for path in sorted(folder.iterdir())]
        figures.append(_share(f"short programs in {len(texts)} styles told as code", told(texts), CODE))
    for path in sorted((corpora / "train").glob("code_*.jsonl")):
        figures.append(_share(f"{path.stem} told as code", told(of(path.stem)), CODE))
    for source, code in _ARTICLES.items():
        articles = [text for text in of(source) if len(text) >= _FEWEST_LETTERS]
        figures.append(_share(f"{source} told as {code}", told(articles), code, ">= 0.98"))
    for path in sorted((corpora / "articles").glob("*.jsonl")):
        articles = [found["text"] for found in sample(path, _COUNT)]
        figures.append(_share(f"articles told as {path.stem}", told(articles), path.stem, ">= 0.98"))
    for names, limit in ((_ON_PROGRAMMING, "<= 0.03"), (_OTHER_PROSE, "<= 0.01")):
        for source in names:
            figures.append(_share(f"{source} (prose) told as code", told(of(source)), CODE, limit))
    return figures


def _functions() -> list[str]:
    """Functions with docstrings of the library of the running Python, without its largest and its nested ones."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
        functions = [
            node for node in tree.body if isinstance(node, ast.FunctionDef) and ast.get_docstring(node)
        ]
        found += [ast.get_source_segment(text, node) or "" for node in functions]
    return random.Random(0).sample(found, min(_COUNT, len(found)))


def _share(name: str, languages: list[str], code: str, goal: str = ">= 0.95") -> Figure:
    right = languages.count(code)
    # datatrove tells languages by fastText models that it downloads, and programs not at all
    peer = "no such stage" if code == CODE else "needs a download"
    return Figure(name, right / max(1, len(languages)), f"{right} of {len(languages)}", goal, peer)
