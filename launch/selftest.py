"""Test that this cluster reads a corpus correctly: `deepspeed launch/selftest.py data.manifest=DIR/manifest.json ...`

All keys of launch/train.py are accepted, so that the test reads what the run will read. Nothing is trained. The first
`steps` steps are read by the launched number of ranks, by half and by twice that number, without loader workers, and by
readers that are killed (SIGKILL) partway and start again. All must give the same samples, each once, with the same
content. Exit codes: 0 the test passed, 1 it failed, 2 the configuration is wrong.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretrain.command import begin

begin(__name__)

from pretrain.config import TrainConfig, run_command
from pretrain.config.launched import launched_world_size
from pretrain.config.texts import PathText
from pretrain.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class SelfTestConfig(TrainConfig):
    """A training run whose reading of data is tested."""

    run_dir: PathText = "unused"
    """Not used; nothing is written there."""
    steps: int = 20
    """Number of steps that are read each time."""
    from_step: int = 1
    """First step that is read. A late step tests the end of a long run."""
    kills: int = 2
    """Number of times that each rank's reader is killed."""
    json: bool = False
    """Print the result as JSON on the last line of stdout."""

    def __post_init__(self) -> None:
        # super() without arguments would fail: it refers to the class from before dataclass(slots=True) replaced it.
        TrainConfig.__post_init__(self)
        if self.steps < 2 or self.from_step < 1 or self.kills < 0:
            raise ConfigError(
                f"steps={self.steps}, from_step={self.from_step}, kills={self.kills} must be at least 2, 1 and 0"
            )


def main(config: SelfTestConfig) -> int:
    """Run the test and print the result."""
    from pretrain.data.inputs import resolve_inputs

    resolve_inputs(config, launched_world_size())
    from pretrain.data.selftest import result_lines, run_selftest
    from pretrain.distributed import init_world, shutdown_world

    world = init_world(config.engine.timeout_s)
    checks = run_selftest(config, world, steps=config.steps, from_step=config.from_step, kills=config.kills)
    if world.is_main:
        print("\n".join(result_lines(checks, config, world.size)), flush=True)
        if config.json:
            print(json.dumps([vars(check) for check in checks]), flush=True)
    shutdown_world()
    return 0 if all(check.problem is None for check in checks) else 1


if __name__ == "__main__":
    run_command(SelfTestConfig, main, config_name="selftest", doc=__doc__, ranks=True)
