"""Settings for all tests: no network, no W&B account, private caches, and quick tests before slow ones.

The markers `integration`, `cluster` and `container` select tests. The folders are only for readers: unit/ (by package),
integration/ (real processes that train) and cluster/. A file that holds both quick and marked tests is in the folder
that suits most of them. File names are unique, because pytest imports each file by its name alone.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
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
# Otherwise each process that a test starts would compile every file of this project again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# A shell makes its background jobs ignore Ctrl-C, and the processes started by the tests would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# There is no deadline, because times on a shared machine vary too much. The same examples in every run make a failure
# repeatable. "explore" tries other examples, which --hypothesis-seed repeats; tests/run.sh runs the property tests once
# with it and prints the seed.
settings.register_profile("pretrain", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile("pretrain")


@pytest.fixture(scope="session", autouse=True)
def private_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Use caches of this test run only, because a stale lock file in a shared folder would hang every later load."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(tmp_path_factory.mktemp("torch_extensions"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    """A small real corpus, which tests must not change."""
    from support.tiny import make_corpus

    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    """A small corpus of labeled texts, which tests must not change."""
    from support.labeled import make_labeled

    return make_labeled(tmp_path_factory.mktemp("labeled"))


@pytest.fixture(scope="session")
def straight(corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run on 2 ranks."""
    from support.launching import run_ranks
    from support.tiny import run_arguments

    run_dir = tmp_path_factory.mktemp("straight") / "run"
    run_ranks(2, "launch/train.py", *run_arguments(corpus, run_dir), log_dir=run_dir.parent / "logs")
    return run_dir


@pytest.fixture(scope="session")
def staged_run(corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run on 2 ranks, whose sequence length and batch change between stages."""
    from support.launching import run_ranks
    from support.training import TRAIN, staged

    run_dir = tmp_path_factory.mktemp("staged") / "run"
    run_ranks(2, TRAIN, *staged(corpus, run_dir), log_dir=run_dir.parent / "logs")
    return run_dir


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a corpus of random tokens, which tests read from a server and must not change."""
    from support.served_corpus import write_corpus

    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def raw_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of text to curate, which tests must not change."""
    from support.curating import write_text

    return write_text(tmp_path_factory.mktemp("input") / "text.jsonl")


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of an empty bucket on a real server. Environment variables tell how to reach it while the module runs."""
    from support.object_store import s3_server

    with s3_server(tmp_path_factory.mktemp("s3")) as bucket:
        yield bucket


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """A torch process group of this process alone."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put quick tests first, then `integration`, `cluster` and `container`, keeping the order within each."""
    slow = ("integration", "cluster", "container")
    items.sort(key=lambda item: [item.get_closest_marker(marker) is not None for marker in reversed(slow)])
