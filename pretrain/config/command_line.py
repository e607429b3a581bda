"""How every script with a configuration begins and ends: its words, its help and its exit code."""

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
    """Entry point of every script: parse `sys.argv`, run, exit with the right code.

    `--cfg job` prints the composed config, `--help` the script's docstring and its keys.
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
    except ConfigError as error:  # alike on all ranks: one says it
        if rank == 0:
            print_error("error", error)
        else:
            time.sleep(2)  # the launcher ends all ranks at the first exit
        sys.exit(ExitCode.CONFIG_ERROR)
    except (RunError, OSError) as error:  # perhaps this rank's alone
        print_error(f"error: rank {rank}" if rank else "error", error)
        sys.exit(ExitCode.CRASHED)
    sys.exit(code or ExitCode.FINISHED)


def _keys_and_defaults(schema: type, config_name: str | None) -> str:
    """What `--help` says after the script's own words."""
    text = f"\nKeys and defaults (??? must be given):\n\n{OmegaConf.to_yaml(compose_config(schema, [], config_name))}"
    if config_name is None:
        return text
    groups = {f.name: CONF_DIR / f.name for f in fields(schema)} | {"experiment": CONF_DIR / "experiment"}
    options = {name: sorted(path.stem for path in folder.glob("*.yaml")) for name, folder in groups.items()}
    lines = [f"  {name}={' | '.join(names)}" for name, names in options.items() if names]
    return text + "\nWhole groups of keys at once:\n\n" + "\n".join(lines) + "\n"
