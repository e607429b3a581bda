"""What an earlier version has left is read as it was then: a corpus, a curation and a run folder with a checkpoint.

They lie in tests/support/before, written by version 0.1.0 on 2026-11-30 on 2 ranks. The run was stopped at step 4 of 6;
what that version went on to compute is below.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.report.schemas import read_curation_report, read_prepare_report, read_statistics
from data_tools.verify import verify
from pretrain.corpus.manifest import load_manifest
from pretrain.reliability.journal import read_ledger, read_metrics
from support import ROOT
from support.launching import run_ranks

BEFORE = ROOT / "tests" / "support" / "before"
HELDOUT_LOSS = 5.8838146860149045
LOSSES = [
    5.951079796100485, 5.947791245404412, 5.925569485587549, 5.904986058662549, 5.896850825291054, 5.885300134060651,
]  # fmt: skip
LEDGER = {5: ([32, 34, 36, 38], "3d040cfc63165588"), 6: ([40, 42, 44, 46], "11292789313bf33e")}
"""Of rank 0: which samples it read, and a hash of their tokens."""


def script(*words: str) -> str:
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_corpus_of_before_is_whole(tmp_path: Path) -> None:
    corpus = shutil.copytree(BEFORE / "corpus", tmp_path / "corpus")
    assert verify(corpus) == []
    manifest = load_manifest(corpus / "manifest.json")
    assert manifest.root_sha256 == "c6b31c9f61c25c3e5d21c8989eda0e74d6f6f2a042f90eef41dbd5c3098c0898"
    assert (manifest.n_documents, manifest.n_chunks, manifest.n_tokens) == (13, 53, 13395)
    assert read_prepare_report(corpus / "prepare.json")["funnel"]["read"] == 14
    assert read_statistics(corpus / "statistics.json")["funnel"]


def test_a_curation_of_before_is_read() -> None:
    assert read_curation_report(BEFORE / "curated" / "report.json")["tally"]["kept"] == {"code": 14}


@pytest.mark.integration
def test_a_document_of_a_corpus_of_before_is_removed(tmp_path: Path) -> None:
    corpus = shutil.copytree(BEFORE / "corpus", tmp_path / "corpus")
    (tmp_path / "ids").write_text("attention.py\n")
    script("-m", "data_tools.remove", str(corpus), "--ids", str(tmp_path / "ids"))
    assert verify(corpus) == []
    assert load_manifest(corpus / "manifest.json").n_documents == 12


@pytest.mark.integration
def test_a_run_of_before_goes_on(tmp_path: Path) -> None:
    run_dir = shutil.copytree(BEFORE / "run", tmp_path / "run")
    corpus = BEFORE / "corpus"
    config = json.loads((run_dir / "config.json").read_text())
    given = [
        f"run_dir={run_dir}",
        f"data.manifest={corpus / 'manifest.json'}",
        f"evaluation.manifest={corpus / 'heldout' / 'manifest.json'}",
        *(
            f"model.{key}={config['model'][key]}"
            for key in ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff")
        ),
        *(f"data.{key}={config['data'][key]}" for key in ("sequence_length", "window_chunks")),
        "global_batch_sequences=8",
        "micro_batch_sequences=2",
        "total_steps=6",
        "optim.lr=3e-3",
        "schedule.warmup_steps=2",
        "checkpoint.every_steps=4",
        "evaluation.every_steps=3",
        "evaluation.max_sequences=8",
        "engine.precision=fp32",
        "logging.wandb=disabled",
        "logging.sample_ledger=true",
        "logging.peak_flops_per_second=1e12",
    ]
    run_ranks(2, "launch/train.py", *given, log_dir=tmp_path / "logs")
    losses = [record["loss"] for record in read_metrics(run_dir) if "loss" in record]
    # fp32 sums come in another order on another processor; 6 steps of Adam carry that on.
    assert losses == pytest.approx(LOSSES, abs=1e-5)
    assert losses[:4] == LOSSES[:4]  # read, not computed
    read = {
        r["step"]: (r["samples"], r["tokens_xxh3"]) for r in read_ledger(run_dir) if r["samples"][0] % 2 == 0
    }
    assert {step: read[step] for step in LEDGER} == LEDGER
    answer = script(
        "launch/eval.py", f"run_dir={run_dir}", f"input=[{corpus / 'heldout'}]", "json=true", "precision=fp32"
    )
    assert json.loads(answer.splitlines()[-1])["loss"] == pytest.approx(HELDOUT_LOSS, abs=1e-5)
    assert "attention.py" in script("launch/provenance.py", f"run_dir={run_dir}", "document=attention.py")
    assert script("launch/generate.py", f"run_dir={run_dir}", "prompt=import", "max_new_tokens=4")
