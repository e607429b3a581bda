"""launch/submit.py: the batch script it writes, what it refuses, and the script at work under a stand-in for Slurm.

The DeepSpeed launcher and the ranks are real; of Slurm there is what tests/slurm_stand_ins.py says.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import yaml

from pretrain.config import ClusterConfig, SubmitConfig, TrainConfig, load_config, run_command
from pretrain.errors import ConfigError
from pretrain.reliability.json_lines import JsonLines
from support import ROOT
from support.slurm_stand_ins import install, requests, start_batch
from support.tiny import TinyCorpus

SUBMIT = ROOT / "launch" / "submit.py"
ODD = 'o\'dd "run" #1 %j $HOME; é'


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return install(tmp_path_factory.mktemp("slurm"))


Submit = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def script_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("launch_submit", SUBMIT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def submit(
    script_module: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Submit:
    """`python launch/submit.py cluster=slurm ...` in the test's folder; in this process, which is quicker."""

    def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            patch.setattr(sys, "argv", [str(SUBMIT), "cluster=slurm", *arguments])
            for name, value in (env or {}).items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit) as ended:
                run_command(SubmitConfig, script_module.submit, config_name="submit")
        output = capfd.readouterr()
        return subprocess.CompletedProcess(
            list(arguments), int(ended.value.code or 0), output.out, output.err
        )

    return run


def a_run(corpus: TinyCorpus, *overrides: str, run_dir: str = "run") -> list[str]:
    defaults = ["total_steps=10", "data.sequence_length=64", "cluster.nodes=2", "cluster.gpus_per_node=4"]
    return [f"run_dir={run_dir}", f"data.manifest={corpus.manifest}", *defaults, *overrides]


def directives(script: str) -> dict[str, str | None]:
    """The options of the #SBATCH lines, read as Slurm 22.05 was seen to: bare, or in "..." with backslash escapes."""
    found: dict[str, str | None] = {}
    for line in script.splitlines():
        if line.startswith("#SBATCH "):
            value = r"""([^\\\s#"']+|"(?:\\.|[^\\"])*")"""
            read = re.fullmatch(rf"--([\w-]+)(?:={value})?", line.removeprefix("#SBATCH "))
            assert read is not None, line
            found[read[1]] = None if read[2] is None else re.sub(r"\\(.)", r"\1", read[2].strip('"'))
        elif line and not line.startswith("#"):
            break  # sbatch reads no further
    return found


def train_command(script: str) -> list[str]:
    """The words of the supervisor's command line."""
    command = script.rpartition("\n    exec ")[2].partition("\n) &")[0]
    return shlex.split(command.replace("\\\n", " "))


# ---- the script ----


def test_each_directive(submit: Submit, corpus: TinyCorpus, tmp_path: Path) -> None:
    cluster = "cpus_per_rank=3 partition=gpu account=lab qos=high constraint='a100&ib' exclude=[n1,n2]"
    limits = "time_limit=2-01:30:00 stop_before_end_s=120 memory_per_node_gib=64"
    overrides = [f"cluster.{override}" for override in (cluster + " " + limits).split()]
    done = submit(*a_run(corpus, *overrides, "dry_run=true"))
    assert done.returncode == 0, done.stderr
    expected = (
        f"job-name=run chdir={tmp_path} output={tmp_path}/run/submit/001/slurm-%j.out open-mode=append "
    )
    expected += (
        "time=2-01:30:00 signal=B:USR1@120 requeue export=ALL nodes=2 ntasks-per-node=1 cpus-per-task=12 "
    )
    expected += "gpus-per-node=4 mem=64G exclusive partition=gpu account=lab qos=high constraint=a100&ib exclude=n1,n2"
    pairs = (option.partition("=") for option in expected.split())
    assert directives(done.stdout) == {name: value or None for name, _, value in pairs}
    assert "nothing is written" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_is_left_out(submit: Submit, corpus: TinyCorpus, tmp_path: Path) -> None:
    cpu = ["cluster.gpus_per_node=0", "cluster.ranks_per_node=2", "cluster.exclusive=false"]
    script = submit(*a_run(corpus, *cpu, "cluster.job_name=mine", "dry_run=true")).stdout
    found = directives(script)
    assert not {"gpus-per-node", "exclusive", "partition", "account", "qos", "constraint", "exclude"} & set(
        found
    )
    assert (found["mem"], found["job-name"], found["cpus-per-task"]) == ("0", "mine", "16")
    assert "export DS_ACCELERATOR=cpu" in script
    assert "SOCKET_IFNAME" not in script
    assert "\n\n\n" not in script
    assert not re.search(r"@[A-Z_]+@", script)


def test_environment_and_setup_lines(submit: Submit, corpus: TinyCorpus, tmp_path: Path) -> None:
    script = submit(
        *a_run(
            corpus, "cluster.network_interface=ib0", "cluster.setup=['module load cuda','source /opt/x y']"
        ),
        *("cluster.python=/opt/my env/bin/python", "dry_run=true"),
    ).stdout
    assert "\nexport GLOO_SOCKET_IFNAME=ib0\n" in script
    assert '\nexport NCCL_SOCKET_IFNAME="=$GLOO_SOCKET_IFNAME"\n' in script
    assert "\nexport OMP_NUM_THREADS=8\n" in script
    assert "\n    module load cuda\n    source /opt/x y\n" in script
    assert "\n    export PATH='/opt/my env/bin':$PATH\n" in script
    assert re.search(r"^    exec '/opt/my env/bin/python' \S+/supervise\.py ", script, re.M)
    assert re.search(r"^    '/opt/my env/bin/python' -m deepspeed\.launcher\.launch ", script, re.M)


def test_the_training_command(submit: Submit, corpus: TinyCorpus, tmp_path: Path) -> None:
    """The same overrides without the cluster's; quoting survives the shell and Hydra."""
    overrides = ["optim.lr=1e-3", "logging.wandb_tags=[a b,'c,d']", "model=125m"]
    arguments = a_run(corpus, *overrides, "dry_run=true", run_dir=ODD)
    done = submit(*arguments)
    assert done.returncode == 0, done.stderr
    words = train_command(done.stdout)
    assert words[:2] == [sys.executable, f"{tmp_path}/{ODD}/submit/001/code/launch/supervise.py"]
    train = words[words.index("run_node") + 1 :]
    assert not [word for word in train if word.startswith(("cluster", "dry_run"))]
    assert train[-3:] == overrides
    config = load_config(TrainConfig, train, "config")
    assert config.run_dir == f"{tmp_path}/{ODD}"
    assert config.logging.wandb_tags == ["a b", "c,d"]
    assert config.model.n_layers == 12
    assert directives(done.stdout)["output"] == f"{tmp_path}/{ODD}/submit/001/slurm-%j.out".replace(
        "%j $", "%%j $"
    )
    assert directives(done.stdout)["job-name"] == ODD


def test_the_script_is_clean_shell(submit: Submit, corpus: TinyCorpus, tmp_path: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck is not None, (
        "shellcheck is missing; the tests need the environment that tests/run.sh makes"
    )
    odd = tmp_path / "odd.sbatch"
    odd.write_text(submit(*a_run(corpus, "dry_run=true", run_dir=ODD)).stdout)
    assert subprocess.run(["bash", "-n", str(odd)], check=False).returncode == 0
    for options in (
        [],
        ["cluster.preflight.enabled=false"],
        ["cluster.network_interface=ib0", "cluster.setup=['module load a']"],
    ):
        script = tmp_path / "train.sbatch"
        script.write_text(submit(*a_run(corpus, *options, "dry_run=true")).stdout)
        assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
        # SC2329: functions that only a trap or another shell calls
        found = subprocess.run(
            [shellcheck, "--exclude=SC2329", str(script)], capture_output=True, text=True, check=False
        )
        assert found.returncode == 0, found.stdout


def test_no_secret_in_what_is_printed_or_written(
    submit: Submit, corpus: TinyCorpus, tmp_path: Path, slurm: dict[str, str]
) -> None:
    canary = "canary0secret0" + "9" * 26
    env = slurm | {"WANDB_API_KEY": canary, "SOME_TOKEN": canary}
    dry = submit(*a_run(corpus, "dry_run=true"), env=env)
    done = submit(*a_run(corpus), env=env)
    assert done.returncode == dry.returncode == 0
    assert canary not in dry.stdout + dry.stderr + done.stdout + done.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10
    assert not [path for path in written if canary.encode() in path.read_bytes()]
    assert canary not in (Path(slurm["SLURM_LOG"]) / "sbatch").read_text()


# ---- what is refused ----


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("global_batch_sequences=36", ["global_batch_sequences=36", "micro_batch_sequences=4"]),
        ("data.manifest=nowhere/manifest.json", ["nowhere/manifest.json"]),
        ("data.sequence_length=48", ["data.sequence_length=48"]),
        ("init_from=nowhere", ["init_from=nowhere"]),
        ("stop_at_step=5", ["stop_at_step=5"]),
        ("optim.lr=-1", ["optim.lr=-1.0"]),
        ("optim.learning_rate=1", ["optim.learning_rate"]),
        ("cluster.node=3", ["cluster.node", "did you mean nodes?"]),
        ("cluster.time_limit=90", ["cluster.time_limit='90'", "hours:minutes:seconds"]),
        (
            "cluster.time_limit=0:05:00",
            ["cluster.stop_before_end_s=300", "cluster.time_limit=0:05:00"],
        ),
        ("cluster.gpus_per_node=0", ["set cluster.ranks_per_node"]),
        ("cluster.ranks_per_node=2", ["cluster.ranks_per_node=2", "one rank"]),
        ("cluster.nodes=0", ["cluster.nodes=0"]),
        ("cluster.partition='a\nb'", ["control character"]),
        ("run_dir=${HOME}/run", ["run_dir=${HOME}/run", "oc.env:NAME"]),
    ],
)
def test_a_mistake_is_named_before_anything_is_written(
    submit: Submit, corpus: TinyCorpus, tmp_path: Path, slurm: dict[str, str], override: str, named: list[str]
) -> None:
    done = submit(*a_run(corpus, override), env=slurm)
    assert done.returncode == 2, done.stderr
    assert [word for word in named if word not in done.stderr] == [], done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_share_sequences_are_on_one_node(
    submit: Submit, corpus: TinyCorpus, slurm: dict[str, str]
) -> None:
    more = ["engine=zero3_ulysses", "cluster.gpus_per_node=3", "global_batch_sequences=12"]
    done = submit(*a_run(corpus, *more), env=slurm)
    assert done.returncode == 2
    assert "engine.sequence_parallel_ranks=2 does not divide the 3 ranks of a node" in done.stderr


def test_without_slurm_one_sentence(corpus: TinyCorpus, tmp_path: Path) -> None:
    """As a process of its own."""
    done = subprocess.run(
        [sys.executable, str(SUBMIT), "cluster=slurm", *a_run(corpus)],
        cwd=tmp_path,
        env={**os.environ, "PATH": str(tmp_path / "empty")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: sbatch is not on PATH")
    assert "dry_run=true" in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("invalid partition specified: gpuu", "Slurm refuses cluster.partition=gpuu; "),
        (
            "Batch job submission failed: Unable to contact slurm controller (connect failure)",
            "the Slurm controller does not answer; ",
        ),
        (
            "resolve_ctls_from_dns_srv: res_nsearch error: Unknown host\n"
            "sbatch: fatal: Could not establish a configuration source",
            "the Slurm controller does not answer; ",
        ),
        (
            "Batch job submission failed: Invalid account or account/partition combination specified",
            "Slurm refuses cluster.account=None; ",
        ),
        ("Batch job submission failed: Requested time limit is invalid", "cluster.time_limit=24:00:00"),
        ("Batch job submission failed: Something new", "Slurm refuses the job: Something new\n"),
    ],
)
def test_a_refused_job_leaves_no_submission(
    text: str, said: str, submit: Submit, corpus: TinyCorpus, tmp_path: Path, slurm: dict[str, str]
) -> None:
    done = submit(*a_run(corpus, "cluster.partition=gpuu"), env=slurm | {"SBATCH_FAILS": text})
    assert done.returncode == 1
    assert said in done.stderr and "sbatch: " not in done.stderr
    assert done.stderr.count("\n") == 1
    assert list((tmp_path / "run" / "submit").iterdir()) == []


def test_time_limits() -> None:
    for text, seconds in (("24:00:00", 86400), ("2-01:30:05", 178205), ("0:10:00", 600)):
        assert ClusterConfig(time_limit=text).time_limit_s == seconds
    with pytest.raises(ConfigError, match="time_limit"):
        ClusterConfig(time_limit="1:60:00")
    assert ClusterConfig(nodes=3, gpus_per_node=8).world_size == 24
    assert ClusterConfig(nodes=3, gpus_per_node=0, ranks_per_node=2).world_size == 6


def test_submitting_takes_the_groups_of_training() -> None:
    """conf/submit.yaml and conf/selftest.yaml repeat the defaults of conf/config.yaml; they may not drift apart."""

    def groups(name: str) -> list[Any]:
        listed = yaml.safe_load((ROOT / "conf" / name).read_text())["defaults"]
        return [
            entry for entry in listed if entry != {"cluster": "slurm"} and not str(entry).endswith("_schema")
        ]

    assert groups("submit.yaml") == groups("config.yaml") == groups("selftest.yaml")
    overrides = ["run_dir=r", "data.manifest=m", "experiment=7b_cluster", "cluster.nodes=8"]
    config = load_config(SubmitConfig, overrides, "submit")
    assert config.grad_accum_steps(config.cluster.world_size) == 8
    assert config.checkpoint.keep_every_steps == 10000


# ---- submitted ----


def test_a_file_outside_conf_is_frozen_too(
    submit: Submit, corpus: TinyCorpus, tmp_path: Path, slurm: dict[str, str]
) -> None:
    own = tmp_path / "my run.yaml"
    own.write_text("optim:\n  lr: 1e-4\n")
    done = submit(*a_run(corpus, f"experiment={own}"), env=slurm)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run" / "submit" / "001"
    own.write_text("optim:\n  lr: 5\n")  # while the job waits
    words = train_command((folder / "train.sbatch").read_text())
    config = load_config(TrainConfig, words[words.index("run_node") + 1 :], "config")
    assert config.optim.lr == 1e-4
    assert f"experiment={folder}/own/experiment.yaml" in words


def test_code_and_configuration_are_frozen(
    submit: Submit, corpus: TinyCorpus, tmp_path: Path, slurm: dict[str, str]
) -> None:
    first = submit(*a_run(corpus, "optim.lr=7e-4"), env=slurm)
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "run" / "submit" / "001"
    assert "submitted job 4242" in first.stdout
    assert f"{folder}/slurm-4242.out" in first.stdout
    assert (Path(slurm["SLURM_LOG"]) / "sbatch").read_text().split() == [
        "--parsable",
        f"{folder}/train.sbatch",
    ]
    for source in [*ROOT.glob("pretrain/**/*.py"), *ROOT.glob("conf/**/*.yaml"), ROOT / "launch/train.py"]:
        assert (folder / "code" / source.relative_to(ROOT)).read_bytes() == source.read_bytes()
    assert not list(folder.rglob("__pycache__"))
    assert yaml.safe_load((folder / "config.yaml").read_text())["optim"]["lr"] == 7e-4
    identity = json.loads((folder / "code.json").read_text())
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert identity["commit"] == (head.stdout.strip() or None)
    assert (folder / "code.diff").exists()
    again = submit(*a_run(corpus), env=slurm)
    assert again.returncode == 0
    assert sorted(path.name for path in folder.parent.iterdir()) == ["001", "002"]


class Ending(NamedTuple):
    code: int
    circumstance: str
    expected: int
    asks: list[str]
    says: str


STUB = """
import os, signal, sys, time
asked = []
signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
print("listening", flush=True)
while os.environ.get("USR1") and not asked:
    time.sleep(0.02)
sys.exit(int(os.environ["CODE"]))
"""


@pytest.mark.parametrize(
    "case",
    [
        Ending(0, "", 0, [], "the run is finished"),
        Ending(2, "chain", 2, ["scancel 4243 4244"], "not tried again"),
        Ending(75, "usr1", 75, ["requeue 4242"], "requeued to go on"),
        Ending(75, "usr1 chain", 75, [], "the next job of the chain"),
        Ending(75, "usr1 scancel", 75, [], "Slurm has ended this start"),
        Ending(1, "chain scancel", 1, [], "Slurm has ended this start"),
        Ending(75, "", 75, [], "stopped on request"),
        Ending(75, "chain", 75, ["scancel 4243 4244"], "stopped on request"),
        Ending(1, "chain", 1, ["scancel 4243 4244"], "could not go on"),
        Ending(
            75,
            "usr1 failed node",
            75,
            ["requeue 4242", "update JobId=4242 ExcNodeList=n9,127.0.0.2"],
            "requeued to go on",
        ),
    ],
    ids=lambda case: f"{case.code} {case.circumstance}".strip(),
)
def test_what_an_exit_code_means(
    submit: Submit, corpus: TinyCorpus, tmp_path: Path, slurm: dict[str, str], case: Ending
) -> None:
    """A stand-in for the supervisor ends with a given code; the script is what is tested."""
    options = ["cluster.preflight.enabled=false", "cluster.exclude=[n9]"]
    options += ["cluster.chain_jobs=3"] if "chain" in case.circumstance else []
    done = submit(*a_run(corpus, *options, run_dir=ODD), env=slurm)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / ODD / "submit" / "001"
    (folder / "code" / "launch" / "supervise.py").write_text(STUB)
    variables = {"CODE": str(case.code), "SLURM_RESTART_COUNT": "3"}
    variables["JOB_STATE"] = "CANCELLED" if "scancel" in case.circumstance else "RUNNING"
    if "usr1" in case.circumstance:
        variables["USR1"] = "1"
    if "failed node" in case.circumstance:
        (folder / "nodes").write_text("n[1-2]\n")
        variables["DOWN_NODES"] = "127.0.0.2"
    process = start_batch(folder / "train.sbatch", slurm, **variables)
    if "usr1" in case.circumstance:
        assert process.stdout is not None
        assert process.stdout.readline() == "listening\n"
        process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == case.expected, output
    assert case.says in output
    assert requests(slurm) == case.asks


def test_a_finished_run_is_not_started_again(
    submit: Submit, corpus: TinyCorpus, tmp_path: Path, slurm: dict[str, str]
) -> None:
    """Later jobs of a chain, and late requeues, end at once; a run that was lengthened since goes on."""
    for total_steps, code in ((10, 0), (100, 7)):
        assert submit(*a_run(corpus, f"total_steps={total_steps}"), env=slurm).returncode == 0
        run_dir = tmp_path / "run"
        events = JsonLines(run_dir / "events.jsonl")
        events.append({"event": "finished", "attempt": 1, "step": 10, "reason": None})
        events.close()
        folder = sorted((run_dir / "submit").iterdir())[-1]
        (folder / "code" / "launch" / "supervise.py").write_text(STUB)
        (folder / "code" / "launch" / "preflight.py").write_text("")
        process = start_batch(folder / "train.sbatch", slurm, CODE="7")
        output, _ = process.communicate(timeout=30)
        assert process.returncode == code, output


JUDGE = """
import os, sys
if "judge=true" in sys.argv:
    print(os.environ["UNFIT"])
    sys.exit(int(os.environ["VERDICT"]))
"""


def test_unfit_nodes_are_named_to_slurm(
    submit: Submit, corpus: TinyCorpus, tmp_path: Path, slurm: dict[str, str]
) -> None:
    """A stand-in for the verdict. The third start with unfit nodes is the last; a new submission knows them."""
    assert submit(*a_run(corpus, "cluster.exclude=[n9]"), env=slurm).returncode == 0
    folder = tmp_path / "run" / "submit" / "001"
    (folder / "code" / "launch" / "preflight.py").write_text(JUDGE)
    (folder / "code" / "launch" / "supervise.py").write_text(STUB)
    seen = ["n9"]
    for name in ("n1", "n2", "n3"):
        process = start_batch(folder / "train.sbatch", slurm, UNFIT=name, VERDICT="10", CODE="0")
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 1, output
        seen.append(name)
        requeued = ["requeue 4242", f"update JobId=4242 ExcNodeList={','.join(seen)}"]
        assert requests(slurm) == (requeued if name != "n3" else [])
    assert "unfit nodes three times" in output
    process = start_batch(folder / "train.sbatch", slurm, UNFIT="", VERDICT="1", CODE="0")
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, requests(slurm)) == (1, [])
    process = start_batch(folder / "train.sbatch", slurm, UNFIT="", VERDICT="0", CODE="0")
    process.communicate(timeout=30)
    assert process.returncode == 0
    script = submit(*a_run(corpus, "cluster.exclude=[n9]", "dry_run=true")).stdout
    assert directives(script)["exclude"] == "n9,n1,n2,n3"


def test_a_chain_of_jobs(submit: Submit, corpus: TinyCorpus, tmp_path: Path, slurm: dict[str, str]) -> None:
    done = submit(*a_run(corpus, "cluster.chain_jobs=3"), env=slurm)
    assert "submitted job 4242" in done.stdout
    assert "jobs 4243 4244 continue" in done.stdout
    script = f"{tmp_path}/run/submit/001/train.sbatch"
    assert (Path(slurm["SLURM_LOG"]) / "sbatch").read_text().splitlines() == [
        f"--parsable {script}",
        f"--parsable --dependency=afterany:4242 {script}",
        f"--parsable --dependency=afterany:4243 {script}",
    ]
    assert (tmp_path / "run/submit/001/chain").read_text() == "4242\n4243\n4244\n"


PROBE = """
import json, os, sys, time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pretrain.config import TrainConfig, load_config
run_dir = Path(load_config(TrainConfig, sys.argv[1:], "config").run_dir)
names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "DS_ACCELERATOR"]
found = {name: os.environ.get(name) for name in names} | {"argv": sys.argv}
(run_dir / "stop").unlink(missing_ok=True)
(run_dir / f"probe-{os.environ['RANK']}.json").write_text(json.dumps(found))
deadline = time.monotonic() + 60
while not (run_dir / "stop").exists() and time.monotonic() < deadline:
    time.sleep(0.05)
time.sleep(float(os.environ["RANK"]) / 10)
if os.environ["RANK"] == "0":
    line = {"event": "stopped", "attempt": 1, "step": 3, "reason": "file stop"}
    (run_dir / "events.jsonl").write_text(json.dumps(line) + chr(10))
sys.exit(75)
"""


@pytest.mark.integration
def test_ranks_of_two_nodes_stop_when_slurm_asks(
    submit: Submit, corpus: TinyCorpus, tmp_path: Path, slurm: dict[str, str]
) -> None:
    """The real DeepSpeed launcher twice; USR1 to the batch script, the ranks end with 75, the job is requeued."""
    cpu = ["cluster.gpus_per_node=0", "cluster.ranks_per_node=2", "cluster.cpus_per_rank=1"]
    done = submit(*a_run(corpus, *cpu, "cluster.preflight.enabled=false", run_dir=ODD), env=slurm)
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / ODD
    folder = run_dir / "submit" / "001"
    (folder / "code" / "launch" / "train.py").write_text(PROBE)
    process = start_batch(folder / "train.sbatch", slurm, TMPDIR=str(tmp_path))
    deadline = time.monotonic() + 120
    while (
        len(list(run_dir.glob("probe-*.json"))) < 4 and process.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert requests(slurm) == ["requeue 4242"]
    assert (
        "--kill-on-bad-exit=0 --wait=30 bash -c run_node" in (Path(slurm["SLURM_LOG"]) / "srun").read_text()
    )
    probes = [json.loads((run_dir / f"probe-{rank}.json").read_text()) for rank in range(4)]
    words = train_command((folder / "train.sbatch").read_text())
    for rank, probe in enumerate(probes):
        assert probe.pop("argv")[1:] == words[words.index("run_node") + 1 :]
        assert probe == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % 2),
            "WORLD_SIZE": "4",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "24242",
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }
    assert not list(tmp_path.glob("torch_extensions*"))
