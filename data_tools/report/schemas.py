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
"""Bound on the size of a report, which lists every source: a corpus may have a hundred thousand."""
MAX_REPORT_VALUES = 1 << 20
_MAX_STAGES = 1000


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
    bytes: Count
    sha256: Sha256


@dataclass(kw_only=True, slots=True)
class RecipeFacts:
    """The recipe of a corpus. Options are only compared and hashed; code that uses one has to check it."""

    options: dict[Text, Any]
    input: InputFacts


@dataclass(kw_only=True, slots=True)
class BegunReport:
    """prepare.json in the work folder."""

    recipe: RecipeFacts


@dataclass(kw_only=True, slots=True)
class FunnelFacts:
    """`gather.Funnel`."""

    read: Count
    dropped: Counts
    kept: Count
    kept_bytes: Count
    heldout: Count


@dataclass(kw_only=True, slots=True)
class FitFacts:
    """`fertility.Fit.as_dict`."""

    documents: Count
    bytes: Count
    characters: Count
    cjk_characters: Count = 0
    words: Count
    tokens: Count
    byte_tokens: Count
    unk_tokens: Count = 0
    returned: Count = 0
    bytes_per_token: Figure
    characters_per_token: Figure
    tokens_per_word: Figure
    byte_token_frac: Figure
    unk_frac: Figure = 0.0


@dataclass(kw_only=True, slots=True)
class TokenizerFacts:
    """The tokenizer, and how well it fits."""

    sha256: Sha256
    kind: Text = "sentencepiece"
    heldout_fit: dict[Text, FitFacts] = field(default_factory=dict)
    heldout_fit_by_language: dict[Text, FitFacts] = field(default_factory=dict)
    sample_bytes: Count = 0
    sample_bytes_by_source: Counts = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class CardFacts:
    """Statements about a corpus."""

    name: Text | None = None
    description: Text | None = None
    creator: Text | None = None
    date_published: Annotated[str, MaxLen(10)] | None = None


@dataclass(kw_only=True, slots=True)
class StageFacts:
    """One entry of the lineage."""

    stage: Text
    options_sha256: Sha256
    input_sha256: Sha256 | None
    output_sha256: Sha256 | None
    documents_in: Count | None
    documents_out: Count | None
    bytes_in: Count | None
    bytes_out: Count | None
    dropped: Counts
    program: Text
    libraries: dict[Text, Text]


@dataclass(kw_only=True, slots=True)
class PrepareReport(BegunReport):
    """prepare.json of a finished corpus."""

    created_by: Text
    root_sha256: Sha256
    card: CardFacts | None = None
    funnel: FunnelFacts
    curations: dict[Text, Any] = field(default_factory=dict)
    curation_funnels: Annotated[list[Text], MaxLen(_MAX_STAGES)] = field(default_factory=list)
    tokenizer: TokenizerFacts
    lineage: Annotated[list[StageFacts], MaxLen(_MAX_STAGES)] = field(default_factory=list)
    summary: Annotated[list[Text], MaxLen(_MAX_STAGES)]


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
    p5: Count
    p50: Count
    p95: Count
    max: Count
    histogram: Annotated[dict[Annotated[str, Predicate(is_power_of_two)], Count], MaxLen(64)]


@dataclass(kw_only=True, slots=True)
class ScriptFacts:
    """Documents of one script."""

    documents: Count
    tokens: Count
    text_bytes: Count


@dataclass(kw_only=True, slots=True)
class SourceFacts:
    """Documents of one source."""

    name: Text
    license: Text
    documents: Count
    tokens: Count
    text_bytes: Count
    bytes_per_token: Figure


@dataclass(kw_only=True, slots=True)
class LanguageFacts:
    """Documents of one language."""

    documents: Count
    text_bytes: Count


@dataclass(kw_only=True, slots=True)
class FunnelRow:
    """One stage of the funnel."""

    stage: Text
    documents_in: Count
    documents_out: Count
    bytes_in: Count | None
    bytes_out: Count | None
    dropped: Counts


@dataclass(kw_only=True, slots=True)
class HeldoutFacts:
    """The held-out part."""

    documents: Count
    tokens: Count


@dataclass(kw_only=True, slots=True)
class DuplicateFacts:
    """Counts of duplicates. Without a curation, only the last field is set."""

    exact: Count | None = None
    near: Count | None = None
    only_repeated_lines: Count | None = None
    repeated_lines: Count | None = None
    clusters: Count | None = None
    documents_in_clusters: Count | None = None
    cluster_sizes: dict[Annotated[str, Predicate(is_size)], Count] | None = None
    exact_in_preparation: Count


@dataclass(kw_only=True, slots=True)
class Statistics:
    """statistics.json."""

    root_sha256: Sha256
    documents: Count
    tokens: Count
    text_bytes: Count
    heldout: HeldoutFacts | None
    lengths: LengthFacts
    scripts: dict[Text, ScriptFacts]
    sources: list[SourceFacts]
    languages: dict[Text, LanguageFacts] | None
    funnel: Annotated[list[FunnelRow], MaxLen(_MAX_STAGES)]
    duplicates: DuplicateFacts
    personal_data: Counts | None
    contamination: Counts | None


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
    read_bytes: Counts
    dropped: Counts
    dropped_bytes: Counts
    dropped_of: Counts
    kept: Counts
    kept_bytes: Counts
    languages: Counts
    language_bytes: Counts
    lengths: Counts
    counts: Counts
    contaminated: Counts = field(default_factory=dict)
    licenses: Counts = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class ClusterFacts:
    """Groups of duplicates."""

    clusters: Count
    documents: Count
    sizes: dict[Annotated[str, Predicate(is_size)], Count]
    largest: Any = None
    repeated_lines: Count


@dataclass(kw_only=True, slots=True)
class DigestFacts:
    """Size and hash of several texts together."""

    bytes: Count
    sha256: Sha256


@dataclass(kw_only=True, slots=True)
class UnitFacts:
    """The input of a curation."""

    units: Count
    sha256: Sha256


@dataclass(kw_only=True, slots=True)
class CurationRecipe:
    """Everything that decides the bytes of a curation."""

    version: Positive
    options: dict[Text, Any]
    files: dict[Text, Sha256]
    input: UnitFacts
    packages: dict[Text, Text | None]


@dataclass(kw_only=True, slots=True)
class CurationReport:
    """report.json."""

    created_by: Text = "unknown"
    tally: TallyFacts
    clusters: ClusterFacts
    stages: Annotated[list[Line], MaxLen(100)]
    units: Count
    texts_read: DigestFacts | None = None
    output: DigestFacts | None = None
    recipe: CurationRecipe


def read_curation_report(path: Path) -> dict[str, Any]:
    """The content of a curation's report.json. Raises ConfigError."""
    found = _read(CurationReport, path, "the report of a curation")
    options = found["recipe"]["options"]
    curation = options.get("curation")
    if (
        "read" not in options
        or not isinstance(curation, dict)
        or not {*found["stages"], "dedup"} <= {*curation}
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
