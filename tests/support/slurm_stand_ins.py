"""Six small shell programs that replace the Slurm commands of a batch script. tests/cluster uses real Slurm."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

STAND_INS = {
    "sbatch": 'echo "$@" >>"$SLURM_LOG/sbatch"; n=$(wc -l <"$SLURM_LOG/sbatch")\n'
    'if [ -n "${SBATCH_FAILS:-}" ]; then echo "sbatch: error: $SBATCH_FAILS" >&2; exit 1; fi\n'
    'echo "$((4241 + n));cluster"',
    # Starts one process per node, and exits with the highest of their exit codes.
    "srun": 'echo "$@" >>"$SLURM_LOG/srun"; nodes=${1#--nodes=}; pids=(); while [[ $1 == --* ]]; do shift; done\n'
    'for ((i = 0; i < nodes; i++)); do SLURM_NODEID=$i "$@" & pids+=($!); done; worst=0\n'
    'for pid in "${pids[@]}"; do wait "$pid"; c=$?; [ "$c" -le "$worst" ] || worst=$c; done; exit "$worst"',
    "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; echo 127.0.0.2; else echo "$@" >>"$SLURM_LOG/scontrol"; fi',
    "sinfo": 'echo "${DOWN_NODES:-}"',
    "scancel": 'echo scancel "$@" >>"$SLURM_LOG/scontrol"',
    "squeue": 'echo "${JOB_STATE:-RUNNING}"',
}


def install(folder: Path) -> dict[str, str]:
    """An environment whose path has the stand-ins first. They log their arguments to $SLURM_LOG."""
    for name, body in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    (folder / "log").mkdir()
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_LOG": str(folder / "log")}


def start_batch(script: Path, slurm: dict[str, str], **variables: str) -> subprocess.Popen[str]:
    """Start the batch script as Slurm does."""
    for name in ("scontrol", "srun"):
        (Path(slurm["SLURM_LOG"]) / name).unlink(missing_ok=True)
    env = slurm | {"SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": "n[1-2]"} | variables
    return subprocess.Popen(
        ["bash", str(script)],
        env=env,
        cwd=script.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def requests(slurm: dict[str, str]) -> list[str]:
    """The commands that the batch script gave to Slurm: requeue, update, scancel."""
    log = Path(slurm["SLURM_LOG"]) / "scontrol"
    return log.read_text().splitlines() if log.exists() else []
