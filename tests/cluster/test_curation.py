"""Curation as array jobs on real Slurm gives the bytes that one machine gives."""

from __future__ import annotations

import sys
from pathlib import Path

from data_tools.curate import curate
from support import ROOT
from support.cluster.hosts import Cluster
from support.cluster.runs import ENVIRONMENT
from support.curating import config, write_text
from support.preparing import content

SLURM = [
    "executor.kind=slurm",
    "executor.slurm.partition=batch",
    "executor.slurm.memory_per_cpu_gib=1",
    "executor.slurm.time_limit=0:10:00",
]


def test_array_jobs_give_the_same_bytes(cluster: Cluster, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.jsonl")
    assert curate(config(text, tmp_path / "here", "unit_bytes=300000", "executor.workers=1")) == 0
    assert len(list((tmp_path / "here" / "documents").iterdir())) > 1
    words = [sys.executable, "-m", "data_tools.curate", f"input=[{text}]", f"output={tmp_path / 'there'}"]
    done = cluster.head.run(*words, "unit_bytes=300000", *SLURM, cwd=ROOT, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stdout
    assert content(tmp_path / "there") == content(tmp_path / "here")
