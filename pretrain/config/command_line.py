"""How every script with a configuration starts and ends: its arguments, its help and its exit code."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import fields
from typing import TypeVar

from omegaconf import OmegaConf

from pretrain.config.launched import launched_rank
from pretrain.config.load import CONF_DIR, compose_config, load_config, to_dict
from pretrain.errors import ConfigError, ExitCode, RunError
from pretrain.printing import print_error

T = TypeVar("T")


def run_command(
    schema: type[T],
    command: Callable[[T], int | None],
    config_name: str | None = None,
    doc: str | None = None,
) -> None:
    """Entry point of every script: parse `sys.argv`, run `command`, and exit with the right code (`ExitCode`).

    `schema` is the dataclass of the configuration, `config_name` the file in `conf/` to start from, and `doc` the text
    of `--help`. `--cfg job` prints the composed configuration; `--help` prints `doc` and the keys with their defaults.
    """
    overrides = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    rank = launched_rank()
    show = "--cfg" in overrides
    if "--help" in overrides or "-h" in overrides:
        if rank == 0:
            print((doc or command.__doc__ or "").strip())
            print(_keys_and_defaults(schema, config_name), end="")
        sys.exit(ExitCode.FINISHED)
    if show:
        at = overrides.index("--cfg")
        del overrides[at : at + 2]
    try:
        config = load_config(schema, overrides, config_name)
        if show:
            if rank == 0:
                print(OmegaConf.to_yaml(to_dict(config)), end="")
            sys.exit(ExitCode.FINISHED)
        code = command(config)
    except ConfigError as error:  # every rank raises the same error, so only rank 0 prints it
        if rank == 0:
            print_error("error", error)
        else:
            time.sleep(2)  # the launcher kills all ranks at the first exit; rank 0 needs time to print
        sys.exit(ExitCode.CONFIG_ERROR)
    except (RunError, OSError) as error:  # this may happen on one rank only, so every rank prints its own
        print_error(f"error: rank {rank}" if rank else "error", error)
        sys.exit(ExitCode.CRASHED)
    sys.exit(code or ExitCode.FINISHED)


def _keys_and_defaults(schema: type, config_name: str | None) -> str:
    """The part of `--help` that lists the keys, their defaults and the config groups."""
    text = f"\nKeys and defaults (??? must be given):\n\n{OmegaConf.to_yaml(compose_config(schema, [], config_name))}"
    if config_name is None:
        return text
    groups = {f.name: CONF_DIR / f.name for f in fields(schema)} | {"experiment": CONF_DIR / "experiment"}
    options = {name: sorted(path.stem for path in folder.glob("*.yaml")) for name, folder in groups.items()}
    lines = [f"  {name}={' | '.join(names)}" for name, names in options.items() if names]
    return text + "\nPresets that set a whole group of keys:\n\n" + "\n".join(lines) + "\n"
