"""The sentencepiece tokenizer of a corpus: encode, decode, special ids, fingerprint."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from pretrain.config import ConfigError
from pretrain.manifest import MANIFEST_TIMEOUT_S, read_capped
from pretrain.remote import DamagedError, as_path, read_whole

MAX_MODEL_BYTES = 64 << 20  # vocabularies of 256,000 entries take about 4 MB
UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3

# sentencepiece writes every space as this character and reads it back as a space, so the character
# itself, where a text holds it, must go another way: as its three UTF-8 bytes.
SPACE_SYMBOL = "\u2581"

_LINES = re.compile(r"[^\n]*\n+|[^\n]+")
_INNER_NEWLINE = re.compile(r"\n[^\n]")


class Tokenizer:
    """A sentencepiece model with the special ids that this project fixes.

    With a model trained by `data_tools.prepare`, `decode(encode(text)) == text` for every text.
    With `sha256`, the hash that the file must have, nothing else of it is looked at where it has another: a model
    made with bad intent can crash the parser. Raises ConfigError for that, and where `path`, which may be a URL, is
    no sentencepiece model or its special ids are others.
    """

    unk_id = UNK_ID
    bos_id = BOS_ID
    eos_id = EOS_ID
    pad_id = PAD_ID

    def __init__(self, path: str | Path, sha256: str | None = None) -> None:
        self.path = as_path(path)
        try:
            model = _read_model(self.path, sha256)
        except OSError as error:
            raise ConfigError(
                f"the tokenizer {self.path} cannot be read: {error.strerror or error}"
            ) from error
        self.sha256 = hashlib.sha256(model).hexdigest()
        if sha256 is not None and self.sha256 != sha256:
            raise ConfigError(
                f"the tokenizer {self.path} has sha256 {self.sha256}, where {sha256} is needed; put back the "
                "tokenizer.model of the corpus"
            )
        self.model = model
        """The file's content, to be used instead of reading again what was hashed."""
        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
            self.vocab_size = int(self._processor.get_piece_size())
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"the tokenizer {self.path} is no sentencepiece model") from error
        self._check_special_ids()
        self._lines_are_independent = self._check_lines()
        pieces = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SYMBOL.encode()]
        self._space_symbol_ids = pieces if UNK_ID not in pieces else None

    def _check_special_ids(self) -> None:
        processor = self._processor
        found = (processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id())
        if found != (UNK_ID, BOS_ID, EOS_ID, PAD_ID):
            raise ConfigError(
                f"the tokenizer {self.path} has the special ids unk, bos, eos, pad = {found}, where "
                f"{(UNK_ID, BOS_ID, EOS_ID, PAD_ID)} are needed; train it with data_tools.prepare"
            )

    def _check_lines(self) -> bool:
        """Whether encoding line by line gives the same ids, which it does at almost twice the speed."""
        processor, text = self._processor, "a\n  a\n\na"
        apart = list(chain.from_iterable(processor.encode(_LINES.findall(text), num_threads=1)))
        pieces = (processor.id_to_piece(i) for i in range(self.vocab_size))
        return processor.encode(text) == apart and not any(_INNER_NEWLINE.search(piece) for piece in pieces)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special ids."""
        if SPACE_SYMBOL not in text or self._space_symbol_ids is None:
            return self._encode_plain(text)
        first, *rest = text.split(SPACE_SYMBOL)
        ids = self._encode_plain(first)
        for part in rest:
            ids += self._space_symbol_ids
            ids += self._encode_plain(part)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        lines = _LINES.findall(text) if self._lines_are_independent else [text]
        if (
            len(lines) == 1
        ):  # a turn of a dialogue: for a list, sentencepiece starts a thread, at 25 times the cost
            return self._processor.encode(text)
        return list(chain.from_iterable(self._processor.encode(lines, num_threads=1)))

    def encode_document(self, text: str) -> list[int]:
        """Token ids of a whole document: [bos] + tokens + [eos]."""
        return [BOS_ID, *self.encode(text), EOS_ID]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special ids are dropped. Raises IndexError for an id outside the vocabulary."""
        special = {UNK_ID, BOS_ID, EOS_ID, PAD_ID}
        return self._processor.decode([int(i) for i in ids if int(i) not in special])

    def piece(self, token: int) -> str:
        """How the vocabulary writes one token, for display."""
        return self._processor.id_to_piece(int(token))


def _read_model(path: str | Path, sha256: str | None) -> bytes:
    if not isinstance(path, str):
        return read_capped(path, MAX_MODEL_BYTES)

    def check(content: bytes) -> str | None:
        same = sha256 in (None, hashlib.sha256(content).hexdigest())
        return None if same else f"it has another sha256 than {sha256}, which is needed"

    try:
        return read_whole(path, MAX_MODEL_BYTES, MANIFEST_TIMEOUT_S, check)
    except DamagedError as error:
        raise ConfigError(f"the tokenizer {error}") from error
