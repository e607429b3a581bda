"""Collect encyclopedic articles in 23 languages for `benchmarks/curation_quality.py`.

    git clone https://github.com/google-deepmind/xquad
    apt-get download stellarium-data && dpkg-deb -x stellarium-data_*.deb stellarium
    python benchmarks/collect_articles.py xquad stellarium CORPORA

It writes CORPORA/articles/LANGUAGE.jsonl, one record per article. XQuAD (CC BY-SA 4.0) has paragraphs of the same 48
Wikipedia articles in 12 languages, translated by people. Stellarium's descriptions of the skies of 49 cultures are
articles too; a language counts that has at least 15 of them and is not in XQuAD. Both are whole texts without the
lists, tables and notes of an encyclopedia's pages, so that a dump of Wikipedia will lose more.
"""

from __future__ import annotations

import argparse
import html
import json
import re
from collections import defaultdict
from pathlib import Path

FEWEST_ARTICLES = 15
FEWEST_CHARS = 400
_LANGUAGES = {"zh_TW": "zh-hant", "pt_BR": "pt"}
"""Names of Stellarium that differ from ours; the others with a country are left out."""
_BLOCK_END = re.compile(r"</(?:p|h\d|li|tr|div|ul|ol|table)>|<br ?/?>", re.IGNORECASE)
_CELL_END = re.compile(r"</t[dh]>\s*(?=<t[dh])", re.IGNORECASE)
_NOT_READ = re.compile(r"<(script|style|sub|sup)\b.*?</\1>", re.IGNORECASE | re.DOTALL)


def from_xquad(folder: Path) -> dict[str, list[str]]:
    """The articles by language, each as its paragraphs."""
    found = {}
    for path in sorted(folder.glob("xquad.*.json")):
        articles = json.loads(path.read_text(encoding="utf-8"))["data"]
        found[path.name.split(".")[1]] = [
            "\n\n".join(paragraph["context"] for paragraph in article["paragraphs"]) for article in articles
        ]
    return found


def from_stellarium(folder: Path) -> dict[str, list[str]]:
    """The descriptions of skies by language, without their markup."""
    found = defaultdict(list)
    for path in sorted(folder.glob("usr/share/stellarium/skycultures/*/description.*.utf8")):
        name = path.name.split(".")[1]
        language = _LANGUAGES.get(name, name)
        text = readable(path.read_text(encoding="utf-8"))
        if "_" not in language and len(text) >= FEWEST_CHARS:
            found[language].append(text)
    return {language: texts for language, texts in found.items() if len(texts) >= FEWEST_ARTICLES}


def readable(page: str) -> str:
    """The text of a page: a paragraph per block or row of a table, without tags."""
    text = _CELL_END.sub(" | ", _BLOCK_END.sub("\0", _NOT_READ.sub("", page)))
    text = html.unescape(re.sub(r"<[^>]*>", "", text))
    blocks = (" ".join(block.split()) for block in text.split("\0"))
    return "\n\n".join(filter(None, blocks))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("xquad", type=Path)
    parser.add_argument("stellarium", type=Path)
    parser.add_argument("corpora", type=Path)
    args = parser.parse_args()
    output = args.corpora / "articles"
    output.mkdir(parents=True, exist_ok=True)
    articles = from_stellarium(args.stellarium) | from_xquad(args.xquad)
    for language, texts in sorted(articles.items()):
        with (output / f"{language}.jsonl").open("w", encoding="utf-8") as file:
            for number, text in enumerate(texts):
                file.write(
                    json.dumps({"id": f"{language}-{number}", "text": text}, ensure_ascii=False) + "\n"
                )
        print(f"{language}: {len(texts)} articles")


if __name__ == "__main__":
    main()
