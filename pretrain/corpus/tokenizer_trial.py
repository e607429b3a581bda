"""Tries an untrusted tokenizer in a process that may die, before this process opens it.

The parsers are written in C++ and Rust. A malicious file can make them crash, or use all memory or time, which no
`except` catches. A file that passes is not tried again on this machine with the same versions of the parsers.
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
"""CPU time limit of a trial in seconds. A vocabulary of 256,000 entries takes about 2 s."""
MAX_MEMORY_BYTES = 1 << 30
_GIB = 1 << 30


def try_tokenizer(content: bytes, path: str | Path) -> None:
    """Open and use a tokenizer in another process. Raises ConfigError, naming `path`, if that process dies.

    A file that the parser rejects with an error passes, because opening it in this process gives a better message.
    """
    # This import takes 40 ms, which only processes that open a tokenizer should pay.
    from importlib.metadata import version

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
        pass  # without the cache entry, the tokenizer is tried again next time


def problem_of(
    content: bytes, command: tuple[str, ...] = (sys.executable, "-m", "pretrain.corpus.tokenizer_trial")
) -> str | None:
    """How another process fails when it opens and uses a tokenizer with this content; None where it succeeds."""
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
    """Use the parsers as `pretrain.corpus.tokenizer` does.

    A tokenizer that they accept must also survive encoding and decoding a text.
    """
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
    except BaseException:  # a panic of the parser does not derive from Exception
        return
    made.decode(made.encode(text, add_special_tokens=False).ids)


def _use_sentencepiece(content: bytes, text: str) -> None:
    from sentencepiece import SentencePieceProcessor

    made = SentencePieceProcessor()
    try:
        made.LoadFromSerializedProto(content)
        made.piece_to_id("a")  # raises where the content holds no model
    except (RuntimeError, ValueError):
        return
    made.id_to_piece(list(range(made.get_piece_size())))  # fails where a piece is not valid UTF-8
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
