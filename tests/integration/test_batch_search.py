"""The search for the largest micro batch: the choice in plain numbers, and with real engines and memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.checkpoint import tensors as checkpoint
from pretrain.distributed import World
from pretrain.engine.micro_batch import LARGEST_STRIDE, Shape, _cgroup_left_bytes, earlier_result, next_probe
from pretrain.reliability.journal import read_metrics
from support.launching import run_ranks
from support.tiny import TinyCorpus, events, run_arguments
from support.training import assert_each_sample_once

TRAIN = "launch/train.py"
CASES = {1: ["0-fp32", "1-bf16", "2-fp32-offload"], 2: ["0-fp32", "1-fp32", "2-fp32", "3-bf16"]}


def search(
    shapes: dict[int, set[Shape]],
    size: dict[int, tuple[int, int]],
    at_rest: int,
    usable: int,
    noise: list[int],
) -> tuple[int | None, dict[Shape, int]]:
    """What is found where `size` gives (fixed, per sequence) bytes of each length, and everything measured."""
    measured: dict[Shape, int] = {}

    def measure(shape: Shape) -> None:
        assert shape not in measured
        fixed, each = size[shape.sequence_length]
        measured[shape] = at_rest + fixed + shape.sequences * each + noise[len(measured) % len(noise)]

    for length in size:
        measure(Shape(1, length))
    while (shape := next_probe(shapes, measured, at_rest, usable)) is not None:
        largest = max(n for n, length in measured if length == shape.sequence_length)
        assert shape.sequences <= LARGEST_STRIDE * largest
        measure(shape)
    fits = [c for c, needed in shapes.items() if all(measured.get(s, usable + 1) <= usable for s in needed)]
    return max(fits, default=None), measured


@st.composite
def runs(draw: st.DrawFn) -> tuple[dict[int, set[Shape]], dict[int, tuple[int, int]], int, int]:
    """Candidates of a rank's share, with one or two lengths; memory per length; at rest; what may be used."""
    share = draw(st.integers(1, 96))
    longer = draw(st.sampled_from([None, 2, 8]))
    lengths = [64] if longer is None else [64, 64 * longer]
    size = {length: (draw(st.integers(0, 3000)), draw(st.integers(1, 500))) for length in lengths}
    candidates = [c for c in range(1, share + 1) if share % c == 0]
    shapes = {c: {Shape(max(1, c * 64 // length), length) for length in lengths} for c in candidates}
    return shapes, size, draw(st.integers(0, 5000)), draw(st.integers(0, 60_000))


@given(runs())
@settings(max_examples=300, deadline=None)
def test_the_largest_that_fits_is_found_and_nothing_too_large_is_ever_tried(run) -> None:
    shapes, size, at_rest, usable = run
    found, measured = search(shapes, size, at_rest, usable, [0])

    def true_bytes(shape: Shape) -> int:
        fixed, each = size[shape.sequence_length]
        return at_rest + fixed + shape.sequences * each

    largest = max((c for c, needed in shapes.items() if max(map(true_bytes, needed)) <= usable), default=None)
    assert all(true_bytes(shape) <= usable for shape in measured if shape.sequences > 1)
    if found != largest:  # only where two sequences might not fit, as far as one can tell from one
        assert largest is not None
        assert any(
            2 * (fixed + each) + at_rest > usable or true_bytes(Shape(1, length)) > usable
            for length, (fixed, each) in size.items()
        )
        assert found is not None
        assert found < largest


@given(runs(), st.lists(st.integers(-2000, 2000), min_size=1, max_size=9))
@settings(max_examples=300, deadline=None)
def test_what_is_found_was_measured_to_fit_however_memory_behaves(run, noise: list[int]) -> None:
    shapes, size, at_rest, usable = run
    found, measured = search(shapes, size, at_rest, usable, noise)
    if found is None:
        assert any(size_ > usable for shape, size_ in measured.items() if shape.sequences == 1) or any(
            measured.get(shape, 0) > usable for shape in shapes[1]
        )
    else:
        assert all(measured[shape] <= usable for shape in shapes[found])


def test_a_number_once_found_is_kept_only_where_it_means_the_same() -> None:
    state = {"world_size": 2, "config": {"micro_batch_sequences": 8}, "micro_batch_found": True}
    two, four = (World(rank=0, size=n, local_rank=0, device=None) for n in (2, 4))  # type: ignore[arg-type]
    assert earlier_result(state, ["optim.lr: 1 -> 2"], two) is None
    assert earlier_result(state, ["logging.every_steps: 1 -> 2"], two) == 8
    assert earlier_result(state, [], four) is None
    assert earlier_result(state, ["engine.zero_stage: 1 -> 3"], two) is None
    assert earlier_result(state | {"micro_batch_found": False}, [], two) is None, "it was given by hand"


def test_the_tightest_control_group_counts(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("9:name=systemd:/\n4:memory:/job/step\n0::/other\n")
    for folder, files in {
        "memory/job": ("1000", "700", "inactive_file 1\ntotal_inactive_file 100\n"),
        "memory/job/step": ("9223372036854771712", "500", "inactive_file 0\ntotal_inactive_file 0\n"),
    }.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, text in zip(
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"), files, strict=True
        ):
            (tmp_path / folder / name).write_text(text)
    assert _cgroup_left_bytes(tmp_path, own) == 400
    (tmp_path / "other").mkdir()
    for name, text in {
        "memory.max": "450",
        "memory.current": "150",
        "memory.stat": "inactive_file 50\n",
    }.items():
        (tmp_path / "other" / name).write_text(text)
    assert _cgroup_left_bytes(tmp_path, own) == 350
    (tmp_path / "other" / "memory.max").write_text("max\n")
    assert _cgroup_left_bytes(tmp_path, own) == 400


# ---- real engines ----


@pytest.fixture(scope="module", params=CASES)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each rank has found, by case."""
    root, n_ranks = tmp_path_factory.mktemp("search"), request.param
    job = json.dumps({"cases": CASES[n_ranks], "out": str(root / "out")})
    run_ranks(n_ranks, "tests/support/workers/batch_search_worker.py", job, log_dir=root)
    return [json.loads((root / f"out-{rank}.json").read_text()) for rank in range(n_ranks)]


@pytest.mark.integration
def test_the_largest_micro_batch_that_fits_is_found_and_trains_as_if_it_had_been_given(
    found: list[dict],
) -> None:
    share = 16 // len(found)
    for case in CASES[len(found)]:
        first = found[0][case]
        assert first["free"]["micro_batch_sequences"] == share
        assert first["tight"]["micro_batch_sequences"] == share // 2, first["tight"]
        for result in (rank[case] for rank in found):
            assert result["tight"] | {"time_s": 0} == first["tight"] | {"time_s": 0}, "agreed on"
            assert result["refused"].startswith(
                "micro_batch_sequences=auto: one sequence of 256 tokens takes 0."
            )
            assert "model.activation_checkpointing=full" in result["refused"]
            assert result["searched"] == result["given"], (
                "losses, gradient norms, weights and moments, to the bit"
            )
            assert result["searched"]["updates"] == 2


@pytest.mark.integration
def test_a_run_finds_its_micro_batch_and_keeps_it(corpus: TinyCorpus, straight: Path, tmp_path: Path) -> None:
    arguments = [
        *run_arguments(corpus, tmp_path / "auto"),
        "micro_batch_sequences=auto",
        "data.loader_workers=0",
    ]
    run_ranks(2, TRAIN, *arguments, "stop_at_step=4", log_dir=tmp_path, expect=75)
    run_ranks(2, TRAIN, *arguments, log_dir=tmp_path)
    searches = [e for e in events(tmp_path / "auto") if e["event"] == "micro_batch_found"]
    assert [e["micro_batch_sequences"] for e in searches] == [4], "all of a rank's sequences, found once"
    resumed = next(e for e in events(tmp_path / "auto") if e["event"] == "resumed")
    assert resumed["config_changed"] == []
    state = checkpoint.read_state(checkpoint.checkpoint_path(tmp_path / "auto", 12))
    assert state["config"]["micro_batch_sequences"] == 4
    assert_each_sample_once(tmp_path / "auto")
    # bf16 sums of 2 x 2 sequences or of 4: seen 2e-3 after 12 steps.
    ours, theirs = ([r["loss"] for r in read_metrics(run)] for run in (tmp_path / "auto", straight))
    assert ours == pytest.approx(theirs, abs=0.02)
