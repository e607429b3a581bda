"""Rows 8 and 17 of the faults: a bit that flips, a rank that is slow. The runs are real; the bits are flipped here."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.checkpoint import tensors as checkpoint
from pretrain.checkpoint.tensors import ALONE
from pretrain.engine.bit_sums import StateSums, bit_sum, check_bit_sums
from pretrain.errors import RunError
from pretrain.train import stragglers
from pretrain.train.stragglers import Pace
from support.launching import Ranks, run_ranks
from support.tiny import TinyCorpus, events, run_arguments
from support.training import assert_equals_undisturbed, steps_done, wait_for

TRAIN = "launch/train.py"
DTYPES = [torch.float32, torch.bfloat16, torch.uint8]


@given(
    numel=st.integers(1, 40),
    offset=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    where=st.integers(0, 10**6),
    bit=st.integers(0, 7),
)
@settings(max_examples=300, deadline=None)
def test_every_flipped_bit_changes_the_sum(
    numel: int, offset: int, dtype: torch.dtype, where: int, bit: int
) -> None:
    """Of tensors of any length, also where they do not begin at a multiple of 8 bytes."""
    tensor = torch.randint(0, 256, (numel + offset,)).to(dtype)[offset:]
    other = torch.ones(5)
    before = int(bit_sum([tensor, other]))
    assert before == int(bit_sum([other, tensor.clone()]))
    octets = tensor.view(torch.uint8)
    octets[where % octets.numel()] ^= 1 << bit
    assert int(bit_sum([tensor, other])) != before


def test_state_may_change_only_between_the_two_sums() -> None:
    own, copy = torch.zeros(3), torch.zeros(2)
    sums = StateSums(lambda: [own], lambda: [copy])
    own += 1
    assert not sums.changed()  # nothing is remembered yet
    sums.remember()
    assert not sums.changed()
    copy[0] = 1e-30
    assert sums.changed()
    sums.forget()
    assert not sums.changed()


def test_memory_that_changed_ends_the_run() -> None:
    facts = {"replica": 7.0, "step": 4, "world": ALONE}
    check_bit_sums(changed=False, n_changed=0.0, replica_total=7.0, **facts)
    with pytest.raises(RunError, match=r"of rank 0 on .* changed between two updates, seen in step 4"):
        check_bit_sums(changed=True, n_changed=1.0, replica_total=7.0, **facts)


def test_ranks_are_compared_near_the_start_and_when_steps_are_slow() -> None:
    pace = Pace(watch=True)
    probes = []
    for step in range(1, 301):
        pace.note(1.0 if step < 50 else 2.0, 0.0)
        if pace.wants_comparison():
            probes.append((step, pace.slow))
    # The median of ten is 1.5 after the fifth slow step, 2.0 after the sixth.
    assert probes == [(10, False), (55, True), (155, True), (255, True)]
    assert not Pace(watch=False).wants_comparison()


def test_who_waits_for_data_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four ranks' answers are played: this is about the judgment."""
    rows = [(100.0, 0.1, "a"), (90.0, 0.8, "b"), (20.0, 0.1, "c"), (95.0, 0.1, "d")]
    monkeypatch.setattr(stragglers, "gather_objects", lambda value, world: rows)
    found = [(s.rank, s.host, s.cause, s.share) for s in Pace(watch=True).find_stragglers(ALONE)]
    assert found == [(1, "b", "data", 0.8), (2, "c", "compute", 20 / 95)]


# ---- real runs -------------------------------------------------------------------------------------------------------


@pytest.mark.integration
@pytest.mark.parametrize(
    "kind",  # long: the same sums over other tensors
    [
        "master",
        pytest.param("exp_avg", marks=pytest.mark.long),
        pytest.param("working", marks=pytest.mark.long),
        "replica",
        "copy",
    ],
)
def test_row_8_a_flipped_bit_is_noticed_in_its_step_and_never_saved(
    kind: str, corpus: TinyCorpus, straight: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    # Step 4 is saved before the run goes on: otherwise it could end in step 8 before that is done.
    arguments = run_arguments(corpus, run_dir, "checkpoint.background=false")
    worker = ("tests/support/workers/flip_worker.py", kind, "1", "8", *arguments)  # step 8 would be saved
    with Ranks(2, *worker, log_dir=tmp_path / "logs") as ranks:
        codes = ranks.wait()
    assert codes[1] not in (0, 2, 75), ranks.output()
    what = "differ from the other ranks' copies" if kind == "copy" else "changed between two updates"
    deadline = time.monotonic() + 30  # the watcher that writes it outlives the ranks
    while not any(e["event"] == "rank_failed" for e in events(run_dir)) and time.monotonic() < deadline:
        time.sleep(0.1)
    (failed,) = (event for event in events(run_dir) if event["event"] == "rank_failed")
    assert f"{what}, seen in step 8" in failed["reason"]
    if kind != "copy":  # of two copies nobody can tell which is right
        assert f"of rank 1 on {os.uname().nodename} " in failed["reason"]
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(run_dir)] == [4]
    run_ranks(2, TRAIN, *arguments, log_dir=tmp_path / "again")
    assert_equals_undisturbed(run_dir, straight)


@pytest.fixture
def rival() -> Iterator[psutil.Process]:
    """Uses up a core for ever."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        yield psutil.Process(process.pid)
        process.kill()


@pytest.mark.integration
@pytest.mark.alone
def test_row_17_a_rank_with_a_tenth_of_a_core_is_named(
    corpus: TinyCorpus, tmp_path: Path, rival: psutil.Process
) -> None:
    """Within 20 steps. Rank 1 shares its core with another process, at weights of 1 to 9, from step 15 on."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs two cores: one for the rank that is not slow")
    rival.cpu_affinity([cores[0]])
    run_dir = tmp_path / "run"
    endless = ["total_steps=4000", "checkpoint.every_steps=4000", "evaluation.every_steps=4000"]
    endless += ["watchdog.step_s=900"]  # the first save imports what saves need, here with a tenth of a core
    with Ranks(2, TRAIN, *run_arguments(corpus, run_dir, *endless), log_dir=tmp_path / "logs") as ranks:
        wait_for(lambda: steps_done(run_dir) >= 15, ranks)
        rival.cpu_affinity([cores[1]])
        slow, other = (psutil.Process(ranks.processes[rank].pid) for rank in (1, 0))
        other.cpu_affinity([cores[0]])
        for process in (slow, *slow.children()):
            for thread in process.threads():
                os.sched_setaffinity(thread.id, [cores[1]])
                os.setpriority(os.PRIO_PROCESS, thread.id, 10)
        slowed_at = steps_done(run_dir)
        wait_for(lambda: any(e["event"] == "straggler" and e["step"] > 15 for e in events(run_dir)), ranks)
        rival.kill()  # what is to be shown is shown; ending with a tenth of a core can take the kernel minutes
        (run_dir / "stop").touch()
        assert ranks.wait() == [75, 75], ranks.output()
    named = [e for e in events(run_dir) if e["event"] == "straggler" and e["step"] > slowed_at]
    assert [(e["rank"], e["cause"]) for e in named] == [(1, "compute")]
    assert named[0]["share"] < 0.4
    assert named[0]["step"] <= slowed_at + 2 * stragglers.WINDOW_STEPS
