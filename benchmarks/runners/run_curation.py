"""Curates files in this process and prints what each stage cost: `python run_curation.py CHECKOUT OUTPUT SET FILE...`

`benchmarks/curate_speed.py` starts it once for each checkout. SET is a file of an evaluation set. The last line is
JSON: CPU seconds by phase and by stage, with "all" for the whole command.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any


def _timed(function: Callable[..., Any], name: str, cpu_s: dict[str, float]) -> Callable[..., Any]:
    def timed(*args: Any, **options: Any) -> Any:
        begin_s = time.process_time()
        try:
            return function(*args, **options)
        finally:
            cpu_s[name] += time.process_time() - begin_s

    return timed


def _time_stages(cpu_s: dict[str, float]) -> None:
    """Measure each stage of curation, wherever its class is defined."""
    import data_tools.stages

    for module in pkgutil.walk_packages(data_tools.stages.__path__, "data_tools.stages."):
        for found in vars(importlib.import_module(module.name)).values():
            is_stage = isinstance(found, type) and found.__module__ == module.name and hasattr(found, "name")
            if is_stage and hasattr(found, "process"):
                found.process = _timed(found.process, found.name, cpu_s)


class _Silent:
    """Stands for the progress of a task."""

    def advance(self, n_bytes: int) -> None:
        pass

    def finish(self, n_bytes: int) -> None:
        pass


def main() -> None:
    checkout, output, evaluation_set, *files = sys.argv[1:]
    sys.path[0] = checkout
    from data_tools import curate

    cpu_s: dict[str, float] = defaultdict(float)
    _time_stages(cpu_s)

    def run_phase(name: str, task: Any, n_tasks: int, *_: Any) -> None:
        run = _timed(task.run, name, cpu_s)
        for rank in range(n_tasks):
            run(rank, _Silent())

    curate.run_phase = run_phase
    config = curate.CurateConfig(input=files, output=output, overwrite=True)
    config.curation.decontaminate.files = [evaluation_set]
    begin_s = time.process_time()
    if curate.curate(config):
        raise SystemExit(1)
    cpu_s["all"] = time.process_time() - begin_s
    print(json.dumps(cpu_s))


if __name__ == "__main__":
    main()
