"""How commands begin and end: a missing package, an old Python, a reader that leaves. Real processes and pipes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pretrain.command import COMMANDS, MISSING_PACKAGE, READER_LEFT
from support import ROOT
from support.launching import free_port
from support.tiny import TinyCorpus, events, run_arguments

SCRIPTS = sorted(path.relative_to(ROOT) for path in (ROOT / "launch").glob("*.py"))
MODULES = [f"data_tools.{name}" for name in ("curate", "prepare", "rejects", "remove", "show", "verify")]
ALL = [[str(script)] for script in SCRIPTS] + [["-m", module] for module in MODULES]
GO_ON = {"launch/train.py", "launch/supervise.py", "launch/quickstart_job.py"}
"""Nobody has to read what these write."""
LATE = {"launch/compare.py": ["a", "b"]}
"""Without these arguments it says what is missing before it loads any package."""
NEED_PACKAGES = [
    [*command, *LATE.get(command[0], [])] for command in ALL if command != ["launch/quickstart_job.py"]
]
"""The quickstart makes the environment first."""


def words(command: list[str]) -> str:
    return " ".join(command)


def test_each_command_is_tried_here() -> None:
    """A command is a file that runs by itself; each begins in the same way."""
    found = [*ROOT.glob("launch/*.py"), *ROOT.glob("data_tools/*.py")]
    mains = {path for path in found if '__name__ == "__main__"' in path.read_text()}
    tried = {ROOT / script for script in SCRIPTS} | {ROOT / f"{m.replace('.', '/')}.py" for m in MODULES}
    assert mains == tried
    assert all("\nbegin(__name__" in path.read_text() for path in mains)


def test_commands_work_in_every_folder(corpus: TinyCorpus, tmp_path: Path) -> None:
    """`-m data_tools.show` needs the project's folder; the script does not, as those in launch/."""
    for script, arguments in (("verify", [str(corpus.folder)]), ("prepare", ["--help", "input"])):
        command = [sys.executable, str(ROOT / "data_tools" / f"{script}.py"), *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr


# --- an interpreter that lacks the packages ---


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment without any package, of the Python that runs the tests."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder / "bin" / "python"


@pytest.mark.parametrize("command", NEED_PACKAGES, ids=words)
@pytest.mark.parametrize("environment", ["there", "absent"])
def test_a_missing_package_is_one_sentence(
    command: list[str], environment: str, bare_python: Path, tmp_path: Path
) -> None:
    venv = tmp_path / "venv"
    activate = venv / "bin" / "activate"
    if environment == "there":
        activate.parent.mkdir(parents=True)
        activate.touch()
    env = {"PATH": os.environ["PATH"], "PRETRAIN_VENV": str(venv)}
    done = subprocess.run(
        [bare_python, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )
    remedy = (
        f"bash {ROOT}/launch/setup_env.sh" if environment == "absent" else "use the project's environment"
    )
    assert done.returncode == MISSING_PACKAGE, done.stderr
    assert done.stderr.count("\n") == 1
    assert f"error: {bare_python} lacks the package " in done.stderr
    assert remedy in done.stderr and f"source {activate}" in done.stderr


def test_a_package_that_is_missed_later_is_one_sentence(tmp_path: Path, corpus: TinyCorpus) -> None:
    """train.py imports torch only when the configuration has been checked."""
    hidden = tmp_path / "hidden" / "torch"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n"
    )
    env = dict(os.environ, PYTHONPATH=str(hidden.parent))
    done = subprocess.run(
        [sys.executable, "launch/train.py", *run_arguments(corpus, tmp_path / "run")],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == MISSING_PACKAGE
    assert "lacks the package torch" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", NEED_PACKAGES, ids=words)
def test_a_defect_keeps_its_traceback(command: list[str], tmp_path: Path) -> None:
    """A module of this project that is missing is no matter of environments."""
    code = tmp_path / "code"
    for name in ("pretrain", "data_tools", "launch", "conf"):
        shutil.copytree(ROOT / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (
        "pretrain/config/run.py",
        "pretrain/reliability/journal.py",
        "pretrain/evaluate/compare.py",
        "data_tools/tables.py",
    ):
        (code / name).unlink()
    done = subprocess.run([sys.executable, *command], cwd=code, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "lacks the package" not in done.stderr


def old_pythons() -> list[str]:
    """Interpreters before 3.11 on this machine that work (shims of version managers may not)."""
    installed = [str(path) for path in Path.home().glob(".pyenv/versions/*/bin/python3")]
    named = [path for minor in range(8, 11) if (path := shutil.which(f"python3.{minor}"))]
    code = "import sys; sys.exit(not (3, 8) <= sys.version_info < (3, 11))"
    return [
        p for p in installed + named if subprocess.run([p, "-c", code], capture_output=True).returncode == 0
    ]


def test_an_old_python_is_told_so() -> None:
    pythons = old_pythons()
    if not pythons:
        pytest.skip("this machine has no Python from 3.8 to 3.10")
    for python in pythons:
        for command in ALL:
            done = subprocess.run([python, *command], cwd=ROOT, capture_output=True, text=True, timeout=60)
            assert done.returncode == MISSING_PACKAGE, (command, done.stderr)
            assert f"error: {python} is Python 3." in done.stderr and "3.11 or newer" in done.stderr
            assert done.stderr.count("\n") == 1


# --- nobody reads ---


def read_a_line(command: list[str], closed: str, first_line: bool = True) -> tuple[int, str]:
    """Exit code and the other stream's text of a command whose reader leaves, after one line or before the first."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, *command], cwd=ROOT, text=True, **streams) as process:
        left, other = (
            (process.stdout, process.stderr) if closed == "stdout" else (process.stderr, process.stdout)
        )
        if first_line:
            left.readline()
        left.close()
        text = other.read()
        return process.wait(60), text


@pytest.mark.parametrize("command", ALL, ids=words)
def test_a_command_ends_quietly_when_its_reader_has_left(command: list[str]) -> None:
    """What is written fits into the buffers, so that it fails at the very end, in the interpreter's own flush."""
    code, said = read_a_line([*command, "--help"], "stdout", first_line=False)
    assert said == ""
    assert code == (0 if words(command) in GO_ON else READER_LEFT)


@pytest.mark.parametrize("command", ALL, ids=words)
def test_a_complaint_that_nobody_reads(command: list[str]) -> None:
    code, said = read_a_line([*command, "no.such.key=1", "--no-such-option"], "stderr", first_line=False)
    assert said == ""
    assert code == (2 if words(command) in GO_ON else READER_LEFT)


LONG_OUTPUT = """
import sys
from pretrain.command import begin
begin("__main__", goes_on={goes_on})
for number in range(20_000):
    {write}
sys.stderr.write("the end\\n")
"""


@pytest.mark.parametrize(
    "write",
    [
        "print('line', number)",
        "sys.stdout.buffer.write(b'line\\n')",
        "__import__('rich.console').console.Console().print('line')",
        "__import__('logging').getLogger().handlers or __import__('logging').basicConfig(stream=sys.stdout); "
        "__import__('logging').error('line')",
    ],
    ids=["print", "buffer", "rich", "logging"],
)
@pytest.mark.parametrize("goes_on", [False, True])
def test_whoever_writes_the_output(write: str, goes_on: bool) -> None:
    code, said = read_a_line(["-c", LONG_OUTPUT.format(write=write, goes_on=goes_on)], "stdout")
    assert (code, said) == ((0, "the end\n") if goes_on else (READER_LEFT, ""))


def test_cleaning_up_is_done_before_the_end() -> None:
    code = LONG_OUTPUT.format(goes_on=False, write="print('line')").replace(
        "for number", "import atexit; atexit.register(lambda: sys.stderr.write('cleaned up'))\nfor number"
    )
    assert read_a_line(["-c", code], "stdout") == (READER_LEFT, "cleaned up")


@pytest.mark.parametrize("where", ["thread", "socket", "other pipe"])
def test_other_pipes_and_threads_are_not_concerned(where: str) -> None:
    """Only the main thread ends for its output; another broken pipe is the error that it was."""
    code = {
        "thread": "import threading; t = threading.Thread(target=lambda: [print('x' * 99) for _ in range(9999)]); "
        "t.start(); t.join(); sys.stderr.write('went on')",
        "socket": "import socket; a, b = socket.socketpair(); b.close(); a.send(b'x')",
        "other pipe": "import os; r, w = os.pipe(); os.close(r); os.write(w, b'x')",
    }[where]
    status, said = read_a_line(
        ["-c", f"import sys\nfrom pretrain.command import begin\nbegin('__main__')\n{code}"],
        "stdout",
        first_line=False,
    )
    if where == "thread":
        assert (status, said) == (READER_LEFT, "went on")  # at the flush in the end
    else:
        assert status == 1
        assert "BrokenPipeError" in said


def test_show_a_corpus_to_a_reader_of_one_line(corpus: TinyCorpus) -> None:
    """As `python -m data_tools.show DIR | head -1`, in a shell."""
    line = f"{sys.executable} -m data_tools.show {corpus.folder} | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout.splitlines()[0] == str(corpus.folder)
    assert done.stdout.splitlines()[-1] in ("0", str(READER_LEFT))


@pytest.mark.integration
@pytest.mark.parametrize("how", ["alone", "deepspeed", "supervised"])
def test_a_run_goes_on_without_a_reader(how: str, corpus: TinyCorpus, tmp_path: Path) -> None:
    """Both streams of everything that belongs to the run go to `head -1`; the run finishes, in one attempt."""
    run_dir = tmp_path / "run"
    launcher = [
        str(Path(sys.executable).parent / "deepspeed"),
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
    ]
    train = ["launch/train.py", *run_arguments(corpus, run_dir)]
    command = {
        "alone": [sys.executable, *train],
        "deepspeed": [*launcher, *train],
        "supervised": [sys.executable, "launch/supervise.py", "--", *launcher, *train],
    }[how]
    env = dict(os.environ, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}", OMP_NUM_THREADS="1")
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        code = process.wait(300)
    names = [event["event"] for event in events(run_dir)]
    assert names.count("started") == 1 and names.count("finished") == 1
    assert "resumed" not in names
    if how != "deepspeed":  # its launcher's own exit code is not ours
        assert code == 0


# --- installed ---


def test_installed_commands_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == dict.fromkeys(COMMANDS, "pretrain.command:main")
    for module in COMMANDS.values():
        path = module.removeprefix("pretrain.").replace(".", "/") + ".py"
        assert (ROOT / path).is_file()
