"""Train a ladder of small models and fit a law to their losses:
`python launch/ladder.py output=DIR experiment=ladder data.manifest=DIR/manifest.json evaluation.manifest=DIR/heldout`

Each run is an ordinary one of launch/train.py under the supervisor, in its own folder of the output. The same command
goes on where it stopped, skips finished runs, and trains those that longer lists add. At the end it writes fit.json,
from which `python launch/plan.py ladder=DIR ...` predicts the loss of a larger run and says which batch and learning
rate to use. All keys of launch/train.py are accepted; optim.lr and global_batch_sequences on the command line hold for
all runs, otherwise they are OLMo's for each size. Exit codes: 0 finished, 1 a run failed, 2 the configuration is wrong,
75 stopped on request.
"""

from __future__ import annotations

import math
import shlex
import signal
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretrain.command import begin

begin(__name__, interrupted="the same command goes on")

from omegaconf import MISSING

from pretrain.config import TrainConfig, load_config, run_command
from pretrain.config.texts import PathText
from pretrain.errors import ConfigError, ExitCode
from pretrain.files import read_lines, write_atomically
from pretrain.plan.ladder import FIT_FILE, LadderFit, Rung, RungResult, rungs_of
from pretrain.ports import free_port
from pretrain.reliability.events import Event, read_events
from pretrain.reliability.journal import HELDOUT_PREFIX, read_metrics
from pretrain.reliability.supervisor import Supervisor

SET_BY_THE_LADDER = (
    "run_dir",
    "total_tokens",
    "total_steps",
    "total_epochs",
    "evaluation.patience",
    "init_from",
)
"""Keys of launch/train.py that nobody may give to a ladder."""
YIELDING = ("global_batch_sequences", "optim.lr", "schedule.warmup_steps")
"""Keys that a run of the ladder sets unless the command line does."""
ASKED_FILE = "asked"
STARTS_WITHOUT_PROGRESS, GRACE_S = 3, 120.0


@dataclass(kw_only=True, slots=True)
class LadderConfig(TrainConfig):
    """A training run, of which a ladder trains several sizes and lengths."""

    run_dir: PathText = "unused"
    """Not used: the runs are in folders of `output`."""
    output: PathText = MISSING
    """Folder of the ladder."""
    depths: list[int] = field(default_factory=lambda: [4, 6, 8, 10])
    """Number of blocks of each size. A model of this depth has as many heads, and is depth x head_width wide."""
    head_width: int = 64
    """Width of an attention head."""
    tokens_per_parameter: list[float] = field(default_factory=lambda: [10.0, 20.0])
    """Lengths of the runs of each size, in tokens per parameter without the token embedding."""
    tokens: list[int] = field(default_factory=list)
    """Further lengths, in tokens, which are the same for each size."""
    lr_multipliers: list[float] = field(default_factory=lambda: [1.0])
    """Multiples of the learning rate that each size and length is trained with. The best one counts."""
    ranks: int = 1
    """Number of ranks. With more than one, `deepspeed --num_gpus RANKS` starts them."""
    launcher: str | None = None
    """What starts the ranks instead, such as "srun python"; launch/train.py and its arguments follow."""

    def __post_init__(self) -> None:
        if MISSING in (self.data, self.model, self.engine, self.evaluation):
            return
        for name in ("depths", "tokens_per_parameter", "tokens", "lr_multipliers"):
            values = getattr(self, name)
            if any(not value > 0 for value in values) or len(set(values)) < len(values):
                raise ConfigError(f"{name}={values} must hold different numbers above 0")
        for name in ("head_width", "ranks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be 1 or more")
        if not self.depths or not self.lr_multipliers:
            raise ConfigError(
                f"depths={self.depths} and lr_multipliers={self.lr_multipliers}: give one or more"
            )
        if self.evaluation.decides is None:
            raise ConfigError(
                "a ladder compares losses on held-out text; give evaluation.manifest=DIR/heldout"
            )
        # What belongs to a training run is checked for each run of the ladder, which has another batch and length.


OWN = {f.name for f in fields(LadderConfig)} - {f.name for f in fields(TrainConfig)}


def key_of(word: str) -> str:
    return word.partition("=")[0].lstrip("+")


def shared_words(words: list[str]) -> list[str]:
    """The words that all runs of the ladder share. Raises ConfigError for one that the ladder sets itself."""
    for word in words:
        if key_of(word) in SET_BY_THE_LADDER:
            raise ConfigError(
                f"{word}: a ladder sets this for each of its runs; give output, depths, tokens or tokens_per_parameter"
            )
    return [word for word in words if key_of(word) not in OWN]


def main(config: LadderConfig) -> int:
    """Train the runs that are not finished, and fit the laws."""
    require_scipy()
    shared = shared_words(sys.argv[1:])
    base = base_of(config, shared)
    given = {key_of(word) for word in shared}
    rungs = rungs_of(
        base.model,
        depths=config.depths,
        head_width=config.head_width,
        tokens=config.tokens,
        tokens_per_parameter=config.tokens_per_parameter,
        lr_multipliers=config.lr_multipliers,
        sequence_length=base.data.sequence_length,
        batch_multiple=base.micro_batch * config.ranks,
        batch_sequences=base.global_batch_sequences if "global_batch_sequences" in given else None,
        lr=base.optim.lr if "optim.lr" in given else None,
    )
    folder = Path(config.output)
    all_words = [words_of(config, rung, shared, folder) for rung in rungs]
    remember(folder, [*shared, f"ranks={config.ranks}"])  # a batch is a multiple of the ranks
    for number, (rung, words) in enumerate(zip(rungs, all_words, strict=True), 1):
        about = f"run {number} of {len(rungs)}: {rung.name}, {rung.n_parameters:,} parameters, {rung.tokens:,} tokens"
        if is_finished(folder / rung.name):
            print(f"{about}: finished before", flush=True)
            continue
        print(about, flush=True)
        code = train([*launcher_of(config), *words], folder / rung.name)
        if code != ExitCode.FINISHED:
            print(f"the ladder ends here with exit code {code:d}; the same command goes on", file=sys.stderr)
            return code
    report(fit(base, rungs, folder), folder)
    return ExitCode.FINISHED


def require_scipy() -> None:
    """Raise ConfigError, before anything is trained, where the package that fits the laws is not installed."""
    from importlib.util import find_spec

    if find_spec("scipy") is None:
        raise ConfigError("a ladder needs the package scipy; install it with: pip install 'pretrain[eval]'")


def base_of(config: LadderConfig, shared: list[str]) -> TrainConfig:
    """What all runs share, with the corpus's vocabulary. Raises ConfigError where it is wrong."""
    from pretrain.data.inputs import resolve_inputs

    micro = config.micro_batch_sequences
    batch = config.ranks * (micro if isinstance(micro, int) and micro > 0 else 1)
    words = ["run_dir=unused", "total_tokens=1_000_000_000", f"global_batch_sequences={batch}", *shared]
    return resolve_inputs(load_config(TrainConfig, words, "config"), config.ranks).config


def words_of(config: LadderConfig, rung: Rung, shared: list[str], folder: Path) -> list[str]:
    """The arguments of launch/train.py for a run. Raises ConfigError where its configuration is wrong."""
    given = {key_of(word) for word in shared} & set(YIELDING)
    values = rung.words(config.data.sequence_length)
    if "optim.lr" in given and len(config.lr_multipliers) > 1:
        given.remove("optim.lr")
    # Later words replace earlier ones.
    words = [*shared, *(f"{key}={value}" for key, value in values.items() if key not in given)]
    words.append(f"run_dir={folder / rung.name}")
    load_config(TrainConfig, words, "config").grad_accum_steps(config.ranks)
    return words


def launcher_of(config: LadderConfig) -> list[str]:
    """What starts the ranks of a run, up to launch/train.py. The port is free now, so this is called for each run."""
    if config.launcher is not None:
        launcher = shlex.split(config.launcher)
    elif config.ranks == 1:
        launcher = [sys.executable]
    else:
        launcher = ["deepspeed", "--num_gpus", str(config.ranks), "--master_port", str(free_port())]
    return [*launcher, str(Path(__file__).resolve().parent / "train.py")]


def remember(folder: Path, shared: list[str]) -> None:
    """Store what all runs share, or raise ConfigError where earlier runs in this folder shared something else."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ASKED_FILE
    earlier = read_lines(file) if file.exists() else shared
    if sorted(earlier) != sorted(shared):
        raise ConfigError(
            f"output={folder} has runs of another ladder ({shlex.join(earlier)}); give the same, or another output"
        )
    write_atomically(file, "".join(f"{word}\n" for word in shared).encode())


def is_finished(run_dir: Path) -> bool:
    return any(event["event"] == Event.FINISHED for event in read_events(run_dir))


def train(command: list[str], run_dir: Path) -> ExitCode:
    """Train one run under the supervisor, which starts it again after a crash and passes a stop request on."""
    try:
        return Supervisor(command, run_dir, max_failures=STARTS_WITHOUT_PROGRESS, grace_s=GRACE_S).run()
    finally:  # between two runs, a request ends this process
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def fit(config: TrainConfig, rungs: list[Rung], folder: Path) -> LadderFit:
    """Fit the laws to the losses of the finished runs, and write the fit file."""
    from pretrain.plan.ladder_fit import fit_ladder, write_fit

    metric = HELDOUT_PREFIX + config.evaluation.deciding_metric
    results = [result_of(rung, folder / rung.name, metric, config.data.sequence_length) for rung in rungs]
    assert config.model.vocab_size is not None
    found = fit_ladder(results, metric, config.model.vocab_size)
    write_fit(found, folder / FIT_FILE)
    return found


def result_of(rung: Rung, run_dir: Path, metric: str, sequence_length: int) -> RungResult:
    """The loss of a finished run. Raises ConfigError where it is none."""
    last = read_metrics(run_dir)[-1]
    loss = last.get(metric)
    if not isinstance(loss, float) or not math.isfinite(loss):
        raise ConfigError(
            f"{run_dir} ended with {metric}={loss}, which no law can be fitted to; remove the folder to train the run "
            "again, in a ladder with a lower optim.lr"
        )
    return RungResult(
        name=rung.name,
        n_parameters=rung.n_parameters,
        tokens=last["tokens_seen"],
        loss=loss,
        lr=rung.lr,
        batch_tokens=rung.batch_sequences * sequence_length,
    )


def report(found: LadderFit, folder: Path) -> None:
    """Print the runs with the losses that the law gives them, and the law."""
    print(f"{'run':<24}{'parameters':>14}{'tokens':>16}{'loss':>9}{'law':>9}")
    for rung in found.rungs:
        law = found.law.loss(rung.n_parameters, rung.tokens)
        print(f"{rung.name:<24}{rung.n_parameters:>14,}{rung.tokens:>16,}{rung.loss:>9.4f}{law:>9.4f}")
    law = found.law
    print(f"loss = {law.e:.4g} + {law.a:.4g} / N^{law.alpha:.4g} + {law.b:.4g} / D^{law.beta:.4g}")
    print(f"the runs depart from it by up to {found.departure_frac:.1%}")
    print(f"wrote {folder / FIT_FILE}; python launch/plan.py ladder={folder} predicts a larger run")


if __name__ == "__main__":
    run_command(LadderConfig, main, config_name="config", doc=__doc__)
