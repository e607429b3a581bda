"""The tokenizer of a corpus, from sentencepiece or Hugging Face: encoding, decoding, special ids and its hash."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain, compress, pairwise
from operator import not_
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from sentencepiece import SentencePieceProcessor

from pretrain.corpus.manifest import MANIFEST_TIMEOUT_S, MAX_VOCAB_SIZE, token_dtype
from pretrain.corpus.tokenizer_trial import try_tokenizer
from pretrain.errors import ConfigError
from pretrain.files import read_capped
from pretrain.remote import DamagedError, as_path, read_whole

SENTENCEPIECE_NAME = "tokenizer.model"
HUGGING_FACE_NAME = "tokenizer.json"
TOKENIZER_NAMES = (SENTENCEPIECE_NAME, HUGGING_FACE_NAME)
"""File names of the two kinds of tokenizer. A corpus, a run folder and an export each hold one of these files."""
MAX_MODEL_BYTES = 64 << 20  # a tokenizer.json with 256,000 entries takes about 33 MB
MAX_SENTENCEPIECE_BYTES = 16 << 20
"""Size limit of a sentencepiece model. One with 256,000 entries takes about 5 MB, and ten times that in memory."""

# sentencepiece writes every space as this character and decodes it to a space. So if the character itself occurs in a
# text, it must be encoded differently: as its three UTF-8 bytes.
SPACE_SYMBOL = "\u2581"

# A text is cut into units that can be encoded independently, so that each distinct unit is encoded only once.
_UNITS = re.compile(rf" *(?:[^ \n{SPACE_SYMBOL}]+\n*|\n+)| +|{SPACE_SYMBOL}")
_BETWEEN_SPACE_SYMBOLS = re.compile(rf"[^{SPACE_SYMBOL}]+|{SPACE_SYMBOL}")
_WHOLE = re.compile(r"(?s).+")
# Finds a vocabulary piece that spans the end of a unit. It searches a text of all pieces, separated by NUL characters.
_ACROSS_UNITS = re.compile(rf"[^{SPACE_SYMBOL}\0]{SPACE_SYMBOL}|\n[^\n\0]")
_LONG_UNIT_CHARS = 24
# Units are encoded many at a time, with this character after each: a call of sentencepiece takes as long as encoding
# ten characters. Its memory grows with the text, and in longer blocks it leaves the processor's cache.
_SEPARATOR = "\0"
_BLOCK_CHARS = 1 << 11
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not valid UTF-8

MASK_NAMES = ("<mask>", "[MASK]", "<|mask|>")
"""Names by which a special token is known to be the mask; the first is that of tokenizers trained here."""

CHECK_TEXT = """It is a truth universally acknowledged, that a single man in possession of a good fortune, \
must be in want of a wife. However little known the feelings or views of such a man may be on his first entering \
a neighborhood, this truth is so well fixed in the minds of the surrounding families, that he is considered as \
the rightful property of some one or other of their daughters.

道可道，非常道。名可名，非常名。無名天地之始；有名萬物之母。故常無欲，以觀其妙；常有欲，以觀其徼。

def fibonacci(n: int) -> list[int]:
    numbers = [0, 1]
    while len(numbers) < n:
        numbers.append(numbers[-1] + numbers[-2])  # 1, 2, 3, 5, 8
    return numbers[:n]

\tTabs,  double   spaces, 12,345.67 €, naïve façade, <s></s><0x0A>, a \u2581 b, 👩‍👩‍👧 🎉\r\n"""
"""Text on which tokenizers and models are compared: prose, Chinese, code, and characters that many vocabularies
lack."""


class EncodedTexts(NamedTuple):
    """Concatenated tokens of several documents."""

    tokens: np.ndarray
    """Tokens of all documents, each [bos] + text + [eos], in the type that a corpus stores: uint16 or uint32."""
    starts: np.ndarray
    """int64 [documents + 1]: where each document starts, then the end of the last one."""


class SpecialIds(NamedTuple):
    """Token ids with a special meaning instead of text."""

    unk: int | None
    """Id for text that the vocabulary cannot encode; None where it can encode all text."""
    bos: int
    """Id that begins a document."""
    eos: int
    """Id that ends a document; it may be the same as bos."""
    pad: int
    """Id for padding; it is eos where the tokenizer has none."""


class _Model(Protocol):
    """The interface that both kinds of tokenizer implement."""

    vocab_size: int
    ids: SpecialIds
    mask_id: int | None

    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts: ...

    def special_tokens(self) -> dict[str, int]: ...

    def encode_rendered(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...

    def piece(self, token: int) -> str: ...

    def special_ids(self) -> set[int]: ...

    def encode_masked(self, text: str) -> list[int]: ...


class Tokenizer:
    """The tokenizer in a file: a sentencepiece model, or a tokenizer.json that `data_tools.prepare` has imported.

    With a model trained by `data_tools.prepare`, `decode(encode(text)) == text` for every text. `encode` treats the
    names of special tokens in a text as ordinary text and never returns bos, eos or pad. `path` may be a URL. `sha256`
    is the hash that the file must have; it is checked before the file is parsed, since a malicious model can crash the
    parser. Raises ConfigError where the hash differs or the file is not a tokenizer.
    """

    def __init__(self, path: str | Path, sha256: str) -> None:
        content = _read_model(as_path(path), sha256)
        found = hashlib.sha256(content).hexdigest()
        if found != sha256:
            raise ConfigError(
                f"the tokenizer {path} has sha256 {found}, but {sha256} is needed; put back the "
                f"{Path(path).name} of the corpus"
            )
        try_tokenizer(content, path)
        self._take(content, Path(path))

    @classmethod
    def trusted(cls, path: Path) -> Tokenizer:
        """Open a file that the user named or this program has just written. There is no hash to check it against."""
        return cls.from_content(_read_model(path, None), path)

    @classmethod
    def from_content(cls, content: bytes, path: Path) -> Tokenizer:
        """Open a tokenizer whose file has already been read. Messages name `path`."""
        tokenizer = cls.__new__(cls)
        tokenizer._take(content, path)
        return tokenizer

    def _take(self, content: bytes, path: Path) -> None:
        self.path = path
        self.content = content
        """The file's content. Use it instead of reading the file again, which may differ from what was hashed."""
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.is_sentencepiece = not content.startswith(b"{")
        if self.is_sentencepiece and len(content) > MAX_SENTENCEPIECE_BYTES:
            raise ConfigError(
                f"the tokenizer {path} has {len(content):,} bytes, but a sentencepiece model may have at most "
                f"{MAX_SENTENCEPIECE_BYTES:,}"
            )
        self.file_name = SENTENCEPIECE_NAME if self.is_sentencepiece else HUGGING_FACE_NAME
        """Name of the file in a corpus, a run folder or an export."""
        self._model: _Model = (
            _SentencePiece(content, path) if self.is_sentencepiece else _HuggingFace(content, path)
        )
        self.vocab_size = self._model.vocab_size
        self.unk_id, self.bos_id, self.eos_id, self.pad_id = self._model.ids
        self.mask_id = self._model.mask_id
        """Id that stands for a hidden token in masked language modeling; None where the tokenizer has none."""
        self._special = {*self._model.ids, self.mask_id}

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special ids."""
        return self._model.encode_texts([text]).tokens[1:-1].tolist()

    def encode_document(self, text: str) -> list[int]:
        """Token ids of a whole document: [bos] + tokens + [eos]."""
        return [self.bos_id, *self.encode(text), self.eos_id]

    def encode_documents(self, texts: Sequence[str]) -> EncodedTexts:
        """`encode_document` for many texts, several times faster per text."""
        return self._model.encode_texts(texts)

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """The id of each special token by its name, as `encode_rendered` reads them."""
        return self._model.special_tokens()

    @property
    def named_tokens(self) -> dict[str, str]:
        """The names of the special tokens that have a role: unk_token (where there is one), bos_token, eos_token and
        pad_token."""
        ids = {"unk": self.unk_id, "bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id}
        return {f"{role}_token": self.piece(i) for role, i in ids.items() if i is not None}

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of a text that a chat template wrote: the names of special tokens in it are these tokens."""
        return self._model.encode_rendered(text)

    def encode_masked(self, text: str) -> list[int]:
        """`encode`, but the name of the mask token in `text` stands for that token. There must be a mask token."""
        return self._model.encode_masked(text)

    def ordinary_ids(self) -> np.ndarray:
        """The ids that stand for text, ascending: all but special tokens and gaps in the vocabulary."""
        is_ordinary = np.ones(self.vocab_size, np.bool_)
        is_ordinary[list(self._model.special_ids())] = False
        return np.flatnonzero(is_ordinary)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, without special ids. Raises IndexError for an id outside the vocabulary."""
        return self._model.decode([number for i in ids if (number := int(i)) not in self._special])

    def decode_after(self, context: Sequence[int], ids: Sequence[int]) -> str:
        """The text that `ids` add after `context`.

        This can differ from `decode(ids)`, because some tokenizers drop the space at the start of a text.
        """
        before, whole = self.decode(context), self.decode([*context, *ids])
        return whole[len(before) :] if whole.startswith(before) else self.decode(ids)

    def piece(self, token: int) -> str:
        """The vocabulary's entry for a token, for display."""
        return self._model.piece(int(token))

    def is_part_of_character(self, token: int) -> bool:
        """Whether a token stands for some of the UTF-8 bytes of a character that is not in the vocabulary."""
        if _BYTE_PIECE.fullmatch(piece := self.piece(token)):
            return True
        if self.is_sentencepiece:  # its other entries are text
            return False
        return _REPLACEMENT not in piece and _REPLACEMENT in self.decode([token])


def _read_model(path: str | Path, sha256: str | None) -> bytes:
    if not isinstance(path, str):
        try:
            return read_capped(path, MAX_MODEL_BYTES)
        except OSError as error:
            raise ConfigError(f"the tokenizer {path} cannot be read: {error.strerror or error}") from error

    def check(content: bytes) -> str | None:
        same = sha256 in (None, hashlib.sha256(content).hexdigest())
        return None if same else f"its sha256 is not {sha256}, which is needed"

    try:
        return read_whole(path, MAX_MODEL_BYTES, MANIFEST_TIMEOUT_S, check)
    except DamagedError as error:
        raise ConfigError(f"the tokenizer {error}") from error


def tokenizer_in(folder: Path) -> Path:
    """Path of the tokenizer file in a folder. Where no such file exists, the path is that of a sentencepiece model."""
    found = [path for name in TOKENIZER_NAMES if (path := folder / name).is_file()]
    return found[0] if found else folder / SENTENCEPIECE_NAME


# ---- sentencepiece ---------------------------------------------------------------------------------------------------


class _SentencePiece:
    def __init__(self, content: bytes, path: Path) -> None:
        processor = self._processor = SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(content)
            self.vocab_size = int(processor.get_piece_size())
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"the tokenizer {path} is not a sentencepiece model") from error
        unk, bos, eos, pad = processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id()
        if bos < 0 and eos < 0:
            raise ConfigError(f"the tokenizer {path} has neither bos nor eos; give one that has either")
        bos, eos = (bos if bos >= 0 else eos), (eos if eos >= 0 else bos)
        self.ids = SpecialIds(unk, bos, eos, pad if pad >= 0 else eos)
        found = {name: processor.piece_to_id(name) for name in MASK_NAMES}
        # A piece of another kind could occur in a text.
        self.mask_id = next((i for i in found.values() if i != unk and processor.is_control(i)), None)
        self._symbol_bytes = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SYMBOL.encode()]

    # What only encoding needs is found when it is needed: it takes longer than loading the model.

    @cached_property
    def _pieces(self) -> list[str]:
        return self._processor.id_to_piece(list(range(self.vocab_size)))

    @cached_property
    def _space_symbol_ids(self) -> list[int]:
        return self._processor.encode(SPACE_SYMBOL) if self._units is _WHOLE else self._symbol_bytes

    @cached_property
    def _units(self) -> re.Pattern[str]:
        """How to cut a text into units such that the concatenated ids of the units are the ids of the text."""
        sample = "  a  b\n  a\n\na \n"
        keeps_spaces = self._processor.normalize(sample) == sample.replace(" ", SPACE_SYMBOL)
        if self.ids.unk in self._symbol_bytes or not keeps_spaces:
            return _WHOLE
        return _BETWEEN_SPACE_SYMBOLS if _ACROSS_UNITS.search("\0".join(self._pieces)) else _UNITS

    @cached_property
    def _separator_id(self) -> int | None:
        """The id of the character that can stand between units without changing their ids; None where none can.

        That holds for a model that merges pairs (BPE) and has no pair with this character. Its scores are ranks, so
        they are whole numbers. The scores of a unigram model are summed up over the whole text and rounded.
        """
        sample, pieces = f"a{_SEPARATOR}a{_SEPARATOR}{_SEPARATOR}a", self._pieces
        scores = self._processor.get_score(list(range(self.vocab_size)))
        ids = self._processor.encode(_SEPARATOR)
        if (
            self._units is _WHOLE
            or self._processor.normalize(sample) != sample
            or any(_SEPARATOR in piece for piece in pieces)
            or not all(score.is_integer() for score in scores)
            or [pieces[token] for token in ids] != ["<0x00>"]
        ):
            return None
        return ids[0]

    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts:
        dtype = token_dtype(self.vocab_size)
        is_one_unit = [self._is_one_unit(text) for text in texts]
        if not any(is_one_unit):
            return self._encode_cut(texts, dtype)
        units = list(compress(texts, is_one_unit))
        found = _framed(*self._encode_units(units), self.ids, dtype)
        if len(units) == len(texts):
            return found
        others = compress(texts, map(not_, is_one_unit))
        return _interleaved(found, self._encode_cut(list(others), dtype), np.array(is_one_unit))

    def _encode_cut(self, texts: Sequence[str], dtype: np.dtype) -> EncodedTexts:
        """Encode each distinct unit only once, since texts repeat their words."""
        numbers = _Numbers()
        number = numbers.__getitem__
        rows: list[int] = []
        n_rows = [0]
        for text in texts:
            rows.append(_BOS)
            rows += map(number, self._units_of(text).findall(text))
            rows.append(_EOS)
            n_rows.append(len(rows))
        special = [[self.ids.bos], [self.ids.eos], self._space_symbol_ids]
        flat, lengths = self._encode_units(list(numbers)[1:])
        flat = np.concatenate([*special, flat])
        lengths = np.concatenate([[len(ids) for ids in special], lengths])
        return _put_together(flat, lengths, rows, n_rows, dtype)

    def _units_of(self, text: str) -> re.Pattern[str]:
        """The units that a text is cut into."""
        # Texts with few spaces, such as Chinese, would give long units that do not repeat.
        is_dense = self._units is _UNITS and text.count(" ") * _LONG_UNIT_CHARS < len(text)
        return _BETWEEN_SPACE_SYMBOLS if is_dense else self._units

    def _is_one_unit(self, text: str) -> bool:
        return SPACE_SYMBOL not in text and self._units_of(text) is _BETWEEN_SPACE_SYMBOLS

    def _encode_units(self, units: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all units, one unit after another, and the number of ids of each."""
        if self._separator_id is None:
            return self._encode_separately(units)
        blocks = ["".join([f"{unit}{_SEPARATOR}" for unit in block]) for block in _blocks(units)]
        if not blocks or sum(block.count(_SEPARATOR) for block in blocks) > len(units):  # a unit holds it
            return self._encode_separately(units)
        # One by one, because for a list the package starts threads, which takes longer than to encode a short text.
        ids = np.concatenate([self._processor.encode(block, return_type="numpy") for block in blocks])
        is_separator = ids == self._separator_id
        ends = np.flatnonzero(is_separator)
        lengths = ends.copy()
        lengths[1:] -= ends[:-1] + 1
        return ids[~is_separator], lengths

    def _encode_separately(self, units: list[str]) -> tuple[np.ndarray, np.ndarray]:
        # For short units, sentencepiece returns lists faster than arrays.
        is_long = sum(map(len, units)) > _LONG_UNIT_CHARS * len(units)
        ids = self._processor.encode(units, num_threads=1, return_type="numpy" if is_long else int)
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        if is_long:
            return np.concatenate(ids), lengths
        return np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths

    def special_tokens(self) -> dict[str, int]:
        """The control pieces, and the one for unknown text: they have no text of their own."""
        processor = self._processor
        found = [i for i in range(self.vocab_size) if processor.is_control(i) or processor.is_unknown(i)]
        return {processor.id_to_piece(i): i for i in found}

    @cached_property
    def _special_names(self) -> tuple[dict[str, int], re.Pattern[str]]:
        special = self.special_tokens()
        longest_first = sorted(special, key=len, reverse=True)
        return special, re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def encode_rendered(self, text: str) -> list[int]:
        special, names = self._special_names
        pieces = names.split(text)
        encoded = self.encode_texts(pieces[::2])  # together, which is several times faster
        tokens, extents = encoded.tokens.tolist(), pairwise(encoded.starts.tolist())
        found: list[int] = []
        for (start, stop), name in zip(extents, [*pieces[1::2], None], strict=True):
            found += tokens[start + 1 : stop - 1]
            if name is not None:
                found.append(special[name])
        return found

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def piece(self, token: int) -> str:
        return self._processor.id_to_piece(token)

    def special_ids(self) -> set[int]:
        processor, every = self._processor, range(self.vocab_size)
        unused = {i for i in every if processor.is_control(i) or processor.is_unused(i)}
        return {processor.unk_id()} | unused

    def encode_masked(self, text: str) -> list[int]:
        assert self.mask_id is not None
        *before, last = text.split(self.piece(self.mask_id))
        ids: list[int] = []
        for part in before:
            # A piece begins with the space before a word, so the mask stands for that space too.
            ids += [*self.encode_texts([part.rstrip()]).tokens[1:-1].tolist(), self.mask_id]
        return ids + self.encode_texts([last]).tokens[1:-1].tolist()


_BOS, _EOS, _SYMBOL = 0, 1, 2  # reserved unit numbers


class _Numbers(dict[str, int]):
    """Maps each unit to its number: the order of its first appearance, after the reserved numbers."""

    def __init__(self) -> None:
        self[SPACE_SYMBOL] = _SYMBOL

    def __missing__(self, unit: str) -> int:
        number = self[unit] = len(self) + _SYMBOL
        return number


def _blocks(units: list[str]) -> Iterator[list[str]]:
    """The units in groups of bounded size."""
    begin = n_chars = 0
    for number, unit in enumerate(units):
        n_chars += len(unit)
        if n_chars >= _BLOCK_CHARS:
            yield units[begin : number + 1]
            begin, n_chars = number + 1, 0
    if begin < len(units):
        yield units[begin:]


def _framed(ids: np.ndarray, lengths: np.ndarray, special: SpecialIds, dtype: np.dtype) -> EncodedTexts:
    """The ids of texts, one text after another, with bos before and eos after each."""
    starts = np.concatenate([[0], np.cumsum(lengths + 2)])
    tokens, is_text = np.empty(starts[-1], dtype), np.ones(starts[-1], np.bool_)
    for places, token in ((starts[:-1], special.bos), (starts[1:] - 1, special.eos)):
        tokens[places], is_text[places] = token, False
    tokens[is_text] = ids
    return EncodedTexts(tokens, starts)


def _interleaved(first: EncodedTexts, second: EncodedTexts, is_first: np.ndarray) -> EncodedTexts:
    """The texts of both, in an order that `is_first` (bool [texts]) tells."""
    lengths = np.empty(len(is_first), np.int64)
    lengths[is_first], lengths[~is_first] = np.diff(first.starts), np.diff(second.starts)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    from_first = np.repeat(is_first, lengths)
    tokens = np.empty(starts[-1], first.tokens.dtype)
    tokens[from_first], tokens[~from_first] = first.tokens, second.tokens
    return EncodedTexts(tokens, starts)


def _put_together(
    ids: np.ndarray, lengths: np.ndarray, rows: list[int], n_rows: list[int], dtype: np.dtype
) -> EncodedTexts:
    """Replace unit numbers by token ids.

    `ids` holds the token ids of all units, `lengths` the number of each unit's, and `rows` the unit numbers of all
    texts; text k ends at index `n_rows[k + 1]` of `rows`.
    """
    flat, units = ids.astype(dtype), np.array(rows, np.int64)
    begins = np.cumsum(lengths) - lengths
    counts = lengths[units]
    ends = np.concatenate([[0], np.cumsum(counts)])
    # Within a unit the index into `flat` and the index into the result both grow by one, so their difference is
    # constant.
    places = np.repeat(begins[units] - ends[:-1], counts)
    places += np.arange(ends[-1])
    return EncodedTexts(flat[places], ends[n_rows])


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


class _HuggingFace:
    """A tokenizer.json that puts bos before a text and eos after it, as written by `data_tools.prepare`."""

    def __init__(self, content: bytes, path: Path) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # there is already one process per core
        self._path = path
        self._tokenizer, description = parse_tokenizer_json(content, path)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # "</s>" in a text is text
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values(), default=0)  # ids may have gaps
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise ConfigError(
                f"the tokenizer {path} has the id {self.vocab_size - 1:,}; ids must be less than {MAX_VOCAB_SIZE:,}"
            )
        if (frame := frame_of(description)) is None:
            raise ConfigError(
                f"the tokenizer {path} does not say which tokens begin and end a document; import it with "
                "data_tools.prepare tokenizer.path=..."
            )
        bos, eos, pad, unk = map(
            self._tokenizer.token_to_id, (*frame, pad_of(description), unk_of(description))
        )
        if bos is None or eos is None:
            raise ConfigError(f"the tokenizer {path} has no entry for {frame[0]!r} or {frame[1]!r}")
        self.ids = SpecialIds(unk, bos, eos, eos if pad is None else pad)
        self.mask_id = self._tokenizer.token_to_id(mask_of(description))
        self._description = description

    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts:
        dtype = token_dtype(self.vocab_size)
        encode, frame = self._tokenizer.encode_batch_fast, ([self.ids.bos], [self.ids.eos])
        found = []
        for (
            text
        ) in texts:  # one at a time, because the package's result takes a hundred times the memory of the ids
            with _package_errors(f"the tokenizer {self._path} cannot encode a text"):
                (encoded,) = encode([text], add_special_tokens=False)
            found.append(np.array([*frame[0], *encoded.ids, *frame[1]], dtype))
        starts = np.cumsum([0, *map(len, found)], dtype=np.int64)
        return EncodedTexts(np.concatenate(found) if found else np.empty(0, dtype), starts)

    def special_tokens(self) -> dict[str, int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items() if token.special}

    @cached_property
    def _of_rendered(self) -> Any:
        """A second tokenizer, since the package keeps this setting in the tokenizer, which other threads may use."""
        made = type(self._tokenizer).from_str(self._tokenizer.to_str())
        made.encode_special_tokens = False
        return made

    def encode_rendered(self, text: str) -> list[int]:
        with _package_errors(f"the tokenizer {self._path} cannot encode a text"):
            return self._of_rendered.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise IndexError(f"a token is outside of 0 to {self.vocab_size - 1}")
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def piece(self, token: int) -> str:
        return self._tokenizer.id_to_token(token) or ""

    def special_ids(self) -> set[int]:
        special = {token["id"] for token in self._description.get("added_tokens", []) if token["special"]}
        gaps = set(range(self.vocab_size)) - set(self._tokenizer.get_vocab().values())
        return special | gaps | (set() if self.ids.unk is None else {self.ids.unk})

    def encode_masked(self, text: str) -> list[int]:
        assert self.mask_id is not None
        description = json.loads(json.dumps(self._description))
        for token in description["added_tokens"]:
            if token["id"] == self.mask_id:
                token["special"] = False  # so that it is found in a text, as no special token is
        found, _ = parse_tokenizer_json(json.dumps(description).encode(), self._path)
        found.no_padding()
        found.no_truncation()
        found.encode_special_tokens = True
        return found.encode(text, add_special_tokens=False).ids


def parse_tokenizer_json(content: bytes, path: Path) -> tuple[Any, dict[str, Any]]:
    """The tokenizer as parsed by the package `tokenizers`, and the JSON of its file. Raises ConfigError."""
    import tokenizers

    with _package_errors(f"the tokenizer {path} is not a tokenizer.json"):
        return tokenizers.Tokenizer.from_str(content.decode()), json.loads(content)


@contextmanager
def _package_errors(problem: str) -> Iterator[None]:
    """Turn what the package `tokenizers` raises into a ConfigError.

    That includes its panics, which do not derive from Exception.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ConfigError(f"{problem}: {' '.join(str(error).split())[:200]}") from error


def frame(
    bos: tuple[str, int], eos: tuple[str, int] | None, mask: tuple[str, int] | None = None
) -> dict[str, Any]:
    """The post-processor of a tokenizer.json that puts bos (name and id) before a text and eos, if any, after it.

    It also names the mask token where one is given, since a tokenizer.json has no place of its own for that.
    """

    def template(*sequences: str) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = []
        for number, sequence in enumerate(sequences):
            items.append({"SpecialToken": {"id": bos[0], "type_id": number}})
            items.append({"Sequence": {"id": sequence, "type_id": number}})
            if eos is not None:
                items.append({"SpecialToken": {"id": eos[0], "type_id": number}})
        return items

    special = dict(token for token in (bos, eos, mask) if token is not None)
    return {
        "type": "TemplateProcessing",
        "single": template("A"),
        "pair": template("A", "B"),
        "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in special.items()},
    }


def frame_of(description: dict[str, Any]) -> tuple[str, str] | None:
    """The names of bos and eos of a tokenizer.json that puts them around a text; None for any other."""
    match description.get("post_processor"):
        case {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": str(bos)}},
                {"Sequence": {"id": "A"}},
                {"SpecialToken": {"id": str(eos)}},
            ],
        }:
            return bos, eos
    return None


def pad_of(description: dict[str, Any]) -> str:
    """The name of the padding token of a tokenizer.json; empty where it has none."""
    match description.get("padding"):
        case {"pad_token": str(pad)}:
            return pad
    return ""


def mask_of(description: dict[str, Any]) -> str:
    """The name of the mask token of a tokenizer.json: the one that `frame` has named, or one of MASK_NAMES that is a
    special token; empty where it has none.
    """
    special = {token["content"] for token in description.get("added_tokens", []) if token["special"]}
    stated: list[str] = []
    if (framed := frame_of(description)) is not None:
        match description["post_processor"].get("special_tokens"):
            case dict(named):
                stated = [name for name in named if name not in framed]
    return next((name for name in (*stated, *MASK_NAMES) if name in special), "")


def unk_of(description: dict[str, Any]) -> str:
    """The name of the token that a tokenizer.json writes for unknown text; empty where it has none."""
    match description["model"]:
        case {"unk_token": str(unk)}:
            return unk
        case {"unk_id": int(number), "vocab": [*entries]}:
            return entries[number][0]
    return ""
