"""Dialogues, and the configuration that prepares a corpus from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_tools.config import PrepareConfig, TokenizerConfig
from pretrain.config import load_config

# Real questions from the Perl FAQ and from a corpus of small talk, with answers of one line and of many lines.
PERL = [
    (
        "What is Perl?",
        "Perl is a high-level programming language with an eclectic heritage\nwritten by Larry Wall.",
    ),
    (
        "Is Perl difficult to learn?",
        "No, Perl is easy to start learning --and easy to keep learning.\n\nIt looks\n",
    ),
]
CHAT = [
    ("什么是ai", "人工智能是工程和科学的分支,致力于构建具有思维的机器。"),
    ("你是什么语言编写的", "Python"),
]


def turns(*pairs: tuple[str, str], system: str | None = None) -> list[dict[str, str]]:
    found = [{"role": "system", "content": system}] if system is not None else []
    for question, answer in pairs:
        found += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return found


def dialogues(count: int) -> list[dict[str, Any]]:
    """Different dialogues of one or two questions each. Every third one has a system message."""
    records = []
    for number in range(count):
        pairs = [
            (f"{q} ({number})", a * (1 + number % 3))
            for q, a in (PERL + CHAT)[number % 3 :][: 1 + number % 2]
        ]
        system = "Answer in one line." if number % 3 == 0 else None
        records.append({"id": f"talk-{number}", "messages": turns(*pairs, system=system)})
    return records


def chat_config(output: Path, *inputs: Path, model: Path, **options: object) -> PrepareConfig:
    length = int(str(options.get("chat.max_tokens", 1)))
    chunk_tokens = max(1, 256 // length) * length
    options = {"chunk_tokens": chunk_tokens, "shard_bytes": 8192, "heldout_frac": 0.1, **options}
    tokenizer = TokenizerConfig(path=str(model))
    return load_config(
        PrepareConfig,
        [
            f"input=[{','.join(map(str, inputs))}]",
            f"output={output}",
            "format=chat",
            f"tokenizer.path={tokenizer.path}",
            "workers=1",
            *(f"{name}={value}" for name, value in options.items()),
        ],
    )
