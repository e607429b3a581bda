"""How every command begins and ends: what it needs is installed, and a reader that leaves is no crash.

It needs the standard library only and parses on older Pythons, since it runs before anything else is imported.

    launch/train.py        python launch/train.py        in the folder of the sources
    pretrain.launch.train  pretrain-train                installed with `pip install .`
"""

from __future__ import annotations

import atexit
import io
import os
import signal
import stat
import sys
import threading
import traceback
from pathlib import Path
from types import TracebackType

LAUNCH = ("train", "eval", "export", "generate", "plan", "provenance", "selftest", "submit", "supervise")
DATA_TOOLS = ("curate", "prepare", "remove", "show", "verify")
COMMANDS = {f"pretrain-{name}": f"pretrain.launch.{name}" for name in LAUNCH}
COMMANDS.update({f"pretrain-{name}": f"data_tools.{name}" for name in DATA_TOOLS})
"""The module of each installed command; pyproject.toml lists the same names."""
OURS = {"pretrain", "data_tools"}
OLDEST_PYTHON = (3, 11)
MISSING_PACKAGE, READER_LEFT = 2, 128 + signal.SIGPIPE
"""Exit codes: as for a wrong configuration, and as a shell shows a tool that SIGPIPE ended."""


def main() -> None:
    """Run the module of the installed command that was called, as `python -m MODULE` would."""
    import runpy  # not needed by the scripts

    package, _, name = COMMANDS[Path(sys.argv[0]).name].rpartition(".")
    script = Path(__file__).resolve().parent.parent / "launch" / f"{name}.py"
    if (
        package == "pretrain.launch" and script.exists()
    ):  # of `pip install -e`, which uses the sources as they lie
        runpy.run_path(str(script), run_name="__main__")
    else:
        runpy.run_module(f"{package}.{name}", run_name="__main__", alter_sys=True)


def begin(name: str, goes_on: bool = False) -> None:
    """Call it with `__name__` first in the file of a command, before any import that may fail.

    From then on a missing package is told in one sentence, with exit code 2, and the command ends quietly when nobody
    reads its output any more. With `goes_on` it works on instead, as a training run must. Where the file is imported,
    nothing happens.
    """
    if name != "__main__":
        return
    if sys.version_info[:2] < OLDEST_PYTHON:
        version = ".".join(map(str, sys.version_info[:3]))
        print(
            f"error: {sys.executable} is Python {version}, and 3.11 or newer is needed; {_remedy()}",
            file=sys.stderr,
        )
        sys.exit(MISSING_PACKAGE)
    sys.excepthook = _on_failure
    for stream in ("stdout", "stderr"):
        _watch_reader(stream, goes_on)
    atexit.register(_flush)


# ---- a package is missing --------------------------------------------------------------------------------------------


def print_failure(error: BaseException) -> int:
    """Tell on stderr what ended this process: a missing package in one sentence, else a traceback. The exit code."""
    missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if not missing or missing in OURS:
        traceback.print_exception(type(error), error, error.__traceback__)
        return 1
    print(f"error: {sys.executable} lacks the package {missing}; {_remedy()}", file=sys.stderr)
    return MISSING_PACKAGE


def _on_failure(_kind: type[BaseException], error: BaseException, _trace: TracebackType | None) -> None:
    raise SystemExit(print_failure(error))  # the interpreter takes its exit code from here


def _remedy() -> str:
    """Which environment to use."""
    sources = Path(__file__).resolve().parent.parent
    setup = sources / "launch" / "setup_env.sh"
    if not setup.exists():
        return "install this project into that environment again, with what it depends on: pip install FOLDER"
    activate = Path(os.environ.get("PRETRAIN_VENV") or sources / ".venv") / "bin" / "activate"
    if activate.exists():
        return f"use the project's environment: source {activate}"
    return f"make the project's environment (bash {setup}) and use it (source {activate})"


# ---- nobody reads any more -------------------------------------------------------------------------------------------


class _Pipe(io.FileIO):
    """An output pipe whose reader may leave. Other pipes and sockets of the process are not concerned."""

    def __init__(self, number: int, goes_on: bool) -> None:
        super().__init__(number, "w", closefd=False)
        self._goes_on = goes_on

    def write(self, data: bytes) -> int:  # type: ignore[override]
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # what is still written is lost, without an error
            os.close(nowhere)
            if not self._goes_on:
                _readers_left.append(self.fileno())
                if threading.current_thread() is threading.main_thread():
                    raise SystemExit(READER_LEFT) from None
            return len(data)


_readers_left: list[int] = []
"""Descriptors of outputs that nobody reads any more, where that ends the command."""


def _watch_reader(stream: str, goes_on: bool) -> None:
    """Put a `_Pipe` under sys.stdout or sys.stderr where it is a pipe."""
    old = getattr(sys, stream)
    try:
        number = old.fileno()
        mode = os.fstat(number).st_mode
    except (AttributeError, OSError, ValueError):  # closed, or none at all
        return
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        return
    old.flush()
    new = io.TextIOWrapper(
        io.BufferedWriter(_Pipe(number, goes_on)),  # type: ignore[type-var]
        encoding=old.encoding,
        errors=old.errors,
        line_buffering=old.line_buffering,
        write_through=old.write_through,
    )
    setattr(sys, stream, new)


def _flush() -> None:
    """The last that a command does. The interpreter flushes too late for an exit code: it would exit with 120."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except SystemExit:
            pass
        except (OSError, ValueError):  # closed, or a full disk: the interpreter tells it
            pass
    if _readers_left:  # which a thread, or what else ends with the interpreter, may have found out
        os._exit(READER_LEFT)
