"""Keeps torch's compiler unloaded in a process that compiles nothing. Importing it costs each rank 1 s of CPU time.

torch and DeepSpeed mark functions, such as those of every optimizer, as not to be compiled, and torch loads the whole
compiler (dynamo, with inductor and sympy) at the first call of such a function. In a process that compiles nothing,
these marks have no effect, so a stand-in accepts them. Any other use of torch._dynamo loads the real module.
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
    """Stands in for torch._dynamo until something is needed that only the compiler has."""

    def disable(self, function: Callable | None = None, *args: Any, **options: Any) -> Any:
        """Return the function unchanged, because nothing can compile it while the compiler is not loaded."""
        if sys.modules.get(_NAME) is not self:
            return importlib.import_module(_NAME).disable(function, *args, **options)
        return _as_it_is(function)

    def graph_break(self, *args: Any, **options: Any) -> None:
        """Do nothing, like the real function when no graph is being built."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # `inspect` looks for the files of all modules
            raise AttributeError(name)
        if sys.modules.get(_NAME) is self:
            del sys.modules[_NAME]  # so that the next line loads the real module and sets it in torch
        return getattr(importlib.import_module(_NAME), name)


def _as_it_is(function: Callable | None = None, *args: Any, **options: Any) -> Any:
    """A decorator that returns its function unchanged. It works with and without arguments."""
    return _as_it_is if function is None else function


def leave_compiler_unloaded() -> None:
    """Install the stand-in, in a process that compiles nothing. It has no effect if the compiler is already loaded."""
    if _NAME not in sys.modules:
        stand_in = _Unloaded(_NAME)
        sys.modules[_NAME] = stand_in
        torch._dynamo = stand_in


@contextmanager
def compiling_nothing() -> Iterator[None]:
    """Make `@torch.compile` a no-op. DeepSpeed's stage 3 imports its Muon, which uses this decorator three times."""
    compiler = torch.compile
    torch.compile = _as_it_is  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler
