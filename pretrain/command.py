"""How every command starts and ends: it checks that its packages are installed, and survives a closed output pipe.

It uses only the standard library and parses on older Pythons, since it runs before anything else is imported.

    launch/train.py        python launch/train.py        in a source checkout
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
from functools import partial
from pathlib import Path
from types import TracebackType

LAUNCH = (
    "train",
    "average",
    "compare",
    "eval",
    "export",
    "generate",
    "import_model",
    "ladder",
    "plan",
    "provenance",
    "selftest",
    "serve",
    "submit",
    "supervise",
    "thin",
)
DATA_TOOLS = ("curate", "prepare", "rejects", "remove", "show", "verify")
COMMANDS = {f"pretrain-{name.replace('_', '-')}": f"pretrain.launch.{name}" for name in LAUNCH}
COMMANDS.update({f"pretrain-{name}": f"data_tools.{name}" for name in DATA_TOOLS})
"""The module of each installed command. pyproject.toml lists the same names."""
OURS = {"pretrain", "data_tools"}
OLDEST_PYTHON = (3, 11)
MISSING_PACKAGE, INTERRUPTED, READER_LEFT = 2, 128 + signal.SIGINT, 128 + signal.SIGPIPE
"""Exit codes: that of a wrong configuration, and those that a shell reports for a tool that SIGINT or SIGPIPE ended."""


def main() -> None:
    """Run the module of the installed command that was called, as `python -m MODULE` would."""
    import runpy  # the scripts in launch/ do not need it

    package, _, name = COMMANDS[Path(sys.argv[0]).name].rpartition(".")
    script = Path(__file__).resolve().parent.parent / "launch" / f"{name}.py"
    # After `pip install -e` the command runs from the source checkout, where the script is not part of a package.
    if package == "pretrain.launch" and script.exists():
        runpy.run_path(str(script), run_name="__main__")
    else:
        runpy.run_module(f"{package}.{name}", run_name="__main__", alter_sys=True)


def begin(name: str, goes_on: bool = False, interrupted: str = "") -> None:
    """Set up error handling for a command; its file calls this with `__name__` before any import that may fail.

    From then on a missing package gives a one-sentence error with exit code 2, and the command ends quietly when the
    reader of its output closes the pipe (as `| head` does). With `goes_on`, it keeps running without a reader, as a
    training run must. Ctrl-C gives exit code 130 and one line; `interrupted` is what this line says of the command's
    files. Characters that the terminal's encoding lacks are printed as escapes. When the file is imported instead of
    run, this does nothing.
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
    sys.excepthook = partial(_on_failure, interrupted)
    for stream in ("stdout", "stderr"):
        if isinstance(getattr(sys, stream), io.TextIOWrapper):
            getattr(sys, stream).reconfigure(errors="backslashreplace")
        _watch_reader(stream, goes_on)
    atexit.register(_flush)


# ---- a package is missing --------------------------------------------------------------------------------------------


def print_failure(error: BaseException) -> int:
    """Report on stderr what ended this process, and return the exit code.

    A missing package gives one sentence; anything else gives a traceback.
    """
    missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if not missing or missing in OURS:
        traceback.print_exception(type(error), error, error.__traceback__)
        return 1
    print(f"error: {sys.executable} lacks the package {missing}; {_remedy()}", file=sys.stderr)
    return MISSING_PACKAGE


def _on_failure(
    interrupted: str, _kind: type[BaseException], error: BaseException, _trace: TracebackType | None
) -> None:
    # The interpreter takes the exit code from an exception in the hook.
    if isinstance(error, KeyboardInterrupt):
        if os.environ.get("RANK", "0") == "0":  # a launcher interrupts all ranks
            print(f"interrupted; {interrupted}" if interrupted else "interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED)
    raise SystemExit(print_failure(error))


def _remedy() -> str:
    """The part of an error message that says which environment to use or how to create one."""
    sources = Path(__file__).resolve().parent.parent
    setup = sources / "launch" / "setup_env.sh"
    if not setup.exists():
        return "install this project and its dependencies into that environment again: pip install FOLDER"
    activate = Path(os.environ.get("PRETRAIN_VENV") or sources / ".venv") / "bin" / "activate"
    if activate.exists():
        return f"use the project's environment: source {activate}"
    return f"create the project's environment (bash {setup}) and use it (source {activate})"


# ---- the reader of the output has closed the pipe --------------------------------------------------------------------


class _Pipe(io.FileIO):
    """An output pipe whose reader may close it.

    This is handled per stream, because handling SIGPIPE would also affect the other pipes and sockets of the process.
    """

    def __init__(self, number: int, goes_on: bool) -> None:
        super().__init__(number, "w", closefd=False)
        self._goes_on = goes_on

    def write(self, data: bytes) -> int:  # type: ignore[override]
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # later writes are discarded without an error
            os.close(nowhere)
            if not self._goes_on:
                _readers_left.append(self.fileno())
                if threading.current_thread() is threading.main_thread():
                    raise SystemExit(READER_LEFT) from None
            return len(data)


_readers_left: list[int] = []
"""File descriptors of outputs whose reader has closed the pipe. `_flush` then ends the command."""


def _watch_reader(stream: str, goes_on: bool) -> None:
    """Make sys.stdout or sys.stderr write through a `_Pipe` if the stream is a pipe or a socket."""
    old = getattr(sys, stream)
    try:
        number = old.fileno()
        mode = os.fstat(number).st_mode
    except (AttributeError, OSError, ValueError):  # the stream is closed or missing
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
    """Flush the outputs as the last action of a command.

    The interpreter's own flush comes too late to choose an exit code: if it fails, the exit code is 120.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except SystemExit:
            pass
        except (OSError, ValueError):  # the stream is closed or the disk is full; the interpreter reports it
            pass
    # A thread or an exit handler may have noticed the closed pipe, but neither can end the process itself.
    if _readers_left:
        os._exit(READER_LEFT)
