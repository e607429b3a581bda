"""How every script with a configuration starts and ends: its arguments, its help and its exit code."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from omegaconf import OmegaConf

from pretrain.config.launched import adopt_launcher, launched_rank
from pretrain.config.load import CONF_DIR, compose_config, load_config, to_dict
from pretrain.config.words.arguments import Arguments
from pretrain.errors import ConfigError, ExitCode, RunError
from pretrain.printing import print_error

T = TypeVar("T")


def run_command(
    schema: type[T],
    command: Callable[[T], int | None],
    config_name: str | None = None,
    doc: str | None = None,
    ranks: bool = False,
) -> None:
    """Entry point of every script: parse `sys.argv`, run `command`, and exit with the right code (`ExitCode`).

    `schema` is the dataclass of the configuration, `config_name` the file in `conf/` to start from, and `doc` the text
    of `--help`. `--cfg job` prints the composed configuration; `--help` prints `doc` and the keys, `--help NAME` what
    is known of one key or group. With `ranks`, the command is one that a launcher starts once per rank.
    """
    words = [a for a in sys.argv[1:] if not a.startswith(("--local_rank", "--local-rank"))]
    try:
        if ranks:
            adopt_launcher(os.environ)
        rank = launched_rank()
        if {"--help", "-h"} & set(words):
            if rank == 0:
                _print_help(schema, words, config_name, doc or command.__doc__ or "")
            sys.exit(ExitCode.FINISHED)
        shown = _without_cfg(words)
        config = load_config(schema, words if shown is None else shown, config_name)
        if shown is not None:
            if rank == 0:
                print(OmegaConf.to_yaml(to_dict(config)), end="")
            sys.exit(ExitCode.FINISHED)
        code = command(config)
    except ConfigError as error:  # every rank raises the same error, so only rank 0 prints it
        if launched_rank() == 0:
            print_error("error", error)
        else:
            time.sleep(2)  # the launcher kills all ranks at the first exit; rank 0 needs time to print
        sys.exit(ExitCode.CONFIG_ERROR)
    except (RunError, OSError) as error:  # this may happen on one rank only, so every rank prints its own
        print_error(f"error: rank {rank}" if rank else "error", error)
        sys.exit(ExitCode.CRASHED)
    sys.exit(code or ExitCode.FINISHED)


def _without_cfg(words: list[str]) -> list[str] | None:
    """The words without `--cfg job`; None where the configuration is not to be printed."""
    if "--cfg=job" in words:
        return [word for word in words if word != "--cfg=job"]
    if "--cfg" not in words:
        return None
    at = words.index("--cfg")
    return words[:at] + words[at + 2 :]


def _print_help(schema: type, words: list[str], config_name: str | None, doc: str) -> None:
    from pretrain.config.words.help import Help  # most commands print none

    defaults = OmegaConf.to_container(
        compose_config(schema, Arguments({}, [], {}), config_name), resolve=False
    )
    text = Help(schema, defaults, CONF_DIR if config_name else None)  # type: ignore[arg-type]
    names = [word for word in words if not word.startswith("-")]
    if names:
        print("\n\n".join(text.one_name(name) for name in names))
    else:
        print(f"{doc.strip()}\n\n{text.all_keys()}")
