"""The rules of the code: those that ruff and import-linter hold fail on a planted breach, the others are read here."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import ROOT

MAX_FUNCTION_LINES = 60
OURS = re.compile(r"f?['\"](pretrain|data_tools|deepspeed)\b")
FORBIDDEN_KEYWORDS = {"allow_pickle": True, "weights_only": False, "trust_remote_code": True}


def source_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


CODE = source_files("pretrain", "data_tools", "launch")
TESTS = source_files("tests")
HELPERS = {path.stem for path in (ROOT / "tests/support").rglob("*.py")} - {"__init__", "sitecustomize"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_code_to_read() -> None:
    """An empty list of files would let everything below pass."""
    assert {"pretrain/config/load.py", "pretrain/__init__.py"} <= {name(path) for path in CODE}


# --- import-linter: which package may import which ---

BREACHES = {
    "pretrain goes one way": ("pretrain/corpus/shards.py", "from pretrain.train.loop import train"),
    "no circle between siblings": ("pretrain/data/order.py", "from pretrain.data.loader import TrainLoader"),
    "the product does not know its race track": ("pretrain/ports.py", "import benchmarks.harness.worker"),
    "only the engine imports deepspeed": ("pretrain/train/run.py", "import deepspeed"),
    "data_tools goes one way": ("data_tools/text.py", "from data_tools.prepare import prepare"),
    "data_tools uses the corpus format, not the trainer": ("data_tools/show.py", "import pretrain.engine"),
}


def test_import_linter_sees_a_breach_of_each_contract(tmp_path: Path) -> None:
    contracts = re.findall(r"(?m)^name = (.+)$", (ROOT / ".importlinter").read_text())
    assert set(contracts) == set(BREACHES)
    for folder in ("pretrain", "data_tools", "benchmarks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".importlinter", tmp_path)
    for where, line in BREACHES.values():
        with (tmp_path / where).open("a") as file:
            file.write(f"\n\ndef planted():\n    {line}\n")
    linter = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([linter, "--no-cache"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    for contract in contracts:
        assert re.search(rf"(?m)^{re.escape(contract)} BROKEN$", done.stdout), done.stdout


# --- ruff: what runs code, starts a shell, or is left for later ---


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("import pickle", "TID251"),
        ("from pickle import loads", "TID251"),
        ("def f():\n    import dill", "TID251"),
        ("import yaml\nyaml.load('')", "TID251"),
        ("import torch\ntorch.load('')", "TID251"),
        ("from torch import save", "TID251"),
        ("import os\nos.system('')", "TID251"),
        ("eval('1')", "S307"),
        ("exec('x = 1')", "S102"),
        ("import subprocess\nsubprocess.run('', shell=True)", "S602"),
        ("import tarfile\ntarfile.open('').extractall('')", "S202"),
        ("# TO" + "DO: later", "FIX002"),
        ("# FIX" + "ME", "FIX001"),
    ],
)
@pytest.mark.parametrize("where", ["pretrain/corpus/x.py", "launch/x.py"])
def test_ruff_sees_a_breach(source: str, rule: str, where: str) -> None:
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise"]
    done = subprocess.run(
        [*command, "--stdin-filename", where, "-"], input=source, cwd=ROOT, capture_output=True, text=True
    )
    assert f" {rule} " in done.stdout, done.stdout


def test_no_rule_on_safety_is_switched_off() -> None:
    """But for one: a user's own stage runs their code, when their command line allows it."""
    switched = re.compile(r"noqa(?!:)|noqa:[^#]*\b(S\d+|TID251|FIX\d*)")
    found = [name(path) for path in CODE if switched.search(path.read_text())]
    assert found == ["data_tools/stages/own.py"]


# --- what no tool sees ---


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or attribute, empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = dotted(node.value)
        return f"{head}.{node.attr}" if head else ""
    return ""


def complaints(source: str) -> Iterator[str]:
    """Functions that are too long, keywords that load pickles or code, modules whose name is computed."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{node.name} has {length} lines, {MAX_FUNCTION_LINES} are allowed"
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Attribute) and node.func.attr in {"extractall", "unsafe_load"}:
            yield f"line {node.lineno}: {node.func.attr} writes or builds what a file names"
        if dotted(node.func) in {"importlib.import_module", "__import__"} and OURS.match(
            ast.unparse(node.args[0])
        ):
            yield f"line {node.lineno}: import-linter does not see this import"
        for keyword in node.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if keyword.arg in FORBIDDEN_KEYWORDS and value is FORBIDDEN_KEYWORDS[keyword.arg]:
                yield f"line {node.lineno}: {keyword.arg}={value}"


@pytest.mark.parametrize("path", CODE, ids=name)
def test_the_code_keeps_the_rules(path: Path) -> None:
    assert not list(complaints(path.read_text()))


@pytest.mark.parametrize(
    "source",
    [
        "np.load(path, allow_pickle=True)",
        "load(path, weights_only=False)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "archive.extractall(folder)",
        "importlib.import_module('pretrain.train.loop')",
        "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES,
    ],
)
def test_a_breach_is_seen(source: str) -> None:
    assert list(complaints(source))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "importlib.import_module('kenlm')",
        "yaml.safe_load(text)",
        "np.load(path, allow_pickle=False)",
        "def f():\n" + "    x = 1\n" * (MAX_FUNCTION_LINES - 1),
    ],
)
def test_what_is_allowed_passes(source: str) -> None:
    assert not list(complaints(source))


# `(...)*+`, `(...)++`, `(...){2,9}+`, also where an f-string doubles the braces.
POSSESSIVE_GROUP = re.compile(r"\)(?:[*+?]|\{{1,2}[0-9,]+\}{1,2})\+")


def test_no_group_that_can_fail_halfway_is_repeated_possessively() -> None:
    """Python 3.11.2, which Debian 12 has, then goes on at the wrong place (gh-106052), and finds something else.

    In the patterns named here a turn cannot fail after its first repeated part.
    """
    found = [name(path) for path in CODE for _ in POSSESSIVE_GROUP.findall(path.read_text())]
    assert found == ["pretrain/stored.py", "data_tools/reading/spanning.py", "data_tools/stages/words.py"]


@pytest.mark.parametrize("path", CODE, ids=name)
def test_nothing_imports_a_script(path: Path) -> None:
    """Not even another script: each can be run alone, as a file and as a module of the installed package."""
    siblings = {script.stem for script in (ROOT / "launch").glob("*.py")}
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        first = {module.split(".")[0] for module in modules}
        assert "launch" not in first
        assert path.parent.name != "launch" or not first & siblings


def test_the_list_of_packages_is_the_folders() -> None:
    """A package that is missing there is in every checkout and in no wheel."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {path.parent.relative_to(ROOT) for path in CODE if path.name == "__init__.py"}
    packages = {".".join(folder.parts) for folder in folders} | {"pretrain.launch", "pretrain.conf"}
    assert sorted(project["tool"]["setuptools"]["packages"]) == sorted(packages)


def test_the_order_needs_numpy_only() -> None:
    """It is a pure function: it must be importable, and testable, without anything heavy."""
    heavy = "{'torch', 'deepspeed', 'pydantic', 'fsspec'}"
    code = f"import sys, pretrain.data.order; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_config_needs_no_torch() -> None:
    """A wrong key is to be reported within seconds, and on login nodes: importing torch takes too long."""
    code = "import sys, pretrain.config; print(sorted({'torch', 'deepspeed', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_scripts_hide_no_module() -> None:
    """The folder of a script is first on the path: launch/evaluate.py would hide the package `evaluate`."""
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    taken |= {"evaluate", "profile", "trace", "inspect", "datasets", "tokenizers"}
    assert not {path.stem for path in (ROOT / "launch").glob("*.py")} & taken


def test_nothing_is_left_to_do() -> None:
    """Open ends belong into the issue list, where they are seen. Ruff reads Python only."""
    marker = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "X" + "XX"]) + r")\b")
    texts = sorted((ROOT / "conf").rglob("*.yaml")) + sorted(ROOT.glob("*/*.sh"))
    found = [
        f"{name(path)}:{number}"
        for path in texts
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if marker.search(line)
    ]
    assert not found
    assert not [name(path) for path in CODE if "NotImplemented" + "Error" in path.read_text()]


# --- tests are apart from each other ---


def wrong_imports_of_a_test(source: str) -> list[str]:
    """Imports of other tests, and imports of helpers in another way than `from support.launching import Ranks`."""
    complaints = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            modules = ["." * node.level + (node.module or "")]
        else:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            first, *rest = module.split(".")
            if any(part == "conftest" or part.startswith("test_") for part in (first, *rest)):
                complaints.append(
                    f"line {node.lineno}: import of the test {module}; share it in tests/support"
                )
            elif first in HELPERS | {"tests", ""} or (isinstance(node, ast.Import) and first == "support"):
                complaints.append(f"line {node.lineno}: import of {module}; write `from support...`")
    return complaints


def test_no_test_imports_a_test_and_helpers_are_imported_in_one_way() -> None:
    """A helper that is imported under two names exists twice, and a test that another needs cannot be moved."""
    assert {"tests/conftest.py", "tests/support/launching.py"} <= {name(path) for path in TESTS}
    found = {name(path): wrong for path in TESTS if (wrong := wrong_imports_of_a_test(path.read_text()))}
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "from test_training import losses",
        "from tests.test_engine import losses",
        "import unit.data.test_loader",
        "from conftest import ROOT",
        "from tiny import TinyCorpus",
        "from tests.support.tiny import TinyCorpus",
        "def f():\n    import bombs",
        "import support.bombs",
        "from .tiny import TinyCorpus",
        "from . import tiny",
    ],
)
def test_a_wrong_import_of_a_test_is_seen(source: str) -> None:
    assert wrong_imports_of_a_test(source)


@pytest.mark.parametrize(
    "source",
    [
        "from support.tiny import TinyCorpus",
        "from support import ROOT, bombs",
        "import pretrain.trained",
    ],
)
def test_a_right_import_of_a_test_passes(source: str) -> None:
    assert not wrong_imports_of_a_test(source)
