"""What each process imports, which is what a start costs; no clock. benchmarks/startup.py measures it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest

from pretrain.config import DataConfig
from pretrain.config.data_stages import plan_stages
from pretrain.corpus.shards import Corpus
from pretrain.data.order import Order, SourceSize
from pretrain.data.sequences import SequenceReader
from pretrain.data.workers import MicroBatches, read_ahead
from support import ROOT
from support.launching import run_ranks
from support.tiny import TinyCorpus, run_arguments

# `copy` looks for Jython's `org`, yaml's parser is made by Cython.
OF_THE_INTERPRETER = {"_distutils_hack", "sitecustomize", "usercustomize", "org", "__main__", "__mp_main__"}
OF_THE_INTERPRETER |= {"cython_runtime"}
OURS = {"pretrain", "data_tools", "support"}
OMEGACONF = {"omegaconf", "antlr4", "attr", "yaml", "_yaml"}
SCHEMAS = {"annotated_types", "typing_extensions"}  # small; pydantic itself waits for a file to be parsed
CONFIGURATION = OMEGACONF | SCHEMAS | {"hydra", "packaging"}
CORPUS = {"numpy", "xxhash", "sentencepiece"}
PYDANTIC = SCHEMAS | {
    "pydantic",
    "pydantic_core",
    "typing_inspection",
}  # for those that have read a manifest: 60 ms
COMMANDS = [
    *([f"launch/{path.name}", "--help"] for path in sorted((ROOT / "launch").glob("*.py"))),
    *(
        ["-m", f"data_tools.{path.stem}", "--help"]
        for path in sorted((ROOT / "data_tools").glob("*.py"))
        if "__main__" in path.read_text()
    ),
    ["launch/train.py", "run_dir=x", "total_steps=9", "--cfg", "job"],
    ["launch/train.py", "run_dir=x", "modle=tiny"],
]
COMPILER = ("torch._dynamo.", "torch._inductor", "torch.fx.experimental.symbolic_shapes", "sympy", "triton")
NOT_FOR_THE_FIRST_STEP = (
    *("torch.distributed.checkpoint", "torch.distributed.tensor", "torch.distributed.fsdp", "torch.onnx"),
    *(
        "wandb",
        "transformers",
        "pandas",
        "scipy",
        "matplotlib",
        "datasets",
        "datatrove",
        "rich",
        "setuptools",
    ),
    *("fsspec", "upath", "requests", "sklearn"),
)


def packages(modules: list[str]) -> set[str]:
    """Those that are neither Python's nor ours."""
    found = {name.split(".")[0] for name in modules if not name.startswith("_cython_")}
    found = {name for name in found if not name.startswith("_sysconfigdata")}
    return found - set(sys.stdlib_module_names) - OF_THE_INTERPRETER - OURS - at_every_start()


@cache
def at_every_start() -> set[str]:
    """What an empty program imports: Ubuntu's sitecustomize has a hook of its own."""
    command = [sys.executable, "-c", "import sys; print(*sys.modules)"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return {name.split(".")[0] for name in names}


def imports_of(*arguments: str) -> list[str]:
    """All modules that a command and the processes that it starts import, whatever its exit code is."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"},
    )
    modules = re.findall(r"^import time:.*\|\s+(\S+)$", done.stderr, re.M)
    assert "encodings" in modules, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return modules


def of_packages(modules: list[str], names: tuple[str, ...]) -> list[str]:
    """The modules that belong to one of these packages; a name that ends with a dot: what is below it."""
    return [m for m in modules if any(m == name or m.startswith(f"{name.rstrip('.')}.") for name in names)]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_command_that_only_prints_or_refuses_imports_little(arguments: list[str]) -> None:
    allowed = CONFIGURATION | CORPUS if "data_tools" in arguments[1] else CONFIGURATION
    if "quickstart_summary" in arguments[0]:
        allowed = CONFIGURATION | CORPUS
    assert packages(imports_of(*arguments)) <= allowed


@pytest.mark.parametrize("missing", ["data.manifest=nothing", "init_from=nothing"])
def test_what_is_not_there_is_told_without_torch(missing: str) -> None:
    words = ["launch/train.py", "run_dir=x", "total_steps=300", "data.manifest=nothing", missing]
    assert packages(imports_of(*words)) <= CONFIGURATION | CORPUS
    assert not (ROOT / "x").exists()


def test_a_watcher_imports_the_standard_library_alone() -> None:
    assert packages(imports_of("-m", "pretrain.reliability.watcher")) == set()


def test_a_supervisor_imports_what_reads_a_command_line() -> None:
    assert (
        packages(imports_of("-c", "import pretrain.reliability.supervisor, pretrain.reliability.watchdog"))
        <= CONFIGURATION
    )


def test_a_process_that_encodes_documents_imports_no_more_than_it_needs() -> None:
    assert packages(imports_of("-c", "import data_tools.building.encode")) <= OMEGACONF | SCHEMAS | CORPUS


def test_a_loader_worker_imports_what_reads_a_corpus(
    corpus: TinyCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked after it has read, so that what is imported late counts."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    opened = Corpus(str(corpus.manifest))
    data = DataConfig(manifest=str(corpus.manifest), sequence_length=64)
    size = SourceSize(opened.n_chunks, opened.chunk_tokens, opened.last_chunk_tokens)
    order = Order([size], plan_stages(data, 8), lanes=2, window_chunks=4, seed=0)
    read = MicroBatches(SequenceReader([opened], data), order)
    wanted = (np.arange(4), np.empty(0, np.int64))
    from support import loaded_modules  # tests/ is on the path of the worker too

    (modules,) = read_ahead(partial(loaded_modules.after, read), iter([wanted]), n_workers=1, ahead=1)
    assert "pretrain.data.sequences" in modules
    assert packages(modules) <= OMEGACONF | PYDANTIC | {"numpy", "xxhash"}


@pytest.mark.integration
def test_a_rank_has_no_compiler_and_no_reporter_at_its_first_step(
    corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these costs a start up to a CPU-second per rank; a run that saves or compiles imports them then."""
    arguments = run_arguments(corpus, tmp_path / "run", "total_steps=3", "data.loader_workers=1")
    monkeypatch.setenv("MODULES_OF_RANK", str(tmp_path / "modules-"))
    run_ranks(2, "tests/support/workers/startup_worker.py", *arguments, log_dir=tmp_path / "logs")
    for rank in range(2):
        modules = (tmp_path / f"modules-{rank}").read_text().split()
        assert "deepspeed.runtime.zero.stage3" in modules
        assert "pretrain.train.loop" in modules
        assert not of_packages(modules, COMPILER)
        assert not of_packages(modules, NOT_FOR_THE_FIRST_STEP)


# ---- a compiler that is not loaded -----------------------------------------------------------------------------------


def run_uncompiled(code: str) -> None:
    """Run code in a process of its own, in which torch's compiler is left unloaded."""
    head = "import sys, torch\nfrom pretrain.engine.uncompiled import *\nleave_compiler_unloaded()\n"
    loaded = "def loaded(): return 'torch._dynamo.eval_frame' in sys.modules\n"
    done = subprocess.run(
        [sys.executable, "-c", head + loaded + code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_an_optimizer_steps_without_the_compiler() -> None:
    run_uncompiled("""
torch.manual_seed(0)
layer = torch.nn.Linear(2, 2)
optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
layer(torch.ones(1, 2)).sum().backward()
optimizer.step()
optimizer.zero_grad()
with compiling_nothing():
    assert torch.compile(len) is len
    assert torch.compile()(len) is len
assert torch.compiler.disable(len) is len
assert torch.compiler.disable()(len) is len
assert not loaded()
""")


@pytest.mark.parametrize(
    "use",
    [
        "assert torch.compile(torch.sin, backend='eager')(torch.zeros(1)) == 0",
        "import torch._dynamo; torch._dynamo.config.suppress_errors",
        "from torch._dynamo.utils import counters; counters['stats']",
        "from torch._dynamo import reset; reset()",
        "import torch._dynamo as d; d.reset()",
    ],
)
def test_any_other_use_of_the_compiler_loads_it(use: str) -> None:
    """Whole: also for those that hold the stand-in, and from then on functions are kept from it again."""
    run_uncompiled(f"""
held = torch._dynamo
assert not loaded()
{use}
assert loaded()
real = sys.modules["torch._dynamo"]
assert real is torch._dynamo and real is not held and held.config is real.config
assert held.disable(len) is not len
""")


def test_a_compiler_that_is_loaded_stays() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, torch._dynamo as real; from pretrain.engine import uncompiled\n"
            "uncompiled.leave_compiler_unloaded()\n"
            "assert sys.modules['torch._dynamo'] is real is sys.modules['torch']._dynamo",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# ---- and the lists see a breach --------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["torch", "deepspeed", "pandas", "transformers", "wandb", "scipy"])
def test_an_import_that_is_too_much_is_seen(package: str) -> None:
    for allowed in (CONFIGURATION | CORPUS, CONFIGURATION, OMEGACONF | CORPUS, OMEGACONF, set[str]()):
        assert not packages(["os", "pretrain.config", f"{package}.part"]) <= allowed


def test_a_compiler_is_seen_and_its_stand_in_is_not() -> None:
    assert of_packages(["torch._dynamo.eval_frame", "torch._inductor", "sympy.core"], COMPILER) == [
        "torch._dynamo.eval_frame",
        "torch._inductor",
        "sympy.core",
    ]
    assert not of_packages(["torch._dynamo", "torch.compiler"], COMPILER)
