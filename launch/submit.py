"""Send a training run to a cluster: `python launch/submit.py cluster=slurm run_dir=DIR data.manifest=... model=1b ...`

All keys of launch/train.py are accepted, and cluster.nodes, cluster.gpus_per_node, cluster.time_limit and so on. This
command checks the whole configuration on the login node, copies the code and the configuration into run_dir/submit/,
writes the batch script there, and submits it. `dry_run=true` prints the script and writes nothing. Submitting the same
command again resumes from the run's newest good checkpoint. docs/slurm.md explains the script line by line.
"""

import base64
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run as a script
    sys.path.insert(0, str(ROOT))

from pretrain.command import begin

begin(__name__)

from omegaconf import OmegaConf

import data_tools
import pretrain
from pretrain.config import ClusterConfig, SubmitConfig, run_command, to_dict
from pretrain.config.load import CONF_DIR
from pretrain.config.words.arguments import is_own_file, path_in
from pretrain.errors import ConfigError, RunError
from pretrain.files import refuse_links
from pretrain.printing import visible
from pretrain.redaction import redact_command
from pretrain.reliability.events import EVENTS_FILE, finished_pattern
from pretrain.reliability.run_lock import LINK_ADVICE, WANDB_STARTS

TEMPLATE = Path(__file__).resolve().parent / "templates" / "train.sbatch"
PREFLIGHT = TEMPLATE.with_name("preflight.sbatch")
CODE_FOLDERS = {
    "pretrain": Path(pretrain.__path__[0]),
    "data_tools": Path(data_tools.__path__[0]),
    "launch": Path(__file__).resolve().parent,
    "conf": CONF_DIR,
}
"""Folders that a job runs from. In an installed package, the last two are inside the package."""
DIRECTIVES = """\
#SBATCH --job-name={name}
# Relative paths in the configuration are relative to the folder where it was submitted.
#SBATCH --chdir={cwd}
# All starts of the job write to one log.
#SBATCH --output={log}
#SBATCH --open-mode=append
#SBATCH --time={time}
# There is one task per node, the launcher. It starts the node's ranks and gets the cores of all of them.
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={cpus}
#SBATCH --mem={memory}
# Slurm sends USR1 to this script only (B:), early enough before the time limit that the run can save.
#SBATCH --signal=B:USR1@{stop_before_end_s}
# After a preemption or a node failure the job starts again and resumes from its newest good checkpoint.
#SBATCH --requeue
# The job gets the environment of the submission, including WANDB_API_KEY, so this file needs no secret.
#SBATCH --export=ALL
"""

REFUSALS = {
    r"contact slurm controller|slurmctld|configuration source|controller_addr": "the Slurm controller does not answer; "
    "submit on a login node where `sinfo` works, or use dry_run=true to see the script",
    r"accounting/qos policy": "Slurm refuses the job because of a limit of your account or QOS; `squeue --me` shows "
    "what you have submitted",
    r"account": "Slurm refuses cluster.account={cluster.account}; `sacctmgr show associations user=$USER` lists yours",
    r"partition": "Slurm refuses cluster.partition={cluster.partition}; `sinfo` lists the partitions",
    r"qos": "Slurm refuses cluster.qos={cluster.qos}",
    r"time limit": "Slurm refuses cluster.time_limit={cluster.time_limit}; `sinfo --format='%P %l'` shows the limits",
    r"node name": "Slurm does not know a node of cluster.exclude={cluster.exclude}",
    r"feature": "Slurm refuses cluster.constraint={cluster.constraint}; `sinfo --format='%P %f'` lists the features",
    r"memory": "no node has the memory of cluster.memory_per_node_gib={cluster.memory_per_node_gib}",
    r"node configuration|node count|gres|cpu count": "no nodes of the cluster fit cluster.nodes={cluster.nodes}, "
    "cluster.gpus_per_node={cluster.gpus_per_node} and cluster.cpus_per_rank={cluster.cpus_per_rank}",
}
"""What to say for a reason of sbatch, by a pattern of its text; the first that is found counts."""

RECHECK = """\
    # Long before Slurm gives up on a node that died, a command cannot be started there.
    if [ -n "$asked" ] || preflight "$start-after"; then end_chain; fi"""


def submit(config: SubmitConfig) -> None:
    """Check the configuration, copy the code, write the script and submit it; with `dry_run` only check and print."""
    _check(config)
    run_dir = Path(config.run_dir).absolute()
    refuse_links(run_dir, run_dir, LINK_ADVICE, leave_out=WANDB_STARTS)
    folder = _next_folder(run_dir / "submit")
    overrides = _train_overrides(sys.argv[1:], config, folder)
    script = batch_script(config, overrides, folder)
    if config.dry_run:
        print(visible(script, keep="\n\t"), end="")
        print(f"dry run: nothing is written; this would be {folder / 'train.sbatch'}", file=sys.stderr)
        return
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch is not on PATH, so there is no Slurm to submit to; run this on a login node of the cluster, "
            "or use dry_run=true to see the script"
        )
    folder.mkdir(parents=True)
    try:
        _freeze(config, folder)
        (folder / "train.sbatch").write_text(script, encoding="utf-8")
        jobs = _submit_chain(config.cluster, folder)
    except BaseException:
        shutil.rmtree(folder)  # every folder here must belong to a submitted job
        raise
    print(visible(f"submitted job {jobs[0]}; its log is {folder}/slurm-{jobs[0]}.out"))
    if len(jobs) > 1:
        print(f"jobs {visible(' '.join(jobs[1:]))} continue the run after it, one after the other")
    print(f"to stop it with its state saved: touch {shlex.quote(str(folder.parent.parent / 'stop'))}")


def batch_script(config: SubmitConfig, overrides: list[str], folder: Path) -> str:
    """The sbatch script for a checked configuration.

    `overrides` are the Hydra overrides for launch/train.py, and `folder` is the folder of this submission.
    """
    cluster = config.cluster
    ranks = cluster.world_size // cluster.nodes
    python = cluster.python or sys.executable
    world = {f"node{i}": list(range(ranks)) for i in range(cluster.nodes)}
    setup = [
        "    # These lines are from cluster.setup.",
        *(f"    {line}" for text in cluster.setup for line in text.splitlines()),
    ]
    checks = cluster.preflight
    values = {
        "DIRECTIVES": _directives(config, folder),
        "RUN_DIR": shlex.quote(str(folder.parent.parent)),
        "SUBMISSION": shlex.quote(str(folder)),
        "ENVIRONMENT": "\n".join(_environment(cluster)),
        "SETUP": "\n".join(setup if cluster.setup else []),
        "WORLD": json.dumps({"node0": world["node0"]})[:-1] + (", ...}" if cluster.nodes > 1 else "}"),
        "BIN": shlex.quote(str(Path(python).parent)),
        "PYTHON": shlex.quote(python),
        "CODE": shlex.quote(str(folder / "code" / "launch")),
        "WORLD_INFO": base64.urlsafe_b64encode(json.dumps(world).encode()).decode(),
        "OVERRIDES": _words(overrides),
        "FINISHED": shlex.quote(finished_pattern(config.n_steps)),
        "EVENTS_FILE": EVENTS_FILE,
        "EXCLUDE": " ".join(shlex.quote(node) for node in cluster.exclude),
        "NODES": str(cluster.nodes),
        "CPUS_PER_NODE": str(ranks * cluster.cpus_per_rank),
        "GRACE_S": str(cluster.stop_before_end_s),
        "PREFLIGHT": PREFLIGHT.read_text(encoding="utf-8").rstrip() if checks.enabled else "",
        "RECHECK": RECHECK if checks.enabled else "    end_chain",
        "CHECKS": _words(_checks(config, folder)),
        "WAIT_S": str(4 * checks.check_timeout_s),
        "PREFLIGHT_MINUTES": str(-(-10 * checks.check_timeout_s // 60)),
    }
    text = TEMPLATE.read_text(encoding="utf-8").replace("@PREFLIGHT@", values["PREFLIGHT"])
    text = re.sub(r"@([A-Z_]+)@", lambda match: values[match[1]], text)
    return re.sub(r"\n{3,}", "\n\n", text)


def _words(words: list[str]) -> str:
    """Quoted words of a command, one per line of the script."""
    return " \\\n        ".join(shlex.quote(word) for word in words)


def _environment(cluster: ClusterConfig) -> list[str]:
    """Script lines that set environment variables of all ranks."""
    lines = [
        "# Each rank uses its share of the cores. Without this it would start one thread per core of the node.",
        f"export OMP_NUM_THREADS={cluster.cpus_per_rank}",
    ]
    if cluster.gpus_per_node == 0:
        lines += [
            "# The nodes have no GPUs, so DeepSpeed must not look for any.",
            "export DS_ACCELERATOR=cpu",
        ]
    if cluster.network_interface is not None:
        lines += [
            "# The network interface that connects the ranks. With = NCCL takes the exact name and not a prefix.",
            f"export GLOO_SOCKET_IFNAME={shlex.quote(cluster.network_interface)}",
            'export NCCL_SOCKET_IFNAME="=$GLOO_SOCKET_IFNAME"',
        ]
    return lines


def _checks(config: SubmitConfig, folder: Path) -> list[str]:
    """The overrides for launch/preflight.py that are known at submission."""
    cluster = config.cluster
    limits = {f.name: getattr(cluster.preflight, f.name) for f in fields(cluster.preflight)}
    known = {
        "folder": folder / "preflight",
        "run_dir": folder.parent.parent,
        "gpus_per_node": cluster.gpus_per_node,
        "network_interface": cluster.network_interface or "null",
    }
    del limits["enabled"]
    return [f"{name}={value}" for name, value in (known | limits).items()]


def _directives(config: SubmitConfig, folder: Path) -> str:
    cluster = config.cluster
    memory = cluster.memory_per_node_gib
    text = DIRECTIVES.format(
        name=_sbatch_value(cluster.job_name or folder.parent.parent.name),
        cwd=_sbatch_value(str(Path.cwd())),
        log=_sbatch_value(str(folder).replace("%", "%%") + "/slurm-%j.out"),
        time=cluster.time_limit,
        nodes=cluster.nodes,
        cpus=cluster.world_size // cluster.nodes * cluster.cpus_per_rank,
        memory=0 if memory is None else f"{memory}G",
        stop_before_end_s=cluster.stop_before_end_s,
    )
    options = {
        "gpus-per-node": cluster.gpus_per_node or None,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "exclude": ",".join(dict.fromkeys([*cluster.exclude, *_failed_nodes(folder.parent)])) or None,
    }
    if cluster.exclusive:
        text += "# The launcher numbers a node's GPUs from 0, so no other job may use any of them.\n"
        text += "#SBATCH --exclusive\n"
    for option, value in options.items():
        if value is not None:
            text += f"#SBATCH --{option}={_sbatch_value(str(value))}\n"
    return text.rstrip("\n")


def _failed_nodes(submissions: Path) -> list[str]:
    """Nodes that earlier jobs of this run have found unfit or have lost."""
    path = submissions / "excluded_nodes"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [line.split()[0] for line in lines if line.strip()]


def _sbatch_value(text: str) -> str:
    """A value for an #SBATCH line. sbatch supports backslash escapes only in double quotes, and no escaped spaces."""
    if re.search(r"[\x00-\x1f\x7f]", text):
        raise ConfigError(
            f"{text!r} has a control character, which a line of a batch script cannot hold; rename it"
        )
    if re.fullmatch(r"[\w@%+=:,./-]+", text):
        return text
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def _train_overrides(arguments: list[str], config: SubmitConfig, folder: Path) -> list[str]:
    """The arguments for launch/train.py: the given ones without those of the cluster, and with an absolute run_dir.

    Files of the configuration that are not in conf/ are those that `_freeze` copies.
    """
    own = _own_files(arguments, folder)
    kept = []
    for argument in arguments:
        if argument in own:
            kept.append(f"{argument.partition('=')[0]}={own[argument][1]}")
            continue
        key = argument.lstrip("+~").split("=")[0].split("@")[0]
        if key.split(".")[0] not in ("cluster", "dry_run", "run_dir"):
            kept.append(argument)
    return [f"run_dir={Path(config.run_dir).absolute()}", *kept]


def _check(config: SubmitConfig) -> None:
    """Raise ConfigError for everything that would fail on the cluster and can be checked here."""
    from pretrain.data.inputs import resolve_inputs

    if "${" in config.run_dir:
        raise ConfigError(
            f"run_dir={config.run_dir} has ${{, which the job would take for a variable; rename it"
        )
    if config.stop_at_step is not None:
        raise ConfigError(
            f"stop_at_step={config.stop_at_step} is for trials by hand: the job would requeue itself forever; "
            "leave it out, or shorten the run with total_steps"
        )
    resolve_inputs(config, config.cluster.world_size)
    config.engine.check_ranks(config.cluster.world_size, config.cluster.world_size // config.cluster.nodes)


def _next_folder(parent: Path) -> Path:
    """The next folder run_dir/submit/NNN that does not exist yet."""
    taken = [int(path.name) for path in parent.glob("[0-9][0-9][0-9]*") if path.name.isdigit()]
    return parent / f"{max(taken, default=0) + 1:03d}"


def _own_files(arguments: list[str], folder: Path) -> dict[str, tuple[Path, Path]]:
    """Each argument that chooses a file outside conf/, with the file and its copy in the folder of the submission."""
    found = {}
    for argument in arguments:
        group, _, text = argument.partition("=")
        if is_own_file(text) and (CONF_DIR / group.lstrip("+")).is_dir():
            found[argument] = Path(path_in(argument)), folder / "own" / f"{group.lstrip('+')}.yaml"
    return found


def _freeze(config: SubmitConfig, folder: Path) -> None:
    """Copy the code that will run, with its commit and diff, so that a later edit or pull does not change the job."""
    for source, copy in _own_files(sys.argv[1:], folder).values():
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, copy)
    for name, path in CODE_FOLDERS.items():
        shutil.copytree(path, folder / "code" / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(to_dict(config)), encoding="utf-8")
    identity = {
        "commit": _git("rev-parse", "HEAD").strip() or None,
        "changed": _git("status", "--porcelain").splitlines(),
        "command": [sys.executable, *redact_command(sys.argv)],
    }
    (folder / "code.json").write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
    (folder / "code.diff").write_text(_git("diff", "--binary", "HEAD"), encoding="utf-8")


def _git(*arguments: str) -> str:
    """The output of a git command in this project's folder; empty where that is not a repository."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, check=False)
    except OSError:
        return ""
    return done.stdout.decode(errors="replace") if done.returncode == 0 else ""


def _submit_chain(cluster: ClusterConfig, folder: Path) -> list[str]:
    """Submit the jobs of a chain, all with the same script, and return their ids. Each waits for the one before it."""
    n_jobs = cluster.chain_jobs
    jobs: list[str] = []
    try:
        while len(jobs) < n_jobs:
            # With afterok, a job would stay pending forever after one that failed.
            after = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
            jobs.append(_sbatch([*after, str(folder / "train.sbatch")], cluster))
            if n_jobs > 1:
                (folder / "chain").write_text("\n".join(jobs) + "\n", encoding="utf-8")
    except RunError:
        if jobs:
            subprocess.run(["scancel", *jobs], check=False)
        raise
    return jobs


def _sbatch(arguments: list[str], cluster: ClusterConfig) -> str:
    """Submit a job and return its id. Raises RunError."""
    done = subprocess.run(["sbatch", "--parsable", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RunError(_refusal(done.stderr, cluster))
    return done.stdout.strip().split(";")[0]


def _refusal(text: str, cluster: ClusterConfig) -> str:
    """Why sbatch has refused the job, from what it says on stderr."""
    for pattern, said in REFUSALS.items():
        if re.search(pattern, text, re.IGNORECASE):
            return said.format(cluster=cluster)
    lines = [line.removeprefix("sbatch: error: ") for line in text.splitlines() if line.strip()]
    reason = lines[-1].removeprefix("Batch job submission failed: ") if lines else "it gives no reason"
    return f"Slurm refuses the job: {reason}"


if __name__ == "__main__":
    run_command(SubmitConfig, submit, config_name="submit", doc=__doc__)
