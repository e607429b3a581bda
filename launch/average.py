"""Average the weights of several checkpoints: `python launch/average.py run_dir=DIR output=DIR last=5`

Writes a folder that launch/eval.py, generate.py and export.py take as run_dir=, and launch/train.py as init_from=. Give
the steps with steps=[1000,1100] or their number, counted from the end, with last=. Exit codes: 0 done, 1 writing
failed and nothing was published, 2 the configuration is wrong.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretrain.command import begin

begin(__name__, interrupted="nothing was written")

from omegaconf import MISSING

from pretrain.config import run_command
from pretrain.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class AverageConfig:
    """What to average, and where to write it."""

    run_dir: str = MISSING
    """Folder of the run."""
    output: str = MISSING
    """Folder to write."""
    last: int | None = None
    """Number of checkpoints, counted from the newest."""
    steps: list[int] = field(default_factory=list)
    """Steps of the checkpoints, instead of `last`."""
    checkpoint_target: str | None = None
    """URL of the run's checkpoints, if they are at a URL. A URL that the run folder names is opened only if it is also
    given here."""
    overwrite: bool = False
    """Replace the content of `output`, if it has any."""

    def __post_init__(self) -> None:
        if (self.last is None) == (not self.steps):
            raise ConfigError(f"last={self.last} and steps={self.steps}: give exactly one of them")
        if self.last is not None and self.last < 2:
            raise ConfigError(f"last={self.last} must be 2 or more")
        if self.steps and (len(set(self.steps)) != len(self.steps) or len(self.steps) < 2):
            raise ConfigError(f"steps={self.steps} must name two or more different steps")


def main(config: AverageConfig) -> None:
    """Find the checkpoints, average them, and write the result."""
    from data_tools.progress import waiting
    from pretrain.convert.averaging import average, last_steps
    from pretrain.convert.hugging_face import check_output

    output = Path(config.output).expanduser()
    check_output(output, config.overwrite)
    steps = sorted(config.steps)
    if config.last is not None:
        steps = last_steps(config.run_dir, config.last, config.checkpoint_target)
    with waiting(f"averaging {len(steps)} checkpoints"):
        average(config.run_dir, steps, output, config.checkpoint_target)
    print(f"wrote the mean of the steps {', '.join(map(str, steps))} to {output}")


if __name__ == "__main__":
    run_command(AverageConfig, main, doc=__doc__)
