"""Near duplicates: which are found, which documents are dropped without being one, and what each edit costs.

The texts are originals and edited copies of them. What is a near duplicate is decided without the product: two texts
whose sets of shingles have a Jaccard similarity of 0.8 or more, found by an exact join over all pairs. A pair is found
if not both of its texts are kept. A drop is right if the text and the kept one that its record names are such a pair.

Set DATATROVE_PYTHON to the Python of an environment with datatrove 0.10.1, spaCy and xxhash below 4 to measure its
MinHash with default settings on the same English texts.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import math
import os
import random
import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.curation.figures import Figure, sample
from data_tools.curate import CurateConfig, curate
from pretrain.config import load_config

ROOT = Path(__file__).resolve().parents[2]
_SIMILAR = 0.8
_BUCKETS = [(0, 40), (40, 70), (70, 100), (100, 10**9)]
Edit = Callable[[str, random.Random], str]
Shingles = Callable[[str], set[Any]]


# ---- texts -----------------------------------------------------------------------------------------------------------


def words_changed(share: float) -> Edit:
    def edit(text: str, rng: random.Random) -> str:
        words = text.split(" ")
        for place in rng.sample(range(len(words)), max(1, round(share * len(words)))):
            words[place] = f"{rng.choice('bcdfghklmnprst')}o{rng.choice('bcdfghklmnprst')}er"
        return " ".join(words)

    return edit


def characters_changed(share: float) -> Edit:
    def edit(text: str, rng: random.Random) -> str:
        characters = list(text)
        for place in rng.sample(range(len(characters)), max(1, round(share * len(characters)))):
            characters[place] = chr(rng.randrange(0x4E00, 0x9000))
        return "".join(characters)

    return edit


def _sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?。!?])\s*", text) if part]


def sentences_shuffled(text: str, rng: random.Random) -> str:
    parts = _sentences(text)
    rng.shuffle(parts)
    return (" " if " " in text else "").join(parts)


def sentence_dropped(text: str, rng: random.Random) -> str:
    parts = _sentences(text)
    parts.pop(rng.randrange(len(parts)))
    return (" " if " " in text else "").join(parts)


ENGLISH: dict[str, Edit] = {
    "case": lambda text, rng: text.upper(),
    "one word": words_changed(0),
    "1% of words": words_changed(0.01),
    "2% of words": words_changed(0.02),
    "3% of words": words_changed(0.03),
    "5% of words": words_changed(0.05),
    "sentence dropped": sentence_dropped,
    "sentences shuffled": sentences_shuffled,
    "first half only": lambda text, rng: text[: len(text) // 2],
}
CHINESE: dict[str, Edit] = {
    "sentences shuffled": sentences_shuffled,
    "sentence dropped": sentence_dropped,
    "2% of characters": characters_changed(0.02),
}


@dataclass
class Texts:
    """Originals and copies, with what each copy was made from."""

    texts: list[str] = field(default_factory=list)
    copies: dict[int, tuple[int, str]] = field(default_factory=dict)
    """Number of a copy -> number of its original, and the edit."""

    def add(self, originals: Iterable[str], edits: dict[str, Edit], rng: random.Random) -> None:
        """Add originals and one copy of each, with one edit after another."""
        names = list(edits)
        for turn, text in enumerate(originals):
            self.texts.append(text)
            name = names[turn % len(names)]
            self.copies[len(self.texts)] = (len(self.texts) - 1, name)
            self.texts.append(edits[name](text, rng))


def frames(passages: list[str], rng: random.Random) -> Texts:
    """Instruction items of one frame with different contents, and copies of some with one word changed at the end."""
    found = Texts()
    for number, passage in enumerate(passages):
        content = " ".join(passage.split()[: rng.randrange(6, 60)])
        found.texts.append(
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n### Instruction:\nRead the following "
            f"passage with care and answer the question in one sentence.\n\n### Input:\n{content}\n\n### Response:\n"
        )
        if number % 20 == 0:
            found.copies[len(found.texts)] = (len(found.texts) - 1, "one word")
            found.texts.append(found.texts[-1].replace("in one sentence", "in two sentences"))
    return found


# ---- the truth -------------------------------------------------------------------------------------------------------


def word_shingles(text: str) -> set[Any]:
    words = re.findall(r"[^\W_]+", text.lower())
    return set(zip(*(words[start:] for start in range(5)), strict=False))


def character_shingles(text: str) -> set[Any]:
    plain = "".join(re.findall(r"[^\W_]", text.lower()))
    return {plain[start : start + 4] for start in range(len(plain) - 3)}


def jaccard(first: set[Any], second: set[Any]) -> float:
    return len(first & second) / max(1, len(first | second))


def similar_pairs(sets: list[set[Any]]) -> set[tuple[int, int]]:
    """All pairs with a similarity of at least _SIMILAR.

    Sorted by rarity, the first n - ceil(0.8 n) + 1 shingles of both texts of such a pair have one in common, because
    otherwise too few would be left. So only texts with a common one among those are compared.
    """
    counts = Counter(shingle for found in sets for shingle in found)
    holders: dict[Any, list[int]] = defaultdict(list)
    pairs = set()
    for number, found in enumerate(sets):
        rare = sorted(found, key=lambda shingle: (counts[shingle], shingle))
        seen = set()
        for shingle in rare[: len(rare) - math.ceil(_SIMILAR * len(rare)) + 1]:
            seen.update(holders[shingle])
            holders[shingle].append(number)
        pairs |= {(other, number) for other in seen if jaccard(found, sets[other]) >= _SIMILAR}
    return pairs


# ---- what was dropped ------------------------------------------------------------------------------------------------


def dropped(texts: list[str], *options: str) -> dict[int, int]:
    """Number of each text that a curation drops -> number of the kept one that its record names."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder / "in.jsonl", texts)
        overrides = [f"input=[{folder / 'in.jsonl'}]", f"output={folder / 'out'}", "curation.stages=[]"]
        config = load_config(
            CurateConfig, [*overrides, "curation.dedup.repeated_lines=false", "unit_bytes=2000000", *options]
        )
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert curate(config) == 0
        found = {}
        for path in (folder / "out/rejected").glob("*/*.gz"):
            for line in gzip.decompress(path.read_bytes()).splitlines():
                record = json.loads(line)
                found[int(record["id"])] = int(record["kept"]["id"])
        return found


def dropped_by_datatrove(texts: list[str]) -> set[int] | None:
    """The texts that datatrove's MinHash drops; None without its environment."""
    python = os.environ.get("DATATROVE_PYTHON")
    if not python:
        return None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder / "in/in.jsonl", texts)
        script = ROOT / "benchmarks/peers/run_datatrove_minhash.py"
        subprocess.run([python, str(script), str(folder)], check=True, capture_output=True)
        kept = {int(json.loads(line)["id"]) for line in (folder / "kept.jsonl").read_text().splitlines()}
    return set(range(len(texts))) - kept


def _write(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"id": str(number), "text": text}) + "\n" for number, text in enumerate(texts))
    path.write_text("".join(lines))


# ---- figures ---------------------------------------------------------------------------------------------------------


def _share(name: str, part: int, whole: int, goal: str = "", theirs: float | None = None) -> Figure:
    return Figure(name, part / whole if whole else 1.0, f"{part} of {whole}", goal, theirs)


def _recall(pairs: Iterable[tuple[int, int]], gone: Iterable[int]) -> tuple[int, int]:
    pairs, gone = list(pairs), set(gone)
    return sum(first in gone or second in gone for first, second in pairs), len(pairs)


def _of_texts(what: str, made: Texts, sets: list[set[Any]], buckets: list[tuple[int, int]]) -> list[Figure]:
    pairs = similar_pairs(sets)
    ours = dropped(made.texts)
    theirs = dropped_by_datatrove(made.texts) if buckets else None
    words = [len(text.split()) for text in made.texts]
    figures = []
    for low, high in buckets or [(0, 10**9)]:
        chosen = [pair for pair in pairs if low <= min(words[number] for number in pair) < high]
        part, whole = _recall(chosen, ours)
        peer = _recall(chosen, theirs)[0] / max(1, whole) if theirs is not None else None
        length = f", {low} to {high - 1} words" if high < 10**9 else f", {low} words or more" if low else ""
        goal = ">= 0.97" if low >= 70 or not buckets else ""
        figures.append(_share(f"{what}: near duplicates found{length}", part, whole, goal, peer))
    right = sum(jaccard(sets[number], sets[kept]) >= _SIMILAR for number, kept in ours.items())
    figures.append(_share(f"{what}: dropped documents that are near duplicates", right, len(ours), ">= 0.99"))
    for edit in dict.fromkeys(name for _, name in made.copies.values()):
        copies = [(number, original) for number, (original, name) in made.copies.items() if name == edit]
        part, whole = _recall(copies, ours)
        peer = _recall(copies, theirs)[0] / max(1, whole) if theirs is not None else None
        figures.append(_share(f"{what}: copies dropped, {edit}", part, whole, "", peer))
    return figures


def _of_frames(made: Texts) -> list[Figure]:
    sets = [word_shingles(text) for text in made.texts]
    pairs, ours, theirs = similar_pairs(sets), dropped(made.texts), dropped_by_datatrove(made.texts)
    part, whole = _recall(pairs, ours)
    wrong = sum(jaccard(sets[number], sets[kept]) < _SIMILAR for number, kept in ours.items())
    # Only for ours is it known which document stands for a dropped one. Of the peer's, those count that are like none.
    peer = None
    if theirs is not None:
        alike = {number for pair in pairs for number in pair}
        peer = len(theirs - alike) / len(made.texts)
    return [
        _share("items of one frame: near duplicates found", part, whole),
        _share("items of one frame: dropped without being one", wrong, len(made.texts), "<= 0", peer),
    ]


def measure(corpora: Path) -> list[Figure]:
    """Recall by length, precision, and the share of each edit that is dropped, in English and Chinese."""
    rng = random.Random(7)
    articles = [record["text"] for record in sample(corpora / "train/wiki_vital.jsonl", 6000, seed=1)]
    passages = [text for text in articles[2000:] if len(text.split()) >= 60][:2000]
    news = [record["text"] for record in sample(corpora / "train/news20_lower.jsonl", 2500, seed=2)]
    english = Texts()
    english.add([text for text in articles[:4500] if len(_sentences(text)) > 1], ENGLISH, rng)
    english.add([text for text in news if len(_sentences(text)) > 1], ENGLISH, rng)
    figures = _of_texts("English", english, [word_shingles(text) for text in english.texts], _BUCKETS)
    chinese = Texts()
    for source in ("zh_peoplesdaily98", "zh_law"):
        found = (record["text"] for record in sample(corpora / f"train/{source}.jsonl", 1200, seed=3))
        chinese.add(
            [text[:2000] for text in found if len(text) >= 150 and len(_sentences(text)) > 1], CHINESE, rng
        )
    figures += _of_texts("Chinese", chinese, [character_shingles(text) for text in chinese.texts], [])
    return figures + _of_frames(frames([*passages, *articles[:2000]], rng))
