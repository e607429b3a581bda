"""Options of `python -m data_tools.prepare`."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date
from enum import Enum
from typing import Any

from omegaconf import MISSING

from data_tools.names import RECORD_BYTES
from pretrain.config.texts import PathText
from pretrain.corpus.manifest import MAX_CHUNK_TOKENS
from pretrain.errors import ConfigError

CARD_FIELDS = ("name", "description", "creator", "date_published")
_LARGEST_WEIGHT = 1000


class ModelType(Enum):
    bpe = "bpe"
    unigram = "unigram"


class DocumentFormat(Enum):
    text = "text"
    chat = "chat"
    labeled = "labeled"


class LossRole(Enum):
    system = "system"
    user = "user"
    assistant = "assistant"
    tool = "tool"


class Longer(Enum):
    drop = "drop"
    cut = "cut"


@dataclass(kw_only=True, slots=True)
class ChatConfig:
    """How dialogues become tokens, and which of them count in the loss."""

    template: PathText | None = None
    """File of a chat template in Jinja; null: the one that lies beside the tokenizer (chat_template.jinja, or in
    tokenizer_config.json), otherwise that of docs/finetuning.md, which `ours` takes in any case."""
    loss_roles: list[LossRole] = field(default_factory=lambda: [LossRole.assistant])
    """Roles whose turns are to be predicted."""
    loss_end: bool = True
    """Whether the special token that ends such a turn is to be predicted too. Without it, a model does not learn to
    stop."""
    max_tokens: int | None = None
    """Largest number of tokens in a dialogue: the length of the training sequences; null: any. Training then cuts
    dialogues where a sequence ends, so that their end does not see their beginning."""
    longer: Longer = Longer.cut
    """What becomes of longer dialogues. cut: they end with the last turn to be predicted that fits; those that have
    none are dropped. drop: all are dropped. Either is counted."""
    pack: bool = True
    """Pack whole dialogues into sequences of `max_tokens` tokens, where that is given, so that training cuts none. What
    they leave free is filler, on which nothing is trained. false: dialogues follow each other without a gap."""
    date: str | None = None
    """YYYY-MM-DD, the date that a template which writes the current date gets, so that the same input gives the same
    tokens on every day."""

    def __post_init__(self) -> None:
        if not self.loss_roles:
            raise ConfigError("chat.loss_roles=[] leaves nothing to learn; give at least one role")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(f"chat.max_tokens={self.max_tokens} must be greater than 0")
        if self.date is not None and not _is_date(self.date):
            raise ConfigError(f"chat.date={self.date} is no date; give YYYY-MM-DD")


@dataclass(kw_only=True, slots=True)
class LabelsConfig:
    """The classes of labeled documents, and how long a document may be."""

    classes: list[str] = field(default_factory=list)
    """The allowed labels, in the order of a classifier's outputs; [] takes all that are found, sorted. A record with
    another label is bad. Give it where training and evaluation texts are prepared separately."""
    max_tokens: int = 512
    """Length of the training sequences, into which whole documents are packed. Of a longer document, the start is kept,
    and that it was cut is counted."""

    def __post_init__(self) -> None:
        if not 4 <= self.max_tokens <= MAX_CHUNK_TOKENS:
            raise ConfigError(f"labels.max_tokens={self.max_tokens} is outside 4 to {MAX_CHUNK_TOKENS:,}")
        if len(set(self.classes)) < len(self.classes) or len(self.classes) == 1:
            raise ConfigError(f"labels.classes={self.classes} must name two or more different classes")


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


@dataclass(kw_only=True, slots=True)
class TokenizerConfig:
    """An existing tokenizer, or how to train a sentencepiece model on the corpus."""

    path: PathText | None = None
    """An existing sentencepiece model, a Hugging Face tokenizer.json, or the folder that holds it; null: train one."""
    bos_token: str | None = None
    """Entry of that tokenizer.json that begins a document; null: the one in the tokenizer_config.json beside it. Where
    only one of bos and eos is known, it is used as both."""
    eos_token: str | None = None
    """Entry of that tokenizer.json that ends a document; null: as for bos_token."""
    mask_token: str | None = None
    """Special entry of that tokenizer.json that hides a token under objective=mlm; null: the one in the
    tokenizer_config.json beside it, or one of the usual names."""
    vocab_size: int | None = None
    """Entries of the vocabulary; null: 16384, or fewer where the corpus is small."""
    model_type: ModelType = ModelType.bpe
    """Algorithm of the sentencepiece model."""
    character_coverage: float | None = None
    """Fraction of the text whose characters get entries of their own; other characters are written as bytes.
    null: 0.9995 for text in Chinese, Japanese or Korean, 0.9999 for other text."""
    sample_bytes: int = 100_000_000
    """Largest amount of text to train on, in bytes, taken evenly from the training documents."""
    source_weights: Any = None  # dict[str, float]: Hydra adds no key to a map with that type
    """Weight of each source in that sample, as a multiple of its share of the text: {wiki: 2, code: 0.5}. A source that
    is not named has weight 1; weight 0 leaves it out. Where there is less text than `sample_bytes`, a source of weight
    2 is used twice."""

    def __post_init__(self) -> None:
        if self.vocab_size is not None and not 300 <= self.vocab_size <= 1_000_000:
            raise ConfigError(
                f"tokenizer.vocab_size={self.vocab_size} is outside 300 to 1000000 (256 bytes and 5 special "
                "ids are always in it)"
            )
        if self.character_coverage is not None and not 0.9 <= self.character_coverage <= 1:
            raise ConfigError(f"tokenizer.character_coverage={self.character_coverage} is outside 0.9 to 1")
        if self.sample_bytes < 1:
            raise ConfigError(f"tokenizer.sample_bytes={self.sample_bytes} must be greater than 0")
        if not isinstance(self.source_weights, dict | None):
            raise ConfigError(
                f"tokenizer.source_weights={self.source_weights} is no map; give one like {{wiki: 2, code: 0.5}}"
            )
        for name, weight in (self.source_weights or {}).items():
            is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not is_number or not 0 <= weight <= _LARGEST_WEIGHT:
                raise ConfigError(
                    f"tokenizer.source_weights: {name!r} has weight {weight}; allowed: 0 to {_LARGEST_WEIGHT}"
                )
        if self.source_weights and self.path is not None:
            raise ConfigError(
                "tokenizer.source_weights says what to train a tokenizer on, and tokenizer.path gives one; leave out "
                "one of them"
            )


@dataclass(kw_only=True, slots=True)
class CardConfig:
    """Statements for the card and croissant.json. Changing one rewrites only these two files."""

    name: str | None = None
    """Name of the corpus; null: corpus- and the first digits of its root hash."""
    description: str | None = None
    """Description of the corpus; null: a sentence with its size."""
    creator: str | None = None
    """Person or organization; null: not stated."""
    date_published: str | None = None
    """YYYY-MM-DD; null: not stated, since today's date would change the bytes every day."""
    required: bool = False
    """Refuse a card where one of these is blank, or where a source has no known license."""

    def __post_init__(self) -> None:
        if self.date_published is not None and not _is_date(self.date_published):
            raise ConfigError(f"card.date_published={self.date_published} is no date; give YYYY-MM-DD")
        blank = [name for name in CARD_FIELDS if not (getattr(self, name) or "").strip()]
        if self.required and blank:
            names = ", ".join(f"card.{name}" for name in blank)
            raise ConfigError(f"card.required=true, and {names} is blank; state it, or card.required=false")

    def stated(self) -> dict[str, str | None]:
        """The statements; None for those that are not given."""
        return {name: (getattr(self, name) or "").strip() or None for name in CARD_FIELDS}


@dataclass(kw_only=True, slots=True)
class PrepareConfig:
    """Options of a preparation. The same input and options give the same corpus on every machine."""

    input: list[PathText] = MISSING
    """Files (JSON lines, JSON, CSV, Parquet, Arrow, text, WARC, tar; docs/corpus.md), folders of them, or `python`:
    the Python code and documentation installed on this machine. `a-{000..099}.tar` stands for 100 files."""
    output: PathText = MISSING
    """Folder for the corpus."""
    overwrite: bool = False
    """Replace a corpus in `output` that was prepared from other text or with other options."""
    format: DocumentFormat = DocumentFormat.text
    """chat: each record (of all kinds of files but text and WARC) is a dialogue in one of the forms of
    docs/finetuning.md; the corpus gets a loss mask, for fine-tuning. labeled: each record is a text with a label, for
    objective=classify (docs/classification.md)."""
    text_field: str = "text"
    """Field of a JSON line, or column of a Parquet file, that holds the text."""
    label_field: str = "label"
    """Field or column that holds the label with format=labeled: a text or a whole number."""
    license: str = "unknown"
    """License of documents that state no license."""
    require_licenses: bool = False
    """Refuse documents whose license is not known."""
    python_max_bytes: int | None = None
    """Largest amount of text to take for `python`, in bytes, chosen evenly from all of it; null: all of it."""
    encoding: str = "utf-8"
    """Encoding of text that has no byte-order mark and is not UTF-8: gb18030, utf-16 or utf-16-be."""
    ignore: list[PathText] = field(default_factory=list)
    """Patterns of names of files, or of their paths within an input, that are not to be read, such as '*.html'."""
    max_bad_records: int = 0
    """Number of bad records (no JSON, no text) that are skipped before the preparation gives up. A file that cannot be
    read counts by an estimate of the documents in it."""
    max_record_bytes: int = RECORD_BYTES
    """Largest size in bytes of a record (line, Parquet row, sample of a tar), and of what is decoded at a time; larger
    records are bad."""
    min_chars: int = 8
    """Shortest allowed document in characters; for a dialogue, its contents count together."""
    max_chars: int = 5_000_000
    """Longest allowed document in characters."""
    heldout_frac: float = 0.01
    """Fraction of the documents that is held out of training, chosen by the hash of their text."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer of the corpus."""
    chat: ChatConfig = field(default_factory=ChatConfig)
    """How dialogues become tokens."""
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    """The classes of labeled documents."""
    card: CardConfig = field(default_factory=CardConfig)
    """Statements for the card."""
    chunk_tokens: int | None = None
    """Tokens per chunk; null: 262144, halved until there are 512 chunks, but not below 4096."""
    shard_bytes: int = 1 << 30
    """Largest size of a shard in bytes; every shard holds at least one chunk."""
    part_bytes: int = 8 << 20
    """Bytes of text that one process tokenizes at a time; an interruption loses at most this much work per process."""
    workers: int | None = None
    """Number of processes that tokenize; null: one per available core."""

    def __post_init__(self) -> None:
        if self.input != MISSING and not self.input:
            raise ConfigError("input=[] names nothing; give input=[PATH,...] or input=[python]")
        if self.format is DocumentFormat.chat and self.tokenizer.path is None:
            raise ConfigError(
                "format=chat needs the tokenizer of the model that is to be fine-tuned; give tokenizer.path="
            )
        if not 0 <= self.heldout_frac <= 0.5:
            raise ConfigError(f"heldout_frac={self.heldout_frac} is outside 0 to 0.5")
        if not 1 <= self.min_chars <= self.max_chars:
            raise ConfigError(
                f"min_chars={self.min_chars} and max_chars={self.max_chars} must satisfy 1 <= min_chars <= max_chars"
            )
        if self.max_bad_records < 0:
            raise ConfigError(f"max_bad_records={self.max_bad_records} is negative; allowed: 0 or more")
        for name in (
            "max_record_bytes",
            "python_max_bytes",
            "chunk_tokens",
            "shard_bytes",
            "part_bytes",
            "workers",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be greater than 0")
        if (self.chunk_tokens or 0) > MAX_CHUNK_TOKENS:
            raise ConfigError(
                f"chunk_tokens={self.chunk_tokens} is more than {MAX_CHUNK_TOKENS:,}: chunks are held in memory"
            )
        packed = self.packed_tokens
        if packed is not None and packed > MAX_CHUNK_TOKENS:
            raise ConfigError(
                f"{self._packed_key}={packed} is more than {MAX_CHUNK_TOKENS:,}, the largest chunk; give a smaller one"
            )
        if packed is not None and (self.chunk_tokens or 0) % packed:
            raise ConfigError(
                f"chunk_tokens={self.chunk_tokens} is no multiple of {self._packed_key}={packed}, the length of the "
                "sequences into which whole documents are packed; leave chunk_tokens out, or give a multiple"
            )

    @property
    def packed_tokens(self) -> int | None:
        """Length of the sequences into which whole documents are packed; None where none are."""
        if self.format is DocumentFormat.labeled:
            return self.labels.max_tokens
        return self.chat.max_tokens if self.format is DocumentFormat.chat and self.chat.pack else None

    @property
    def _packed_key(self) -> str:
        return "labels.max_tokens" if self.format is DocumentFormat.labeled else "chat.max_tokens"
