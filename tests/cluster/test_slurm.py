"""Jobs of launch/submit.py on real Slurm: to the end, and through what interrupts them.

Each case ends with the same question: is the run, bit for bit and sample for sample, the one that nothing disturbed?
"""

from __future__ import annotations

from pathlib import Path

from tests.cluster.hosts import Cluster
from tests.cluster.runs import SlurmRun, assert_equals_undisturbed, events
from tests.tiny import TinyCorpus


def test_a_job_runs_to_completion(
    cluster: Cluster, corpus: TinyCorpus, straight: Path, tmp_path: Path
) -> None:
    run = SlurmRun(cluster, corpus, tmp_path / "run")
    job = run.submit_job()
    ended = run.wait_end(job)
    assert (ended["ExitCode"], ended["Restarts"]) == ("0:0", "0")
    assert "the run is finished" in run.log()
    assert [event["event"] for event in events(run.run_dir, "started", "resumed")] == ["started"]
    assert_equals_undisturbed(run.run_dir, straight)
