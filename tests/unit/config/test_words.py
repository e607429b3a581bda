"""What people type: paths of every kind, numbers as they are written, the habits of other programs."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.config import PrepareConfig
from data_tools.curate import CurateConfig
from pretrain.config import SubmitConfig, TrainConfig, load_config, run_command, stored_config, to_dict
from pretrain.config.words.arguments import path_in
from pretrain.config.words.build import whole_number
from pretrain.config.words.help import meanings_of
from pretrain.config.words.kinds import find_kind, leaf_keys
from pretrain.config.words.names import NOT_HERE, OF_OTHERS
from pretrain.config.words.values import unquoted
from pretrain.errors import ConfigError
from support import ROOT

BASE = ["run_dir=r", "data.manifest=m", "total_steps=100"]


def train(*words: str) -> TrainConfig:
    return load_config(TrainConfig, [*BASE, *words], "config")


def prepare(*words: str) -> PrepareConfig:
    return load_config(PrepareConfig, ["output=o", *words])


def refused(schema: type, *words: str) -> str:
    base = BASE if issubclass(schema, TrainConfig) else ["input=i", "output=o"]
    config_name = {TrainConfig: "config", SubmitConfig: "submit"}.get(schema)
    with pytest.raises(ConfigError) as raised:
        load_config(schema, [*base, *words], config_name)
    text = str(raised.value)
    assert "\n" not in text
    for word in ("full_key", "Lexer", "mismatched", "viable", "ListConfig", "Hydra's grammar", "https"):
        assert word not in text
    return text


# ---- paths -----------------------------------------------------------------------------------------------------------

PATHS = [
    "runs/实验", "runs/lr=3e-4", "my run (1)", "a,b", "data/[1]/x", "{a}", "tail ", " head", "-x", "100", "1e3", "true",
    "null/x", "it's", 'the "best"', "back\\slash", "a:b", "a#b", "a$b", "$HOME/x", "50%", "@x", "a\tb", "?", "*", "&&",
    "[2024] notes", "[]]", "'half", "ünï", "😀",
]  # fmt: skip


def test_a_path_is_taken_as_it_stands() -> None:
    assert train("run_dir=runs/实验/lr=3e-4 (1)").run_dir == "runs/实验/lr=3e-4 (1)"
    for path in PATHS:
        assert prepare(f"input=/{path}", f"output={path}").output == path
        assert prepare(f"input=/{path}").input == [f"/{path}"]
        assert path_in(f"run_dir={path}") == path


@settings(max_examples=25, deadline=None)
@given(st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), min_size=1))
def test_any_path_comes_back(path: str) -> None:
    """Those that begin with ~, stand in quotes, or have `${` mean something else, and can be written another way."""
    if "${" not in path:
        assert prepare(f"input=/{path}").input == [f"/{path}"]
        if path[0] != "~" and unquoted(path) == path and path not in ("???", "null"):
            assert path_in(f"run_dir={path}") == path


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("'\"\\, []")), min_size=1))
def test_any_paths_in_quotes_come_back_in_a_list(paths: list[str]) -> None:
    """As launch/quickstart_job.py quotes those of its user."""
    paths = [f"/{path}" for path in paths if "${" not in path]
    text = ", ".join(
        "'" + re.sub(r"(\\+)(?='|\Z)", r"\1\1", path).replace("'", "\\'") + "'" for path in paths
    )
    assert prepare(f"input=[{text}, x]").input == [*paths, "x"]


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("one path", ["one path"]),
        ("[my texts/]", ["my texts/"]),
        ("[data/a=b/a.txt,/data/a(1).txt]", ["data/a=b/a.txt", "/data/a(1).txt"]),
        ("[数据/文本.txt, a-{000..099}.tar]", ["数据/文本.txt", "a-{000..099}.tar"]),
        ("""['a,b', "it's", x[1].txt]""", ["a,b", "it's", "x[1].txt"]),
        ("[[1].txt, {a}]", ["[1].txt", "{a}"]),
        ("[100, 1e3, true, null]", ["100", "1e3", "true", "null"]),
        ("[ a , b , ]", ["a", "b"]),
        ("a,b.txt", ["a,b.txt"]),
    ],
)
def test_lists_of_paths(text: str, paths: list[str]) -> None:
    assert prepare(f"input={text}").input == paths


def test_a_home_folder_is_found_and_no_folder_named_tilde_arises() -> None:
    home = str(Path.home())
    config = train("run_dir=~/a b", "init_from=~", "data.cache_dir=~/c", "checkpoint.target=~/t")
    assert (config.run_dir, config.init_from, config.data.cache_dir, config.checkpoint.target) == (
        *(f"{home}/a b", home, f"{home}/c", f"{home}/t"),
    )
    assert prepare("input=[~/x, ./~/y]", "tokenizer.path=~/t").input == [f"{home}/x", "./~/y"]
    sources = train(
        "data.sources=[{name: a, manifest: ~/网页 (1)/m.json}]", "data.manifest=null"
    ).data.sources
    assert sources[0].manifest == f"{home}/网页 (1)/m.json"
    assert "./~nobody-x/a" in refused(TrainConfig, "run_dir=~nobody-x/a")
    assert path_in("run_dir=~/a b") == f"{home}/a b"


def test_every_key_that_names_a_path_is_known_as_one() -> None:
    """A key whose meaning speaks of a file, folder or path, and that is no path key, is one that was forgotten."""
    words = ("path", "folder", "file", "files", "dir")
    for schema in (SubmitConfig, CurateConfig):
        for key, kind in leaf_keys(schema).items():
            group = find_kind(schema, key.rpartition(".")[0]) if "." in key else None
            owner = group.type if group else schema
            meaning = meanings_of(owner).get(key.rpartition(".")[2], "").lower()
            begins = meaning.split(" ")[:2]
            if kind.holds_text and set(words) & {word.strip(",;.") for word in begins}:
                assert kind.mark is not None, f"{key}: {meaning}"


def test_quotes_around_a_path_are_not_part_of_it() -> None:
    """Hydra's grammar needed them; what people have in their scripts goes on to mean the same folder."""
    assert train("run_dir='a b'").run_dir == "a b"
    assert train('run_dir="it\'s (1)"').run_dir == "it's (1)"
    assert train("run_dir='it\\'s'").run_dir == "it's"
    assert train("run_dir=./'a'").run_dir == "./'a'"


def test_null_is_none_only_where_a_path_may_be_left_out() -> None:
    assert train("init_from=null").init_from is None
    assert train("init_from=./null").init_from == "./null"
    assert train("run_dir=null").run_dir == "null"
    assert "run_dir=" in refused(TrainConfig, "run_dir=")


def test_interpolations_are_those_of_the_command_line_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_FOLDER", "/scratch/我")
    assert train("run_dir=${oc.env:SOME_FOLDER}/a (${seed})").run_dir == "/scratch/我/a (1234)"
    assert "run_dir=${HOME}/x" in refused(TrainConfig, "run_dir=${HOME}/x")
    assert "oc.env:NAME" in refused(TrainConfig, "seed=${seed}")
    with pytest.raises(ConfigError, match="not resolved"):
        stored_config(to_dict(train()) | {"run_dir": "${oc.env:SOME_FOLDER}"}, "config.json")


def test_the_folder_of_a_corpus_stands_for_its_manifest(tmp_path: Path) -> None:
    config = train(f"data.manifest={tmp_path}", f"evaluation.manifest={tmp_path}/held.json")
    assert config.data.manifest == f"{tmp_path}/manifest.json"
    assert config.evaluation.manifest == f"{tmp_path}/held.json"
    assert train("data.manifest=s3://b/c/").data.manifest == "s3://b/c/manifest.json"
    [source] = train(f"data.sources=[{{name: a, manifest: {tmp_path}}}]", "data.manifest=null").data.sources
    assert source.manifest == f"{tmp_path}/manifest.json"


def test_texts_that_are_no_paths_are_taken_as_they_stand_too() -> None:
    config = load_config(
        SubmitConfig,
        [*BASE, "cluster.job_name=实验 (1), a=b", "cluster.setup=[module load cuda/12.4, 'echo a, b']"],
        "submit",
    )
    assert config.cluster.job_name == "实验 (1), a=b"
    assert config.cluster.setup == ["module load cuda/12.4", "echo a, b"]
    assert prepare("input=x", "card.description=Text: a, b").card.description == "Text: a, b"
    keep = load_config(CurateConfig, ["input=x", "output=y", "curation.language.keep=[no, zh]"])
    assert keep.curation.language.keep == ["no", "zh"]


# ---- numbers and other values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2e10", 20_000_000_000), ("20B", 20_000_000_000), ("1_000", 1000), ("1e6", 1_000_000),
        ("1,000,000", 1_000_000), ("1.5B", 1_500_000_000),
        ("300M", 300_000_000), ("2t", 2_000_000_000_000), ("2.0", 2), ("-1", -1),
        ("1.5", None), ("8k", None), ("1,00", None), ("", None), ("1e", None), ("1e999999999", None), ("ten", None),
        ("1e-3", None), ("٣", 3),
    ],
)  # fmt: skip
def test_whole_numbers_as_people_write_them(text: str, number: int | None) -> None:
    assert whole_number(text) == number


@given(st.integers(-(10**25), 10**25))
def test_every_whole_number_is_read_in_each_form(number: int) -> None:
    assert all(whole_number(text) == number for text in (str(number), f"{number:_}", f"{number:,}", number))


def test_numbers_reach_the_configuration() -> None:
    assert train("total_steps=null", "total_tokens=20B").total_tokens == 20_000_000_000
    config = train(
        "data.stages=[{start_tokens: 2e6, global_batch_sequences: 64}]", "micro_batch_sequences=auto"
    )
    assert (config.data.stages[0].start_tokens, config.micro_batch_sequences) == (2_000_000, "auto")
    assert train("engine.deepspeed_overrides={a: {b: 1}, c: [x, 2.5, true]}").engine.deepspeed_overrides == {
        "a": {"b": 1},
        "c": ["x", 2.5, True],
    }
    assert train("engine.deepspeed_overrides.a.b=1e-3").engine.deepspeed_overrides == {"a": {"b": 1e-3}}
    assert "total_steps=1.5" in refused(TrainConfig, "total_steps=1.5")
    assert "8k is not a whole number" in refused(TrainConfig, "data.sequence_length=8k")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("logging.wandb_tags=[a, b", "no closing ]"),
        ("data.sources=[{name: a]", "data.sources"),
        ("data.sources=[{name}]", "no value for name"),
        ("data.sources=[1]", "data.sources"),
        ("data.sources=5", "a list"),
        ("watchdog=5", "watchdog.KEY=VALUE"),
        ("model.dropout=true", "model.dropout=true is not a number"),
        ("data.verify_chunks=maybe", "true or false"),
        ("schedule.name=cosin", "did you mean cosine?"),
        ("total_steps=", "total_steps= is not a whole number"),
        ("seed=null", "seed=null is not a whole number"),
    ],
)
def test_values_that_do_not_fit_are_one_sentence(word: str, said: str) -> None:
    assert said in refused(TrainConfig, word)


# ---- the habits of other programs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--learning-rate", "1e-3"], "options are KEY=VALUE; did you mean optim.lr=1e-3?"),
        (["--learning-rate=1e-3"], "did you mean optim.lr=1e-3?"),
        (["--model=1b"], "options are KEY=VALUE; did you mean model=1b?"),
        (["--version"], "options are KEY=VALUE"),
        (["-lr", "3e-4"], "did you mean optim.lr=3e-4?"),
        (["--sequence-length", "2048"], "did you mean data.sequence_length=2048?"),
        (["--config-name", "my"], "did you mean experiment=my?"),
        (["lr=1"], "did you mean optim.lr?"),
        (["train_micro_batch_size_per_gpu=1"], "did you mean micro_batch_sequences?"),
        (["pipe_parallel_size=2"], "no pipeline parallelism"),
        (["model_parallel_size=2"], "no tensor parallelism"),
        (["optim.lr", "=", "3"], "write optim.lr=VALUE without"),
        (["optim.lr"], "write optim.lr=VALUE"),
        (["runs/a"], "is not KEY=VALUE"),
        (["~model"], "cannot be taken away"),
        (["hydra.run.dir=x"], "hydra.run.dir=x: Hydra's own settings have no effect"),
        (["+hydra.job.chdir=true"], "no effect"),
        (["hydra/launcher=basic"], "no effect"),
        (["cluster.nodes=2"], "launch/submit.py"),
        (["model@x=tiny"], "model@x is not a key"),
        (["model=8b"], "tiny, 125m, 350m, 1b, 3b, 7b, 13b, 70b"),
    ],
)
def test_what_was_meant_is_said(words: list[str], said: str) -> None:
    assert said in refused(TrainConfig, *words)


def test_names_of_other_programs_lead_to_keys_that_exist() -> None:
    for theirs, ours in OF_OTHERS.items():
        said = refused(TrainConfig, f"{theirs}=1") if find_kind(TrainConfig, theirs) is None else ours
        if find_kind(TrainConfig, ours) is not None or ours in ("recompute", "experiment"):
            assert ours in said, said
        else:
            assert "did you mean total_epochs" not in said
    known = {*leaf_keys(SubmitConfig), *leaf_keys(PrepareConfig), "engine", "optim", "schedule"}
    assert set(OF_OTHERS.values()) - known <= {"recompute", "experiment", "total_epochs"}
    assert not set(OF_OTHERS) & {name for names in NOT_HERE.values() for name in names}


def test_a_name_is_recommended_only_where_the_command_has_it() -> None:
    assert "optim" not in refused(PrepareConfig, "lr=3")
    assert "did you mean input?" in refused(PrepareConfig, "inputs=x")
    assert "did you mean cluster.time_limit?" in refused(SubmitConfig, "cluster.time=3:00:00")
    assert "did you mean dry_run=true?" in refused(SubmitConfig, "--dry-run")


# ---- files outside conf/ ---------------------------------------------------------------------------------------------


def test_a_file_outside_conf_is_chosen_by_its_path(tmp_path: Path) -> None:
    own = tmp_path / "my run (1).yaml"
    own.write_text(
        "# @package _global_\ndefaults:\n  - override /model: 125m\n"
        "total_tokens: 20B\noptim:\n  lr: 1e-4\nlogging:\n  wandb_tags: [a]\n"
    )
    config = load_config(
        TrainConfig, ["run_dir=r", "data.manifest=m", f"experiment={own}", "optim.lr=2e-4"], "config"
    )
    assert (config.model.n_layers, config.total_tokens, config.optim.lr) == (12, 20_000_000_000, 2e-4)
    assert config.logging.wandb_tags == ["a"]
    shape = tmp_path / "shape.yaml"
    shape.write_text("n_layers: 3\nd_model: 64\nn_heads: 2\nd_ff: 128\n")
    assert train(f"model={shape}").model.n_layers == 3
    assert train().model.n_layers == 8


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ("optim: [", "is not YAML in line 1"),
        ("- 1", "holds no keys"),
        ("text", "text is not a key"),
        ("optim:\n  lrr: 1\n", "optim.lrr"),
        ("optim:\n  lr: fast\n", "optim.lr=fast is not a number"),
        ("defaults:\n  - override /model: 2b\n", "model/2b is not there"),
        ("defaults:\n  - override /modle: 1b\n", "modle"),
        ("total_steps: ${oops\n", "experiment="),
    ],
)
def test_a_wrong_file_is_one_sentence(content: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    if content is not None:
        path.write_text(content)
    assert said in refused(TrainConfig, f"experiment={path}")


# ---- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--help"], ["matter first", "lr=0.0003", "tiny | 125m | 350m | 1b", "recompute=", "zero_stage=3"]),
        (["--help", "optim"], ["optim.lr=0.0003", "Peak learning rate.", "Allowed: adamw, muon", "adamw | muon"]),
        (["--help", "watchdog.step_s"], ["watchdog.step_s=600", "Time limit in seconds"]),
        (["--help", "model=1b"], ["conf/model/1b.yaml", "d_model: 2048"]),
    ],
)  # fmt: skip
def test_help_teaches(
    words: list[str], shown: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["launch/train.py", *words])
    with pytest.raises(SystemExit) as ended:
        run_command(TrainConfig, lambda config: 0, "config", doc="Train a model.")
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert [word for word in shown if word not in printed] == []


def test_every_key_of_training_has_a_meaning() -> None:
    for key in leaf_keys(SubmitConfig):
        group = find_kind(SubmitConfig, key.rpartition(".")[0]) if "." in key else None
        assert meanings_of(group.type if group else SubmitConfig).get(key.rpartition(".")[2]), key


def test_a_run_is_the_same_for_each_process(tmp_path: Path) -> None:
    """Nothing of the command line stays behind in the process or on the disk."""
    before = dict(os.environ)
    assert train("model=1b").model.n_layers == 22
    assert train().model.n_layers == 8
    assert dict(os.environ) == before
    assert not (ROOT / "outputs").exists() and not list(tmp_path.iterdir())
