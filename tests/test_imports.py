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
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Within pretrain/ a file imports only files that stand above it here.
ORDER = [
    "errors",
    "printing",
    "files",
    "stored",
    "run_state",
    "redaction",
    "command",
    "command_runner",
    "quickstart_length",
    "schemas",
    "engine_schemas",
    "cluster_schemas",
    "data_schemas",
    "precision",
    "loss_scale",
    "stages",
    "config",
    "heartbeat",
    "hub",
    "watchdog",
    "watcher",
    "remote",
    "checkpoint_folder",
    "collectives",
    "device",
    "distributed",
    "health",
    "manifest",
    "chunk_documents",
    "node_cache",
    "remote_chunks",
    "trial",
    "tokenizer",
    "chat",
    "shards",
    "document_ids",
    "corpus_check",
    "corpus_writer",
    "inputs",
    "permutation",
    "mixture",
    "order",
    "order_state",
    "schedule",
    "packing",
    "sequences",
    "provenance",
    "workers",
    "loader",
    "selftest",
    "sequence_parallel",
    "kernels",
    "attention",
    "recompute",
    "linear",
    "float8",
    "liger",
    "model",
    "objectives",
    "optim",
    "engine_state",
    "uncompiled",
    "engine",
    "checkpoint",
    "saving",
    "resilience",
    "trained",
    "evaluate",
    "journal",
    "attempts",
    "supervise",
    "device_peak",
    "monitor",
    "batch_search",
    "run_folder",
    "assembly",
    "trainer",
    "export",
    "generate",
    "hardware",
    "plan_memory",
    "plan_time",
    "planner",
    "plan_report",
    "plan_scaling",
    "bench_worker",
    "bench_ranks",
    "bench_report",
    "bench_session",
]
# The ends of the line do not know each other; the trainer may evaluate.
ENDS = {"export", "evaluate", "generate", "planner", "trainer"}
DATA_TOOLS_MAY_IMPORT = {
    "chunk_documents",
    "remote",
    "command",
    "errors",
    "files",
    "printing",
    "stored",
    "chat",
    "config",
    "tokenizer",
    "trial",
    "manifest",
    "shards",
    "corpus_writer",
    "corpus_check",
}

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


def pretrain_imports(tree: ast.AST, package: str = "") -> set[str]:
    """The files of pretrain/ that a file imports."""
    modules = imported_modules(tree, package)
    return {m.split(".")[1] for m in modules if m.startswith("pretrain.") and m != "pretrain.__version__"}


def top_levels(tree: ast.AST, package: str = "") -> set[str]:
    return {m.split(".")[0] for m in imported_modules(tree, package)}


def wrong_way_imports(stem: str, source: str) -> list[str]:
    """Imports of the file pretrain/<stem>.py that break the order."""
    complaints = []
    for other in sorted(pretrain_imports(ast.parse(source), "pretrain")):
        if other not in ORDER:
            complaints.append(f"{stem} imports {other}, which is not in the order")
        elif ORDER.index(other) >= ORDER.index(stem):
            complaints.append(f"{stem} imports {other}, which stands below it")
        elif {stem, other} <= ENDS and (stem, other) != ("trainer", "evaluate"):
            complaints.append(f"{stem} imports {other}: the two may not know each other")
    return complaints


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


# --- the code keeps the rules ---


def test_there_is_code_to_read() -> None:
    """An empty list of files would let everything below pass."""
    assert {"pretrain/config.py", "pretrain/__init__.py"} <= {name(path) for path in CODE}


@pytest.mark.parametrize("path", source_files("pretrain"), ids=name)
def test_pretrain_imports_go_one_way(path: Path) -> None:
    if path.stem == "__init__":
        assert not top_levels(ast.parse(path.read_text())), "importing the package must cost nothing"
        return
    assert path.stem in ORDER, f"{name(path)} has no place in the order of DESIGN"
    assert not wrong_way_imports(path.stem, path.read_text())


@pytest.mark.parametrize("path", CODE, ids=name)
def test_only_the_engine_imports_deepspeed(path: Path) -> None:
    if name(path) != "pretrain/engine.py":
        assert "deepspeed" not in top_levels(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", source_files("data_tools"), ids=name)
def test_data_tools_import_the_contract_only(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert pretrain_imports(tree, "data_tools") <= DATA_TOOLS_MAY_IMPORT


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


def test_the_order_needs_numpy_only() -> None:
    """order.py is a pure function: it must be importable, and testable, without anything heavy."""
    path = ROOT / "pretrain" / "order.py"
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
    ("stem", "source"),
    [
        ("shards", "from pretrain.loader import Batch"),
        ("shards", "from pretrain import loader"),
        ("shards", "from . import loader"),
        ("shards", "from .loader import Batch"),
        ("shards", "import pretrain.loader as x"),
        ("shards", "def f():\n    from pretrain.trainer import Trainer"),
        ("shards", "import importlib\nimportlib.import_module('pretrain.trainer')"),
        ("shards", "import pretrain.shards"),
        ("shards", "import pretrain.something_new"),
        ("generate", "from pretrain.export import parity"),
        ("export", "from pretrain.trainer import Trainer"),
        ("trainer", "from pretrain.export import parity"),
    ],
)
def test_a_wrong_import_is_seen(stem: str, source: str) -> None:
    assert wrong_way_imports(stem, source)


@pytest.mark.parametrize(
    ("stem", "source"),
    [
        ("trainer", "from pretrain.evaluate import evaluate_loss\nfrom pretrain.config import TrainConfig"),
        ("generate", "from pretrain.model import Decoder\nimport torch"),
    ],
)
def test_a_right_import_passes(stem: str, source: str) -> None:
    assert not wrong_way_imports(stem, source)


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


def test_a_long_function_is_seen() -> None:
    body = "    x = 1\n" * MAX_FUNCTION_LINES
    assert long_functions("def f():\n" + body)
    assert not long_functions("def f():\n" + body[: -len("    x = 1\n")])


def test_deepspeed_is_seen_at_any_depth() -> None:
    assert "deepspeed" in top_levels(ast.parse("def f():\n    from deepspeed.runtime import zero"))
