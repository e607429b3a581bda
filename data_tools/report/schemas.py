"""Schemas of the JSON files of a corpus and of a curation, which are checked as a whole before they are used.

    prepare.json      how a corpus was made (`PrepareReport`)
    statistics.json   what it holds, in figures (`Statistics`)
    report.json       what a curation did (`CurationReport`)

They are untrusted, because they come with the corpus. Fields that older programs did not write have defaults.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.errors import ConfigError
from pretrain.files import read_capped
from pretrain.stored import (
    Annotated,
    Count,
    Ge,
    Le,
    Line,
    MaxLen,
    Positive,
    Predicate,
    Sha256,
    Text,
    parse,
)

MAX_REPORT_BYTES = 32 << 20
"""Largest size of a report in bytes. A report lists every source, and a corpus may have a hundred thousand of them."""
MAX_REPORT_VALUES = 1 << 20
"""Largest number of JSON values in a report, which bounds the memory that parsing it takes."""
_MAX_STAGES = 1000
"""Largest number of entries in a list of stages or curations."""


def is_power_of_two(text: str) -> bool:
    """Whether a text is a power of two in decimal digits, as the keys of a histogram are."""
    return is_size(text) and int(text).bit_count() == 1


def is_size(text: str) -> bool:
    """Whether a text is a decimal number of at least 1."""
    return len(text) < 19 and text.isascii() and text.isdecimal() and text[0] != "0"


Figure = Annotated[float, Ge(0), Le(1e18)]
Counts = dict[Text, Count]


# ---- prepare.json ----------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class InputFacts:
    """All input files together."""

    files: Count
    """Number of input files."""
    bytes: Count
    """Total size of the input files in bytes."""
    sha256: Sha256
    """Hash of the files' names, sizes and modification times."""


@dataclass(kw_only=True, slots=True)
class RecipeFacts:
    """The recipe of a corpus. Options are only compared and hashed; code that uses one has to check it."""

    options: dict[Text, Any]
    """Options of the preparation by their full names, such as `tokenizer.vocab_size`."""
    input: InputFacts
    """The input files."""


@dataclass(kw_only=True, slots=True)
class BegunReport:
    """prepare.json in the work folder."""

    recipe: RecipeFacts
    """Everything that decides the bytes of the corpus."""


@dataclass(kw_only=True, slots=True)
class UnreadFacts:
    """`funnel.Unread`."""

    files: Count = 0
    """Number of files of the input that were not read, or only in part."""
    documents: Count = 0
    """Number of documents that were lost with them, as an estimate."""
    named: dict[Text, Text] = field(default_factory=dict)
    """The reason for each of the first files."""


@dataclass(kw_only=True, slots=True)
class FunnelFacts:
    """`gather.Funnel`."""

    read: Count
    """Number of documents that were read, including bad ones."""
    dropped: Counts
    """Number of dropped documents by reason."""
    kept: Count
    """Number of documents that were kept, including held-out ones."""
    kept_bytes: Count
    """UTF-8 bytes of the kept documents."""
    heldout: Count
    """Number of kept documents that are held out of training."""
    cut: Count = 0
    """Number of kept dialogues that were cut."""
    shortened: Count = 0
    """Number of kept labeled documents that were cut."""
    unread: UnreadFacts = field(default_factory=UnreadFacts)
    """Files that were not read."""


@dataclass(kw_only=True, slots=True)
class FitFacts:
    """`fertility.Fit.as_dict`."""

    documents: Count
    """Number of documents that were measured."""
    bytes: Count
    """UTF-8 bytes of their text."""
    characters: Count
    """Number of their characters, not counting white space."""
    cjk_characters: Count = 0
    """Number of those characters that are Chinese, Japanese or Korean."""
    words: Count
    """Number of words separated by white space."""
    tokens: Count
    """Number of tokens."""
    byte_tokens: Count
    """Number of tokens that stand for a single byte of a character without its own vocabulary entry."""
    unk_tokens: Count = 0
    """Number of unknown tokens, whose text is lost."""
    returned: Count = 0
    """Number of documents whose text is unchanged after encoding and decoding."""
    bytes_per_token: Figure
    """UTF-8 bytes per token."""
    characters_per_token: Figure
    """Characters other than white space per token."""
    tokens_per_word: Figure
    """Tokens per word."""
    byte_token_frac: Figure
    """Fraction of the tokens (0 to 1) that are `byte_tokens`."""
    unk_frac: Figure = 0.0
    """Fraction of the tokens (0 to 1) that are unknown."""


@dataclass(kw_only=True, slots=True)
class TokenizerFacts:
    """The tokenizer, and how well it fits."""

    sha256: Sha256
    """Hash of the tokenizer file."""
    kind: Text = "sentencepiece"
    """Type of the tokenizer, and whether it was imported."""
    heldout_fit: dict[Text, FitFacts] = field(default_factory=dict)
    """How well it fits the held-out text, by script (`cjk` or `other`)."""
    heldout_fit_by_language: dict[Text, FitFacts] = field(default_factory=dict)
    """How well it fits the held-out text, by language."""
    sample_bytes: Count = 0
    """UTF-8 bytes of the sample that it was trained on; 0 for an imported tokenizer."""
    sample_bytes_by_source: Counts = field(default_factory=dict)
    """UTF-8 bytes of that sample by source."""


@dataclass(kw_only=True, slots=True)
class CardFacts:
    """Statements about a corpus."""

    name: Text | None = None
    """Name of the corpus."""
    description: Text | None = None
    """Description of the corpus."""
    creator: Text | None = None
    """Person or organization that created the corpus."""
    date_published: Annotated[str, MaxLen(10)] | None = None
    """Date of publication as YYYY-MM-DD."""


@dataclass(kw_only=True, slots=True)
class StageFacts:
    """One entry of the lineage."""

    stage: Text
    """Name of the stage."""
    options_sha256: Sha256
    """Hash of the options that the stage depends on."""
    input_sha256: Sha256 | None
    """Hash of the stage's input; null where it was not recorded."""
    output_sha256: Sha256 | None
    """Hash of the stage's output; null where it was not recorded."""
    documents_in: Count | None
    """Number of documents that the stage received; null where it was not counted."""
    documents_out: Count | None
    """Number of documents that the stage passed on; null where it was not counted."""
    bytes_in: Count | None
    """Bytes of the stage's input; null where they were not counted."""
    bytes_out: Count | None
    """Bytes of the stage's output; null where they were not counted."""
    dropped: Counts
    """Number of dropped documents by reason."""
    program: Text
    """Name and version of the program that ran the stage."""
    libraries: dict[Text, Text]
    """Versions of the libraries that affect the result, by name of the library."""


@dataclass(kw_only=True, slots=True)
class PrepareReport(BegunReport):
    """prepare.json of a finished corpus."""

    created_by: Text
    """Name and version of the program that made the corpus."""
    root_sha256: Sha256
    """Root hash of the corpus."""
    card: CardFacts | None = None
    """Statements for the card."""
    funnel: FunnelFacts
    """Numbers of documents that were read, dropped and kept."""
    curations: dict[Text, Any] = field(default_factory=dict)
    """Recipe of each curation whose text was prepared, by the path of the curation's output."""
    curation_funnels: Annotated[list[Text], MaxLen(_MAX_STAGES)] = field(default_factory=list)
    """Funnel of each of these curations, as a table in plain text."""
    tokenizer: TokenizerFacts
    """The tokenizer of the corpus."""
    lineage: Annotated[list[StageFacts], MaxLen(_MAX_STAGES)] = field(default_factory=list)
    """Stages that led to the corpus, in order."""
    summary: Annotated[list[Text], MaxLen(_MAX_STAGES)]
    """Funnel of the preparation, as lines of text."""


def read_prepare_report(path: Path) -> dict[str, Any]:
    """The content of prepare.json of a finished corpus. Raises ConfigError."""
    return _read(PrepareReport, path, "the report of a preparation")


def read_recipe(path: Path, *, finished: bool) -> RecipeFacts:
    """The recipe in prepare.json. Raises ConfigError, FileNotFoundError among the causes."""
    content = _content(path)
    schema = PrepareReport if finished else BegunReport
    return parse(schema, content, str(path), "the report of a preparation", MAX_REPORT_VALUES).recipe


# ---- statistics.json -------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class LengthFacts:
    """Lengths of documents in tokens."""

    mean: Figure
    """Mean length in tokens."""
    p5: Count
    """5th percentile of the length in tokens."""
    p50: Count
    """Median length in tokens."""
    p95: Count
    """95th percentile of the length in tokens."""
    max: Count
    """Largest length in tokens."""
    histogram: Annotated[dict[Annotated[str, Predicate(is_power_of_two)], Count], MaxLen(64)]
    """Number of documents by length: the key n, a power of two, counts documents of n to 2n - 1 tokens."""


@dataclass(kw_only=True, slots=True)
class ScriptFacts:
    """Documents of one script."""

    documents: Count
    """Number of documents."""
    tokens: Count
    """Number of their tokens."""
    text_bytes: Count
    """UTF-8 bytes of their text."""


@dataclass(kw_only=True, slots=True)
class SourceFacts:
    """Documents of one source."""

    name: Text
    """Name of the source."""
    license: Text
    """License of the source."""
    documents: Count
    """Number of documents."""
    tokens: Count
    """Number of their tokens."""
    text_bytes: Count
    """UTF-8 bytes of their text."""
    bytes_per_token: Figure
    """UTF-8 bytes of text per token."""


@dataclass(kw_only=True, slots=True)
class LanguageFacts:
    """Documents of one language."""

    documents: Count
    """Number of documents."""
    text_bytes: Count
    """UTF-8 bytes of their text."""


@dataclass(kw_only=True, slots=True)
class FunnelRow:
    """One stage of the funnel."""

    stage: Text
    """Name of the stage."""
    documents_in: Count
    """Number of documents that the stage received."""
    documents_out: Count
    """Number of documents that the stage kept."""
    bytes_in: Count | None
    """UTF-8 bytes of the received documents; null where they were not counted."""
    bytes_out: Count | None
    """UTF-8 bytes of the kept documents; null where they were not counted."""
    dropped: Counts
    """Number of dropped documents by reason."""


@dataclass(kw_only=True, slots=True)
class HeldoutFacts:
    """The held-out part."""

    documents: Count
    """Number of held-out documents."""
    tokens: Count
    """Number of their tokens."""


@dataclass(kw_only=True, slots=True)
class DuplicateFacts:
    """Counts of duplicates. Without a curation, only the last field is set."""

    exact: Count | None = None
    """Number of documents dropped because another one has the same text."""
    near: Count | None = None
    """Number of documents dropped because another one has a similar text."""
    only_repeated_lines: Count | None = None
    """Number of documents dropped because all of their lines were repeated lines."""
    repeated_lines: Count | None = None
    """Number of different lines that occur in too many documents."""
    clusters: Count | None = None
    """Number of clusters of duplicates."""
    documents_in_clusters: Count | None = None
    """Number of documents in all clusters, including those that were kept."""
    cluster_sizes: dict[Annotated[str, Predicate(is_size)], Count] | None = None
    """Number of clusters by their size in documents."""
    exact_in_preparation: Count
    """Number of exact duplicates that the preparation dropped."""


@dataclass(kw_only=True, slots=True)
class Statistics:
    """statistics.json."""

    root_sha256: Sha256
    """Root hash of the corpus."""
    documents: Count
    """Number of training documents."""
    tokens: Count
    """Number of training tokens."""
    text_bytes: Count
    """UTF-8 bytes of the training text."""
    heldout: HeldoutFacts | None
    """The held-out part; null where nothing is held out."""
    lengths: LengthFacts
    """Lengths of the training documents."""
    scripts: dict[Text, ScriptFacts]
    """Training documents by script (`cjk` or `other`)."""
    sources: list[SourceFacts]
    """Training documents of each source, largest source first."""
    languages: dict[Text, LanguageFacts] | None
    """Kept documents by language; null unless all input was curated."""
    funnel: Annotated[list[FunnelRow], MaxLen(_MAX_STAGES)]
    """Stages of curation in order, then the preparation."""
    duplicates: DuplicateFacts
    """Duplicates that were found."""
    personal_data: Counts | None
    """Number of replaced items of personal data by kind; null where none were looked for."""
    contamination: Counts | None
    """Number of documents that share text with each evaluation set; null where this was not checked."""


def read_statistics(path: Path) -> dict[str, Any]:
    """The content of statistics.json. Raises ConfigError."""
    found = _read(Statistics, path, "the statistics of a corpus")
    if not found["funnel"] or not found["lengths"]["histogram"]:
        raise ConfigError(f"{path} is not the statistics of a corpus: it has no funnel or no lengths")
    return found


# ---- report.json of a curation ---------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class TallyFacts:
    """`curation.Tally`."""

    read: Counts
    """Number of documents that were read, by source."""
    read_bytes: Counts
    """UTF-8 bytes that were read, by source."""
    dropped: Counts
    """Number of dropped documents, by `stage/reason`."""
    dropped_bytes: Counts
    """UTF-8 bytes of the dropped documents as they were read, by `stage/reason`."""
    dropped_of: Counts
    """Number of dropped documents, by `source/stage`."""
    kept: Counts
    """Number of kept documents, by source."""
    kept_bytes: Counts
    """UTF-8 bytes of the kept documents, by source."""
    languages: Counts
    """Number of kept documents, by language."""
    language_bytes: Counts
    """UTF-8 bytes of the kept documents, by language."""
    lengths: Counts
    """Number of kept documents, by the number of bits (4 to 24) of their length in characters."""
    counts: Counts
    """Number of changes to texts, by `stage.what`."""
    changed: Counts = field(default_factory=dict)
    """Number of documents whose text was changed, by `stage.what`; empty in reports of earlier versions."""
    contaminated: Counts = field(default_factory=dict)
    """Number of documents that share text with an evaluation set, by name of the set."""
    licenses: Counts = field(default_factory=dict)
    """Number of kept documents, by `source/license`."""


@dataclass(kw_only=True, slots=True)
class ClusterFacts:
    """Groups of duplicates."""

    clusters: Count
    """Number of clusters of duplicates."""
    documents: Count
    """Number of documents in all clusters, including those that were kept."""
    sizes: dict[Annotated[str, Predicate(is_size)], Count]
    """Number of clusters by their size in documents."""
    largest: Any = None
    """The largest clusters: the number of documents of each, and which of them was kept."""
    repeated_lines: Count
    """Number of different lines that occur in too many documents."""


@dataclass(kw_only=True, slots=True)
class DigestFacts:
    """Size and hash of several texts together."""

    bytes: Count
    """Total size in bytes."""
    sha256: Sha256
    """Hash over the hashes of the texts."""


@dataclass(kw_only=True, slots=True)
class UnitFacts:
    """The input of a curation."""

    units: Count
    """Number of units of work that the input was cut into."""
    sha256: Sha256
    """Hash of the name, source, format, range and version of every unit."""


@dataclass(kw_only=True, slots=True)
class CurationRecipe:
    """Everything that decides the bytes of a curation."""

    version: Positive
    """Version of the rules; it is raised when the same input gives different bytes."""
    options: dict[Text, Any]
    """Options that the result depends on."""
    files: dict[Text, Sha256]
    """Hash of each file that the options name, by path or URL."""
    input: UnitFacts
    """The input."""
    packages: dict[Text, Text | None]
    """Versions of the packages that affect the result, by name; null for a package that was not installed."""


@dataclass(kw_only=True, slots=True)
class CurationReport:
    """report.json."""

    created_by: Text = "unknown"
    """Name and version of the program that ran the curation."""
    tally: TallyFacts
    """Counts of documents and bytes."""
    clusters: ClusterFacts
    """Clusters of duplicates."""
    stages: Annotated[list[Line], MaxLen(100)]
    """Names of the stages that ran, in order."""
    units: Count
    """Number of units of work that the input was cut into."""
    texts_read: DigestFacts | None = None
    """Size and hash of all texts that were read."""
    output: DigestFacts | None = None
    """Size and hash of all files that were written."""
    unread: UnreadFacts | None = None
    """Files that were not read; null in reports of older programs."""
    recipe: CurationRecipe
    """Everything that decides the bytes of the result."""


def read_curation_report(path: Path) -> dict[str, Any]:
    """The content of a curation's report.json. Raises ConfigError."""
    found = _read(CurationReport, path, "the report of a curation")
    options = found["recipe"]["options"]
    curation = options.get("curation")
    own = curation.get("own_stages") if isinstance(curation, dict) else None
    n_own = len(own) if isinstance(own, list) else 0
    if (
        "read" not in options
        or not isinstance(curation, dict)
        or len({*found["stages"], "dedup"} - {*curation}) > n_own
    ):
        raise ConfigError(f"{path} is not the report of a curation: recipe.options lacks those of its stages")
    decontaminate = curation.get("decontaminate")
    files = decontaminate.get("files") if isinstance(decontaminate, dict) else None
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise ConfigError(f"{path} is not the report of a curation: decontaminate.files is no list of names")
    return found


def read_digest(path: Path) -> DigestFacts:
    """Read a size and hash from a work folder. Raises ConfigError."""
    return parse(DigestFacts, _content(path), str(path), "a digest")


def _read(schema: type, path: Path, what: str) -> dict[str, Any]:
    """The content of a file, after it was checked against `schema`."""
    content = _content(path)
    parse(schema, content, str(path), what, MAX_REPORT_VALUES)
    return json.loads(content)


def _content(path: Path) -> bytes:
    try:
        return read_capped(path, MAX_REPORT_BYTES)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
