"""Tests whether a cluster reads a corpus in the right order, with several rank and worker counts and after kills."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from pretrain.config import TrainConfig, to_dict, validate
from pretrain.corpus.manifest import load_manifest
from pretrain.data.inputs import masking_of
from pretrain.data.loader import TrainLoader
from pretrain.data.masking import Masking
from pretrain.distributed import World, gather_objects
from pretrain.errors import RunError

_KILL_SEED = 20260401
_POLL_S = 0.01


class SampleRead(NamedTuple):
    """One sequence that a rank got from its loader."""

    step: int
    """Number of the step in which the sequence was read."""
    sample: int
    """Index of the sample in the order."""
    digest: int
    """xxh3-64 hash of its tokens, labels, positions and document ids."""


@dataclass
class ReadingCheck:
    """The result of one way of reading, which is compared with the order and with the first way of reading."""

    name: str
    """The number of ranks, of workers, or of kills in this way of reading."""
    problem: str | None
    """What is wrong, in one sentence; None if nothing is."""
    first_batch_s: float
    """Seconds until the slowest rank had its first batch."""
    tokens_per_second: float
    """Tokens per second of all ranks together, without the first batch."""


class _Reading(NamedTuple):
    """What one rank has read, and how fast."""

    samples: list[SampleRead]
    """The sequences, in the order in which they were read."""
    first_batch_s: float
    """Seconds until the first batch."""
    tokens_per_second: float
    """Tokens per second, without the first batch."""


def run_selftest(
    config: TrainConfig, world: World, *, steps: int, from_step: int, kills: int
) -> list[ReadingCheck]:
    """Run all checks. All ranks call this together and get the same results. Raises RunError if a reader fails."""
    # At exit, Python would warn about the semaphores of the killed readers.
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker:UserWarning"
    last = min(from_step + steps - 1, _loader(config, 0, 1).n_steps)
    n = config.reader_ranks(world.size)
    half, double = max(1, n // 2), 2 * n
    workers = config.data.loader_workers
    ways = [(f"{n} ranks, {workers} workers each", n, workers, 0)]
    ways += [
        (f"{ranks} ranks", ranks, workers, 0)
        for ranks in (half, double)
        if ranks != n and _fits(config, ranks)
    ]
    ways += [("no workers" if workers else "1 worker", n, 0 if workers else 1, 0)]
    if kills:
        ways.append((f"every rank killed {kills} times", n, workers, kills))
    reference: dict[int, SampleRead] = {}
    checks = []
    for name, n_ranks, n_workers, n_kills in ways:
        mine = [rank for rank in range(n_ranks) if rank % n == world.rank]
        readings = [_read(config, rank, n_ranks, n_workers, (from_step, last), n_kills) for rank in mine]
        found = [reading for part in gather_objects(readings, world) for reading in part]
        samples = [sample for reading in found for sample in reading.samples]
        problem = _problem(config, samples, reference, (from_step, last)) if world.is_main else None
        reference = reference or {sample.sample: sample for sample in samples}
        checks.append(
            ReadingCheck(
                name,
                problem,
                max(reading.first_batch_s for reading in found),
                sum(reading.tokens_per_second for reading in found),
            )
        )
    return [check for part in gather_objects(checks, world)[:1] for check in part]


def _fits(config: TrainConfig, n_ranks: int) -> bool:
    return all(stage.batch_sequences % n_ranks == 0 for stage in config.stages)


def _loader(config: TrainConfig, rank: int, n_ranks: int, masking: Masking | None = None) -> TrainLoader:
    return TrainLoader(
        config.data,
        config.seed,
        global_batch_sequences=config.global_batch_sequences,
        micro_batch_sequences=config.micro_batch,
        rank=rank,
        world_size=n_ranks,
        total_steps=config.total_steps,
        total_tokens=config.total_tokens,
        total_epochs=config.total_epochs,
        state=None,
        masking=masking,
    )


def _read(
    config: TrainConfig, rank: int, n_ranks: int, workers: int, steps: tuple[int, int], kills: int
) -> _Reading:
    """Read the steps as one rank would, in a process that is killed `kills` times at random steps and restarted."""
    config = replace(config, data=replace(config.data, loader_workers=workers))
    chance = random.Random(f"{_KILL_SEED} {rank}")
    with tempfile.TemporaryDirectory(prefix="selftest-") as folder:
        log = Path(folder) / "samples.jsonl"
        for left in range(kills, -1, -1):
            first = _next_step(log, steps[0])
            kill_at = chance.randint(first, steps[1]) if left and first <= steps[1] else None
            _run_reader(config, rank, n_ranks, (first, steps[1]), log, kill_at)
        return _parse(log, steps[0])


def _run_reader(
    config: TrainConfig, rank: int, n_ranks: int, steps: tuple[int, int], log: Path, kill_at: int | None
) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=_reader, args=(json.dumps(_train_keys(config)), rank, n_ranks, steps, str(log))
    )
    process.start()
    while kill_at is not None and process.is_alive() and _next_step(log, steps[0]) < kill_at:
        time.sleep(_POLL_S)
    if kill_at is not None and process.is_alive() and process.pid:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    if kill_at is None and process.exitcode != 0:
        raise RunError(
            f"the reader of rank {rank} of {n_ranks} ended with code {process.exitcode}; its error is above"
        )


def _train_keys(config: TrainConfig) -> dict[str, Any]:
    """The configuration without the keys that a subclass of TrainConfig adds."""
    values = to_dict(config)
    return {key.name: values[key.name] for key in fields(TrainConfig)}


def _reader(config_json: str, rank: int, n_ranks: int, steps: tuple[int, int], log: str) -> None:
    """The program of the reader process. It writes one line per step, after it has read the step."""
    config = validate(TrainConfig, json.loads(config_json))
    started = time.monotonic()
    with open(log, "a", encoding="utf-8") as file:
        file.write("\n")  # ends the line that a killed reader may have left half-written
        # Made here, because arguments of a process that is killed early must be small (see `Corpus.__reduce__`).
        first = config.data.corpora()[0].manifest
        masking = masking_of(config, first, load_manifest(first))
        loader = _loader(config, rank, n_ranks, masking)
        batches = loader.steps(steps[0])
        for step in range(steps[0], steps[1] + 1):
            found = [
                (
                    int(sample),
                    xxhash.xxh3_64_intdigest(np.stack([t[row].numpy() for t in batch[:4]]).tobytes()),
                )
                for batch in next(batches)
                for row, sample in enumerate(batch.samples)
            ]
            tokens = len(found) * loader.plan[step].sequence_length
            entry = {"step": step, "samples": found, "s": time.monotonic() - started, "tokens": tokens}
            file.write(json.dumps(entry) + "\n")
            file.flush()
        batches.close()  # type: ignore[attr-defined]


def _entries(log: Path) -> Iterator[dict]:
    """The entries of complete lines. A line that a killed reader was still writing is skipped."""
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    for line in text.split("\n")[:-1]:
        try:
            yield json.loads(line)
        except ValueError:  # an incomplete or empty line
            continue


def _next_step(log: Path, first: int) -> int:
    return max((entry["step"] + 1 for entry in _entries(log)), default=first)


def _parse(log: Path, first: int) -> _Reading:
    entries = list(_entries(log))
    samples = [SampleRead(entry["step"], *sample) for entry in entries for sample in entry["samples"]]
    start = next((entry["s"] for entry in entries if entry["step"] == first), 0.0)
    last = [entry for entry in entries if entry["s"] > start]
    seconds = max((entry["s"] for entry in last), default=0.0) - start
    rate = sum(entry["tokens"] for entry in last) / seconds if seconds > 0 else 0.0
    return _Reading(samples, start, rate)


def _problem(
    config: TrainConfig, found: list[SampleRead], reference: dict[int, SampleRead], steps: tuple[int, int]
) -> str | None:
    """What is wrong with the samples that the ranks have read together, in one sentence; None if nothing is."""
    plan = _loader(config, 0, 1).plan
    expected = {
        sample: step
        for step in range(steps[0], steps[1] + 1)
        for sample in range(plan[step].first_sample, plan[step].end_sample)
    }
    seen: dict[int, SampleRead] = {}
    for sample in found:
        if sample.sample in seen:
            steps_of = f"{seen[sample.sample].step} and {sample.step}"
            return f"sample {sample.sample} was read twice, in the steps {steps_of}"
        if expected.get(sample.sample) != sample.step:
            return f"sample {sample.sample} was read in step {sample.step}, it belongs to {expected.get(sample.sample)}"
        seen[sample.sample] = sample
    lost = sorted(expected.keys() - seen.keys())
    if lost:
        return f"{len(lost)} of {len(expected)} samples were not read, the first of them {lost[0]}"
    for number, sample in sorted(seen.items()):
        if reference and reference[number].digest != sample.digest:
            return f"sample {number} of step {sample.step} has another content than the first time"
    return None


def result_lines(checks: list[ReadingCheck], config: TrainConfig, n_ranks: int) -> list[str]:
    """A table of the checks and a conclusion, as lines of text."""
    lines = [f"{'reading':<36}{'first batch s':>14}{'tokens/s':>14}  result"]
    lines += [
        f"{check.name:<36}{check.first_batch_s:>14.2f}{check.tokens_per_second:>14,.0f}  {check.problem or 'the same'}"
        for check in checks
    ]
    wrong = [check for check in checks if check.problem]
    corpora = ", ".join(source.manifest for source in config.data.corpora())
    lines.append(
        f"FAILED: {len(wrong)} of {len(checks)} ways of reading are wrong; do not train on this"
        if wrong
        else f"passed: {corpora} is read alike in all {len(checks)} ways on {n_ranks} ranks; nothing lost or read twice"
    )
    return lines
