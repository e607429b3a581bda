"""The supervisor over real launchers and ranks; for its policy alone, over small commands that play a run.

The play commands are real processes that write the events of a run and end as they are told, without any training.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.checkpoint import folder as checkpoint_folder
from pretrain.errors import ConfigError
from pretrain.reliability.starts import Cause, Start, account, error_sentence, find_cause
from pretrain.reliability.stop import STOP_FILE
from pretrain.reliability.supervisor import Tail, run_dir_of
from support import ROOT
from support.gate import Gate
from support.supervised import CANARY, Supervised, deepspeed, processes, processes_of
from support.tiny import TinyCorpus, events, run_arguments
from support.training import assert_equals_undisturbed

PLAY = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
run_dir, plan = Path(sys.argv[1].removeprefix("run_dir=")), sys.argv[2:]
count = run_dir / "count"
number = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(number))
def write(name, **record):
    with (run_dir / name).open("a") as file:
        file.write(json.dumps({**record, "attempt": number}) + chr(10))
def event(name, **more):
    write("events.jsonl", event=name, **more)
def steps(first, last):
    for step in range(first, last + 1):
        write("metrics.jsonl", kind="step", step=step, step_time_s=2.0)
def save(step):
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "COMPLETE").touch()
def wait_for_stop():
    while not (run_dir / "stop").exists():
        time.sleep(0.02)
exec(plan[min(number, len(plan)) - 1])
"""


def play(run_dir: Path, *plan: str, options: tuple[str, ...] = ("--grace-s", "3")) -> Supervised:
    """A run that is only played: one piece of Python per attempt, the last one again and again."""
    return Supervised(run_dir, sys.executable, "-c", PLAY, f"run_dir={run_dir}", *plan, options=options)


FINISH = "event('finished', step=12)"
CRASH = "event('started'); sys.exit('ValueError: the moon is in the way')"


# --- policy, with played runs ---


def test_crash_then_finish(tmp_path: Path) -> None:
    first = "event('started'); steps(1, 6); save(4); sys.exit('ValueError: the moon is in the way')"
    second = "event('resumed', step=4); steps(5, 12); save(12); event('finished', step=12)"
    with play(tmp_path / "run", first, second) as run:
        assert run.wait() == 0
    one, two = run.attempts()
    assert (one["cause"], one["exit_code"], one["reason"]) == (
        "crash",
        1,
        "ValueError: the moon is in the way",
    )
    assert (one["first_step"], one["last_step"], one["run_attempts"]) == (1, 6, [1])
    assert (one["checkpoints_before"], one["checkpoints_after"], two["checkpoints_before"]) == ([], [4], [4])
    assert (two["cause"], two["exit_code"], two["first_step"], two["last_step"]) == ("finished", 0, 5, 12)
    assert one["lost_s"]["redone"] == 4.0  # steps 5 and 6, 2 s each
    assert one["lost_s"]["restart"] > 0
    assert two["lost_s"] == {"redone": 0.0, "detection": 0.0, "restart": 0.0}
    summary = json.loads((run.run_dir / "attempts/summary.json").read_text())
    assert summary["useful_s"] == 24.0
    assert summary["lost_s_by_cause"]["crash"]["redone"] == 4.0
    assert "the moon is in the way" in (run.run_dir / "attempts/001/output.log").read_text()
    assert "the moon is in the way" in run.text()  # passed through
    assert "Lost time by cause" in run.text()


def test_no_progress_ends_after_three_attempts(tmp_path: Path) -> None:
    with play(tmp_path / "run", CRASH) as run:
        assert run.wait() == 1
    assert run.causes() == ["crash"] * 3
    log = run.run_dir / "attempts/003/output.log"
    assert (
        "gave up after 3 attempts in a row without a newer checkpoint; the last one: crash: ValueError: "
        in run.text()
    )
    assert f"(log: {log})" in run.text()


def test_only_a_newer_checkpoint_is_progress(tmp_path: Path) -> None:
    """Steps that are lost again, and a checkpoint that was there already, are none."""
    plan = [
        "save(4); " + CRASH,
        CRASH,
        "save(8); " + CRASH,
        "steps(9, 11); " + CRASH,
        "save(8); " + CRASH,
        CRASH,
    ]
    with play(tmp_path / "run", *plan) as run:
        assert run.wait() == 1
    assert len(run.attempts()) == 6  # progress, none, progress, none, none, none


@pytest.mark.parametrize(("option", "count"), [("1", 1), ("2", 2)])
def test_number_of_attempts(tmp_path: Path, option: str, count: int) -> None:
    with play(tmp_path / "run", CRASH, options=("--attempts", option)) as run:
        assert run.wait() == 1
    assert len(run.attempts()) == count


def test_configuration_errors_are_not_tried_again(tmp_path: Path) -> None:
    with play(tmp_path / "run", "print('error: optim.lr=-1 must be positive'); sys.exit(2)") as run:
        assert run.wait() == 2
    assert run.causes() == ["configuration or input wrong"]
    assert "not tried again: error: optim.lr=-1 must be positive" in run.text()


@pytest.mark.parametrize(
    ("ending", "cause"),
    [
        ("pass", "launcher lost"),  # 0 without a word
        ("event('started'); os.kill(os.getpid(), signal.SIGKILL)", "killed"),
        ("event('started'); sys.exit(247)", "killed"),  # deepspeed's way to say SIGKILL
        ("event('started'); sys.exit(139)", "killed"),  # a shell's way to say SIGSEGV
        ("sys.exit('ImportError: no such thing')", "failed to start"),
        ("event('started'); raise MemoryError", "out of memory"),
        (
            "event('rank_failed', rank=1, host='a', cause='hang', reason='no step for 9 s'); sys.exit(247)",
            "hang",
        ),
        (
            "event('rank_failed', rank=1, host='a', cause='oom', reason='killed'); sys.exit(247)",
            "out of memory",
        ),
        ("event('stopped', step=4, reason='SIGTERM'); os.kill(os.getpid(), 9)", "launcher lost"),
        ("event('stopped', step=4, reason='SIGTERM')", "launcher lost"),
        # On another host: here the ranks' own exit code is what comes back.
        ("event('stopped', step=4, reason='loss of the launcher'); sys.exit(75)", "launcher lost"),
        (
            "sys.exit(151)",
            "failed to start",
        ),  # srun could not launch; 151 - 128 = 23 is SIGURG, which ends nothing
    ],
)
def test_causes_that_are_tried_again(tmp_path: Path, ending: str, cause: str) -> None:
    with play(tmp_path / "run", ending, FINISH) as run:
        assert run.wait() == 0
    assert run.causes() == [cause, "finished"]


def test_a_signal_to_the_launcher_asks_to_stop_even_if_its_ranks_only_see_it_go(tmp_path: Path) -> None:
    ending = "event('stopped', step=4, reason='loss of the launcher'); os.kill(os.getpid(), signal.SIGTERM)"
    with play(tmp_path / "run", ending) as run:
        assert run.wait() == 75
    assert "stopped by SIGTERM at step 4" in run.text()


@pytest.mark.parametrize("code", [75, 1, -signal.SIGTERM])
def test_a_stopped_run_is_not_started_again(tmp_path: Path, code: int) -> None:
    ending = f"sys.exit({code})" if code > 0 else f"os.kill(os.getpid(), {-code})"
    with play(tmp_path / "run", f"event('stopped', step=4, reason='file stop'); {ending}") as run:
        assert run.wait() == 75
    assert run.causes() == ["stopped on request"]


def test_a_run_that_stopped_early_is_not_started_again(tmp_path: Path) -> None:
    with play(tmp_path / "run", "event('finished', step=6, reason='stopped early: no gain')") as run:
        assert run.wait() == 0
    assert run.causes() == ["finished"]
    assert "finished at step 6 (stopped early: no gain)" in run.text()


def test_finished_counts_even_if_the_launcher_fails(tmp_path: Path) -> None:
    with play(tmp_path / "run", FINISH + "; sys.exit(1)") as run:
        assert run.wait() == 0


def test_events_of_earlier_attempts_do_not_count(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "events.jsonl").write_text('{"event": "finished", "attempt": 9}\n{"event": "fin')
    with play(run_dir, CRASH, options=("--attempts", "1")) as run:
        assert run.wait() == 1
    assert run.causes() == [
        "failed to start"
    ]  # the played run has continued the torn line, which a real one cuts off
    assert "gave up after 1 attempts" in run.text()
    assert "line 2 is no JSON" in run.text()
    assert "Traceback" not in run.text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_request_is_passed_on_until_it_is_heard(tmp_path: Path, number: signal.Signals) -> None:
    """The run removes the file once, as one that is just starting does."""
    plan = "event('started'); wait_for_stop(); (run_dir / 'stop').unlink(); wait_for_stop(); save(4);"
    plan += "event('stopped', step=4, reason='file stop'); sys.exit(75)"
    with play(tmp_path / "run", plan, options=("--grace-s", "30")) as run:
        run.wait_for(lambda: (run.run_dir / "events.jsonl").exists())
        run.process.send_signal(number)
        assert run.wait() == 75
    assert run.causes() == ["stopped on request"]
    assert f"stopped by {number.name} at step 4" in run.text()
    assert not (run.run_dir / "stop").exists()


def test_a_run_that_does_not_stop_is_killed_with_all_its_processes(tmp_path: Path) -> None:
    plan = "event('started'); subprocess.Popen(['setsid', 'sleep', '4711'], start_new_session=True); time.sleep(4711)"
    with play(tmp_path / "run", plan, options=("--grace-s", "1")) as run:
        run.wait_for(lambda: any(p.command.strip() == "sleep 4711" for p in processes()))
        run.process.terminate()
        assert run.wait() == 1
    assert run.causes() == ["stopped without saving"]
    assert not [p for p in processes() if p.command.strip() == "sleep 4711"]


def test_a_request_between_two_attempts(tmp_path: Path) -> None:
    with play(tmp_path / "run", CRASH, options=("--attempts", "9")) as run:
        run.wait_for(lambda: "attempt 3: crash" in run.text())  # a pause of 4 s follows
        run.process.terminate()
        assert run.wait() == 75
    assert len(run.attempts()) == 3


def test_orphans_may_save_before_the_next_attempt(tmp_path: Path) -> None:
    """The launcher dies, its rank saves: the next attempt must not begin before."""
    rank = "import sys, time; from pathlib import Path; run = Path(sys.argv[1])\\n"
    rank += "while not (run / 'stop').exists(): time.sleep(0.02)\\n"
    rank += "time.sleep(0.7); (run / 'saved').touch()"
    first = f'event("started"); subprocess.Popen([sys.executable, "-c", "{rank}", run_dir], start_new_session=True)'
    first += "; os.kill(os.getpid(), 9)"
    second = "assert (run_dir / 'saved').exists(); event('finished', step=1)"
    with play(tmp_path / "run", first, second, options=("--grace-s", "60")) as run:
        assert run.wait() == 0
    assert run.causes() == ["killed", "finished"]


def test_a_launcher_that_outlives_its_run_is_ended(tmp_path: Path) -> None:
    with play(tmp_path / "run", FINISH + "; time.sleep(4711)", options=("--grace-s", "1")) as run:
        assert run.wait(timeout_s=60) == 0


def test_a_failed_run_has_no_grace(tmp_path: Path) -> None:
    """Its launcher may wait for ranks that cannot end (DeepSpeed's for 30 s), but not for the grace time given here."""
    failing = "event('rank_failed', rank=1, host='a', cause='killed', reason='x'); time.sleep(4711)"
    with play(tmp_path / "run", failing, FINISH, options=("--grace-s", "4000")) as run:
        assert run.wait() == 0
    assert run.causes() == ["killed", "finished"]


def test_secrets_are_written_nowhere(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = ["env", "WANDB_API_KEY=canary-words", sys.executable, "-c", PLAY, f"run_dir={run_dir}", FINISH]
    with Supervised(run_dir, *command) as run:
        assert run.wait() == 0
    assert run.attempts()[0]["command"][1] == "WANDB_API_KEY=***"
    texts = [path.read_text() for path in run_dir.rglob("*") if path.is_file()] + [run.text()]
    assert not [text for text in texts if CANARY in text or "canary-words" in text]


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ([], "no command to supervise"),
        (["deepspeed", "launch/train.py"], "the command has no word run_dir=DIR"),
        (["no-such-launcher", "run_dir=x"], "no-such-launcher is no command that can be run"),
        (["deepspeed", "run_dir=${oc.env:HOME}"], "must be the path of a folder"),
        (["deepspeed", "run_dir=/dev/null/x"], "run_dir=/dev/null/x cannot be made"),
    ],
)
def test_what_a_user_can_get_wrong(tmp_path: Path, command: list[str], sentence: str) -> None:
    with Supervised(tmp_path / "run", *command) as run:
        assert run.wait() == 2
    assert run.text().startswith("error: ")
    assert sentence in run.text()
    assert run.text().count("\n") == 1


def test_two_supervisors_of_one_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with play(run_dir, "event('started'); wait_for_stop(); event('stopped', step=0); sys.exit(75)") as first:
        first.wait_for(lambda: (run_dir / "events.jsonl").exists())
        with play(run_dir, FINISH, options=("--grace-s", "0.5")) as second:
            assert second.wait() == 2
        assert "is held by another supervisor" in second.text()
        first.process.terminate()
        assert first.wait() == 75


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a", "run_dir=runs/x"], "runs/x"),
        (["run_dir='a b'"], "a b"),
        (['run_dir="a b"', "run_dir=c"], "c"),
        (["run_dir=7"], "7"),
        (["run_dir=实验/lr=3e-4 (1)"], "实验/lr=3e-4 (1)"),
        (["run_dir=~/runs/a"], str(Path.home() / "runs/a")),
    ],
)
def test_run_dir_is_read_as_the_run_reads_it(words: list[str], expected: str) -> None:
    assert run_dir_of(words) == Path(expected)


@pytest.mark.parametrize("word", ["run_dir=", "run_dir=${x}", "run_dir=~nobody-of-this-name/a"])
def test_a_run_dir_that_is_none(word: str) -> None:
    with pytest.raises(ConfigError):
        run_dir_of([word])


def test_tail_reads_whole_lines_from_now_on(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"tor')
    tail = Tail(path)
    assert tail.read() == []
    path.write_text('{"a": 1}\n{"a": 2}\nno json\n{"a"')  # the torn line was cut off
    assert tail.read() == [{"a": 2}]
    with path.open("a") as file:
        file.write(": 3}\n")
    assert tail.read() == [{"a": 3}]


def test_the_cause_is_said_by_the_one_who_has_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "step 1\nTraceback (most recent call last):\n  File x\n"
        "RuntimeError: [gloo/transport] Connection closed by peer [127.0.0.1]\n"
        "error: rank 1: shards/0.tar: member 3 has another hash\n"
        "subprocess.CalledProcessError: no\n"
    )
    assert error_sentence(log) == "error: rank 1: shards/0.tar: member 3 has another hash"
    assert error_sentence(tmp_path / "none") == ""
    cause, reason = find_cause(247, [{"event": "started"}], log, asked=None, oom_kills=1)
    assert (cause, reason) == (
        Cause.OUT_OF_MEMORY,
        "a process was killed by the kernel because memory ran out",
    )


def test_goodput_and_lost_time_add_up_to_the_wall_time(tmp_path: Path) -> None:
    """Durations by hand: nothing is counted twice, and a checkpoint that went bad undoes an older attempt's steps."""
    lines = []
    for attempt, first, last in ((1, 1, 10), (2, 9, 12), (3, 5, 20)):
        lines += [
            {"kind": "step", "step": s, "attempt": attempt, "step_time_s": 1.0}
            for s in range(first, last + 1)
        ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = {"command": [], "started": "", "last_step": 1, "first_step": 1}
    starts = [
        Start(
            number=1, cause=Cause.KILLED, run_attempts=[1], startup_s=7, detection_s=2, wall_s=19, **common
        ),
        Start(
            number=2,
            cause=Cause.HANG,
            run_attempts=[2],
            gap_before_s=1,
            startup_s=8,
            detection_s=3,
            wall_s=15,
            **common,
        ),
        Start(
            number=3,
            cause=Cause.FINISHED,
            run_attempts=[3],
            gap_before_s=1,
            startup_s=9,
            detection_s=2,
            wall_s=27,
            **common,
        ),
    ]
    summary = account(starts, tmp_path)
    assert starts[0].lost_s == {"redone": 6.0, "detection": 2, "restart": 9}  # steps 5 to 10
    assert starts[1].lost_s == {"redone": 4.0, "detection": 3, "restart": 10}  # steps 9 to 12
    assert summary["wall_s"] == 63
    assert summary["useful_s"] == 20.0  # steps 1 to 4 and 5 to 20
    lost = sum(sum(start.lost_s.values()) for start in starts)
    assert lost + summary["useful_s"] + starts[0].startup_s + starts[2].detection_s == summary["wall_s"]


def test_the_supervisor_needs_no_torch() -> None:
    heavy = "{'torch', 'deepspeed', 'numpy'}"
    code = f"import sys, pretrain.reliability.supervisor; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- real runs ---


def wait_until_asked_to_stop(run_dir: Path) -> None:
    """Wait for the stop file. Ranks that go on before it is there may finish the run first."""
    deadline = time.monotonic() + 60
    while not (run_dir / STOP_FILE).exists():
        assert time.monotonic() < deadline, "the supervisor has not asked the run to stop"
        time.sleep(0.02)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("victim", "causes"),
    [
        ("rank", {"killed"}),
        ("launcher", {"launcher lost"}),  # `deepspeed` returns 0 then
        # Long: for the supervisor, the launcher is lost as above.
        pytest.param("deepspeed", {"launcher lost"}, marks=pytest.mark.long),
        pytest.param("guard", {"launcher lost"}, marks=pytest.mark.long),
    ],
)
def test_killed_then_restarted_equals_the_undisturbed_run(
    corpus: TinyCorpus, straight: Path, tmp_path: Path, victim: str, causes: set[str]
) -> None:
    run_dir, gate = tmp_path / "run", Gate(tmp_path / "gate", "step-6")
    with Supervised(run_dir, *deepspeed(2, *run_arguments(corpus, run_dir)), env=gate.env) as run:
        run.wait_for(lambda: gate.reached("step-6"))
        os.kill(run.victim(victim, -1), signal.SIGKILL)
        if victim != "rank":
            wait_until_asked_to_stop(run_dir)
        gate.open("step-6")
        assert run.wait() == 0, run.text()
    assert run.causes()[0] in causes
    assert run.causes()[1:] == ["finished"]
    assert_equals_undisturbed(run_dir, straight)
    assert not processes_of(run_dir)
    text = "".join(path.read_text() for path in (run_dir / "attempts").rglob("*") if path.is_file())
    assert CANARY not in text


@pytest.mark.integration
def test_a_wrong_key_is_answered_once(corpus: TinyCorpus, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with Supervised(run_dir, *deepspeed(2, *run_arguments(corpus, run_dir, "optim.learning_rate=1"))) as run:
        assert run.wait() == 2
    assert run.causes() == ["configuration or input wrong"]
    assert "not tried again: error: optim.learning_rate is not a key" in run.text()


@pytest.mark.integration
def test_stop_request_to_the_supervisor_saves(corpus: TinyCorpus, straight: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command, gate = deepspeed(2, *run_arguments(corpus, run_dir)), Gate(tmp_path / "gate", "step-6")
    with Supervised(run_dir, *command, env=gate.env) as run:
        run.wait_for(lambda: gate.reached("step-6"))
        run.process.send_signal(signal.SIGUSR1)
        wait_until_asked_to_stop(run_dir)
        gate.open("step-6")
        assert run.wait() == 75, run.text()
    assert events(run_dir)[-1]["event"] == "stopped"
    with Supervised(run_dir, *command) as run:
        assert run.wait() == 0, run.text()
    assert run.causes() == ["stopped on request", "finished"]
    assert_equals_undisturbed(run_dir, straight)


@pytest.mark.integration
def test_a_killed_supervisor_leaves_a_run_that_saves_and_ends(
    corpus: TinyCorpus, straight: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    command, gate = deepspeed(2, *run_arguments(corpus, run_dir)), Gate(tmp_path / "gate", "step-6")
    with Supervised(run_dir, *command, env=gate.env) as run:
        run.wait_for(lambda: gate.reached("step-6"))
        # The first save imports what saves need. The launcher gives its ranks 30 s, which could pass over that.
        run.wait_for(lambda: checkpoint_folder.checkpoint_path(run_dir, 4).exists())
        run.process.kill()
        wait_until_asked_to_stop(run_dir)
        gate.open("step-6")
    with Supervised(run_dir, *command) as run:  # waits for the first to end
        assert run.wait() == 0, run.text()
    assert_equals_undisturbed(run_dir, straight)
    told = [
        event["event"] for event in events(run_dir) if event["event"] in ("started", "stopped", "resumed")
    ]
    assert told == ["started", "stopped", "resumed"]
    deadline = time.monotonic() + 20
    while processes_of(run_dir) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_of(run_dir)
