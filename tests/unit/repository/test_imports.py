"""The rules that keep the code one-way, safe and short, read from the syntax tree of every file.

Each rule is a function from source text to complaints, so that the tests below can also show that
it complains about a bad example.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import ROOT

MAX_FUNCTION_LINES = 60

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {
    "eval": "runs code from a string",
    "exec": "runs code from a string",
    "yaml.load": "builds any object; use yaml.safe_load",
    "yaml.unsafe_load": "builds any object; use yaml.safe_load",
    "yaml.full_load": "builds any object; use yaml.safe_load",
    "torch.load": "is pickle; use safetensors",
    "torch.save": "is pickle; use safetensors",
    "os.system": "runs a shell; use subprocess with a list",
    "os.popen": "runs a shell; use subprocess with a list",
}
FORBIDDEN_KEYWORDS = {
    "allow_pickle": True,
    "weights_only": False,
    "shell": True,
    "trust_remote_code": True,
}


def source_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


CODE = source_files("pretrain", "data_tools", "launch")
TESTS = source_files("tests")
HELPERS = {path.stem for path in (ROOT / "tests/support").rglob("*.py")} - {"__init__", "sitecustomize"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported_modules(tree: ast.AST, package: str = "") -> Iterator[str]:
    """Full names of all modules and members that a file imports, at any depth; relative ones resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(part for part in (package if node.level else "", node.module or "") if part)
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func) in {"importlib.import_module", "__import__"}:
            yield str(node.args[0].value) if isinstance(node.args[0], ast.Constant) else "<computed>"


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or attribute, empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = dotted(node.value)
        return f"{head}.{node.attr}" if head else ""
    return ""


def top_levels(tree: ast.AST, package: str = "") -> set[str]:
    return {m.split(".")[0] for m in imported_modules(tree, package)}


def unsafe_constructs(source: str) -> list[str]:
    """Modules, calls and keywords that load pickles, run strings or start shells."""
    tree = ast.parse(source)
    complaints = [f"import of {module}" for module in sorted(top_levels(tree) & FORBIDDEN_MODULES)]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        if called in FORBIDDEN_CALLS:
            complaints.append(f"line {node.lineno}: {called} {FORBIDDEN_CALLS[called]}")
        if isinstance(node.func, ast.Attribute) and node.func.attr in {"extractall", "unsafe_load"}:
            complaints.append(f"line {node.lineno}: {node.func.attr} writes or builds what a file names")
        for keyword in node.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if keyword.arg in FORBIDDEN_KEYWORDS and value is FORBIDDEN_KEYWORDS[keyword.arg]:
                complaints.append(f"line {node.lineno}: {keyword.arg}={value}")
    return complaints


def long_functions(source: str) -> list[str]:
    return [
        f"{node.name} has {length} lines, {MAX_FUNCTION_LINES} are allowed"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES
    ]


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


# --- the code keeps the rules ---


def test_there_is_code_to_read() -> None:
    """An empty list of files would let everything below pass."""
    assert {"pretrain/config/load.py", "pretrain/__init__.py"} <= {name(path) for path in CODE}


@pytest.mark.parametrize("path", CODE, ids=name)
def test_only_the_engine_imports_deepspeed(path: Path) -> None:
    if name(path) != "pretrain/engine/engine.py":
        assert "deepspeed" not in top_levels(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", CODE, ids=name)
def test_nothing_imports_launch(path: Path) -> None:
    modules = top_levels(ast.parse(path.read_text()), path.parent.name)
    siblings = {script.stem for script in (ROOT / "launch").glob("*.py")}
    assert "launch" not in modules
    assert path.parent.name != "launch" or not modules & siblings


@pytest.mark.parametrize("path", CODE, ids=name)
def test_no_unsafe_constructs(path: Path) -> None:
    assert not unsafe_constructs(path.read_text())


@pytest.mark.parametrize("path", CODE, ids=name)
def test_functions_are_short(path: Path) -> None:
    """A file may be as long as its idea: a limit on files bred files with halves of ideas."""
    assert not long_functions(path.read_text())


def test_no_test_imports_a_test_and_helpers_are_imported_in_one_way() -> None:
    """A helper that is imported under two names exists twice, and a test that another needs cannot be moved."""
    assert {"tests/conftest.py", "tests/support/launching.py"} <= {name(path) for path in TESTS}
    found = {name(path): wrong for path in TESTS if (wrong := wrong_imports_of_a_test(path.read_text()))}
    assert not found


def test_the_list_of_packages_is_the_folders() -> None:
    """A package that is missing there is in every checkout and in no wheel."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {path.parent.relative_to(ROOT) for path in CODE if path.name == "__init__.py"}
    packages = {".".join(folder.parts) for folder in folders} | {"pretrain.launch", "pretrain.conf"}
    assert sorted(project["tool"]["setuptools"]["packages"]) == sorted(packages)


def test_the_order_needs_numpy_only() -> None:
    """order.py is a pure function: it must be importable, and testable, without anything heavy."""
    path = ROOT / "pretrain" / "data" / "order.py"
    allowed = {"numpy", "pretrain", "__future__"} | set(sys.stdlib_module_names)
    assert top_levels(ast.parse(path.read_text()), "pretrain") <= allowed


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
    """Open ends belong into the issue list, where they are seen."""
    marker = re.compile(
        r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "X" + "XX", "NotImplemented" + "Error"]) + r")\b"
    )
    texts = CODE + sorted((ROOT / "conf").rglob("*.yaml")) + sorted(ROOT.glob("*/*.sh"))
    found = [
        f"{name(path)}:{number}"
        for path in texts
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if marker.search(line)
    ]
    assert not found


# --- and the rules see a breach ---


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import dill",
        "eval('1')",
        "exec('x = 1')",
        "yaml.load(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(line, shell=True)",
        "tarfile.open(path).extractall(folder)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_an_unsafe_construct_is_seen(source: str) -> None:
    assert unsafe_constructs(source)


@pytest.mark.parametrize(
    "source",
    ["model.eval()", "yaml.safe_load(text)", "np.load(path, allow_pickle=False)", "subprocess.run([a, b])"],
)
def test_a_safe_construct_passes(source: str) -> None:
    assert not unsafe_constructs(source)


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
        "from pretrain.config import test_x",
    ],
)
def test_a_right_import_of_a_test_passes(source: str) -> None:
    assert not wrong_imports_of_a_test(source)


def test_a_long_function_is_seen() -> None:
    body = "    x = 1\n" * MAX_FUNCTION_LINES
    assert long_functions("def f():\n" + body)
    assert not long_functions("def f():\n" + body[: -len("    x = 1\n")])


def test_deepspeed_is_seen_at_any_depth() -> None:
    assert "deepspeed" in top_levels(ast.parse("def f():\n    from deepspeed.runtime import zero"))
