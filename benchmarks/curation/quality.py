"""What the quality stage drops on the web's terms: good text of every form and script, and pages nobody wants.

Encyclopedia articles are `train/wiki_*.jsonl`, each in one language, `train/factbook.jsonl`, and those that
`benchmarks/collect_articles.py` collects, `articles/LANGUAGE.jsonl`; only those of 50 words or more count, for shorter
ones are dropped for their length. The other texts are in `quality_texts.json` beside this
file. Languages are given, not detected, so that the figures are this stage's own.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.curation.figures import Figure, sample
from data_tools.record import Record
from data_tools.stages.quality import QualityConfig, QualityStage
from data_tools.stages.words import split

_TEXTS = Path(__file__).parent / "quality_texts.json"
_ARTICLES = 1000
_LEAST_WORDS = 50
# datatrove reads the first texts of each kind only, because it takes up to a hundred times as long.
_PEER_TEXTS = 100
# datatrove's names of the languages for which its word splitters need no model.
_SCRIPTS = {
    "en": "eng_Latn",
    "de": "deu_Latn",
    "es": "spa_Latn",
    "fr": "fra_Latn",
    "ru": "rus_Cyrl",
    "el": "ell_Grek",
    "ar": "arb_Arab",
    "hr": "hrv_Latn",
    "nl": "nld_Latn",
    "pt": "por_Latn",
    "ro": "ron_Latn",
    "tr": "tur_Latn",
    "uk": "ukr_Cyrl",
}


def measure(corpora: Path) -> list[Figure]:
    """Fraction of articles dropped by language, of good texts dropped, and of junk kept."""
    figures = [
        _dropped(f"encyclopedia articles dropped, {path.stem}", _articles(path), "<= 0.03")
        for path in [
            *sorted((corpora / "train").glob("wiki_*.jsonl")),
            corpora / "train/factbook.jsonl",
            *sorted((corpora / "articles").glob("*.jsonl")),
        ]
        if path.exists()
    ]
    texts = json.loads(_TEXTS.read_text(encoding="utf-8"))
    good = [(text["text"], text["language"]) for text in texts["good"].values()]
    junk = [(text["text"], text["language"]) for text in texts["junk"].values()]
    dropped = _dropped("good texts of any form and script dropped", good, "<= 0.0")
    lost = _dropped("junk kept", junk, "")
    n_kept = len(junk) - int(lost.counted.split()[0])
    theirs = None if lost.theirs is None else f"dropped: {lost.theirs}"
    kept = Figure("junk kept", n_kept / len(junk), f"{n_kept} of {len(junk)}", "<= 0.1", theirs)
    return [*figures, dropped, kept]


def _articles(path: Path) -> list[tuple[str, str]]:
    language = "en" if path.stem in ("wiki_vital", "factbook") else path.stem.rsplit("_", 1)[-1]
    texts = [record["text"] for record in sample(path, _ARTICLES)]
    return [(text, language) for text in texts if len(split(text, language).numbers) >= 1.2 * _LEAST_WORDS]


def _dropped(name: str, texts: list[tuple[str, str]], goal: str) -> Figure:
    stage = QualityStage(QualityConfig())
    n_dropped = sum(
        stage.process(Record(id="0", text=text, source="web", language=language)) is not None
        for text, language in texts
    )
    theirs = _theirs(texts) if find_spec("datatrove") and find_spec("spacy") else None
    return Figure(name, n_dropped / max(1, len(texts)), f"{n_dropped} of {len(texts)}", goal, theirs)


def _theirs(texts: list[tuple[str, str]]) -> str | None:
    """How many texts datatrove's filters drop with the settings of FineWeb, of the first ones in languages that it can
    split into words; None where there are none."""
    from datatrove.data import Document
    from datatrove.pipeline import filters as f

    known = [(text, code) for text, code in texts if code in _SCRIPTS][:_PEER_TEXTS]
    chains: dict[str, list[Any]] = {}
    n_dropped = 0
    for text, code in known:
        language = _SCRIPTS[code]
        if language not in chains:
            chains[language] = [
                f.GopherRepetitionFilter(language=language),
                f.GopherQualityFilter(language=language, min_stop_words=2 if code == "en" else 0),
                f.C4QualityFilter(filter_no_terminal_punct=False, language=language),
                f.FineWebQualityFilter(language=language),
            ]
        document = Document(text=text, id="0")
        n_dropped += any(step.filter(document) is not True for step in chains[language])
    return f"{n_dropped} of {len(known)}" if known else None
