"""What every test shares: no network, no W&B account, private caches, quick tests before slow ones."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from support.tiny import TinyCorpus


# Set before any test imports torch or transformers, and inherited by every process that a test starts.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    TOKENIZERS_PARALLELISM="false",
    PYTHONUNBUFFERED="1",
)
os.environ.pop("WANDB_API_KEY", None)
# Where the tests run in the background of a shell, it has made them ignore Ctrl-C, and every process that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Timing on a shared machine says nothing; the same examples on every run make a failure repeatable.
settings.register_profile("pretrain", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("pretrain")


@pytest.fixture(scope="session", autouse=True)
def private_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compiled extensions of this test run only: a stale lock file in a shared folder hangs every later load."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(tmp_path_factory.mktemp("torch_extensions"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    """A small real corpus, not to be changed."""
    from support.tiny import make_corpus

    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def straight(corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbed, on 2 ranks."""
    from support.launching import run_ranks
    from support.tiny import run_arguments

    run_dir = tmp_path_factory.mktemp("straight") / "run"
    run_ranks(2, "launch/train.py", *run_arguments(corpus, run_dir), log_dir=run_dir.parent / "logs")
    return run_dir


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick tests first, then `integration`, `cluster`, `container`; the order within each is kept."""
    slow = ("integration", "cluster", "container")
    items.sort(key=lambda item: [item.get_closest_marker(marker) is not None for marker in reversed(slow)])
