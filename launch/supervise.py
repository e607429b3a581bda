"""Keep a run going: `python launch/supervise.py [--attempts N] [--grace-s S] -- deepspeed launch/train.py run_dir=DIR`

Runs the command after `--`, and runs it again after a crash, until the run has finished. Each start has its own folder
in run_dir/attempts/. Exit codes: 0 finished, 2 the configuration is wrong (never retried), 75 stopped on request with
the state saved (SIGTERM, SIGINT or SIGUSR1 to this process, or the file `stop`), 1 gave up or could not save.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretrain.command import begin

begin(__name__, goes_on=True)

from pretrain.errors import ConfigError, ExitCode
from pretrain.printing import print_error
from pretrain.reliability.supervisor import Supervisor, run_dir_of


def main(words: list[str]) -> int:
    """Parse the arguments and supervise the command. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="supervise.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--attempts",
        type=int,
        default=3,
        help="give up after this number of consecutive starts without a newer checkpoint (default: 3)",
    )
    parser.add_argument(
        "--grace-s",
        type=float,
        default=120,
        help="seconds that the run gets to save and end after a stop request or a lost launcher (default: 120)",
    )
    at = words.index("--") if "--" in words else len(words)
    options, command = parser.parse_args(words[:at]), words[at + 1 :]
    try:
        if not command:
            raise ConfigError("no command to supervise; give it after --")
        if options.attempts < 1 or options.grace_s < 0:
            raise ConfigError(
                f"--attempts {options.attempts} must be at least 1, and --grace-s {options.grace_s:g} at least 0"
            )
        run_dir = run_dir_of(command)
        return Supervisor(command, run_dir, max_failures=options.attempts, grace_s=options.grace_s).run()
    except ConfigError as error:
        print_error("error", error)
        return ExitCode.CONFIG_ERROR


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
