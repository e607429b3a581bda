"""Programs in many styles are told from prose by their content, also short ones and ones full of comments."""

from __future__ import annotations

import argparse
import csv
import inspect
import json
import logging
import subprocess
import time
from pathlib import Path

import pytest

from data_tools.record import CODE, ENGLISH, Record
from data_tools.stages.code_text import grams, is_code, is_code_name, is_code_text, piece_of, tokens_of
from support.short_programs import PROGRAMS, TEXTS


@pytest.mark.parametrize("style", PROGRAMS)
def test_a_short_program_is_code(style: str) -> None:
    assert is_code_text(PROGRAMS[style])


@pytest.mark.parametrize("kind", TEXTS)
def test_prose_is_no_code(kind: str) -> None:
    assert not is_code_text(TEXTS[kind])


def test_modules_are_code_and_their_docstrings_are_not() -> None:
    modules = [json.decoder, argparse, subprocess, logging]
    assert [is_code_text(Path(module.__file__).read_text()) for module in modules] == [True] * 4
    texts = [inspect.getdoc(thing) or "" for thing in (subprocess, argparse, csv, inspect)]
    assert all(texts)
    assert not any(map(is_code_text, texts))


def test_blocks_of_markdown_make_no_text_code() -> None:
    answer = f"Use a stack:\n\n```ruby\n{PROGRAMS['ruby'] * 5}```\n\nIt keeps the plates in order.\n"
    assert not is_code_text(answer)
    assert is_code_text(answer.replace("```ruby", "").replace("```", ""))
    assert piece_of("a\n```\nb\n```\nc") == "a\nc"


@pytest.mark.parametrize(
    ("id", "expected"),
    [
        ("repo:src/a.py", True),
        ("repo:src/a.CPP", True),
        ("folder/a.rs:17", True),
        ("about.rst.txt", False),
        ("https://example.org/index.php", False),
        ("corpus.jsonl:1", False),
        ("see a.py", False),
        ("c", False),
        (".c", False),
    ],
)
def test_names_of_source_files(id: str, expected: bool) -> None:
    assert is_code_name(id) is expected


def test_a_name_counts_only_together_with_the_text() -> None:
    notice = "# Copyright (c) 2001 Us. All rights reserved.\n# See LICENSE.\n"
    assert is_code_text(notice, "src/a.py")
    package = (
        "/*\nVet examines source code and reports what is suspicious.\n\nIt is run by the go command.\n*/\n"
    )
    assert is_code_text(package, "src/cmd/vet/doc.go")
    assert not is_code_text(package, "vet")
    assert not is_code_text("# Node.js\n\nA program that runs scripts on a server, begun in 2009.", "Node.js")
    assert not is_code_text("We meet at noon (in the garden) and eat. " * 5, "about.py")


def test_a_language_that_was_told_is_believed() -> None:
    text = PROGRAMS["c"]
    assert [is_code(Record("1", text, "s", language)) for language in (ENGLISH, CODE, "und")] == [
        False,
        True,
        True,
    ]


def test_the_score_is_the_sum_of_weights_of_runs() -> None:
    assert tokens_of("def f_1(x):\n    Read") == ["NL", "def", "SP", "w_w", "(", "w", ")", ":", "NL+", "W"]
    assert grams("a a")[("w", "SP", "w")] == 1
    assert grams("a a")[("w",)] == 2
    assert not is_code_text("")


@pytest.mark.parametrize(
    "piece", ["```x\n", "```\n", "def f(", "x" * 50, "_a1", "中", "\u0301", "\n\t", "http://"]
)
def test_hostile_text_takes_no_long_time(piece: str) -> None:
    began = time.process_time()
    is_code_text(piece * (400_000 // len(piece)))
    assert time.process_time() - began < 2
