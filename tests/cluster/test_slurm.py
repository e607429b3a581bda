"""Jobs of launch/submit.py on real Slurm: to the end, and through what interrupts them.

Each case ends with the same question: is the run, bit for bit and sample for sample, the one that nothing disturbed?
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import pytest

from pretrain.checkpoint.tensors import checkpoint_path, list_checkpoints
from pretrain.reliability.json_lines import read_lines
from support import ROOT
from support.cluster.hosts import Cluster
from support.cluster.runs import (
    ENVIRONMENT,
    N_STEPS,
    SAVE_EVERY_STEPS,
    SlurmRun,
    arguments,
    assert_equals_undisturbed,
    events,
    report,
    steps_done,
)
from support.tiny import TinyCorpus

MEGABITS_PER_SECOND = 10


def slow_down(cluster: Cluster) -> None:
    """A network so slow that the run's middle is not missed: about half a second per step."""
    for node in cluster.nodes:
        node.limit_network(MEGABITS_PER_SECOND)


def speed_up(cluster: Cluster) -> None:
    for node in cluster.nodes:
        if node.is_on:
            node.limit_network(None)


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


@pytest.mark.long  # test_launched.py has the variables that srun sets, and what only looks like it
def test_srun_starts_one_task_per_rank(
    cluster: Cluster, corpus: TinyCorpus, straight: Path, tmp_path: Path
) -> None:
    """Without submit.py and without a launcher, from a shell: two tasks on two nodes are one run of two ranks."""
    run_dir = tmp_path / "run"
    environment = ENVIRONMENT | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "eth0",
    }
    train = [sys.executable, str(ROOT / "launch" / "train.py"), *arguments(corpus, run_dir)]
    cluster.head.run("srun", "--nodes=2", "--ntasks=2", *train, cwd=ROOT, env=environment, timeout_s=300)
    assert [event["world_size"] for event in events(run_dir, "started")] == [2]
    assert_equals_undisturbed(run_dir, straight)


def assert_no_step_lost_or_doubled(run_dir: Path) -> None:
    """Of all attempts together: each step was done once."""
    done = [line["step"] for line in read_lines(run_dir / "metrics.jsonl") if line["kind"] == "step"]
    assert done == list(range(1, N_STEPS + 1))


def test_preempted_requeued_resumed(
    cluster: Cluster, corpus: TinyCorpus, straight: Path, tmp_path: Path
) -> None:
    """A job of a higher partition takes both nodes for a moment. W&B sees one run."""
    run = SlurmRun(cluster, corpus, tmp_path / "run")
    job = run.submit_job("logging.wandb=offline")
    run.wait_steps(1, job)
    slow_down(cluster)
    run.wait_steps(3, job)
    asked = time.monotonic()
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=srun sleep 1"]
    other = cluster.head.run(*urgent, "--output=/dev/null").stdout.strip()
    run.wait_for("stopped", lambda: len(events(run.run_dir, "stopped")) == 1, job)
    stopped = time.monotonic()
    speed_up(cluster)
    run.wait_for("resumed", lambda: len(events(run.run_dir, "resumed")) == 1, job)
    resumed = time.monotonic()
    ended = run.wait_end(job)
    assert ended["Restarts"] == "1"
    assert cluster.job(other)["JobState"] == "COMPLETED"
    [stop] = events(run.run_dir, "stopped")
    assert 3 <= stop["step"] < N_STEPS
    assert [event["step"] for event in events(run.run_dir, "resumed")] == [stop["step"]]
    assert_no_step_lost_or_doubled(run.run_dir)
    assert_equals_undisturbed(run.run_dir, straight)
    identity = json.loads((run.run_dir / "run.json").read_text())
    logged = [path.name.rpartition("-")[2] for path in run.run_dir.glob("wandb/offline-run-*")]
    assert logged == [identity["wandb_run_id"]] * 2
    report("preempted", to_stop_s=stopped - asked, to_resume_s=resumed - asked)


def test_time_limit_saves_requeues_and_finishes(
    cluster: Cluster, corpus: TinyCorpus, straight: Path, tmp_path: Path
) -> None:
    run = SlurmRun(cluster, corpus, tmp_path / "run")
    job = run.submit_job()
    run.wait_steps(1, job)
    slow_down(cluster)
    run.wait_steps(3, job)
    # The limit is moved to the next minute but one, so that the end is near in the middle of the run on any machine.
    hours, minutes, _ = cluster.job(job)["RunTime"].split(":")
    cluster.head.run("scontrol", "update", f"JobId={job}", f"TimeLimit={int(hours) * 60 + int(minutes) + 2}")
    moved = time.monotonic()
    run.wait_for("stopped", lambda: len(events(run.run_dir, "stopped")) == 1, job)
    stopped = time.monotonic()
    speed_up(cluster)
    run.wait_for("requeued", lambda: cluster.job(job).get("JobState") == "PENDING", job)
    cluster.head.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    run.wait_for("resumed", lambda: len(events(run.run_dir, "resumed")) == 1, job)
    resumed = time.monotonic()
    ended = run.wait_end(job)
    assert ended["Restarts"] == "1"
    assert "requeued to go on" in run.log()
    assert_no_step_lost_or_doubled(run.run_dir)
    assert_equals_undisturbed(run.run_dir, straight)
    report("time limit", to_stop_s=stopped - moved, stop_to_resume_s=resumed - stopped)


def test_a_node_lost_silently_is_replaced(
    wide_cluster: Cluster, corpus: TinyCorpus, straight: Path, tmp_path: Path
) -> None:
    """No closed connection tells of it: Slurm misses the node's answers, and requeues the job on others."""
    cluster = wide_cluster
    run = SlurmRun(cluster, corpus, tmp_path / "run")
    job = run.submit_job()
    run.wait_steps(1, job)
    slow_down(cluster)
    run.wait_steps(SAVE_EVERY_STEPS + 3, job)
    assert cluster.job(job)["NodeList"] == "node[1-2]"
    cluster.nodes[1].power_off(silent=True)
    lost = time.monotonic()
    run.wait_for("requeued", lambda: cluster.job(job).get("Restarts") == "1", job)
    noticed = time.monotonic()
    speed_up(cluster)
    run.wait_for("resumed", lambda: len(events(run.run_dir, "resumed")) == 1, job)
    resumed = time.monotonic()
    ended = run.wait_end(job)
    assert ended["NodeList"] == "node[1,3]"
    excluded = (run.run_dir / "submit" / "excluded_nodes").read_text()
    assert excluded == f"node2 down when job {job} was started again\n"
    assert events(run.run_dir, "resumed")[0]["step"] >= SAVE_EVERY_STEPS
    assert_equals_undisturbed(run.run_dir, straight)
    report("node lost silently", to_notice_s=noticed - lost, to_resume_s=resumed - lost)


@pytest.mark.long  # a cluster of its own; a silent loss is harder
def test_a_node_that_dies_is_replaced_before_slurm_gives_it_up(
    corpus: TinyCorpus, straight: Path, tmp_path: Path
) -> None:
    """Slurm waits for the node (in real life for minutes); starting again on it fails, and the checks say why."""
    with Cluster(tmp_path / "cluster", n_nodes=3, slurmd_timeout_s=300) as cluster:
        run = SlurmRun(cluster, corpus, tmp_path / "run")
        job = run.submit_job()
        run.wait_steps(1, job)
        slow_down(cluster)
        run.wait_steps(SAVE_EVERY_STEPS + 3, job)
        cluster.nodes[1].power_off()
        died = time.monotonic()
        excluded = run.run_dir / "submit" / "excluded_nodes"
        named_s = run.wait_for("a node excluded", excluded.exists, job, timeout_s=240)
        speed_up(cluster)
        # A requeued job waits for its old nodes: until SlurmdTimeout, or until an administrator gives the node up, who
        # is not as quick as to start the job anew before its old credentials (cred_expire) are out of use.
        time.sleep(10)
        cluster.head.run("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=died")
        run.wait_for("resumed", lambda: len(events(run.run_dir, "resumed")) == 1, job)
        resumed = time.monotonic()
        ended = run.wait_end(job)
        assert excluded.read_text() == f"node2 not fit in round {job}-0-after\n"
        assert "node2 is not fit: Slurm could not start a task there" in run.log()
        assert (ended["NodeList"], ended["ExcNodeList"]) == ("node[1,3]", "node2")
        assert_equals_undisturbed(run.run_dir, straight)
        report("node died", to_name_s=named_s, to_resume_s=resumed - died)


@pytest.mark.long  # Slurm's own work, most of it
def test_slurmctld_restarted_under_a_running_job(
    cluster: Cluster, corpus: TinyCorpus, straight: Path, tmp_path: Path
) -> None:
    """The controller is killed and away for some seconds: the run does not notice."""
    run = SlurmRun(cluster, corpus, tmp_path / "run")
    job = run.submit_job()
    run.wait_steps(1, job)
    slow_down(cluster)
    run.wait_steps(3, job)
    cluster.restart_slurmctld(down_s=3)
    assert steps_done(run.run_dir) < N_STEPS
    speed_up(cluster)
    ended = run.wait_end(job)
    assert ended["Restarts"] == "0"
    assert [event["event"] for event in events(run.run_dir, "started", "resumed")] == ["started"]
    assert_no_step_lost_or_doubled(run.run_dir)
    assert_equals_undisturbed(run.run_dir, straight)


def test_the_stop_file_ends_the_job(cluster: Cluster, corpus: TinyCorpus, tmp_path: Path) -> None:
    """Whoever touches it wants the run to stop: neither the supervisor nor Slurm starts it again."""
    run = SlurmRun(cluster, corpus, tmp_path / "run")
    job = run.submit_job()
    run.wait_steps(1, job)
    slow_down(cluster)
    (run.run_dir / "stop").touch()
    ended = run.wait_end(job, "FAILED")
    assert (ended["ExitCode"], ended["Restarts"]) == ("75:0", "0")
    assert "stopped on request; submit again to go on" in run.log()
    [stopped] = events(run.run_dir, "stopped")
    assert list_checkpoints(run.run_dir)[-1] == checkpoint_path(run.run_dir, stopped["step"])
    assert not events(run.run_dir, "resumed")


@pytest.mark.long  # the checks themselves are in test_preflight.py
def test_a_bad_node_is_excluded_by_name(
    wide_cluster: Cluster, corpus: TinyCorpus, straight: Path, tmp_path: Path
) -> None:
    """A node whose network is slow is found before training; the same job goes on without it."""
    cluster = wide_cluster
    cluster.nodes[1].limit_network(MEGABITS_PER_SECOND)
    run = SlurmRun(cluster, corpus, tmp_path / "run")
    submitted = time.monotonic()
    job = run.submit_job()
    excluded = run.run_dir / "submit" / "excluded_nodes"
    named_s = run.wait_for("a node excluded", excluded.exists, job)
    ended = run.wait_end(job)
    assert re.search(
        r"preflight: node2 is not fit: node. to node.: the network gives [\d.]+ MiB/s", run.log()
    )
    assert excluded.read_text() == f"node2 not fit in round {job}-0\n"
    assert (ended["NodeList"], ended["ExcNodeList"], ended["Restarts"]) == ("node[1,3]", "node2", "1")
    reports = run.run_dir / "submit" / "001" / "preflight"
    assert sorted(str(path.relative_to(reports)) for path in reports.rglob("*.json")) == [
        f"{job}-0/node1.json",
        f"{job}-0/node2.json",
        f"{job}-1/node1.json",
        f"{job}-1/node3.json",
    ]
    assert [event["event"] for event in events(run.run_dir, "started", "resumed")] == ["started"]
    assert_equals_undisturbed(run.run_dir, straight)
    report("bad node", to_name_s=named_s, whole_s=time.monotonic() - submitted)


@pytest.mark.long  # each link is a job as above
def test_a_chain_of_jobs_goes_on_and_ends(
    cluster: Cluster, corpus: TinyCorpus, straight: Path, tmp_path: Path
) -> None:
    """The first is asked to stop as before its time limit, the second finishes, the third has nothing to do."""
    run = SlurmRun(cluster, corpus, tmp_path / "run")
    first = run.submit_job("cluster.chain_jobs=3")
    jobs = (run.run_dir / "submit" / "001" / "chain").read_text().split()
    assert jobs == [first, str(int(first) + 1), str(int(first) + 2)]
    run.wait_steps(1, first)
    slow_down(cluster)
    run.wait_steps(3, first)
    cluster.head.run("scancel", "--batch", "--signal=USR1", first)
    ended = run.wait_end(first, "FAILED")
    assert (ended["ExitCode"], ended["Restarts"]) == ("75:0", "0")
    speed_up(cluster)
    assert run.wait_end(jobs[1])["ExitCode"] == "0:0"
    assert run.wait_end(jobs[2])["ExitCode"] == "0:0"
    assert len(events(run.run_dir, "started", "resumed")) == 2
    assert_no_step_lost_or_doubled(run.run_dir)
    assert_equals_undisturbed(run.run_dir, straight)
