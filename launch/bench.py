"""Compare the speed of training with other programs: `python launch/bench.py bench.output=DIR model=125m bench.ranks=2`

Runs several variants on this machine, each in new processes and in alternating order (A B C, C B A, ...), and prints
tokens per second, MFU, memory, the time of each part of a step, and the bytes that its collectives move. A variant is
the name of a runner, followed by overrides for this variant only:

    'bench.variants=[pretrain, "pretrain engine=zero1 kernels=compiled", pytorch, olmo_core_fsdp]'

Runners: pretrain (this program), pytorch (the same model in a plain training loop), and peers, which need an
environment of their own (bench.peers_python): olmo_core_fsdp, olmo_core_ddp, litgpt, litgpt_bf16_true, hf_trainer.
All keys of launch/train.py are accepted. run_dir is not used, and without data.manifest the tokens are random. The same
command continues where it was stopped. The results are in results.json and table.md in the folder bench.output;
docs/benchmarks.md explains them.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run as a script
    sys.path.insert(0, str(ROOT))

from pretrain.command import begin

begin(__name__)

from omegaconf import MISSING

from pretrain.config import (
    AUTO,
    Objective,
    Precision,
    RopeType,
    TrainConfig,
    load_config,
    run_command,
    to_dict,
)
from pretrain.config.checks import check_positive
from pretrain.config.texts import PathText
from pretrain.errors import ConfigError

SYNTHETIC = "synthetic"
VOCABULARY = 32_768
COUNTED_STEPS = 2


class Runner(NamedTuple):
    """A program that is measured."""

    script: str
    """Path of the script that runs it, in the folder benchmarks."""
    module: str | None = None
    """Module that a peer imports from its own environment; None for our own runners."""
    package: str | None = None
    """Name of the peer's package for pip."""


RUNNERS = {
    "pretrain": Runner("runners/run_pretrain.py"),
    "pytorch": Runner("runners/run_pytorch.py"),
    "olmo_core_fsdp": Runner("peers/run_olmo_core.py", "olmo_core", "ai2-olmo-core"),
    "olmo_core_ddp": Runner("peers/run_olmo_core.py", "olmo_core", "ai2-olmo-core"),
    "litgpt": Runner("peers/run_litgpt.py", "litgpt", "litgpt"),
    "litgpt_bf16_true": Runner("peers/run_litgpt.py", "litgpt", "litgpt"),
    "hf_trainer": Runner("peers/run_hf_trainer.py", "transformers", "transformers"),
}
ONE_PROCESS = ("litgpt", "litgpt_bf16_true")


@dataclass(kw_only=True, slots=True)
class BenchSettings:
    """Settings of the benchmark itself."""

    variants: list[str] = field(default_factory=lambda: ["pretrain", "pytorch"])
    """The variants: each is a runner and overrides for it alone, separated by spaces. Ratios are relative to the
    first."""
    ranks: int = 1
    """Number of processes per variant. The machine's cores are divided among them."""
    steps: int = 20
    """Number of optimizer updates that are timed in each run."""
    warmup_steps: int = 3
    """Number of updates before the timed ones, in which code is compiled and memory allocated."""
    repeats: int = 3
    """Number of runs of each variant."""
    in_turns: bool = False
    """Start all variants of a repeat at once and let them take turns, one step each. This shows smaller differences,
    but all variants must fit in memory together."""
    output: PathText = MISSING
    """Folder for results.json, table.md and logs. Runs in it with the same settings are reused."""
    peers_python: PathText | None = None
    """Python interpreter of the environment with the peers; null means this interpreter."""
    run_timeout_s: float = 3600
    """Seconds after which a run counts as failed."""

    def __post_init__(self) -> None:
        check_positive(self, "bench", "ranks", "steps", "warmup_steps", "repeats", "run_timeout_s")
        for text in self.variants:
            runner, *overrides = text.split() or [""]
            if runner not in RUNNERS or not all("=" in override for override in overrides):
                raise ConfigError(
                    f"bench.variants: {text!r} is not a runner followed by KEY=VALUE overrides; "
                    f"runners: {', '.join(RUNNERS)}"
                )
        if len(set(self.variants)) != len(self.variants) or not self.variants:
            raise ConfigError(
                f"bench.variants={self.variants} must have at least one variant and no duplicates"
            )


@dataclass(kw_only=True, slots=True)
class BenchConfig(TrainConfig):
    """A training run that is measured."""

    run_dir: PathText = "unused"
    """Not used; nothing is written there."""
    bench: BenchSettings = field(default_factory=BenchSettings)

    def __post_init__(self) -> None:
        if MISSING in (self.data, self.model):
            return
        if self.data.manifest is None and not self.data.sources:
            self.data.manifest = SYNTHETIC
        if self.model.vocab_size is None:
            self.model.vocab_size = VOCABULARY
        if self.total_steps is None and self.total_tokens is None:
            self.total_steps = self.bench.warmup_steps + self.bench.steps + COUNTED_STEPS
        if self.lora.r:
            raise ConfigError(
                f"lora.r={self.lora.r} is not measured here, where no weights are loaded; leave it out"
            )
        TrainConfig.__post_init__(self)


def variant_config(text: str, given: list[str]) -> BenchConfig:
    """The configuration of one variant: the overrides of the command line, replaced by its own where it has them."""
    own = text.split()[1:]
    keys = {override.partition("=")[0] for override in own}
    return load_config(BenchConfig, [o for o in given if o.partition("=")[0] not in keys] + own, "bench")


def check_variant(text: str, config: BenchConfig) -> None:
    """Raise ConfigError where a runner does not support the configuration of its variant."""
    runner, model = text.split()[0], config.model
    config.grad_accum_steps(config.bench.ranks)
    wrong = {
        "micro_batch_sequences": config.micro_batch_sequences == AUTO,
        "engine.sequence_parallel_ranks": config.engine.sequence_parallel_ranks > 1,
        "objective": config.objective is not Objective.causal,
    }
    if runner != "pretrain":
        wrong |= {
            "optim.name": config.optim.name.value != "adamw",
            "data.manifest": config.data.manifest != SYNTHETIC,
        }
    if RUNNERS[runner].module is not None:
        wrong |= {
            "engine.precision": config.engine.precision is not Precision.bf16,
            "data.document_masking": config.data.document_masking,
            "kernels.fp8": config.kernels.fp8,
            "kernels.liger": config.kernels.liger,
            "model.qk_norm": model.qk_norm,
            "model.attention_bias": model.attention_bias,
            "model.rope_scaling.rope_type": model.rope_scaling.rope_type is not RopeType.default,
            "model.tie_embeddings": model.tie_embeddings,
            "model.activation_checkpointing": model.activation_checkpointing.value != "none",
            "model.dropout": model.dropout > 0,
            "model.z_loss": model.z_loss > 0,
        }
    keys = [key for key, is_wrong in wrong.items() if is_wrong]
    if keys:
        raise ConfigError(
            f"bench.variants: {text!r} does not support the value of {', '.join(keys)}; set it only for other variants"
        )
    if runner in ONE_PROCESS and config.bench.ranks != 1:
        raise ConfigError(
            f"bench.variants: {text!r} is measured in a single process; write '{text} bench.ranks=1'"
        )
    if config.data.manifest != SYNTHETIC:
        from pretrain.data.inputs import resolve_inputs

        resolve_inputs(config, config.bench.ranks)


def job_values(runner: str, config: BenchConfig) -> dict[str, Any]:
    """The field values of a `benchmarks.harness.worker.Job`."""
    model, bench, values = config.model, config.bench, to_dict(config)
    del values["bench"]
    shape = values["model"] | {"n_kv_heads": model.kv_heads, "d_head": model.head_width}
    return {
        "runner": runner,
        "ranks": bench.ranks,
        "threads": max(1, len(os.sched_getaffinity(0)) // bench.ranks),
        "warmup_steps": bench.warmup_steps,
        "steps": bench.steps,
        "counted_steps": COUNTED_STEPS,
        "model": shape,
        "optim": values["optim"],
        "compile": config.kernels.compile.value,
        "sequence_length": config.data.sequence_length,
        "global_batch_sequences": config.global_batch_sequences,
        "micro_batch_sequences": config.micro_batch_sequences,
        "grad_accum_steps": config.grad_accum_steps(bench.ranks),
        "seed": config.seed,
        "in_turns": bench.in_turns and runner != "peak",
        "config": values,
    }


def checked_variants(config: BenchConfig, given: list[str]) -> dict[str, BenchConfig]:
    """The configuration of each variant by its text. All are checked before any run starts. Raises ConfigError."""
    configs = {text: variant_config(text, given) for text in config.bench.variants}
    for text, one in configs.items():
        check_variant(text, one)
    turns = {(one.bench.in_turns, one.bench.warmup_steps, one.bench.steps) for one in configs.values()}
    if len(turns) > 1 and any(in_turns for in_turns, *_ in turns):
        raise ConfigError(
            "bench.variants: with bench.in_turns=true, bench.in_turns, bench.warmup_steps and bench.steps must be the "
            "same for all variants"
        )
    return configs


def interpreter(given: str | None) -> str:
    """The absolute path of the peers' interpreter. Raises ConfigError where it cannot be run."""
    found = shutil.which(given or sys.executable)
    if found is None:
        raise ConfigError(
            f"bench.peers_python={given} cannot be run; give the python of the peers' environment"
        )
    # Links are not resolved, because Python finds its venv by the path of the link.
    return os.path.abspath(found)


def installed(configs: dict[str, BenchConfig], peers_python: str) -> dict[str, BenchConfig]:
    """The variants without the peers that are not installed, each of which is reported. ConfigError if none is left."""
    from benchmarks.harness.session import missing_module

    left = {}
    for text, one in configs.items():
        runner = RUNNERS[text.split()[0]]
        if runner.module is not None and missing_module(peers_python, runner.module):
            print(
                f"{text}: skipped, since {peers_python} has no {runner.package}; benchmarks/peers/requirements.txt "
                "says how to install it, and bench.peers_python names the interpreter",
                flush=True,
            )
        else:
            left[text] = one
    if not left:
        raise ConfigError(f"bench.variants={list(configs)}: none of these runners is installed")
    return left


def main(config: BenchConfig) -> int:
    """Run the variants whose results are missing, and print the tables."""
    # SystemExit lets the session end its ranks when this process is ended by a signal.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    bench = config.bench
    if not (ROOT / "benchmarks").is_dir():
        raise ConfigError(
            f"{ROOT} has no folder benchmarks, since this program is installed as a package; run launch/bench.py from "
            "a source checkout"
        )
    configs = checked_variants(config, sys.argv[1:])
    peers_python = interpreter(bench.peers_python)
    configs = installed(configs, peers_python)
    from rich.console import Console
    from rich.table import Table

    from benchmarks.harness.session import PEAK, Session, Variant
    from benchmarks.harness.worker import Job
    from pretrain.arithmetic import count_parameters, flops_per_token

    def variant(text: str, one: BenchConfig) -> Variant:
        name = text.split()[0]
        runner = RUNNERS.get(name, Runner("runners/run_peak.py"))
        return Variant(
            text=text,
            script=ROOT / "benchmarks" / runner.script,
            python=peers_python if runner.module else sys.executable,
            job=Job(**job_values(name, one)),
            n_parameters=count_parameters(one.model),
            flops_per_token=flops_per_token(one.model, one.data.sequence_length),
        )

    variants = [variant(text, one) for text, one in configs.items()]
    session = Session(
        Path(bench.output).resolve(), variants, variant(PEAK, config), bench.repeats, bench.run_timeout_s
    )
    session.run(lambda line: print(line, flush=True))
    session.write()
    console = Console(width=None if sys.stdout.isatty() else 200)
    for title, (header, rows) in session.tables():
        table = Table(*header, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table, markup=False)
    return 1 if session.problems else 0


if __name__ == "__main__":
    run_command(BenchConfig, main, config_name="bench", doc=__doc__)
