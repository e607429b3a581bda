"""The self-test of a cluster's reading: it passes on what is right, and it sees what is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xxhash

from pretrain.config import TrainConfig, load_config, to_dict
from pretrain.data.inputs import resolve_inputs
from pretrain.data.selftest import SampleRead, _entries, _loader, _problem, _reader
from support import ROOT
from support.launching import run_ranks
from support.tiny import TinyCorpus, run_arguments

pytestmark = pytest.mark.integration


def test_a_sound_corpus_passes_on_two_ranks(corpus: TinyCorpus, tmp_path: Path) -> None:
    stages = "data.stages=[{start_tokens: 2048, sequence_length: 128}]"
    arguments = run_arguments(corpus, tmp_path / "unused", stages, "data.packing=best_fit")
    more = ["steps=8", "from_step=3", "kills=2", "json=true"]
    run_ranks(2, "launch/selftest.py", *arguments, *more, log_dir=tmp_path / "logs")
    lines = (tmp_path / "logs" / "rank-0.log").read_text().splitlines()
    checks = json.loads(lines[-1])
    assert [check["name"] for check in checks] == [
        "2 ranks, 1 workers each",
        "1 ranks",
        "4 ranks",
        "no workers",
        "every rank killed 2 times",
    ]
    assert all(check["problem"] is None for check in checks)
    assert all(check["first_batch_s"] > 0 for check in checks)
    assert lines[-2].startswith("passed: ")
    assert not (tmp_path / "unused").exists()
    assert "passed" not in (tmp_path / "logs" / "rank-1.log").read_text()


def test_a_damaged_corpus_fails(corpus: TinyCorpus, tmp_path: Path) -> None:
    """One process, as a person tries it: the reader's error is shown."""
    copy = TinyCorpus(Path(shutil.copytree(corpus.folder, tmp_path / "corpus")))
    shard = copy.folder / "shards" / "shard-00000.tar"
    damaged = bytearray(shard.read_bytes())
    for at in range(600, len(damaged), 2048):
        damaged[at] ^= 1
    shard.write_bytes(damaged)
    arguments = run_arguments(copy, tmp_path / "unused", "steps=4", "kills=0")
    command = [sys.executable, "launch/selftest.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "has xxh3-64" in done.stderr
    assert "the reader of rank 0 of 1 ended with code" in done.stderr


def test_masked_language_modeling_is_read_with_its_masks(corpus: TinyCorpus, tmp_path: Path) -> None:
    """What a reader hashes is what a run of that objective trains on."""
    arguments = run_arguments(corpus, tmp_path / "run", "objective=mlm", "data.loader_workers=0")
    config = load_config(TrainConfig, arguments, "config")
    _reader(json.dumps(to_dict(config)), 0, 1, (1, 1), str(tmp_path / "log"))
    (entry,) = _entries(tmp_path / "log")
    masking = resolve_inputs(config, 1).masking
    for hides, expected in ((masking, True), (None, False)):
        batches = next(iter(_loader(config, 0, 1, hides).steps(1)))
        rows = {
            int(sample): xxhash.xxh3_64_intdigest(np.stack([t[row].numpy() for t in batch[:4]]).tobytes())
            for batch in batches
            for row, sample in enumerate(batch.samples)
        }
        assert (rows == dict(entry["samples"])) is expected


@pytest.fixture(scope="module")
def config(corpus: TinyCorpus) -> TrainConfig:
    return load_config(TrainConfig, run_arguments(corpus, Path("unused")), "config")


GOOD = [SampleRead(step, sample, sample * 7) for step in (2, 3) for sample in range(8 * step - 8, 8 * step)]


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (GOOD, None),
        (GOOD[1:], "1 of 16 samples were not read, the first of them 8"),
        ([*GOOD, GOOD[3]], "sample 11 was read twice, in the steps 2 and 2"),
        ([*GOOD[:-1], GOOD[-1]._replace(step=2)], "sample 23 was read in step 2, it belongs to 3"),
        ([*GOOD, SampleRead(3, 24, 0)], "sample 24 was read in step 3, it belongs to None"),
        ([*GOOD[:5], GOOD[5]._replace(digest=1), *GOOD[6:]], "sample 13 of step 2 has another content"),
    ],
)
def test_what_is_wrong_is_seen(config: TrainConfig, found: list[SampleRead], sentence: str | None) -> None:
    reference = {sample.sample: sample for sample in GOOD}
    problem = _problem(config, found, reference, (2, 3))
    assert problem is None if sentence is None else problem is not None and problem.startswith(sentence)


def test_half_a_line_of_a_killed_reader_does_not_count(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text('\n{"step": 1}\n{"st\n{"step": 2}\n{"step": 3')
    assert [entry["step"] for entry in _entries(log)] == [1, 2]
