"""Writes every load of a pickle and every call of torch.load to $PICKLE_LOG. Tests put this folder on PYTHONPATH.

Each line is JSON: the function, whether it read a file on disk, and the files of its callers, innermost first.
"""

from __future__ import annotations

import functools
import importlib.machinery
import json
import os
import pickle
import stat
import sys
from typing import Any


def _note(what: str, source: Any = None) -> None:
    try:
        on_disk = stat.S_ISREG(os.fstat(source.fileno()).st_mode)
    except (AttributeError, OSError, ValueError):
        on_disk = False
    callers, frame = [], sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename != __file__:
            callers.append(frame.f_code.co_filename)
        frame = frame.f_back
    line = json.dumps({"what": what, "on_disk": on_disk, "callers": callers[:12], "argv": sys.argv}) + "\n"
    descriptor = os.open(os.environ["PICKLE_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, line.encode())
    os.close(descriptor)


def _recorded(what: str, function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        _note(what, args[0] if args else None)
        return function(*args, **kwargs)

    return call


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, *args: Any, **kwargs: Any) -> None:
        _note("Unpickler", file)
        super().__init__(file, *args, **kwargs)


class _PythonUnpickler(pickle._Unpickler):
    def __init__(self, file: Any, *args: Any, **kwargs: Any) -> None:
        _note("_Unpickler", file)
        super().__init__(file, *args, **kwargs)


class _TorchLoad:
    """Import hook that records torch.load, which uses its own unpickler with weights_only=True."""

    @staticmethod
    def find_spec(name: str, path: Any, target: Any = None) -> Any:
        if name != "torch.serialization":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            module.load = _recorded("torch.load", module.load)

        spec.loader.exec_module = exec_module
        return spec


import _pickle

for module in (pickle, _pickle):
    module.load = _recorded("load", module.load)
    module.loads = _recorded("loads", module.loads)
    module.Unpickler = _Unpickler
pickle._Unpickler = _PythonUnpickler
sys.meta_path.insert(0, _TorchLoad)
