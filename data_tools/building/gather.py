"""The first step of a preparation: read and clean every document, drop some, and write the others as parts.

A part consists of two files, each complete or absent:

    text-00000.txt       the texts of its documents, with a NUL character between them
    text-00000.npz       their ids, languages, hashes, sizes and sources, and the state that is needed to continue
                         after this part

Documents are short, often a single sentence, so what costs microseconds is done for many at once.
"""

from __future__ import annotations

import hashlib
import io
import json
from binascii import hexlify
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import xxhash

from data_tools import text as clean
from data_tools.building.classes import classes_of
from data_tools.config import DocumentFormat, PrepareConfig
from data_tools.progress import stage
from data_tools.reading import dialogue
from data_tools.reading.listing import LeftOut
from data_tools.reading.sources import Documents, InputFile, Rejected, read_documents
from data_tools.report.funnel import Funnel, estimated_documents
from data_tools.report.schemas import MAX_REPORT_BYTES, MAX_REPORT_VALUES
from data_tools.tables import shown
from pretrain.corpus.chunk_documents import MAX_ID_CHARS
from pretrain.errors import ConfigError
from pretrain.files import read_capped, write_atomically
from pretrain.printing import print_error
from pretrain.stored import parse

GATHERED_NAME = "gathered.json"
_MAX_U64 = (1 << 64) - 1
_PROBE_CHARS = 1000  # characters at the beginning of each document from which its script is detected
_NAMED_SOURCES = 12
_BETWEEN = "\0"  # in no text: cleaning drops control characters, and the JSON of dialogues escapes them


class SourceSample(NamedTuple):
    """Which training documents of a source the tokenizer is trained on."""

    times: int
    """Number of times that every document is in the sample."""
    below: int
    """Documents whose `order` is below this bound are in the sample one more time."""
    text_bytes: int
    """Bytes of text that the sample takes from the source."""


@dataclass(kw_only=True, slots=True)
class Gathered:
    """Result of the step."""

    parts: list[int]
    """Text bytes of each part."""
    sources: list[tuple[str, str]]
    """Name and license of each source."""
    funnel: Funnel
    """Counts of documents that were read, dropped and kept."""
    heldout_below: int
    """Documents whose `split` is below this bound are held out."""
    sample: list[SourceSample]
    """Tokenizer sample of each source, in the order of `sources`."""
    sample_bytes: int
    """Bytes of text in the whole sample."""
    cjk_share: float
    """Fraction of Chinese, Japanese or Korean characters at the beginnings of the documents."""
    read_sha256: str = ""
    """Hash over the hashes of all texts, in the order in which they were read."""
    classes: list[str] = field(default_factory=list)
    """The classes of labeled documents, in the order of their numbers."""


class PartTexts(NamedTuple):
    """The documents of a part, in the order of `read_digests`."""

    ids: list[str]
    """Id of each document."""
    texts: list[str]
    """The texts; for dialogues, the results of `dialogue.dump`."""
    languages: list[str]
    """Language code of each document, or empty where it is not known."""
    labels: Sequence[str] = ()
    """Label of each document, in a preparation of labeled ones."""


@dataclass(slots=True)
class _Rows:
    """Columns of the documents of the part that is being gathered."""

    ids: list[str] = field(default_factory=list)
    languages: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    """Label of each, in a preparation of labeled documents."""
    contents: list[bytes] = field(default_factory=list)
    """The texts in UTF-8; for dialogues, the results of `dialogue.dump`."""
    digests: list[bytes] = field(default_factory=list)
    """Hashes of the contents."""
    sizes: list[int] = field(default_factory=list)
    """UTF-8 bytes of the text."""
    sources: list[int] = field(default_factory=list)
    """Index of each source."""


@dataclass(slots=True)
class _State:
    """The state after the documents that were read so far, without their digests."""

    next_file: int = 0
    """Index of the file to continue with."""
    next_record: int = 0
    """Number of records of that file that are done."""
    funnel: Funnel = field(default_factory=Funnel)
    """Counts of documents that were read, dropped and kept."""
    licenses: dict[str, list[str]] = field(default_factory=dict)
    """Licenses of each source, sources and licenses in the order of their appearance."""
    parts: list[int] = field(default_factory=list)
    """Text bytes of each part."""
    probed_chars: int = 0
    """Number of visible characters at the beginnings of the documents."""
    cjk_chars: int = 0
    """Number of these that are Chinese, Japanese or Korean."""
    read_sha256: str = ""
    """Chained hash over the hashes of all texts."""
    read_bytes: int = 0
    """Size of the finished files that held documents, which tells how much an unread file holds."""


def part_path(work: Path, number: int) -> Path:
    """Path of the text of a part."""
    return work / f"text-{number:05d}.txt"


def read_digests(path: Path) -> np.ndarray:
    """Order, split, text bytes and source index of the documents of a part: uint64 [documents, 4].

    Order and split are hashes of the text: one decides the document's position in the corpus, the other whether it is
    held out.
    """
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as saved:
        return saved["digests"]


def read_part(path: Path) -> PartTexts:
    """The documents of a part."""
    texts = path.read_bytes().decode().split(_BETWEEN)
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as saved:
        return PartTexts(texts=texts, **json.loads(saved["names"].tobytes()))


def gather(
    config: PrepareConfig, files: list[InputFile], work: Path, left_out: Sequence[LeftOut] = ()
) -> Gathered:
    """Run the step, continue it, or load its result. `left_out` are the files of the input that are not read.

    Raises ConfigError where no document is left, or too much cannot be read.
    """
    result = work / GATHERED_NAME
    if not result.exists():
        gatherer = _Gatherer(config, work, left_out)
        gatherer.run(files)
        gathered = gatherer.result()
        write_atomically(result, json.dumps(asdict(gathered)).encode())
    content = read_capped(result, MAX_REPORT_BYTES)
    return parse(Gathered, content, str(result), "what a preparation gathered", MAX_REPORT_VALUES)


class _Gatherer:
    """Reads documents into parts, starting after the last complete part."""

    def __init__(self, config: PrepareConfig, work: Path, left_out: Sequence[LeftOut]) -> None:
        self._config, self._work, self._left_out = config, work, left_out
        self._state = _State()
        self._seen: set[bytes] = set()  # about 100 bytes of memory per document
        self._source_index: dict[tuple[str, str], int] = {}  # by source and license
        self._digests: list[np.ndarray] = []  # per part, as `read_digests` gives them
        self._start_part()
        self._load()

    def _start_part(self) -> None:
        self._rows = _Rows()
        self._bytes = 0

    def _load(self) -> None:
        """Load the complete parts of an earlier call."""
        while (path := part_path(self._work, len(self._digests)).with_suffix(".npz")).exists():
            with np.load(path, allow_pickle=False) as saved:
                self._digests.append(saved["digests"])
                state = saved["state"].tobytes()
            self._state = parse(_State, state, str(path), "a part of a preparation", MAX_REPORT_VALUES)
            hashes = self._digests[-1][:, :2].astype(">u8").tobytes()
            self._seen.update(hashes[begin : begin + 16] for begin in range(0, len(hashes), 16))
        names = enumerate(self._state.licenses.items())
        self._source_index = {(name, known): i for i, (name, licenses) in names for known in licenses}

    def run(self, files: list[InputFile]) -> None:
        sizes = [file.size_bytes for file in files]
        first_file, skipped_records = self._state.next_file, self._state.next_record
        if not self._config.max_bad_records:
            for file in (file for file in self._left_out if file.holds_documents):
                _refuse(self._config, f"{file.name} {file.reason}", is_file=True)
        with stage("reading and cleaning", sum(sizes)) as progress:
            progress.skip(sum(sizes[:first_file]))
            for number in range(first_file, len(files)):
                position, record, has_documents = 0, 0, False
                for item in read_documents(files[number], self._config):
                    progress.advance(item.position_bytes - position)
                    position = item.position_bytes
                    has_documents = has_documents or isinstance(item, Documents)
                    done = max(0, skipped_records - record) if number == first_file else 0
                    n_records = len(item) if isinstance(item, Documents) else 1
                    self._state.next_file = number
                    if isinstance(item, Documents):
                        self._take(item.after(done), record + done)
                    elif not done:
                        self._state.next_record = record + 1
                        self._reject(item)
                    record += n_records
                progress.advance(sizes[number] - position)
                self._state.read_bytes += sizes[number] if has_documents else 0
        if self._rows.ids:
            self._finish_part()
        for file in self._left_out:
            lost, lost_bytes = (1, file.size_bytes) if file.holds_documents else (0, 0)
            self._lose(file.name, file.reason, lost, lost_bytes)
            check_bad(self._config, self._state.funnel, f"{file.name} {file.reason}", is_file=True)

    def _take(self, documents: Documents, record: int) -> None:
        """Take documents that follow the first `record` records of a file."""
        texts, plains = self._cleaned(documents.texts)
        contents = [text.encode() for text in texts]
        sizes = [len(content) for content in contents]
        if plains is not texts:
            sizes = [len(plain.encode()) for plain in plains]
        # Where a document may fill the part, each is taken by itself.
        step = len(texts) if self._bytes + sum(sizes) < self._config.part_bytes else 1
        columns = (
            documents.ids,
            documents.languages,
            documents.labels,
            contents,
            sizes,
            documents.sources,
            plains,
        )
        for start in range(0, len(texts), step or 1):
            chosen = columns if step > 1 else tuple(column[start : start + 1] for column in columns)
            self._state.next_record = record + start + step
            self._add(*chosen)
            if self._bytes >= self._config.part_bytes:
                self._finish_part()

    def _cleaned(self, texts: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
        """The texts as they are stored and as they are read."""
        if self._config.format is DocumentFormat.chat:  # messages have already been cleaned one by one
            return texts, [dialogue.plain(dialogue.load(text).messages) for text in texts]
        texts = clean.clean_all(texts)
        return texts, texts

    def _add(
        self,
        ids: Sequence[str],
        languages: Sequence[str],
        labels: Sequence[str],
        contents: Sequence[bytes],
        sizes: Sequence[int],
        sources: Sequence[tuple[str, str]],
        plains: Sequence[str],
    ) -> None:
        """Add documents to the part, those that are dropped excepted."""
        state, seen, funnel = self._state, self._seen, self._state.funnel
        digests = [xxhash.xxh3_128_digest(content) for content in contents]
        # A chain of hashes, because a hash object cannot be saved with the state of a part.
        chained = state.read_sha256.encode()
        for digest in digests:
            chained = hexlify(hashlib.sha256(chained + hexlify(digest)).digest())
        state.read_sha256 = chained.decode()
        problems = clean.length_problems(plains, self._config.min_chars, self._config.max_chars)
        kept = list[int]()
        for row, (digest, problem) in enumerate(zip(digests, problems, strict=True)):
            if problem is not None or digest in seen:
                funnel.drop(problem or "duplicate")
            else:
                seen.add(digest)
                kept.append(row)
        funnel.read += len(digests)
        funnel.kept += len(kept)
        columns: list[Sequence[Any]] = [ids, languages, labels, contents, digests, sizes, sources, plains]
        if len(kept) < len(digests):
            columns = [[column[row] for row in kept] for column in columns]
        ids, languages, labels, contents, digests, sizes, sources, plains = columns
        rows = self._rows
        rows.ids += [name[:MAX_ID_CHARS] for name in ids]
        rows.languages += languages
        rows.labels += labels
        rows.contents += contents
        rows.digests += digests
        rows.sizes += sizes
        for source in dict.fromkeys(sources):
            if source not in self._source_index:
                self._add_source(*source)
        rows.sources += map(self._source_index.__getitem__, sources)
        self._bytes += sum(sizes)
        funnel.kept_bytes += sum(sizes)
        if self._config.tokenizer.path is None:  # the script decides how a tokenizer is trained
            probes = "\n".join([plain[:_PROBE_CHARS] for plain in plains])
            visible_chars, cjk_chars = clean.count_cjk(probes)
            state.probed_chars += visible_chars
            state.cjk_chars += cjk_chars

    def _add_source(self, name: str, license: str) -> None:
        """Take in a source that has not had this license yet."""
        licenses = self._state.licenses
        licenses.setdefault(name, []).append(license)
        self._source_index[name, license] = list(licenses).index(name)

    def _reject(self, item: Rejected) -> None:
        if item.file:
            self._lose(item.file, item.problem, item.lost, item.lost_bytes)
        else:
            self._state.funnel.read += 1
            self._state.funnel.drop(item.reason)
        if item.is_error:
            check_bad(self._config, self._state.funnel, item.where, is_file=bool(item.file))
            print_error("passed over", item.where)

    def _lose(self, name: str, reason: str, lost: int, lost_bytes: int) -> None:
        """Count a file, or the part of one, that is not read."""
        funnel = self._state.funnel
        documents = estimated_documents(lost, lost_bytes, self._state.read_bytes, funnel.read)
        funnel.unread.add(name, reason, documents)

    def _finish_part(self) -> None:
        number = len(self._digests)
        self._state.parts.append(self._bytes)
        rows, path = self._rows, part_path(self._work, number)
        halves = np.frombuffer(b"".join(rows.digests), ">u8").astype(np.uint64).reshape(-1, 2)
        columns = np.array([rows.sizes, rows.sources], np.uint64)
        digests = np.column_stack([halves, *columns])
        labels = {"labels": rows.labels} if self._config.format is DocumentFormat.labeled else {}
        names = json_array({"ids": rows.ids, "languages": rows.languages, **labels})
        write_atomically(path, _BETWEEN.encode().join(rows.contents))
        save_arrays(
            path.with_suffix(".npz"), digests=digests, names=names, state=json_array(asdict(self._state))
        )
        self._digests.append(digests)
        self._start_part()

    def result(self) -> Gathered:
        state = self._state
        if not self._digests:
            raise ConfigError(nothing_left(self._config, state.funnel))
        unknown = sorted(name for name, known in state.licenses.items() if not all(map(is_known, known)))
        if unknown and (self._config.require_licenses or self._config.card.required):
            names = ", ".join(map(shown, unknown[:5])) + (" and others" if len(unknown) > 5 else "")
            raise ConfigError(
                f"the license of {names} is not known; state it in the field license of "
                "the records, or for all of them with license=NAME"
            )
        digests = np.concatenate(self._digests)
        below = heldout_bound(digests[:, 1], self._config.heldout_frac)
        heldout = digests[:, 1] < np.uint64(below)
        state.funnel.heldout = int(heldout.sum())
        classes = list[str]()
        if self._config.format is DocumentFormat.labeled:
            parts = (read_part(part_path(self._work, number)) for number in range(len(self._digests)))
            classes = classes_of(self._config, [label for part in parts for label in part.labels], heldout)
        sample = self._sample(digests[~heldout])
        return Gathered(
            parts=state.parts,
            sources=[(name, "; ".join(licenses)) for name, licenses in state.licenses.items()],
            funnel=state.funnel,
            heldout_below=below,
            sample=sample,
            sample_bytes=sum(source.text_bytes for source in sample),
            cjk_share=state.cjk_chars / max(state.probed_chars, 1),
            read_sha256=state.read_sha256,
            classes=classes,
        )

    def _sample(self, digests: np.ndarray) -> list[SourceSample]:
        """Choose the sample of the tokenizer from the training documents. Raises ConfigError for wrong weights."""
        config, names = self._config.tokenizer, list(self._state.licenses)
        given = {str(name): weight for name, weight in (config.source_weights or {}).items()}
        for name in sorted(given.keys() - set(names)):
            known = ", ".join(names[:_NAMED_SOURCES]) + (" and others" if len(names) > _NAMED_SOURCES else "")
            raise ConfigError(
                f"tokenizer.source_weights names {name!r}, which is no source of the input; its sources are {known}"
            )
        weights = [float(given.get(name, 1)) for name in names]
        sample = choose_sample(digests, weights, config.sample_bytes)
        if not any(source.text_bytes for source in sample):
            raise ConfigError(
                "tokenizer.source_weights leaves no text to train a tokenizer on; raise a weight"
            )
        return sample


def nothing_left(config: PrepareConfig, funnel: Funnel) -> str:
    """The sentence on a preparation that leaves no document to train on."""
    dropped = ", ".join(f"{n} {reason}" for reason, n in sorted(funnel.dropped.items()))
    held_out = f", held out: {funnel.heldout}" if funnel.heldout else ""
    return (
        f"input={','.join(config.input)} leaves no document: {funnel.read} read, "
        f"dropped: {dropped or 'none'}{held_out}"
    )


def check_bad(config: PrepareConfig, funnel: Funnel, where: str, is_file: bool = False) -> None:
    """Raise ConfigError where more is bad than the configuration allows."""
    limit = config.max_bad_records
    n_bad = funnel.dropped.get("bad_record", 0) + funnel.unread.documents
    if n_bad > limit:
        more = f" (about {n_bad:,} documents are bad so far)" if n_bad > limit + 1 else ""
        _refuse(config, f"{where}{more}", is_file)


def _refuse(config: PrepareConfig, problem: str, is_file: bool) -> NoReturn:
    limit = config.max_bad_records
    allowed = f", and max_bad_records={limit} allows no more" if limit else "; max_bad_records=N lets N pass"
    remedy = ", and ignore=['NAME'] leaves a file out" if is_file else ""
    raise ConfigError(f"{problem}{allowed}{remedy}")


def is_known(license: str) -> bool:
    """Whether a license is known. If there are several, joined by semicolons, all must be known."""
    return not {"unknown", ""} & {part.strip() for part in license.split(";")}


def heldout_bound(splits: np.ndarray, heldout_frac: float) -> int:
    """The bound of `split` (uint64 [documents]) below which documents are held out.

    The bound is moved by one document where it would leave the training or the held-out part empty.
    """
    bound = int(heldout_frac * 2**64)
    if bound == 0 or len(splits) < 2:
        return 0
    smallest, largest = int(splits.min()), int(splits.max())
    return min(max(bound, smallest + 1), largest)


def sample_bound(digests: np.ndarray, sample_bytes: int) -> tuple[int, int]:
    """The bound of `order` that takes at least `sample_bytes` of text, or all of it, and the bytes that it takes.

    `digests` is uint64 [documents, 3 or more]: (order, split, bytes, ...).
    """
    if (all_bytes := int(digests[:, 2].sum())) < sample_bytes:
        return min(int(digests[:, 0].max()) + 1, _MAX_U64), all_bytes
    ordered = digests[np.argsort(digests[:, 0], kind="stable")]
    total = np.cumsum(ordered[:, 2])
    count = min(int(np.searchsorted(total, np.uint64(sample_bytes))) + 1, len(ordered))
    return min(int(ordered[count - 1, 0]) + 1, _MAX_U64), int(total[count - 1])


def choose_sample(digests: np.ndarray, weights: Sequence[float], sample_bytes: int) -> list[SourceSample]:
    """The tokenizer's sample: weight x bytes of each source, scaled down to at most `sample_bytes` in total.

    `digests` is uint64 [documents, 4]: (order, split, bytes, source); `weights` has one entry per source. Documents
    are taken in the order of their hashes, so the order and size of the parts do not matter. Where all weights are
    equal, documents of all sources are taken in one common order.
    """
    source = digests[:, 3].astype(np.int64)
    sizes = np.bincount(source, digests[:, 2], minlength=len(weights))
    if len(set(weights)) == 1 and weights[0] > 0:
        below, _ = sample_bound(digests, sample_bytes)
        taken = np.bincount(source, digests[:, 2] * (digests[:, 0] < below), minlength=len(weights))
        return [SourceSample(0, below, int(n_bytes)) for n_bytes in taken]
    total = float(np.dot(sizes, weights))
    scale = min(1.0, sample_bytes / total) if total else 0.0
    sample = []
    for number, (size, weight) in enumerate(zip(sizes.tolist(), weights, strict=True)):
        times, part = divmod(scale * weight, 1)
        below = taken = 0
        if part * size >= 1:
            below, taken = sample_bound(digests[source == number], int(part * size))
        sample.append(SourceSample(int(times), below, int(times * size) + taken))
    return sample


def json_array(value: Any) -> np.ndarray:
    """JSON as an array of bytes, so that it can be stored beside other arrays in one .npz."""
    from pydantic_core import to_json  # imported here so that help is printed without it

    return np.frombuffer(to_json(value), dtype=np.uint8)


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write an .npz atomically."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]  # its stub confuses the first array with another argument
    write_atomically(path, buffer.getvalue())
