"""Keeps torch's compiler unloaded in a process that compiles nothing: importing it costs each rank a CPU-second.

torch and DeepSpeed mark functions, those of every optimizer among them, as not to be compiled, and torch loads the
whole compiler (dynamo, with inductor and sympy) at the first call of such a function. Where nothing is compiled these
marks mean nothing, so a stand-in takes them; any other use of torch._dynamo loads the real one.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

_NAME = "torch._dynamo"


class _Unloaded(ModuleType):
    """Stands for torch._dynamo until something is asked of it that only a compiler can answer."""

    def disable(self, function: Callable | None = None, *args: Any, **options: Any) -> Any:
        """The function as it is, as long as there is no compiler that could take it up."""
        if sys.modules.get(_NAME) is not self:
            return importlib.import_module(_NAME).disable(function, *args, **options)
        return _as_it_is(function)

    def graph_break(self, *args: Any, **options: Any) -> None:
        """Nothing, as the real one does where no graph is being made."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # `inspect` looks for the files of all modules
            raise AttributeError(name)
        if sys.modules.get(_NAME) is self:
            del sys.modules[_NAME]  # so that the next line loads it, and makes it an attribute of torch
        return getattr(importlib.import_module(_NAME), name)


def _as_it_is(function: Callable | None = None, *args: Any, **options: Any) -> Any:
    """A decorator, with arguments or without, that changes nothing."""
    return _as_it_is if function is None else function


def leave_compiler_unloaded() -> None:
    """For a process that compiles nothing; without effect where the compiler is loaded already."""
    if _NAME not in sys.modules:
        stand_in = _Unloaded(_NAME)
        sys.modules[_NAME] = stand_in
        torch._dynamo = stand_in


@contextmanager
def compiling_nothing() -> Iterator[None]:
    """Within, `@torch.compile` leaves functions as they are: DeepSpeed's stage 3 imports its Muon, which has three."""
    compiler = torch.compile
    torch.compile = _as_it_is  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler
