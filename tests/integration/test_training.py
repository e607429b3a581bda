"""Whole runs of launch/train.py in real processes: killed, stopped, resumed, resized, and fed what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from starlette.testclient import TestClient
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_tools.prepare import prepare
from data_tools.text import clean
from pretrain.checkpoint import tensors as checkpoint
from pretrain.config import TrainConfig, load_config
from pretrain.corpus.shards import Corpus, documents_of
from pretrain.data.loader import TrainLoader
from pretrain.generation.sampling import Sampling
from pretrain.generation.server import Served, build_app
from pretrain.generation.service import Service
from pretrain.generation.writer import Writer
from pretrain.reliability.journal import read_metrics
from pretrain.trained import TrainedModel, load_trained
from support import ROOT
from support.dialogues import chat_config, dialogues
from support.gate import Gate
from support.launching import Ranks, free_port, run_ranks
from support.preparing import write_jsonl
from support.tiny import GLOBAL_BATCH, TinyCorpus, events, make_corpus, run_arguments
from support.training import (
    N_STEPS,
    TRAIN,
    assert_each_sample_once,
    assert_equals_undisturbed,
    losses,
    samples_by_step,
    steps_done,
    wait_for,
)

pytestmark = pytest.mark.integration


def test_straight_run_learns_and_leaves_what_it_should(straight: Path) -> None:
    records = read_metrics(straight)
    assert [r["step"] for r in records] == list(range(1, N_STEPS + 1))
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    assert records[-1]["tokens_seen"] == N_STEPS * 512
    assert "heldout/bits_per_byte" in records[-1]
    assert [p.name for p in checkpoint.list_checkpoints(straight)] == [
        "step-00000004",
        "step-00000008",
        "step-00000012",
    ]
    assert all(checkpoint.verify(p) is None for p in checkpoint.list_checkpoints(straight))
    assert_each_sample_once(straight)
    assert not list(straight.rglob("*.tmp"))
    assert events(straight)[-1]["event"] == "finished"
    started = next(e for e in events(straight) if e["event"] == "started")
    # What `auto` chose on a CPU.
    assert started["kernels"] == {"attention": "flash", "compile": "never", "fp8": False, "liger": False}
    advice = [e for e in events(straight) if e["event"] == "checkpoint_interval_advised"]
    stall_s = next(e["stall_s"] for e in events(straight) if e["event"] == "checkpoint_saved")
    assert [e["interval_s"] for e in advice] == [pytest.approx((2 * stall_s * 25_000 * 3600) ** 0.5)]


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.long), 1])  # long: the other rank
def test_kill_9_mid_step_then_resume(corpus: TinyCorpus, straight: Path, tmp_path: Path, victim: int) -> None:
    run_dir = tmp_path / "run"
    arguments = run_arguments(corpus, run_dir)
    gate, place = Gate(tmp_path / "gate", f"step-{6 + victim}"), f"step-{6 + victim}"
    saved = checkpoint.checkpoint_path(run_dir, 4)
    with Ranks(2, TRAIN, *arguments, log_dir=tmp_path / "first", env=gate.env) as ranks:
        wait_for(lambda: gate.reached(place) and saved.exists(), ranks)
        ranks.processes[victim].kill()
        gate.open(place)
        codes = ranks.wait()
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] not in (0, 2, 75)
    run_ranks(2, TRAIN, *arguments, log_dir=tmp_path / "second")
    resumed = [e for e in events(run_dir) if e["event"] == "resumed"]
    assert [e["step"] for e in resumed] == [4]
    assert_equals_undisturbed(run_dir, straight)


def test_kill_9_mid_save_then_resume(corpus: TinyCorpus, straight: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = run_arguments(corpus, run_dir)
    temporary = run_dir / "checkpoints" / ".step-00000008.tmp"
    gate, place = Gate(tmp_path / "gate", "rename-step-00000008"), "rename-step-00000008"
    with Ranks(2, TRAIN, *arguments, log_dir=tmp_path / "first", env=gate.env) as ranks:
        wait_for(lambda: gate.reached(place, n_ranks=1), ranks)
        for process in ranks.processes:
            process.kill()
        ranks.wait()
    assert temporary.exists()  # killed while it was being written
    assert not checkpoint.checkpoint_path(run_dir, 8).exists()
    run_ranks(2, TRAIN, *arguments, log_dir=tmp_path / "second")
    assert [e["step"] for e in events(run_dir) if e["event"] == "resumed"] == [4]
    assert not temporary.exists()
    assert_equals_undisturbed(run_dir, straight)


def test_2_to_1_to_2_ranks(corpus: TinyCorpus, straight: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for ranks, stop in ((2, 4), (1, 8), (2, None)):
        arguments = run_arguments(corpus, run_dir, *([f"stop_at_step={stop}"] if stop else []))
        with Ranks(ranks, TRAIN, *arguments, log_dir=tmp_path / f"logs-{stop}") as processes:
            codes = processes.wait()
        assert codes == [75 if stop else 0] * ranks, processes.output()
    assert_each_sample_once(run_dir)
    assert samples_by_step(run_dir) == samples_by_step(straight)
    ours, theirs = read_metrics(run_dir), read_metrics(straight)
    assert losses(run_dir)[:4] == losses(straight)[:4]
    # Afterwards sums run in another order, in bf16; 8 steps carry that on. Seen: 2e-3.
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], abs=2e-2)


# long: the quickstart's test stops a run by the file
@pytest.mark.parametrize("request_by", ["SIGTERM", pytest.param("stop file", marks=pytest.mark.long)])
def test_stop_on_request_saves_and_exits_75(
    corpus: TinyCorpus, straight: Path, tmp_path: Path, request_by: str
) -> None:
    run_dir = tmp_path / "run"
    arguments = run_arguments(corpus, run_dir)
    gate = Gate(tmp_path / "gate", "step-6")
    with Ranks(2, TRAIN, *arguments, log_dir=tmp_path / "first", env=gate.env) as ranks:
        wait_for(lambda: gate.reached("step-6"), ranks)
        if request_by == "SIGTERM":
            ranks.processes[1].send_signal(signal.SIGTERM)  # one rank knows, all agree
        else:
            (run_dir / "stop").touch()
        gate.open("step-6")
        codes = ranks.wait()
    assert codes == [75, 75], ranks.output()
    stopped = events(run_dir)[-1]
    assert stopped["event"] == "stopped"
    assert checkpoint.find_latest(run_dir).path == checkpoint.checkpoint_path(run_dir, stopped["step"])
    run_ranks(2, TRAIN, *arguments, log_dir=tmp_path / "second")
    assert_equals_undisturbed(run_dir, straight)


def test_deepspeed_launcher_returns_our_exit_codes(
    corpus: TinyCorpus, straight: Path, tmp_path: Path
) -> None:
    """The command of the README: stop half way with 75, go on to 0, and the same run as ever."""
    run_dir = tmp_path / "run"
    codes = []
    for more in (["stop_at_step=6"], []):
        command = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), TRAIN]
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        result = subprocess.run(
            [*command, *run_arguments(corpus, run_dir, *more)],
            cwd=ROOT,
            env={**environment, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        codes.append(result.returncode)
    assert codes == [75, 0], result.stdout + result.stderr
    assert_equals_undisturbed(run_dir, straight)


def train_once(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, TRAIN, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def copy_of(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def last_error(result: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


def test_another_corpus_is_refused(straight: Path, tmp_path: Path) -> None:
    other = make_corpus(tmp_path / "other", vocab_size=500)
    result = train_once(run_arguments(other, copy_of(straight, tmp_path), "total_steps=13"))
    assert result.returncode == 2, result.stderr
    assert "the corpus changed" in last_error(result)


def test_another_model_or_seed_is_refused(corpus: TinyCorpus, straight: Path, tmp_path: Path) -> None:
    run_dir = copy_of(straight, tmp_path)
    result = train_once(run_arguments(corpus, run_dir, "total_steps=13", "model.n_layers=3", "seed=7"))
    assert result.returncode == 2, result.stderr
    assert "model.n_layers=3 (was 2)" in last_error(result)
    assert "seed=7 (was 1234)" in last_error(result)


def test_damaged_checkpoint_is_passed_over_with_its_reason(
    corpus: TinyCorpus, straight: Path, tmp_path: Path
) -> None:
    run_dir = copy_of(straight, tmp_path)
    newest = checkpoint.checkpoint_path(run_dir, 12)
    shard = sorted(newest.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    arguments = run_arguments(corpus, run_dir)
    run_ranks(2, TRAIN, *arguments, log_dir=tmp_path / "logs")
    told = [e for e in events(run_dir) if e["event"] == "checkpoint_passed_over"]
    assert f"step-00000012: {shard.name} differs" in told[0]["reason"]
    assert [e["step"] for e in events(run_dir) if e["event"] == "resumed"] == [8]
    assert_equals_undisturbed(run_dir, straight)


def test_a_stop_at_the_step_of_a_damaged_checkpoint_saves_anew(
    corpus: TinyCorpus, straight: Path, tmp_path: Path
) -> None:
    """A folder of that name is no proof of a saved state."""
    run_dir = copy_of(straight, tmp_path)
    for step in (8, 12):
        (checkpoint.checkpoint_path(run_dir, step) / "COMPLETE").unlink()
    with Ranks(
        2, TRAIN, *run_arguments(corpus, run_dir, "stop_at_step=8"), log_dir=tmp_path / "logs"
    ) as ranks:
        assert ranks.wait() == [75, 75], ranks.output()
    assert checkpoint.verify(checkpoint.checkpoint_path(run_dir, 8)) is None


def test_no_trustworthy_checkpoint_ends_the_run(corpus: TinyCorpus, straight: Path, tmp_path: Path) -> None:
    run_dir = copy_of(straight, tmp_path)
    for path in checkpoint.list_checkpoints(run_dir):
        (path / "COMPLETE").unlink()
    result = train_once(run_arguments(corpus, run_dir))
    assert result.returncode == 1
    assert "step-00000008: COMPLETE is missing" in last_error(result)


def test_second_run_in_the_same_folder_is_refused(corpus: TinyCorpus, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = run_arguments(corpus, run_dir, "total_steps=5000", "checkpoint.every_steps=5000")
    with Ranks(1, TRAIN, *arguments, log_dir=tmp_path / "first") as ranks:
        wait_for(lambda: steps_done(run_dir) >= 1, ranks)
        before = json.loads((run_dir / "run.json").read_text())
        result = train_once(arguments)
        assert result.returncode == 2, result.stderr
        assert "is in use by another run" in last_error(result)
        assert json.loads((run_dir / "run.json").read_text()) == before


def test_damaged_shard_ends_the_run_naming_the_member(corpus: TinyCorpus, tmp_path: Path) -> None:
    damaged = TinyCorpus(Path(shutil.copytree(corpus.folder, tmp_path / "corpus")))
    shard = next((damaged.folder / "shards").glob("*.tar"))
    content = bytearray(shard.read_bytes())
    for at in range(600, len(content), 1024):  # something in every member
        content[at] ^= 255
    shard.write_bytes(content)
    result = train_once(run_arguments(damaged, tmp_path / "run"))
    assert result.returncode == 1
    assert str(shard) in last_error(result)
    assert ".tok has xxh3-64" in last_error(result)


def test_the_rank_that_meets_a_damaged_chunk_says_so(corpus: TinyCorpus, tmp_path: Path) -> None:
    """With two lanes, rank 1 alone reads the second half of the batch: its error must not go under."""
    damaged = TinyCorpus(Path(shutil.copytree(corpus.folder, tmp_path / "corpus")))
    arguments = run_arguments(damaged, tmp_path / "run", "data.lanes=2", "checkpoint.every_steps=100")
    config = load_config(TrainConfig, arguments, "config")
    loaders = [
        TrainLoader(
            config.data,
            config.seed,
            global_batch_sequences=GLOBAL_BATCH,
            micro_batch_sequences=2,
            rank=rank,
            world_size=2,
            total_steps=N_STEPS,
            state=None,
        )
        for rank in (0, 1)
    ]
    first = [next(loader.steps(1)) for loader in loaders]
    chunks = [
        {int(c) for b in batches for c in loaders[0].order.locate(b.samples).chunk} for batches in first
    ]
    victim = min(chunks[1] - chunks[0])
    corpus_file = Corpus(damaged.manifest)
    shard, row = corpus_file._locate(victim)
    with shard.path.open("r+b") as file:
        file.seek(int(shard.index[row, 0, 0]) + 10)
        file.write(b"\xff\xff")
    with Ranks(2, TRAIN, *arguments, log_dir=tmp_path / "logs") as ranks:
        codes = ranks.wait()
    assert codes[1] == 1
    assert codes[0] != 0
    assert f"error: rank 1: {shard.path}: member {victim:06d}.tok has xxh3-64" in ranks.logs[1].read_text()


def test_full_disk_while_saving(corpus: TinyCorpus, straight: Path, tmp_path: Path) -> None:
    """A save that fails is reported and training goes on; the last one that must succeed ends the run with 1."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system of fixed size needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    # Room for the run's small files and one checkpoint of about 1.5 MB, not for two.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2560k", "tmpfs", str(disk)], check=True)
    try:
        run_dir = disk / "run"
        result = train_once(run_arguments(corpus, run_dir, "micro_batch_sequences=8"))
        assert result.returncode == 1, result.stderr
        assert "No space left on device" in last_error(result)
        failed = [e for e in events(run_dir) if e["event"] == "checkpoint_failed"]
        assert [e["step"] for e in failed] == [8, 12]
        assert [p.name for p in checkpoint.list_checkpoints(run_dir)] == ["step-00000004"]
        assert checkpoint.verify(checkpoint.checkpoint_path(run_dir, 4)) is None
        assert not list((run_dir / "checkpoints").glob(".*.tmp"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_weights_only_start(corpus: TinyCorpus, straight: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = run_arguments(corpus, run_dir, "total_steps=1", "schedule=constant", f"init_from={straight}")
    result = train_once(arguments)
    assert result.returncode == 0, result.stderr
    first = read_metrics(run_dir)[0]["loss"]
    assert first < read_metrics(straight)[-1]["loss"] + 0.3
    assert first < read_metrics(straight)[0]["loss"] - 0.3


def test_dialogues_fine_tune_a_run(corpus: TinyCorpus, straight: Path, tmp_path: Path) -> None:
    """On 2 ranks, mixed with ordinary text; on held-out answers the loss falls below that of the run it began with."""
    source = write_jsonl(tmp_path / "talks.jsonl", dialogues(200))
    talks = TinyCorpus(tmp_path / "talks")
    model = corpus.folder / "tokenizer.model"
    packed = {"chat.max_tokens": 128, "chunk_tokens": 1024}
    assert prepare(chat_config(talks.folder, source, model=model, **packed)) == 0
    run_dir = tmp_path / "run"
    arguments = [a for a in run_arguments(talks, run_dir) if not a.startswith("data.manifest=")]
    sources = f"[{{name: talks, manifest: {talks.manifest}, weight: 3}}, {{name: code, manifest: {corpus.manifest}}}]"
    arguments += [f"data.sources={sources}", f"init_from={straight}", "evaluation.max_sequences=null"]
    arguments += ["data.sequence_length=128"]
    run_ranks(2, TRAIN, *arguments, log_dir=tmp_path / "logs")

    def answers(run: Path) -> dict[str, float]:
        command = [
            sys.executable,
            "launch/eval.py",
            f"run_dir={run}",
            f"input=[{talks.heldout}]",
            "json=true",
        ]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    before, after = answers(straight), answers(run_dir)
    assert after["loss"] < before["loss"] - 0.3
    heldout = Corpus(talks.heldout)
    n_targets = sum(int(document.is_target.sum()) for document in documents_of(heldout))
    assert before["tokens"] == after["tokens"] == n_targets
    assert read_metrics(run_dir)[-1]["heldout/tokens"] == n_targets, "no dialogue is cut"
    assert_is_served(load_trained(run_dir))


def assert_is_served(trained: TrainedModel) -> None:
    """The server answers with what the model writes after the prompt in the form of its training."""
    turns = [{"role": "user", "content": "What is a shard?"}]
    chat = trained.chat()
    model = trained.decoder(torch.device("cpu"), torch.float32)
    writer = Writer(model, trained.tokenizer, sampling=Sampling(temperature=0), max_new_tokens=8, chat=chat)
    service = Service(model, trained.tokenizer, batch_sequences=1, max_waiting=1)
    served = Served(
        name="chat",
        tokenizer=trained.tokenizer,
        context_tokens=trained.sequence_length,
        max_new_tokens=8,
        clean=clean,
        chat=chat,
    )
    client = TestClient(build_app(service, served, ["testserver"]))
    body = {"messages": turns, "temperature": 0, "max_tokens": 8}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    (expected,) = writer.write([writer.answer_to(turns)])
    assert answer.json()["choices"][0]["message"]["content"] == expected.text
    assert answer.json()["usage"]["prompt_tokens"] == len(chat.encode_prompt(turns))
    service.close()
    chat.close()


def test_a_trained_run_is_evaluated_exported_and_generates(
    corpus: TinyCorpus, straight: Path, tmp_path: Path
) -> None:
    """Every script that reads a run, on a run that ZeRO-3 trained on two ranks."""

    def script(name: str, *arguments: str) -> str:
        command = [sys.executable, f"launch/{name}.py", f"run_dir={straight}", *arguments]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    scores = json.loads(script("eval", f"input=[{corpus.heldout}]", "json=true").splitlines()[-1])
    assert scores["step"] == N_STEPS
    in_training = read_metrics(straight)[-1]["heldout/loss"]  # the first 16 sequences only, cut apart
    assert scores["loss"] == pytest.approx(in_training, abs=0.5)

    script("export", f"output={tmp_path / 'export'}", "dtype=fp32")
    text = script("generate", "prompt=import ", "max_new_tokens=8", "temperature=0")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    prompt = tokenizer("import ", return_tensors="pt")
    theirs = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(theirs[0], skip_special_tokens=True).strip() in text
