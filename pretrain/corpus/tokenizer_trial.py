"""Tries a stranger's tokenizer in a process that may die, before this one opens it.

The parsers are of C++ and Rust: where a file is made to harm them they can crash, or take all memory or time, which no
`except` catches. What was tried once on this machine, with the same versions of the parsers, is not tried again.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from pretrain.errors import ConfigError
from pretrain.files import create_file

MAX_CPU_S = 20
"""A vocabulary of 256,000 entries takes about 2 s."""
MAX_MEMORY_BYTES = 1 << 30
_GIB = 1 << 30


def try_tokenizer(content: bytes, path: str | Path) -> None:
    """Open and use a tokenizer in another process. Raises ConfigError where that does not live; `path` is for its text.

    A file that is refused as it should be passes: to open it here gives the sentence that says why.
    """
    from importlib.metadata import version  # 40 ms, for those that open a tokenizer

    versions = "-".join(version(name) for name in ("sentencepiece", "tokenizers"))
    tried = _cache() / f"{hashlib.sha256(content).hexdigest()}-{versions}"
    if tried.exists():
        return
    if (problem := problem_of(content)) is not None:
        raise ConfigError(f"the tokenizer {path} is not used: a process that tried it {problem}")
    try:
        tried.parent.mkdir(parents=True, exist_ok=True)
        create_file(tried).close()
    except OSError:
        pass  # tried again the next time


def problem_of(
    content: bytes, command: tuple[str, ...] = (sys.executable, "-m", "pretrain.corpus.tokenizer_trial")
) -> str | None:
    """What becomes of a process that opens and uses a tokenizer with this content; None: it lives."""
    settings = {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "RAYON_NUM_THREADS": "1",
        "RUST_BACKTRACE": "0",
    }
    settings["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(command, input=content, capture_output=True, env=os.environ | settings)
    if done.returncode == 0:
        return None
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"took more than {MAX_CPU_S} s"
    if done.returncode < 0:
        return f"crashed ({signal.Signals(-done.returncode).name})"
    said = done.stderr.decode(errors="replace").strip().split("\n")[-1]
    return (
        f"took more than {MAX_MEMORY_BYTES / _GIB:g} GiB"
        if "MemoryError" in said
        else f"failed ({said[:200]!r})"
    )


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pretrain" / "tried"


def use(content: bytes) -> None:
    """Use the parsers as `pretrain.corpus.tokenizer` does. What they do not refuse at once has to survive a text."""
    signs = "".join(map(chr, (*range(0x20, 0x800, 3), *range(0x4E00, 0x4F00, 3), 0x1F389)))
    text = f"A few words,  12.5\n\n\tand \u2581 {signs} {'a' * 100}!"
    if content.startswith(b"{"):
        _use_hugging_face(content, text)
    else:
        _use_sentencepiece(content, text)


def _use_hugging_face(content: bytes, text: str) -> None:
    from tokenizers import Tokenizer

    try:
        made = Tokenizer.from_str(content.decode())
    except MemoryError:
        raise
    except BaseException:  # a panic of its parser is no Exception
        return
    made.decode(made.encode(text, add_special_tokens=False).ids)


def _use_sentencepiece(content: bytes, text: str) -> None:
    from sentencepiece import SentencePieceProcessor

    made = SentencePieceProcessor()
    try:
        made.LoadFromSerializedProto(content)
        made.piece_to_id("a")  # raises where there is no model in it
    except (RuntimeError, ValueError):
        return
    made.id_to_piece(list(range(made.get_piece_size())))  # not all need be UTF-8
    made.decode(made.encode(text))
    made.decode(list(range(min(256, made.get_piece_size()))))


def _limit() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S + 1))
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    _limit()
    use(sys.stdin.buffer.read())
