"""Hosts, and the run that nothing disturbed, for the tests on real parts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.cluster.hosts import Cluster, unavailable
from support.cluster.runs import arguments
from support.launching import run_ranks
from support.tiny import TinyCorpus


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where hosts cannot be had, these tests are skipped, with the reason."""
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    reason = unavailable() if here else None
    for item in here:
        item.add_marker(pytest.mark.cluster)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def straight(corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks on one machine, without launcher, ssh or Slurm."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    run_ranks(2, "launch/train.py", *arguments(corpus, run_dir), log_dir=run_dir.parent / "logs")
    return run_dir


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A head and two nodes."""
    with Cluster(tmp_path / "cluster", n_nodes=2) as cluster:
        yield cluster


@pytest.fixture
def wide_cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A head and three nodes: one to spare for a run on two."""
    with Cluster(tmp_path / "cluster", n_nodes=3) as cluster:
        yield cluster
