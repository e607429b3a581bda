"""The sentencepiece tokenizer of a corpus: encode, decode, special ids, fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from pretrain.config import ConfigError

UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3

# sentencepiece writes every space as this character and reads it back as a space, so the character
# itself, where a text holds it, must go another way: as its three UTF-8 bytes.
SPACE_SYMBOL = "\u2581"


class Tokenizer:
    """A sentencepiece model with the special ids that this project fixes.

    With a model trained by `data_tools.prepare`, `decode(encode(text)) == text` for every text.
    Raises ConfigError where `path` is no sentencepiece model or its special ids are others.
    """

    unk_id = UNK_ID
    bos_id = BOS_ID
    eos_id = EOS_ID
    pad_id = PAD_ID

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            model = self.path.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"the tokenizer {self.path} cannot be read: {error.strerror or error}"
            ) from error
        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
            self.vocab_size = int(self._processor.get_piece_size())
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"the tokenizer {self.path} is no sentencepiece model") from error
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._check_special_ids()
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

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special ids."""
        if SPACE_SYMBOL not in text or self._space_symbol_ids is None:
            return self._processor.encode(text)
        first, *rest = text.split(SPACE_SYMBOL)
        ids = self._processor.encode(first)
        for part in rest:
            ids += self._space_symbol_ids
            ids += self._processor.encode(part)
        return ids

    def encode_document(self, text: str) -> list[int]:
        """Token ids of a whole document: [bos] + tokens + [eos]."""
        return [BOS_ID, *self.encode(text), EOS_ID]

    def encode_documents(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """`encode_document` of each text, in order; one call into sentencepiece for all of them."""
        plain = [text for text in texts if SPACE_SYMBOL not in text]
        encoded = iter(self._processor.encode(plain, num_threads=1) if plain else [])
        for text in texts:
            ids = self.encode(text) if SPACE_SYMBOL in text else next(encoded)
            yield [BOS_ID, *ids, EOS_ID]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special ids are dropped. Raises IndexError for an id outside the vocabulary."""
        special = {UNK_ID, BOS_ID, EOS_ID, PAD_ID}
        return self._processor.decode([int(i) for i in ids if int(i) not in special])

    def piece(self, token: int) -> str:
        """How the vocabulary writes one token, for display."""
        return self._processor.id_to_piece(int(token))
