"""Imports an existing tokenizer. Afterward its file alone defines everything that a corpus needs from it.

A sentencepiece model is used as it is. A Hugging Face `tokenizer.json` is rewritten: its post-processor puts bos before
a text and eos after it, and truncation, dropout and padding are removed. Code that comes with a tokenizer is never run.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from data_tools.config import DocumentFormat, PrepareConfig, TokenizerConfig
from pretrain.corpus.chat import OWN_TEMPLATE
from pretrain.corpus.chat_template import read_template, template_in
from pretrain.corpus.tokenizer import (
    CHECK_TEXT,
    HUGGING_FACE_NAME,
    MAX_MODEL_BYTES,
    TOKENIZER_NAMES,
    Tokenizer,
    frame,
    frame_of,
    mask_of,
    pad_of,
    parse_tokenizer_json,
    unk_of,
)
from pretrain.corpus.tokenizer_trial import try_tokenizer
from pretrain.errors import ConfigError
from pretrain.files import read_capped

_OURS = "ours"
_CONFIG_NAME = "tokenizer_config.json"
_END_OF_TEXT = "<|endoftext|>"  # GPT-2's only special token
_UNREACHABLE_SCORE = -1e4
_NAMED_SPECIAL_TOKENS = 8


def import_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer at `config.path`, in the form that is stored in the corpus. Raises ConfigError.

    Prints a note on stderr where decoding does not restore a text.
    """
    assert config.path is not None
    path = Path(config.path).expanduser()
    if path.is_dir():
        found = [path / name for name in reversed(TOKENIZER_NAMES) if (path / name).is_file()]
        if not found:
            raise ConfigError(
                f"tokenizer.path={path} holds neither {' nor '.join(TOKENIZER_NAMES)}; give the tokenizer's file"
            )
        path = found[0]
    content = _read(path)
    if content.lstrip().startswith(
        b"{"
    ):  # a sentencepiece model may begin with a byte that looks like a line feed
        content = content.lstrip()
    try_tokenizer(content, path)
    if content.startswith(b"{"):
        try:
            rewritten = _rewritten(path, content, config)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ConfigError(f"the tokenizer {path} is not a tokenizer.json: {reason}") from error
        tokenizer = Tokenizer.from_content(rewritten, path)
        _check_names_are_text(tokenizer)
    elif (config.bos_token, config.eos_token, config.mask_token) != (None, None, None):
        raise ConfigError(
            f"tokenizer.bos_token, eos_token and mask_token are for a {HUGGING_FACE_NAME}, and {path} is none; "
            "leave them out"
        )
    else:
        tokenizer = Tokenizer.from_content(content, path)
    _tell_losses(tokenizer)
    return tokenizer


def chat_template_of(config: PrepareConfig) -> str | None:
    """The chat template for a corpus of dialogues: the given one, otherwise the one that comes with the tokenizer,
    otherwise ours. None for a corpus of text. Raises ConfigError."""
    if config.format is not DocumentFormat.chat:
        return None
    assert config.tokenizer.path is not None  # which format=chat needs
    if config.chat.template == _OURS:
        return OWN_TEMPLATE
    if config.chat.template is not None:
        return read_template(Path(config.chat.template).expanduser())
    beside = Path(config.tokenizer.path).expanduser()
    found = template_in(beside if beside.is_dir() else beside.parent)
    return OWN_TEMPLATE if found is None else found


def _read(path: Path) -> bytes:
    try:
        return read_capped(path, MAX_MODEL_BYTES)
    except OSError as error:
        raise ConfigError(f"the tokenizer {path} cannot be read: {error.strerror or error}") from error


def _rewritten(path: Path, content: bytes, config: TokenizerConfig) -> bytes:
    """The tokenizer.json for a corpus. Other settings stay as they are, and a second import changes nothing."""
    parsed, description = parse_tokenizer_json(content, path)
    description.setdefault("added_tokens", [])
    bos, eos, pad = _special_tokens(path, description, config)
    added = {token["content"]: token for token in description["added_tokens"]}
    mask = _mask_token(path, description, config)
    for name in (bos, eos):
        if name not in added:  # a learned entry could occur in a text
            raise ConfigError(f"{name!r} is no special token of the tokenizer {path}{_named(description)}")
    for name in {bos, eos, pad, mask} & added.keys():
        added[name]["special"] = True
    _make_certain(description)
    description["truncation"] = None
    # This project pads nothing, but other programs look for the padding token in this place.
    description["padding"] = None
    if pad in added:
        description["padding"] = {
            "strategy": "BatchLongest",
            "direction": "Left",
            "pad_to_multiple_of": None,
            "pad_id": parsed.token_to_id(pad),
            "pad_type_id": 0,
            "pad_token": pad,
        }
    ends = [(name, parsed.token_to_id(name)) for name in (bos, eos)]
    description["post_processor"] = frame(*ends)
    if mask is not None and mask_of(description) != mask:  # a usual name needs no statement
        description["post_processor"] = frame(*ends, mask=(mask, parsed.token_to_id(mask)))
    return json.dumps(description, ensure_ascii=False, separators=(",", ":")).encode()


def _special_tokens(
    path: Path, description: dict[str, Any], config: TokenizerConfig
) -> tuple[str, str, str | None]:
    """bos, eos and pad: from the options, otherwise from the tokenizer_config.json beside the file, otherwise from the
    file."""
    beside = _config_beside(path)
    inside = frame_of(description) or (None, None)
    bos = config.bos_token or beside.get("bos_token") or inside[0]
    eos = config.eos_token or beside.get("eos_token") or inside[1]
    special = [token["content"] for token in description["added_tokens"] if token["special"]]
    if bos is None and eos is None and special == [_END_OF_TEXT]:
        eos = _END_OF_TEXT
    bos, eos = bos or eos, eos or bos
    if bos is None or eos is None:
        raise ConfigError(
            f"the tokenizer {path} does not say which of its special tokens ends a document{_named(description)}; "
            "name it with tokenizer.eos_token, and with tokenizer.bos_token what begins one"
        )
    pad = beside.get("pad_token") or pad_of(description)
    return bos, eos, pad if pad not in ("", bos, eos) else None


def _mask_token(path: Path, description: dict[str, Any], config: TokenizerConfig) -> str | None:
    """The mask token: from the options, from the tokenizer_config.json beside the file, or from the file."""
    mask = config.mask_token or _config_beside(path).get("mask_token") or mask_of(description) or None
    names = [token["content"] for token in description["added_tokens"]]
    if config.mask_token is not None and mask not in names:  # a learned entry could occur in a text
        raise ConfigError(
            f"tokenizer.mask_token={mask} is no special token of the tokenizer {path}{_named(description)}"
        )
    return mask if mask in names else None


def _config_beside(path: Path) -> dict[str, str]:
    """The special tokens in the tokenizer_config.json beside a tokenizer, by their role."""
    beside = path.parent / _CONFIG_NAME
    if not beside.is_file():
        return {}
    try:
        content = json.loads(_read(beside))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{beside} is not JSON; fix or remove it") from error
    found = {}
    for role in ("bos_token", "eos_token", "pad_token", "mask_token") if isinstance(content, dict) else ():
        match content.get(role):
            case str(name) | {"content": str(name)}:
                found[role] = name
    return found


def _named(description: dict[str, Any]) -> str:
    """The special tokens of a tokenizer.json, in words for an error message."""
    special = [token["content"] for token in description["added_tokens"] if token["special"]]
    more = " and others" if len(special) > _NAMED_SPECIAL_TOKENS else ""
    return f" (it has {', '.join(special[:_NAMED_SPECIAL_TOKENS]) or 'none'}{more})"


def _make_certain(description: dict[str, Any]) -> None:
    """Remove settings that would give different tokens at each call, or special tokens for ordinary text."""
    model = description["model"]
    if model.get("dropout") is not None:
        model["dropout"] = None
    if not isinstance(model["vocab"], list):
        return
    # A unigram model matches any of its pieces in a text, even special ones, unless other pieces are more probable.
    for token in description["added_tokens"]:
        number, name = token["id"], token["content"]
        if token["special"] and number < len(model["vocab"]):
            model["vocab"][number] = [name, _UNREACHABLE_SCORE]


def _check_names_are_text(tokenizer: Tokenizer) -> None:
    """Raise ConfigError where the name of a special token inside a text would be encoded as that token."""
    description = json.loads(tokenizer.content)
    unk = unk_of(description)
    for token in description["added_tokens"]:
        name = token["content"]
        if not token["special"] or name == unk:
            continue
        for text in (name, f" {name}", f"a{name}b", f"a {name} b\n{name}\n"):
            if name in map(tokenizer.piece, tokenizer.encode(text)):
                raise ConfigError(
                    f"the tokenizer {tokenizer.path} reads {name!r} in a text as its special token, so that a text "
                    "could end a document; give another"
                )


def _tell_losses(tokenizer: Tokenizer) -> None:
    """Print a note on stderr, with an example, where decoding does not restore a text."""
    for text in re.findall(r"\S+\s*|\s+", CHECK_TEXT) + CHECK_TEXT.splitlines(keepends=True):
        if (back := tokenizer.decode(tokenizer.encode(text))) != text:
            print(
                f"note: the tokenizer {tokenizer.path} does not restore every text: {text!r} becomes {back!r}",
                file=sys.stderr,
                flush=True,
            )
            return
