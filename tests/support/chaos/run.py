"""Disturb real training at random moments and check that nothing is lost.

    python tests/support/chaos/run.py --kills 300 --seed 1

Trains a tiny model under the real launcher and the real supervisor, in run folders below --out. Processes of every kind
get signals at uniformly random moments of an attempt: startup, loading, training, saving, ending. After every resume,
the oracle (oracle.py) compares every step with an undisturbed run on the same number of ranks. --resize changes the
number of ranks between attempts instead; samples must then be exact, and losses agree within a tolerance.

The seed determines the plan; what a signal hits also depends on timing. The same command again continues the log and
adds the missing faults. Exit codes: 0 no violation, 1 violations.

A power cut is simulated by killing everything at once and truncating files under checkpoints/ to their synced length.
Lost directory entries, and losses in the run's journals, which are never synced, are not simulated.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from pretrain.reliability.json_lines import read_lines
from pretrain.reliability.starts import Cause
from pretrain.reliability.supervisor import Tail, complete_checkpoints
from support.chaos.faults import (
    Fault,
    choose,
    damage,
    expected_causes,
    forget_unsynced,
    harmless,
    kill_all,
    plan,
)
from support.chaos.oracle import Oracle, Reference, append, summarize
from support.supervised import Process, Supervised, below, deepspeed, kill_tree, processes_of, role
from support.tiny import TinyCorpus, make_corpus, run_arguments

N_STEPS = 60
SAVE_EVERY_STEPS = 5
FAULTS_PER_RUN = 6
"""Number of faults per run. After them the run is left alone, so that it finishes and can be compared."""
LIMIT_S = 240
"""An attempt counts as hung after this many seconds, counted from its start and again from a fault."""
GRACE_S = 60
ENDING_S = 1.5
"""Seconds that the last save and the end of the run add to the expected length of an attempt."""
ENOUGH = 5
"""Largest number of violations recorded per run, because the first one usually causes many more."""


class ShownEnough(Exception):
    """A negative control has shown a violation, as it must."""


class Chaos:
    """All runs of one invocation."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out: Path = options.out
        self.out.mkdir(parents=True, exist_ok=True)
        suffix = f"-{options.broken}" if options.broken else "-resize" if options.resize else ""
        self.log = self.out / f"log{suffix}.jsonl"
        self.suffix = suffix
        lines = read_lines(self.log)
        self.number = sum(line["type"] == "fault" for line in lines)
        self.n_runs = max((int(line["run"].split("-")[1]) for line in lines), default=0)
        self.violations = sum(line["type"] == "violation" for line in lines)
        self.first_number = self.number
        self.startup_s, self.step_s = 10.0, 0.15
        self.began = time.monotonic()
        self.run_name = ""
        self.run_violations = 0
        folder = self.out / "corpus"
        self.corpus = (
            TinyCorpus(folder) if (folder / "heldout/manifest.json").exists() else make_corpus(folder)
        )

    def complain(self, text: str) -> None:
        """Record a violation."""
        self.violations += 1
        self.run_violations += 1
        if self.run_violations > ENOUGH:
            return
        append(self.log, {"type": "violation", "run": self.run_name, "fault": self.number, "text": text})
        print(f"VIOLATION in {self.run_name} after fault {self.number}: {text}", flush=True)
        if self.options.broken and self.run_violations == ENOUGH:
            raise ShownEnough

    def arguments(self, run_dir: Path, n_ranks: int) -> list[str]:
        """The training command for this number of ranks."""
        more = [
            f"total_steps={N_STEPS}",
            f"checkpoint.every_steps={SAVE_EVERY_STEPS}",
            "checkpoint.keep_last=3",
            "checkpoint.keep_every_steps=25",
            "evaluation.every_steps=30",
            "logging.every_steps=20",
            f"global_batch_sequences={batch_sequences(n_ranks)}",
            "watchdog.startup_s=60",
            "watchdog.step_s=15",
            "watchdog.lost_s=10",
        ]
        return run_arguments(self.corpus, run_dir, *more)

    def environment(self, run_dir: Path, broken: str) -> dict[str, str]:
        """The environment of the run, with tests/support/chaos/shim/ first on Python's path."""
        return {
            "PYTHONPATH": str(ROOT / "tests/support/chaos/shim"),
            "CHAOS_BREAK": broken,
            "CHAOS_SYNCED": str(run_dir.with_suffix(".synced")),
            "TORCH_EXTENSIONS_DIR": str(self.out / "torch_extensions"),
            "WANDB_MODE": "offline",
        }

    def reference(self, n_ranks: int) -> Reference:
        """The undisturbed run, which is done once for each number of ranks."""
        run_dir = self.out / f"undisturbed-{n_ranks}"
        if not (run_dir / "attempts/summary.json").exists():
            shutil.rmtree(run_dir, ignore_errors=True)
            command = deepspeed(n_ranks, *self.arguments(run_dir, n_ranks))
            with Supervised(run_dir, *command, env=self.environment(run_dir, "")) as run:
                if (code := run.wait(LIMIT_S * 2)) != 0:
                    sys.exit(f"error: the undisturbed run ended with {code}; see {run.output}")
        [attempt] = [json.loads(path.read_text()) for path in run_dir.glob("attempts/*/attempt.json")]
        self.startup_s = attempt["startup_s"]
        self.step_s = (attempt["wall_s"] - attempt["startup_s"] - attempt["detection_s"]) / N_STEPS
        return Reference.read(run_dir, N_STEPS)

    def run(self) -> int:
        """Deliver all faults that are still missing. Returns the exit code."""
        ctypes.CDLL(None).prctl(
            36, 1, 0, 0, 0
        )  # PR_SET_CHILD_SUBREAPER: this process inherits the children of a killed supervisor
        sizes = self.options.ranks
        while self.number < self.options.kills:
            self.n_runs += 1
            self.run_name = f"run-{self.n_runs:03d}{self.suffix}"
            self.run_violations = 0
            n_ranks = sizes[self.n_runs % len(sizes)]
            with suppress(ShownEnough):
                Run(self, n_ranks, self.reference(sizes[0] if self.options.resize else n_ranks)).go()
            # Runs that fail by themselves never reach their fault.
            if self.violations >= 100 or self.n_runs >= 5 * (1 + self.options.kills):
                print("too many violations or runs; stopping")
                break
        append(self.log, {"type": "session", "run": "-0", "wall_s": time.monotonic() - self.began})
        report = summarize(self.log)
        print(report)
        (self.out / f"summary{self.suffix}.txt").write_text(report + "\n")
        return 1 if self.violations else 0

    def progress(self) -> str:
        """Number of faults so far, seconds per fault, and remaining time."""
        each = (time.monotonic() - self.began) / max(1, self.number - self.first_number)
        eta_s = each * (self.options.kills - self.number)
        return f"fault {self.number}/{self.options.kills}, {each:.1f} s each, ETA {eta_s / 60:.0f} min"


def batch_sequences(n_ranks: int) -> int:
    """A global batch size that is divisible by the number of ranks."""
    return 12 if n_ranks == 3 else 8


class Run:
    """One run folder: disturbed FAULTS_PER_RUN times, then left to finish and compared."""

    def __init__(self, chaos: Chaos, n_ranks: int, reference: Reference) -> None:
        self.chaos = chaos
        self.n_ranks = n_ranks
        self.run_dir = chaos.out / chaos.run_name
        for process in processes_of(self.run_dir):  # left by an invocation that was killed
            kill_tree(process.pid)
        shutil.rmtree(self.run_dir, ignore_errors=True)
        self.run_dir.with_suffix(".synced").unlink(missing_ok=True)
        self.oracle = Oracle(
            self.run_dir,
            reference,
            chaos.complain,
            save_interval_steps=SAVE_EVERY_STEPS,
            same_ranks=not chaos.options.resize,
        )
        self.supervised: Supervised | None = None
        self.n_faults = 0
        self.dead = False
        """Whether a violation has made it pointless to continue."""
        self.ended_at: float | None = None
        self.was_saved = False
        self.gave_up_after: list[int] = []
        self.seen: set[tuple[int, int]] = set()
        """(process id, start time) of every process of the previous attempt."""

    def go(self) -> None:
        """Disturb the run, then let it finish, and check it."""
        number = 0
        try:
            while not self.dead:
                number += 1
                code = Attempt(self, number).go()
                if code == 0:
                    break
        finally:
            self.end_supervisor()
        if self.dead:
            return
        self.oracle.finished(N_STEPS, batch_sequences(self.n_ranks))
        append(self.chaos.log, {"type": "run", "run": self.chaos.run_name, "ranks": self.n_ranks})
        if not self.chaos.run_violations:
            shutil.rmtree(self.run_dir)

    def supervise(self) -> Supervised:
        """The living supervisor. A new one is started if there is none."""
        if self.supervised is None:
            n_ranks = self.n_ranks
            if self.chaos.options.resize:
                n_ranks = random.Random(f"{self.chaos.options.seed}/{self.chaos.number}/ranks").choice(
                    [1, 2, 4]
                )
            self.supervised = Supervised(
                self.run_dir,
                *deepspeed(n_ranks, *self.chaos.arguments(self.run_dir, n_ranks)),
                options=("--grace-s", str(GRACE_S)),
                env=self.chaos.environment(self.run_dir, self.chaos.options.broken),
            )
        return self.supervised

    def end_supervisor(self) -> None:
        """Kill the supervisor and its descendants, and reap them."""
        if self.supervised is not None and self.supervised.process.poll() is None:
            self.supervised.process.kill()
            self.supervised.process.wait()
        self.supervised = None
        kill_all()


class Attempt:
    """One start of the launcher: its faults, its end, and the checks that follow."""

    def __init__(self, run: Run, number: int) -> None:
        self.run, self.chaos, self.oracle = run, run.chaos, run.oracle
        self.path = run.run_dir / f"attempts/{number:03d}/attempt.json"
        self.events_tail = Tail(run.run_dir / "events.jsonl")
        self.complete = complete_checkpoints(run.run_dir)
        self.events: list[dict] = []
        self.faults: list[dict] = []
        self.first_step_at: float | None = None
        self.supervisor_code: int | None = None
        self.members: set[tuple[int, int]] = set()
        """(process id, start time) of every process that was seen."""
        self.next_census = 0.0

    def go(self) -> int | None:
        """Start or find the attempt, disturb it, and check it. Returns the supervisor's exit code if that has ended."""
        supervised = self.run.supervise()
        limit = time.monotonic() + LIMIT_S
        if not self.wait(lambda: self.path.exists() or supervised.process.poll() is not None, limit):
            return self.fail("no new attempt began")
        if not self.path.exists():
            return self.fail(f"the supervisor ended with {supervised.process.returncode} before an attempt")
        self.began = time.monotonic()
        self.check_nothing_is_left()
        limit = self.began + LIMIT_S
        while self.run.n_faults < FAULTS_PER_RUN and self.chaos.number < self.chaos.options.kills:
            fault = plan(self.chaos.options.seed, self.chaos.number + 1, self.chaos.options.broken)
            if not self.wait_for_the_moment(fault) or self.deliver(fault):
                break
        if not self.wait(self.has_ended, limit + (LIMIT_S if self.faults else 0)):
            return self.fail("it hangs")
        self.ended_at = time.monotonic()
        if self.first_step_at is None and self.run.ended_at and self.ended_at - self.began > LIMIT_S:
            self.chaos.complain("no step within the limit")
        return self.check()

    def fail(self, text: str) -> None:
        """Give up this run and keep its folder."""
        output = self.run.supervised.text() if self.run.supervised else ""
        table = [f"{p.pid} {p.state} {p.command[:80]}" for p in below(os.getpid())]
        self.chaos.complain(f"{text}; processes: {table}; output: ...{output[-1500:]}")
        self.run.dead = True

    # ---- watching ------------------------------------------------------------------------------------------------

    def look(self) -> None:
        new = self.events_tail.read()
        self.events += new
        for event in new:
            if event["event"] in ("resumed", "started"):
                self.oracle.resumed(event.get("step", 0), self.complete, was_saved=self.run.was_saved)
            elif event["event"] == "checkpoint_saved":
                self.oracle.saved.add(event["step"])
                self.oracle.damaged.discard(event["step"])
            elif event["event"] == "checkpoint_skipped":
                self.oracle.skipped.add(event["step"])
        if self.oracle.look() and self.first_step_at is None:
            self.first_step_at = time.monotonic()
            self.chaos.startup_s = 0.5 * (self.chaos.startup_s + self.first_step_at - self.began)

    def wait(self, condition, deadline: float, poll_s: float = 0.03) -> bool:
        """Wait until the condition is true. Returns False if it is not by the deadline."""
        while not condition():
            if time.monotonic() > deadline:
                return False
            self.look()
            if time.monotonic() > self.next_census:
                self.members |= {(p.pid, p.started) for p in self.processes()}
                self.next_census = time.monotonic() + 0.5
            time.sleep(poll_s)
        self.look()
        return True

    def processes(self) -> list[Process]:
        """The processes of the attempt: all descendants of this process except the supervisor."""
        own = self.run.supervised.process.pid if self.run.supervised else 0
        return [process for process in below(os.getpid()) if process.pid != own]

    def has_ended(self) -> bool:
        supervised = self.run.supervised
        assert supervised is not None
        if supervised.process.poll() is not None and supervised.process.returncode < 0:
            return not self.processes()  # after its supervisor was killed, a run must end by itself
        with suppress(ValueError):
            return json.loads(self.path.read_text())["ended"] is not None
        return False

    def has_event(self, *names: str) -> bool:
        return any(event["event"] in names for event in self.events)

    def trained(self, step: int) -> bool:
        return self.has_event("started", "resumed") and self.oracle.reached >= step

    def phase(self) -> str:
        """The phase that the attempt is in."""
        if self.has_event("finished", "stopped", "rank_failed"):
            return "ending"
        if not self.events:
            return "start-up"
        if not self.has_event("started", "resumed"):
            return "loading"
        return "saving" if self.saving() else "training"

    def saving(self) -> bool:
        return any((self.run.run_dir / "checkpoints").glob(".*tmp*"))

    # ---- disturbing ----------------------------------------------------------------------------------------------

    def wait_for_the_moment(self, fault: Fault) -> bool:
        """Wait for the moment of a fault. Returns False if the attempt ends before it."""
        if fault.aim == "trained":
            steps = 2 * SAVE_EVERY_STEPS + 2

            def enough() -> bool:  # two saves have finished, which run in the background of training
                return self.trained(steps) and len(complete_checkpoints(self.run.run_dir)) >= 2

            self.wait(lambda: enough() or self.has_ended(), time.monotonic() + LIMIT_S)
            return not self.has_ended()
        first = max((step for step in self.complete if step not in self.oracle.damaged), default=0)
        train_s = 0 if fault.aim == "recovery" else (N_STEPS - first) * self.chaos.step_s + ENDING_S
        at_s = fault.moment * (self.chaos.startup_s + train_s)
        over = self.wait(self.has_ended, self.began + min(at_s, self.chaos.startup_s))
        if at_s > self.chaos.startup_s and not over:
            # After the first step, the moment is counted in steps. Their pace varies too much for a clock, and the
            # attempt must not end before its fault.
            steps, rest_s = divmod(at_s - self.chaos.startup_s, self.chaos.step_s)
            step = min(first + int(steps), N_STEPS)
            rest_s += max(0, first + int(steps) - N_STEPS) * self.chaos.step_s
            self.wait(lambda: self.trained(step) or self.has_ended(), time.monotonic() + LIMIT_S, 0.005)
            over = self.wait(self.has_ended, time.monotonic() + rest_s)
        at = time.monotonic()
        if fault.aim == "saving" and not over:
            over = self.wait(lambda: self.saving() or self.has_event("finished"), at + 20, 0.002)
            return over and not self.has_ended()
        if fault.aim == "loading" and not over:
            self.wait(lambda: bool(self.events) or self.has_ended(), at + 20, 0.002)
        return not self.has_ended()

    def deliver(self, fault: Fault) -> bool:
        """Send the signal. Returns False if the attempt continues unharmed and can take another fault."""
        supervised = self.run.supervised
        assert supervised is not None
        self.look()
        table = below(supervised.process.pid)
        by_role: dict[str, list[int]] = {}
        for process in table:
            by_role.setdefault(role(process, table), []).append(process.pid)
        victim, pid = choose(fault, by_role, supervised.process.pid)
        if victim is None:
            time.sleep(0.05)
            return False
        self.run.n_faults += 1
        self.chaos.number += 1
        record = {
            "type": "fault",
            "run": self.chaos.run_name,
            "fault": self.chaos.number,
            "ranks": self.run.n_ranks,
            "victim": victim,
            "phase": self.phase(),
            "in_recovery": self.run.ended_at is not None and self.first_step_at is None,
            "step": self.oracle.reached,
            "kind": fault.kind,
            "aim": fault.aim,
            "damage": None,
        }
        at = time.monotonic()
        if victim == "everything":
            record |= {"kind": "SIGKILL", "damage": self.cut_the_power(fault)}
        else:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.Signals[fault.kind])
        append(self.chaos.log, record)
        self.faults.append({**record, "at": at})
        print(
            f"{self.chaos.progress()}: {record['kind']} to {victim}, {record['phase']}, step {record['step']}"
            + (f", {record['damage']}" if record["damage"] else ""),
            flush=True,
        )
        return not harmless(record)

    def cut_the_power(self, fault: Fault) -> str | None:
        """Kill everything, drop what was not synced, and damage the newest checkpoint. Returns the damage."""
        assert self.run.supervised is not None
        self.run.supervised.process.kill()
        self.run.supervised.process.wait()
        kill_all()
        self.look()
        forget_unsynced(self.run.run_dir)
        good = [s for s in complete_checkpoints(self.run.run_dir) if s not in self.oracle.damaged]
        if fault.damage is None or len(good) < 2:
            return None
        damage(self.run.run_dir / f"checkpoints/step-{good[-1]:08d}", fault)
        self.oracle.damaged.add(good[-1])
        return fault.damage

    # ---- checking ------------------------------------------------------------------------------------------------

    def check_nothing_is_left(self) -> None:
        """Check that no process of the previous attempt still lives."""
        left = [p for p in below(os.getpid()) if (p.pid, p.started) in self.run.seen]
        if left:
            self.chaos.complain(f"two attempts at once: {[p.command[:80] for p in left]}")

    def check(self) -> int | None:
        """Check the cause, exit code and orphans, and note what the next attempt needs. Returns the exit code."""
        supervised, run = self.run.supervised, self.run
        assert supervised is not None
        attempt = json.loads(self.path.read_text())
        cause = attempt["cause"]
        code = self.exit_code(supervised, cause)
        if cause is not None:
            self.check_cause(cause, attempt["reason"])
        own = supervised.process.pid
        run.seen = {member for member in self.members if member[0] != own}
        run.was_saved = self.has_event("stopped")
        self.record(attempt)
        run.ended_at = self.ended_at
        if code is not None:
            left = self.processes()
            if left:
                self.chaos.complain(f"orphans: {[(p.pid, p.command[:80]) for p in left]}")
                kill_all()
            run.supervised = None
        self.check_progress(code, cause, attempt)
        return code

    def exit_code(self, supervised: Supervised, cause: str | None) -> int | None:
        """The supervisor's exit code if this attempt ends it."""
        if cause is None:
            return supervised.process.returncode
        last = cause in (Cause.FINISHED, Cause.STOPPED, Cause.UNSAVED_STOP, Cause.CONFIG_ERROR)
        following = self.path.parent.parent / f"{int(self.path.parent.name) + 1:03d}"
        deadline = time.monotonic() + LIMIT_S
        while supervised.process.poll() is None and not following.exists():
            if time.monotonic() > deadline:
                self.fail("the supervisor neither ends nor begins another attempt")
                return None
            time.sleep(0.03)
        code = supervised.process.poll()
        if last and code is None:
            self.chaos.complain(f"another attempt began after: {cause}")
        return code

    def check_progress(self, code: int | None, cause: str | None, attempt: dict) -> None:
        """Check that the exit code fits the cause, and that giving up fits the number of attempts without progress."""
        run = self.run
        before = max(attempt["checkpoints_before"], default=0)
        after = max(attempt["checkpoints_after"], default=0)
        run.gave_up_after = [] if after > before else [*run.gave_up_after, after]
        expected = {
            Cause.FINISHED: 0,
            Cause.STOPPED: 75,
            Cause.UNSAVED_STOP: 1,
            Cause.CONFIG_ERROR: 2,
            None: code,
        }
        if code is not None and cause in expected and code != expected[cause]:
            self.chaos.complain(f"exit code {code} after: {cause}")
        if code is not None and cause not in expected and (code != 1 or len(run.gave_up_after) < 3):
            self.chaos.complain(f"exit code {code} after {run.gave_up_after} without progress, cause {cause}")
        if code is not None:
            run.gave_up_after = []
        if cause == Cause.FINISHED and not self.has_event("finished"):
            self.chaos.complain("called finished without the run's word")

    def check_cause(self, cause: str, reason: str) -> None:
        allowed = {str(Cause.FINISHED)} if self.has_event("finished") else expected_causes(self.faults)
        if cause not in allowed:
            did = [(f["kind"], f["victim"], f["phase"]) for f in self.faults]
            self.chaos.complain(f"cause {cause!r} ({reason}) after {did}; expected one of {sorted(allowed)}")
            if not self.faults:
                self.run.dead = True  # it cannot continue even undisturbed

    def record(self, attempt: dict) -> None:
        run = self.run
        restart_s = None
        if run.ended_at is not None and self.first_step_at is not None:
            restart_s = self.first_step_at - run.ended_at
        detection_s = self.ended_at - self.faults[-1]["at"] if self.faults else None
        record = {
            "type": "attempt",
            "run": self.chaos.run_name,
            "number": attempt["number"],
            "cause": attempt["cause"] or "unwatched",
            "reason": attempt["reason"],
            "exit_code": attempt["exit_code"],
            "detection_s": detection_s,
            "restart_s": restart_s,
            "lost_steps": self.oracle.lost_steps,
            "faults": [fault["fault"] for fault in self.faults],
        }
        self.oracle.lost_steps = None
        append(self.chaos.log, record)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kills", type=int, required=True, help="faults to deliver, those of the log counted in"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[2], help="numbers of ranks, taken in turn (2)"
    )
    parser.add_argument("--resize", action="store_true", help="1, 2 or 4 ranks, another number at each start")
    parser.add_argument(
        "--out", type=Path, default=Path("chaos-out"), help="folder of runs and log (chaos-out)"
    )
    parser.add_argument("--break", dest="broken", default="", choices=["", "fsync", "hash", "loader"])
    options = parser.parse_args()
    options.out = options.out.resolve()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(1)
    )  # leaving this way ends the processes that it has started
    return Chaos(options).run()


if __name__ == "__main__":
    sys.exit(main())
