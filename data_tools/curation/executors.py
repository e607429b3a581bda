"""Phases of curation on datatrove's executors: processes of this machine, Slurm array jobs, or Ray.

A phase consists of tasks, each a call `run(rank)` of one picklable object. A task writes its results under temporary
names and renames them, so it may be killed and repeated. datatrove marks finished tasks by their numbers only, so the
caller derives the name of the folder with the marks from everything that the results depend on.

Only this module imports datatrove, and only when a phase is run.
"""

from __future__ import annotations

import multiprocessing
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from data_tools.progress import stage
from pretrain.errors import ConfigError, RunError
from pretrain.files import create_file

ROOT = Path(__file__).resolve().parents[2]
POLL_S = 1.0


class ExecutorKind(Enum):
    local = "local"
    slurm = "slurm"
    ray = "ray"


@dataclass(kw_only=True, slots=True)
class SlurmConfig:
    """What datatrove's Slurm executor requests."""

    partition: str = "cpu"
    qos: str | None = None
    time_limit: str = "24:00:00"
    """Time limit of one task."""
    cpus_per_task: int = 1
    memory_per_cpu_gib: int = 4
    sbatch_args: dict[str, str] = field(default_factory=dict)
    """Further options of sbatch, by their long names."""


@dataclass(kw_only=True, slots=True)
class ExecutorConfig:
    """Where tasks run. The results are the same everywhere."""

    kind: ExecutorKind = ExecutorKind.local
    workers: int | None = None
    """Number of tasks that run at a time; null: one per core of this machine, and on Slurm and Ray all of them."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    ray_address: str | None = None
    """Address of a running Ray cluster; null: start one on this machine and stop it at the end."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"executor.workers={self.workers} must be 1 or more")


class Task(Protocol):
    """The work of a phase, which is called once for each task number (rank)."""

    def run(self, rank: int, progress: TaskProgress) -> None: ...


class TaskProgress:
    """Reports to the waiting process how many bytes of its input a task has done."""

    def __init__(self, path: Path) -> None:
        self._path, self._bytes, self._written_at = path, 0, 0.0

    def advance(self, n_bytes: int) -> None:
        self._bytes += n_bytes
        now = time.monotonic()
        if now - self._written_at >= POLL_S:
            self._written_at = now
            self.close()

    def close(self) -> None:
        with create_file(self._path) as file:
            file.write(str(self._bytes).encode())

    def finish(self, total_bytes: int) -> None:
        """Report that all bytes of the task are done, even where `total_bytes` was only an estimate."""
        self._bytes = total_bytes


class _Step:
    """A task as datatrove calls it."""

    def __init__(self, task: Task, folder: Path) -> None:
        self.task, self.folder = task, folder

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        progress = TaskProgress(self.folder / f"{rank:05d}.bytes")
        self.task.run(rank, progress)
        progress.close()


def run_phase(
    name: str, task: Task, n_tasks: int, folder: Path, config: ExecutorConfig, total_bytes: int
) -> None:
    """Run all tasks of a phase that are not marked as done in `folder`, and return when all of them are.

    `total_bytes` is the sum that all tasks report to their `TaskProgress`. Raises ConfigError where a task does, and
    RunError where a process dies or a job ends before its tasks are done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    executor = _executor(_Step(task, folder), n_tasks, folder, config)
    left = executor.get_incomplete_ranks()
    if not left:
        return
    with stage(name, total_bytes) as shown, _watched(folder, shown, set(range(n_tasks)) - set(left)):
        _run(executor, config, name)
    left = executor.get_incomplete_ranks()
    if left:
        raise RunError(
            f"{name}: {len(left)} of {n_tasks} tasks were not done (the first: {left[0]}); see {folder}/logs, "
            "then run the same command again, which repeats only these tasks"
        )


@contextmanager
def _watched(folder: Path, shown: Any, done: set[int]) -> Iterator[None]:
    """Display the progress that the tasks report."""

    def told(ranks: set[int] | None = None) -> int:
        total = 0
        for path in folder.glob("*.bytes"):
            if ranks is None or int(path.stem) in ranks:
                with suppress(OSError, ValueError):
                    total += int(path.read_text())
        return total

    for path in folder.glob("*.bytes"):  # left by interrupted tasks, which begin again
        if int(path.stem) not in done:
            path.unlink()
    before = told(done)
    shown.skip(before)
    over = threading.Event()

    def follow() -> None:
        seen = before
        while not over.wait(POLL_S):
            now = told()
            shown.advance(now - seen)
            seen = now

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


# ---- datatrove -------------------------------------------------------------------------------------------------------


def _executor(step: _Step, n_tasks: int, folder: Path, config: ExecutorConfig) -> Any:
    try:
        from loguru import logger
    except ImportError as error:
        raise ConfigError("curation needs datatrove: pip install 'pretrain[data]'") from error
    logger.disable("datatrove")  # it would log every task, and errors are raised as exceptions anyway
    common = {"pipeline": [step], "tasks": n_tasks, "logging_dir": str(folder), "skip_completed": True}
    workers = config.workers or -1
    match config.kind:
        case ExecutorKind.local:
            from datatrove.executor import LocalPipelineExecutor

            n_workers = min(n_tasks, config.workers or len(os.sched_getaffinity(0)))
            return LocalPipelineExecutor(**common, workers=n_workers)
        case ExecutorKind.ray:
            from datatrove.executor import RayPipelineExecutor

            return RayPipelineExecutor(**common, workers=workers, mem_per_cpu_gb=0)
        case ExecutorKind.slurm:
            from datatrove.executor import SlurmPipelineExecutor

            slurm = config.slurm
            if shlex.quote(str(folder)) != str(folder):
                raise ConfigError(
                    f"executor.kind=slurm: datatrove writes the path {folder} into a shell script without quotes; "
                    "choose an output folder of letters, digits and @%+=:,./-_"
                )
            return SlurmPipelineExecutor(
                **common,
                workers=workers,
                time=slurm.time_limit,
                partition=slurm.partition,
                qos=slurm.qos,
                cpus_per_task=slurm.cpus_per_task,
                mem_per_cpu_gb=slurm.memory_per_cpu_gib,
                job_name="pretrain-curate",
                env_command=_environment(ROOT, Path(sys.executable).parent),
                sbatch_args=slurm.sbatch_args,
                mail_type="NONE",
            )


def _environment(root: Path, binaries: Path) -> str:
    """The shell line that makes this project and its Python available in a Slurm job."""
    root_word, path_word = shlex.quote(str(root)), shlex.quote(str(binaries))
    return f"export PATH={path_word}:$PATH PYTHONPATH={root_word}; cd {root_word}"


def _run(executor: Any, config: ExecutorConfig, name: str) -> None:
    match config.kind:
        case ExecutorKind.local:
            _run_here(executor, name)
        case ExecutorKind.ray:
            _start_ray(config.ray_address)
            executor.run()
        case ExecutorKind.slurm:
            executor.run()
            _wait_for_job(executor)


def _start_ray(address: str | None) -> None:
    """Connect to a Ray cluster, or start one. Whoever reaches a cluster can run code, so ours listens locally only."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    options: dict[str, Any] = {"runtime_env": {"env_vars": {"PYTHONPATH": path}}, "log_to_driver": False}
    if address is None and "RAY_ADDRESS" not in os.environ:
        options["include_dashboard"] = False
        # Ray reads this when it is imported. It is the only way to bind all of its ports to 127.0.0.1 on Linux: the
        # address that is passed to ray.init is only advertised, while Ray listens elsewhere.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray generates a token for this user
    import ray

    if not ray.is_initialized():
        ray.init(address, **options)


def _run_here(executor: Any, name: str) -> None:
    """Run tasks in processes of this machine. datatrove's own pool would wait forever if a worker were killed."""
    # Spawned, because a fork of a process with threads may hang.
    context = multiprocessing.get_context("spawn")
    ranks = executor.get_incomplete_ranks()
    with ProcessPoolExecutor(min(executor.workers, len(ranks)), mp_context=context) as pool:
        calls = [pool.submit(_run_rank, executor, rank) for rank in ranks]
        try:
            for call in as_completed(calls):
                call.result()
        except BrokenProcessPool:
            raise RunError(
                f"{name}: a worker process was killed, perhaps for lack of memory; run the same command again to "
                "continue, perhaps with fewer executor.workers, so that each has more memory"
            ) from None
        finally:
            for call in calls:
                call.cancel()


def _run_rank(executor: Any, rank: int) -> None:
    from loguru import logger

    logger.disable("datatrove")
    executor._run_for_rank(rank, local_rank=1)


def _wait_for_job(executor: Any) -> None:
    """Wait until all tasks are done, or until Slurm no longer knows the job."""
    while executor.get_incomplete_ranks():
        time.sleep(POLL_S)
        listed = subprocess.run(
            ["squeue", "--noheader", "--jobs", str(executor.job_id), "--format", "%T"],
            capture_output=True,
            text=True,
        )
        unknown = listed.returncode != 0 and "Invalid job id" in listed.stderr
        if unknown or (listed.returncode == 0 and not listed.stdout.strip()):
            time.sleep(POLL_S)  # a shared file system may show the last marks late
            return
