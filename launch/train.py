"""Train a model: `deepspeed launch/train.py run_dir=DIR data.manifest=DIR/manifest.json total_steps=N ...`

The launcher (`deepspeed`, `torchrun` or `srun` with a task per rank) starts one process per rank; without a launcher
there is a single rank. A run folder with a checkpoint resumes from it. Options are KEY=VALUE, such as `model=1b
optim.lr=3e-4 engine=zero2 experiment=1b_one_node`. Exit codes: 0 finished, 2 the configuration is wrong, 75 stopped on
request with the state saved, anything else a crash.
"""

import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

# Objects made by imports live as long as the process, and searching them repeatedly for garbage costs 0.3 s of CPU
# time.
gc.disable()
# Training does not use numpy's matrix products, and starting their threads costs each process 0.06 s of CPU time.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretrain.command import begin, print_failure

begin(__name__, goes_on=True)

from pretrain.reliability.stop import listen_for_signals

listen_for_signals()  # as early as possible: a signal is remembered until the state can be saved

from pretrain.config import TrainConfig, run_command
from pretrain.config.launched import launched_world_size
from pretrain.errors import ConfigError
from pretrain.reliability.heartbeat import mark
from pretrain.reliability.watchdog import Watchdog

if TYPE_CHECKING:
    from pretrain.data.inputs import Inputs


def main(config: TrainConfig) -> int:
    """Check everything that can be checked without a process group, then train. Returns the exit code."""
    from pretrain.data.inputs import resolve_inputs

    watchdog = Watchdog(config.run_dir, config.watchdog)
    try:
        code = _train(resolve_inputs(config, launched_world_size()), watchdog)
    except ConfigError:  # the same on all ranks
        watchdog.close()
        raise
    except BaseException as error:
        mark("failed", last_words=f"{type(error).__name__}: {' '.join(str(error).split())}")
        raise
    watchdog.close()
    return code


def _train(inputs: "Inputs", watchdog: Watchdog) -> int:
    mark("import")
    from data_tools.text import clean
    from pretrain.distributed import gather_objects, init_world, shutdown_world
    from pretrain.train.loop import train

    gc.freeze()
    gc.enable()
    mark("rendezvous")
    engine = inputs.config.engine
    world = init_world(engine.timeout_s, engine.sequence_parallel_ranks)
    watchdog.join(gather_objects(watchdog.address, world)[0])
    code = train(inputs, world, watchdog, clean)
    mark("leave")
    shutdown_world()
    return code


def exit_at_once(code: int) -> None:
    """End this process, whatever its threads and loader processes are doing. A rank that lingers blocks the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    try:
        run_command(TrainConfig, main, config_name="config", doc=__doc__, ranks=True)
    except SystemExit as ending:
        exit_at_once(int(ending.code or 0))
    except BaseException as failure:
        exit_at_once(print_failure(failure))
