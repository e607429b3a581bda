"""Compare the cost of curating English text with datatrove: `python benchmarks/curation_speed.py FILE.jsonl`

Both read the same documents from memory, in turns, on one core each, --repeats times. datatrove's filters are called
with their default settings, without its pipeline: a filter does not see what an earlier one dropped. Our stage measures
all of its rules on every document. With spaCy installed, datatrove splits words as by default; without it, its filters
get a regular expression, which is several times faster than that default.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data_tools.curation.dedup import DedupConfig, shingles, sketch
from data_tools.record import ENGLISH, Record
from data_tools.stages.quality import QualityConfig, QualityStage, ThresholdsConfig
from data_tools.stages.words import words_of

Process = Callable[[str], bool]
"""Processes one text and returns whether it is kept."""


class Job(NamedTuple):
    """One piece of work, as datatrove does it by default and as this program does it."""

    name: str
    theirs: Process
    ours: Process


def their_tokenizer() -> tuple[Any, str]:
    """The `language` argument for datatrove's filters, and a description of it."""
    if find_spec("spacy"):
        import spacy

        return "eng_Latn", f"its default, spaCy {spacy.__version__}"
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Regex(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return words_of(text, ENGLISH)

        def sent_tokenize(self, text: str) -> list[str]:
            return [part for part in text.split(". ") if part]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            ends = [place + 2 for place in range(len(text)) if text.startswith(". ", place)]
            return list(zip([0, *ends], [*ends, len(text)], strict=True))

    return Regex(), "our regular expression (spaCy is not installed)"


def _their_filters(filters: list[Any]) -> Process:
    from datatrove.data import Document

    def process(text: str) -> bool:
        document = Document(text=text, id="0")
        return all(step.filter(document) is True for step in filters)

    return process


def _our_stage(thresholds: ThresholdsConfig) -> Process:
    stage = QualityStage(QualityConfig(english=thresholds))
    return lambda text: stage.process(Record(id="0", text=text, source="", language=ENGLISH)) is None


def gopher_job(language: Any) -> Job:
    """Gopher's quality and repetition rules. Ours also measures those of C4 and FineWeb, without filtering by them."""
    from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter

    filters = [GopherRepetitionFilter(language=language), GopherQualityFilter(language=language)]
    others = (
        "min_sentences",
        "max_lorem_ipsum",
        "max_curly_brackets",
        "min_terminal_lines",
        "max_short_lines",
    )
    ours = replace(
        ThresholdsConfig(), **dict.fromkeys(others), max_newline_ratio=None, max_duplicate_line_chars=0.2
    )
    return Job("Gopher quality and repetition", _their_filters(filters), _our_stage(ours))


def all_rules_job(language: Any) -> Job:
    """All rules, in the order of FineWeb's own pipeline."""
    from datatrove.pipeline import filters as f

    filters = [
        f.GopherRepetitionFilter(language=language),
        f.GopherQualityFilter(language=language),
        f.C4QualityFilter(filter_no_terminal_punct=False, language=language),
        f.FineWebQualityFilter(language=language),
    ]
    return Job("Gopher, C4 and FineWeb", _their_filters(filters), _our_stage(ThresholdsConfig()))


def minhash_job(language: Any) -> Job:
    """MinHash signatures over shingles of 5 words, each with its own default bands: 14 of 8 hashes, and 14 of 5."""
    import tempfile

    from datatrove.pipeline.dedup import MinhashDedupSignature

    config = DedupConfig()
    step = MinhashDedupSignature(tempfile.mkdtemp(), language=language)
    # The same as datatrove's own function, which passes a string to xxhash; xxhash 4 accepts only bytes.
    step._hash_func = lambda shingle: xxhash.xxh64_intdigest(shingle.encode())

    def theirs(text: str) -> bool:
        found = step.get_shingles(text)
        return bool(found.size) and bool(step.get_signature(found))

    def ours(text: str) -> bool:
        found = shingles(text, config)
        return bool(len(found)) and bool(sketch(found, config).size)

    return Job("MinHash signatures", theirs, ours)


def together_job(language: Any) -> Job:
    """The work for which there is a speed target: Gopher's rules and the signatures."""
    rules, signatures = gopher_job(language), minhash_job(language)

    def both(first: Process, second: Process) -> Process:
        return lambda text: first(text) and second(text)

    return Job(
        "Gopher and MinHash",
        both(rules.theirs, signatures.theirs),
        both(rules.ours, signatures.ours),
    )


JOBS = [gopher_job, all_rules_job, minhash_job, together_job]


def documents_per_second(process: Process, texts: list[str]) -> float:
    """Documents per second of this process's CPU time, which does not depend on what else the machine does."""
    start_s = time.process_time()
    for text in texts:
        process(text)
    return len(texts) / (time.process_time() - start_s)


def spread(values: list[float]) -> str:
    """Values as their median and range."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.4g} ({low:.4g} to {high:.4g})"


def read(path: Path, n_documents: int) -> list[str]:
    """`n_documents` texts of a JSON-lines file, evenly spaced over it."""
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines() if line]
    return texts[:: max(1, len(texts) // n_documents)][:n_documents]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help='JSON lines with "text", in English')
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    texts = read(args.file, args.documents)
    language, tokenizer = their_tokenizer()
    print(
        f"{len(texts)} documents, {statistics.mean(map(len, texts)):.0f} characters on average, "
        f"{args.repeats} repeats in turn; median (range)\n\ndatatrove splits words by {tokenizer}.\n"
    )
    print("| work | datatrove, documents per second per core | ours | ratio | same decision |")
    print("|---|---|---|---|---|")
    for make in JOBS:
        job = make(language)
        # This comparison is not timed, and it loads everything that is loaded only once.
        same = sum(job.theirs(text) == job.ours(text) for text in texts[:200])
        theirs, ours = [], []
        for _ in range(args.repeats):
            theirs.append(documents_per_second(job.theirs, texts))
            ours.append(documents_per_second(job.ours, texts))
        ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
        agreement = f"{100 * same / min(200, len(texts)):.0f} %"
        print(f"| {job.name} | {spread(theirs)} | {spread(ours)} | {spread(ratios)} | {agreement} |")


if __name__ == "__main__":
    main()
