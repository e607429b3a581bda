"""Every command in the documentation is known, and every key, flag, file and link in it exists.

A command that takes a configuration is composed and validated here, most of them by the real script with `--cfg job`,
which starts nothing; and the batch, the ranks and the sequence length of each training run fit together. Commands of
other kinds have a check of their own below; that they work is shown by the tests named there.
"""

from __future__ import annotations

import ast
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml

from data_tools.config import PrepareConfig
from data_tools.curate import CurateConfig
from pretrain.command import COMMANDS
from pretrain.config import SubmitConfig, TrainConfig, load_config
from pretrain.config.words.arguments import presets
from pretrain.config.words.kinds import find_kind
from pretrain.data.inputs import check_lengths
from pretrain.errors import ConfigError
from pretrain.generation.protocol import ChatBody
from support import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "README.zh.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
COMPOSE = ROOT / "docker" / "compose.yaml"
SHELL = {"bash", "sh", "shell", "console", "zsh"}


def code_blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of each fenced block."""
    return re.findall(r"^```([^\n`]*)\n(.*?)^```$", text, flags=re.M | re.S)


def commands_of(block: str) -> list[list[str]]:
    """The commands of a shell block as words: continued lines joined, comments left out."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def documented_commands() -> list[list[str]]:
    """Each different command once."""
    found = {
        tuple(words)
        for page in PAGES
        for language, block in code_blocks(page.read_text())
        if language in SHELL
        for words in commands_of(block)
    }
    return [list(words) for words in sorted(found)]


# --- what is checked of each kind of command ---


def run_script(target: str, arguments: list[str]) -> str:
    """Run a script (a path) or module (a name) of the project; its output. It must exit with 0."""
    how = [target] if target.endswith(".py") else ["-m", target]
    done = subprocess.run(
        [sys.executable, *how, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


TRAINING = {"launch/train.py": (TrainConfig, "config"), "launch/submit.py": (SubmitConfig, "submit")}
"""Scripts whose many commands are read within this process, which is quicker."""
SHORTEST_CHUNK_TOKENS, CHUNK_TOKENS = 4096, 262144
"""Tokens in the chunks of the smallest corpora and of large ones, where `chunk_tokens` is not given."""


def check_script(target: str, arguments: list[str], ranks: int = 1) -> None:
    """Help works, overrides compose and validate; what arguments of other forms do is for the script's own tests."""
    if target in TRAINING and "--help" not in arguments:
        check_training(target, arguments, ranks)
    elif "--help" in arguments or not any("=" in argument for argument in arguments):
        assert run_script(target, ["--help"]).strip()
    else:
        extra: list[str] = [] if "--cfg" in arguments else ["--cfg", "job"]
        assert ":" in run_script(target, [*arguments, *extra])


def check_training(target: str, arguments: list[str], ranks: int) -> None:
    """The run holds at its ranks: the batch divides over them, and the sequence length divides the chunks."""
    schema, config_name = TRAINING[target]
    if "--cfg" in arguments:  # which only prints
        load_config(schema, [word for word in arguments if word not in ("--cfg", "job")], config_name)
        return
    config = load_config(schema, arguments, config_name)
    size, local = ranks, None
    if isinstance(config, SubmitConfig):
        size, local = config.cluster.world_size, config.cluster.world_size // config.cluster.nodes
    config.grad_accum_steps(size)
    config.engine.check_ranks(size, local)
    for source in config.data.corpora():
        folder = str(Path(source.manifest).parent)
        chunk_tokens = documented_chunks().get(folder, CHUNK_TOKENS)
        check_lengths([stage.sequence_length for stage in config.stages], chunk_tokens, source.manifest)


@cache
def documented_chunks() -> dict[str, int]:
    """The tokens per chunk of each corpus that a documented command prepares, by its folder."""
    found = {}
    for words in documented_commands():
        if words[:3] == ["python", "-m", "data_tools.prepare"] and "--help" not in words:
            given = dict(word.split("=", 1) for word in words[3:])
            found[given["output"]] = int(given.get("chunk_tokens", SHORTEST_CHUNK_TOKENS))
    return found


def hostfile_ranks(path: str) -> int:
    """The ranks of a host file: those of docker/, or the one that docs/multinode.md shows."""
    known = ROOT / path
    text = known.read_text() if known.exists() else (ROOT / "docs/multinode.md").read_text()
    return sum(int(slots) for slots in re.findall(r"^\S+ slots=(\d+)$", text, flags=re.M))


def script_of(module: str) -> str:
    """What runs the module of an installed command in the folder of the sources."""
    assert module in COMMANDS.values()
    in_launch = module.removeprefix("pretrain.launch.")
    return module if in_launch == module else f"launch/{in_launch}.py"


def check_deepspeed(arguments: list[str]) -> None:
    """The launcher accepts its flags, and the script what follows it. Launching: tests of training, quickstart."""
    from deepspeed.launcher.runner import parse_args

    with redirect_stderr(io.StringIO()):
        parsed = parse_args(arguments)
    script = parsed.user_script
    if parsed.no_python or parsed.module:  # as it is installed
        script = script_of(COMMANDS[script] if parsed.no_python else script)
    if "--hostfile" in arguments:
        ranks = hostfile_ranks(parsed.hostfile)
    else:
        ranks = parsed.num_gpus if parsed.num_gpus > 0 else 8  # all of a node's GPUs
    check_script(script, parsed.user_args, ranks)


def check_srun(arguments: list[str]) -> None:
    """One task per rank. Run by: test_launched.py, test_slurm.py."""
    options = dict(word.removeprefix("--").split("=") for word in arguments if word.startswith("--"))
    words = [word for word in arguments if not word.startswith("--")]
    assert words[0] == "python"
    check_script(words[1], words[2:], int(options["nodes"]) * int(options["ntasks-per-node"]))


def check_python(arguments: list[str]) -> None:
    if arguments[0] == "-m" and arguments[1] == "pytest":
        return check_paths(arguments[2:])
    if arguments[0] == "launch/supervise.py":
        return check_supervised(arguments[1:])
    target, rest = (arguments[1], arguments[2:]) if arguments[0] == "-m" else (arguments[0], arguments[1:])
    return check_script(target, rest)


def check_supervised(arguments: list[str]) -> None:
    """The options exist, and what follows them is a command known here. Run by: test_supervise.py."""
    at = arguments.index("--")
    assert {word for word in arguments[:at] if word.startswith("--")} <= {"--attempts", "--grace-s"}
    check(arguments[at + 1 :])


def check_bash(arguments: list[str]) -> None:
    """The script exists and knows the flags. Run by: test_quickstart.py, every test run (run.sh, setup_env.sh)."""
    script = ROOT / arguments[0]
    for flag in arguments[1:]:
        if flag.startswith("--"):
            assert re.search(rf"{re.escape(flag)}\b", script.read_text()), (
                f"{arguments[0]} does not know {flag}"
            )
    if script.name == "run.sh":
        check_paths(arguments[1:])


def check_docker(arguments: list[str]) -> None:
    """Build targets exist, and what follows the image is a command known here. Run by: test_container.py."""
    if arguments[0] == "build":
        target = arguments[arguments.index("--target") + 1]
        assert re.search(rf"^FROM \S+ AS {target}$", (ROOT / "docker/Dockerfile").read_text(), flags=re.M)
        check_paths([arguments[arguments.index("-f") + 1]])
    elif arguments[0] == "compose":
        assert arguments[1:3] == ["-f", str(COMPOSE.relative_to(ROOT))]
        assert arguments[3:] in (["up"], ["stop"], ["down"])
    elif arguments[0] == "run":
        image = next(i for i, word in enumerate(arguments) if word.startswith("pretrain:"))
        check(arguments[image + 1 :])
    elif arguments[:3] == ["buildx", "imagetools", "inspect"]:
        assert re.search(
            rf"^ARG \w+={arguments[3]}@sha256:", (ROOT / "docker/Dockerfile").read_text(), flags=re.M
        )
    else:
        assert arguments[0] in ("inspect", "rm", "stop") and arguments[-1] == "first"


def check_pip(arguments: list[str]) -> None:
    """Run by: test_install.py; what is installed from a lock file, by launch/setup_env.sh."""
    if "--require-hashes" in arguments:
        check_paths([arguments[arguments.index("-r") + 1]])
    else:
        assert arguments == ["install", "."]


def check_export(arguments: list[str]) -> None:
    """Variables of programs and of the compose file; the overrides in them are checked as part of their command."""
    for name, value in (word.split("=", 1) for word in arguments):
        if name in VARIABLES:
            assert re.search(rf"\b{name}\b", (ROOT / VARIABLES[name]).read_text())
            continue
        assert f"${{{name}:" in COMPOSE.read_text(), f"{COMPOSE.name} does not use {name}"
        if name == "TRAIN":
            for service in yaml.safe_load(COMPOSE.read_text())["services"].values():
                check(shlex.split(re.sub(r"\$\{TRAIN:[^}]*\}", value, service["command"])))


def check_curl(arguments: list[str]) -> None:
    """A request to launch/serve.py, which it would answer. Run by: test_server.py."""
    url, option, header, data, body = arguments
    assert url == "http://127.0.0.1:8000/v1/chat/completions"
    assert (option, header, data) == ("-H", "content-type: application/json", "-d")
    ChatBody.model_validate_json(body)


def check_mkdir(arguments: list[str]) -> None:
    assert arguments[0] == "-p"


def check_paths(arguments: list[str]) -> None:
    for path in arguments:
        assert path.startswith("-") or (ROOT / path.split("::")[0]).exists(), f"{path} does not exist"


def check_activate(arguments: list[str]) -> None:
    """Made by launch/setup_env.sh, which every test run has called."""
    assert arguments == [".venv/bin/activate"]


def check_stop_file(arguments: list[str]) -> None:
    """A request to stop: tests of resilience and training."""
    from pretrain.reliability.stop import STOP_FILE

    assert [Path(argument).name for argument in arguments] == [STOP_FILE]


def check_pre_commit(arguments: list[str]) -> None:
    assert arguments in (["install"], ["run", "--all-files"])


VARIABLES = {"DS_ACCELERATOR": "pretrain/device.py", "PRETRAIN_TORCH": "launch/setup_env.sh"}
"""Where a variable of the environment is read."""

CHECKS: dict[str, Callable[[list[str]], None]] = {
    "bash": check_bash,
    "curl": check_curl,
    "deepspeed": check_deepspeed,
    "docker": check_docker,
    "export": check_export,
    "mkdir": check_mkdir,
    "pip": check_pip,
    "pre-commit": check_pre_commit,
    "python": check_python,
    "source": check_activate,
    "srun": check_srun,
    "touch": check_stop_file,
}


def check(words: list[str]) -> None:
    """Fail where a command is unknown or wrong."""
    if "=" in words[0]:
        check_export(words[:1])
        check(words[1:])
    elif words[0] in COMMANDS:
        check_script(script_of(COMMANDS[words[0]]), words[1:])
    else:
        assert words[0] in CHECKS, f"{words[0]} is no command that this test knows: {shlex.join(words)}"
        CHECKS[words[0]](words[1:])


# --- the documentation keeps to it ---


@pytest.mark.parametrize("words", documented_commands(), ids=shlex.join)
def test_command(words: list[str]) -> None:
    check(words)


def test_both_readmes_have_the_same_commands() -> None:
    english, chinese = (code_blocks((ROOT / name).read_text()) for name in ("README.md", "README.zh.md"))
    assert english
    assert english == chinese


def test_first_screen_has_the_two_commands() -> None:
    for name in ("README.md", "README.zh.md"):
        first_screen = "\n".join((ROOT / name).read_text().splitlines()[:25])
        assert "\nbash launch/quickstart.sh\nbash tests/run.sh\n" in first_screen


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    for path in re.findall(r"`((?:pretrain|launch|conf|data_tools|docker|docs|tests)/[\w./-]*)`", prose):
        assert (ROOT / path).exists(), f"{page.name}: {path}"


def is_defined(name: str) -> bool:
    """Whether a name like `data.order.Order.locate` exists, below pretrain/ or from the root. Imports nothing."""
    parts = name.split(".")
    for place in (ROOT / "pretrain", ROOT):
        for n in range(1, len(parts)):
            module = place.joinpath(*parts[:n]).with_suffix(".py")
            if module.exists():
                return _is_defined_in(ast.parse(module.read_text()), parts[n:])
    return False


def _is_defined_in(scope: ast.AST, parts: list[str]) -> bool:
    if not parts:
        return True
    for node in getattr(scope, "body", []):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if parts[0] in (getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)):
            return _is_defined_in(node, parts[1:])
    return False


def unknown_names(text: str) -> list[str]:
    """Names of code in a page, as `module.function()` or `module.Class`, and test files, that do not exist."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    dotted = re.findall(r"`([a-z_]+(?:\.\w+)+)(\(\))?`", prose)
    names = [name for name, call in dotted if call or re.search("[A-Z]", name)]
    files = re.findall(r"`((?:test_\w+|recording)\.py)`", prose)
    missing = [name for name in files if not any((ROOT / "tests").rglob(name))]
    return missing + [name for name in names if not is_defined(name)]


def test_the_map_names_what_exists() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    assert text.count("()`") > 30
    assert unknown_names(text) == []
    packages = {path.parent.name for path in (ROOT / "pretrain").glob("*/__init__.py")}
    assert packages <= set(re.findall(r"`pretrain/(\w+)/`", text))


def test_a_wrong_name_is_seen() -> None:
    wrong = ["data.order.Order.nothing", "data.orders.locate", "train.loop.nothing", "model.decoder.LossSum"]
    assert unknown_names("".join(f"`{name}()` " for name in wrong)) == wrong
    assert unknown_names("`test_nothing.py` `data.order.Orders`") == ["test_nothing.py", "data.order.Orders"]
    assert (
        unknown_names("`data.order.Order.locate()` `data.stages` `engine.objectives.training_loss()`") == []
    )


def test_the_example_of_lanes_is_what_the_order_gives() -> None:
    from pretrain.config import DataConfig
    from pretrain.config.data_stages import plan_stages
    from pretrain.data.order import Order, SourceSize

    data = DataConfig(manifest="unused", sequence_length=1024, window_chunks=2)
    order = Order([SourceSize(8, 4096, 4096)], plan_stages(data, 4), lanes=2, window_chunks=2, seed=1234)
    text = (ROOT / "docs/architecture.md").read_text()
    for lane in (0, 1):
        [line] = re.findall(rf"^lane {lane} (.*)$", text, flags=re.M)
        shown = re.findall(r"(\d)\.(\d)", line)
        where = order.locate(lane + 2 * np.arange(len(shown)))
        assert shown == [(str(c), str(s)) for c, s in zip(where.chunk, where.sequence, strict=True)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_compile(page: Path) -> None:
    for language, block in code_blocks(page.read_text()):
        if language == "python":
            compile(block, page.name, "exec")


@pytest.mark.parametrize(
    "group", ["model", "engine", "schedule", "optim", "data", "logging", "cluster", "experiment"]
)
def test_configuration_page_lists_every_file(group: str) -> None:
    row = re.search(rf"^\| `{group}` \|(.*)\|$", (ROOT / "docs/configuration.md").read_text(), flags=re.M)
    assert row is not None
    listed = set(re.findall(r"`(?!launch/)([\w./]+)`", row.group(1)))
    assert listed == set(presets(ROOT / "conf" / group)) - {"none"}


def test_every_fault_has_a_named_test() -> None:
    """The table of docs/reliability.md: rows 1 to 21, each with tests that exist, or the issue that will bring them."""
    text = (ROOT / "docs/reliability.md").read_text().partition("## Faults, and how long they take")[2]
    rows = re.findall(r"^\| (\d+) \|.*\| ([^|]*) \|$", text, flags=re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 22))
    names = {name for tests in names_of_tests().values() for name in tests}
    for number, tests in rows:
        cited = re.findall(r"`(test_\w+)`", tests)
        assert cited, f"row {number}"
        for test in cited:
            assert any(name.startswith(test) for name in names), f"row {number}: {test}"


def texts_of_the_program() -> Iterator[tuple[Path, str]]:
    """Every text in the program's code, with its file."""
    files = [*ROOT.glob("launch/*.py"), *ROOT.glob("pretrain/**/*.py"), *ROOT.glob("data_tools/**/*.py")]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield path, node.value


@cache
def names_of_tests() -> dict[str, list[str]]:
    """The names of the tests in each file."""
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    return {file: re.findall(r"^ *def (test_\w+)", text, flags=re.M) for file, text in files.items()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_a_page_names_exist(page: Path) -> None:
    """In backquotes, with or without the file: `test_x`, `test_file.py`, `test_file.py::test_x`; some are cut short."""
    defined = names_of_tests()
    for named in re.findall(r"`(?:tests/[\w/]+/)?(test_\w+(?:\.py)?(?:::test_\w+)?)`", page.read_text()):
        file, _, test = named.rpartition("::")
        if named.endswith(".py"):
            assert named in defined
        else:
            among = defined[file] if file else [name for names in defined.values() for name in names]
            assert any(name.startswith(test) for name in among), named


def test_messages_recommend_only_what_exists() -> None:
    """Files, modules and keys in the texts of the program, which a user reads as advice."""
    schemas = (SubmitConfig, CurateConfig, PrepareConfig)
    groups = {name for schema in schemas for name in schema.__dataclass_fields__}
    elsewhere = {"cluster.gpu", "data.tokens"}  # of launch/plan.py
    elsewhere |= {"curation.own_stages"}  # of a stage that curation does not have yet
    seen = 0
    for path, text in texts_of_the_program():
        for name in re.findall(r"(?<![/\w])(?:launch|data_tools|docs|conf|benchmarks)/[\w./-]*\w", text):
            assert (ROOT / name).exists() or "://" in text, f"{path}: {name}"
        for name in re.findall(r"-m (data_tools\.\w+)", text):
            assert (ROOT / f"{name.replace('.', '/')}.py").exists(), f"{path}: {name}"
        for key in re.findall(r"(?<![\w./])(?:[a-z_]+\.)+[a-z_0-9]+(?==)", text):
            seen += 1
            if key.split(".")[0] in groups and key not in elsewhere:
                assert any(find_kind(schema, key) for schema in schemas), f"{path}: {key}"
    assert seen > 50


# --- and the checks see what is wrong ---


@pytest.mark.parametrize(
    "line",
    [
        "wget example.org",
        "bash launch/quickstart.sh --nonsense",
        "bash tests/run.sh tests/test_nothing.py",
        "python launch/train.py run_dir=x data.manifest=y total_steps=5 optim.learning_rate=1",
        "python launch/train.py run_dir=x data.manifest=y total_steps=5 model=2b",
        "python launch/nothing.py a=b",
        "deepspeed --num_gpu_s 2 launch/train.py run_dir=x data.manifest=y total_steps=5",
        "deepspeed --num_gpus 2 launch/train.py run_dir=x data.manifest=y",
        "docker build -f docker/Dockerfile --target tpu -t pretrain:tpu .",
        "docker run pretrain:cpu nonsense",
        "python launch/supervise.py --tries 3 -- deepspeed launch/train.py --help",
        "python launch/supervise.py -- deepspeed launch/train.py run_dir=x data.manifest=y",
        "docker compose -f docker/compose.yaml dance",
        "export TRAINING='model=tiny'",
        "export TRAIN='model=tiny total_step=5'",
        "touch runs/first/halt",
        "pip install torch",
        "pretrain-train run_dir=x data.manifest=y total_steps=5 model=2b",
        "pretrain-nothing --help",
        "deepspeed --num_gpus 2 --module pretrain.launch.nothing --help",
        "PRETRAIN_TORCHES=existing bash launch/setup_env.sh",
        "deepspeed --hostfile hostfile launch/train.py run_dir=x data.manifest=y total_steps=5",
        "deepspeed --num_gpus 3 launch/train.py run_dir=x data.manifest=y total_steps=5",
        "python launch/submit.py cluster=slurm run_dir=x data.manifest=y total_steps=5 cluster.nodes=4",
        "python launch/train.py run_dir=x data.manifest=corpora/web/m.json total_steps=5 data.sequence_length=8192",
        "srun --nodes=2 --ntasks-per-node=8 python launch/train.py run_dir=x data.manifest=y total_steps=5",
    ],
)
def test_a_wrong_command_is_seen(line: str) -> None:
    [words] = commands_of(line)
    with pytest.raises((AssertionError, SystemExit, ConfigError)):
        check(words)


def test_continued_lines_and_comments() -> None:
    assert commands_of("a b \\\n  c='d e' # f\n\n# g\nh\n") == [["a", "b", "c=d e"], ["h"]]
