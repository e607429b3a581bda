"""The CPU image, built and run by a real Docker engine: it trains without a network, is killed, stopped and resumed.

See docker_engine.py for what stands in for the base image. Every training container runs as the image's user without
rights, with all capabilities dropped and a root file system that cannot be written.
"""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pretrain.checkpoint import tensors as checkpoint
from pretrain.reliability.journal import read_ledger, read_metrics
from support import ROOT
from support.checkpoints import assert_same_state
from support.docker_engine import BASE, IMAGE, Engine, Unavailable, build_image, running_engine
from support.tiny import GLOBAL_BATCH, TinyCorpus, events, make_corpus, run_arguments

# Long: the image takes minutes to build. So CI lints the Dockerfile, but does not see the image work.
pytestmark = [pytest.mark.integration, pytest.mark.container, pytest.mark.long]
N_STEPS = 40
USER = 10001
CANARY = f"canary-{secrets.token_hex(8)}"  # not a constant: this file is in the image
CONFINED = [
    *("--network=none", "--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges"),
    *("--shm-size=1g", "-e", "OMP_NUM_THREADS=1"),
]
LAUNCH = ["deepspeed", "--num_gpus", "2", "launch/train.py"]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """With the image in it."""
    try:
        with running_engine() as engine:
            build_image(engine)
            yield engine
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    # One level down: pytest's own folders can be entered by root only.
    return make_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return writable(tmp_path / "runs")


def writable(folder: Path, user: int = USER) -> Path:
    """A folder that the user, by default the image's, may write into."""
    folder.mkdir()
    shutil.chown(folder, user, user)
    return folder


def arguments(*more: str) -> list[str]:
    """The tiny run, as seen from within a container."""
    inside = run_arguments(TinyCorpus(Path("/corpus")), Path("/runs/run"), f"total_steps={N_STEPS}", *more)
    return [*inside, "checkpoint.keep_last=20"]


def mounts(corpus: TinyCorpus, runs: Path) -> list[str]:
    return ["-v", f"{corpus.folder}:/corpus:ro", "-v", f"{runs}:/runs"]


@pytest.fixture(scope="module")
def straight(engine: Engine, corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbed, in one container; as a user whom the image does not know."""
    runs = writable(tmp_path_factory.mktemp("straight") / "runs", user=12345)
    user = "--user=12345:12345"
    engine.docker("run", "--rm", user, *CONFINED, *mounts(corpus, runs), IMAGE, *LAUNCH, *arguments())
    return runs / "run"


@pytest.fixture
def started(engine: Engine, corpus: TinyCorpus, runs: Path) -> Iterator[str]:
    """A training container under way, with a checkpoint."""
    command = [*CONFINED, *mounts(corpus, runs), IMAGE, *LAUNCH, *arguments()]
    container = engine.docker("run", "-d", *command)
    try:
        wait_for(lambda: saved_and_going_on(runs / "run"), engine, container)
        yield container
    finally:
        engine.docker("rm", "-f", container)


def saved_and_going_on(run_dir: Path) -> bool:
    """A checkpoint is written beside training, and later than its step where the machine is busy."""
    return steps_done(run_dir) >= 6 and bool(checkpoint.list_checkpoints(run_dir))


def steps_done(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count('"kind": "step"') if path.exists() else 0


def wait_for(condition: Callable[[], bool], engine: Engine, container: str, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline or engine.inspect(container, "{{.State.Running}}") == "false":
            raise AssertionError(f"it did not happen\n{engine.docker('logs', container)}")


def resume(engine: Engine, corpus: TinyCorpus, runs: Path) -> None:
    engine.docker("run", "--rm", *CONFINED, *mounts(corpus, runs), IMAGE, *LAUNCH, *arguments())


def assert_equals_undisturbed(run_dir: Path, straight: Path) -> None:
    """Losses, parameters and moments bit-identical; each sample once and in order, with the same tokens."""
    ours, theirs = read_metrics(run_dir), read_metrics(straight)
    assert [record["step"] for record in ours] == list(range(1, N_STEPS + 1))
    assert [record["loss"].hex() for record in ours] == [record["loss"].hex() for record in theirs]
    last = [checkpoint.checkpoint_path(run, N_STEPS) for run in (run_dir, straight)]
    assert_same_state(*last)
    by_step: dict[int, list[int]] = {}
    for entry in read_ledger(run_dir):
        by_step.setdefault(entry["step"], []).extend(entry["samples"])
    read = [sample for step in sorted(by_step) for sample in sorted(by_step[step])]
    assert read == list(range(N_STEPS * GLOBAL_BATCH))
    tokens = [[entry["tokens_xxh3"] for entry in read_ledger(run)] for run in (run_dir, straight)]
    assert tokens[0] == tokens[1]


def test_killed_container_is_resumed_by_a_new_one(
    engine: Engine, corpus: TinyCorpus, straight: Path, runs: Path, started: str
) -> None:
    engine.docker("kill", started)
    assert engine.inspect(started, "{{.State.ExitCode}}") == "137"
    assert [e["event"] for e in events(runs / "run") if e["event"] in ("stopped", "finished")] == []
    resume(engine, corpus, runs)
    [resumed] = [e for e in events(runs / "run") if e["event"] == "resumed"]
    assert resumed["step"] >= 4
    assert_equals_undisturbed(runs / "run", straight)


def test_docker_stop_saves(
    engine: Engine, corpus: TinyCorpus, straight: Path, runs: Path, started: str
) -> None:
    engine.docker("stop", "-t", "120", started)
    assert engine.inspect(started, "{{.State.ExitCode}}") == "75", engine.docker("logs", started)
    stopped = events(runs / "run")[-1]
    assert (stopped["event"], stopped["reason"]) == ("stopped", "SIGTERM")
    assert stopped["step"] < N_STEPS
    assert checkpoint.verify(checkpoint.checkpoint_path(runs / "run", stopped["step"])) is None
    resume(engine, corpus, runs)
    assert [e["step"] for e in events(runs / "run") if e["event"] == "resumed"] == [stopped["step"]]
    assert_equals_undisturbed(runs / "run", straight)


def test_ranks_save_when_their_launcher_is_killed(engine: Engine, runs: Path, started: str) -> None:
    """The container outlives the launcher: process 1 asks the orphaned ranks to save and waits for them."""
    # `deepspeed` and the launcher below it; not the ranks, whose command lines end with the run's arguments too.
    kill = (
        "import os, signal\n"
        "for pid in filter(str.isdigit, os.listdir('/proc')):\n"
        "    words = open(f'/proc/{pid}/cmdline').read().split('\\0')\n"
        "    if pid != '1' and any(w.endswith(('bin/deepspeed', 'deepspeed.launcher.launch')) for w in words[:4]):\n"
        "        os.kill(int(pid), signal.SIGKILL)\n"
    )
    engine.docker("exec", started, "python", "-c", kill)
    assert engine.docker("wait", started) == "137", engine.docker("logs", started)
    assert events(runs / "run")[-1]["event"] == "stopped"


@pytest.mark.parametrize(
    ("command", "code"),
    [(["bash", "-c", "exit 3"], 3), (["bash", "-c", "kill -9 $$"], 137), (["no-such-command"], 127)],
    ids=["exit 3", "killed", "not found"],
)
def test_exit_codes_come_through(engine: Engine, command: list[str], code: int) -> None:
    container = engine.docker("create", *CONFINED, IMAGE, *command)
    engine.docker("start", container)
    assert engine.docker("wait", container) == str(code)
    said = engine.docker("logs", container)
    assert said == (
        "error: no-such-command cannot be run in this container: No such file or directory"
        if code == 127
        else ""
    )


def test_stop_goes_to_a_command_that_handles_it(engine: Engine) -> None:
    """As launch/supervise.py does; a rank that it has started is its own business."""
    script = "trap 'exit 7' TERM; RANK=0 sleep 300 & echo ready; wait"
    container = engine.docker("run", "-d", *CONFINED, IMAGE, "bash", "-c", script)
    wait_for(lambda: "ready" in engine.docker("logs", container), engine, container)
    engine.docker("stop", "-t", "60", container)
    # The sleeping "rank" outlives the script and is ended, else this would have been 137 after a minute.
    assert engine.inspect(container, "{{.State.ExitCode}}") == "7"


def test_the_image_holds_no_secret_and_no_rights(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A secret in the builder's environment or lying about in the folder does not get into the image."""
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    context = tmp_path / "context"
    ignored = shutil.ignore_patterns(".git", ".venv*", ".*_cache", "__pycache__", "quickstart-out*")
    shutil.copytree(ROOT, context, ignore=ignored)
    for name in (".env", ".netrc", "secret.txt", ".deepspeed_env"):
        (context / name).write_text(f"WANDB_API_KEY={CANARY}\n")
    build = ["build", "--progress=plain", "--network=host", f"--build-arg=CPU_BASE={BASE}"]
    build += ["-f", context / "docker" / "Dockerfile"]
    engine.docker(*build, "--target", "cpu", "-t", "pretrain:canary", context, timeout_s=900)

    told = engine.docker("history", "--no-trunc", "pretrain:canary") + engine.docker(
        "inspect", "pretrain:canary"
    )
    assert CANARY not in told
    find = ["run", "--rm", "--user=0", "pretrain:canary", "bash", "-c"]
    search = f"grep -rIl --exclude-dir=lib {CANARY} /opt /root /home /runs /tmp; ls -A /opt/pretrain"
    found = engine.docker(*find, search).splitlines()
    assert not [line for line in found if line.startswith("/")]
    assert not {".env", ".netrc", "secret.txt", ".deepspeed_env", ".git"} & set(found)
    assert "launch" in found
    assert json.loads(engine.inspect("pretrain:canary", "{{json .Config.User}}")) == str(USER)
    assert engine.docker("run", "--rm", *CONFINED, IMAGE, "id", "-u") == str(USER)


def compose(engine: Engine, corpus: TinyCorpus, runs: Path, *arguments_: str) -> str:
    """docker-compose with docker/compose.yaml as it stands, and the tiny run."""
    inside = [
        a for a in arguments() if not a.startswith(("run_dir=", "data.manifest=", "evaluation.manifest="))
    ]
    variables = {
        "CORPUS": str(corpus.folder),
        "RUNS": str(runs),
        "TRAIN": " ".join(inside),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["docker-compose", "-p", "pretrain-test", "-f", "docker/compose.yaml", *arguments_],
        cwd=ROOT,
        env={**engine.environment, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_two_containers_train_as_two_nodes(
    engine: Engine, corpus: TinyCorpus, straight: Path, runs: Path
) -> None:
    """Over a network of their own, without ssh: stopped half way, then to the end; the same run as ever."""
    try:
        compose(engine, corpus, runs, "up", "-d")
        nodes = compose(engine, corpus, runs, "ps", "-q").split()
        addresses = "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{end}}"
        assert len({engine.inspect(node, addresses) for node in nodes}) == 2
        wait_for(lambda: steps_done(runs / "compose") >= 6, engine, nodes[0])
        compose(engine, corpus, runs, "stop", "-t", "120")
        logs = compose(engine, corpus, runs, "logs")
        assert [engine.inspect(node, "{{.State.ExitCode}}") for node in nodes] == ["75", "75"], logs
        assert events(runs / "compose")[-1]["event"] == "stopped"
        logs = compose(engine, corpus, runs, "up")
        assert [engine.inspect(node, "{{.State.ExitCode}}") for node in nodes] == ["0", "0"], logs
    finally:
        compose(engine, corpus, runs, "down")
    assert_equals_undisturbed(runs / "compose", straight)
