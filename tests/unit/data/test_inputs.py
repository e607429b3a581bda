"""Configuration against corpora: what does not fit is said before any process starts."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from data_tools.prepare import prepare
from pretrain.config import TrainConfig, load_config
from pretrain.corpus.chat import OWN_TEMPLATE
from pretrain.corpus.manifest import load_manifest
from pretrain.corpus.shards import Corpus
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.data.inputs import chat_template_of, resolve_inputs, tokenizer_path
from pretrain.data.loader import TrainLoader
from pretrain.errors import ConfigError
from support import ROOT
from support.dialogues import chat_config, dialogues
from support.faulty_server import FaultyServer, always
from support.preparing import write_jsonl
from support.tiny import TinyCorpus, make_corpus, run_arguments
from support.trained_run import train_tokenizer


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    return make_corpus(tmp_path_factory.mktemp("foreign"), vocab_size=500)


def configure(corpus: TinyCorpus, *more: str) -> TrainConfig:
    return load_config(TrainConfig, run_arguments(corpus, Path("unused"), *more), "config")


def test_vocabulary_is_rounded_up_to_a_multiple_of_64(corpus: TinyCorpus, foreign: TinyCorpus) -> None:
    assert resolve_inputs(configure(corpus), 1).config.model.vocab_size == 512
    assert resolve_inputs(configure(foreign), 1).config.model.vocab_size == 512
    assert resolve_inputs(configure(corpus, "model.vocab_size=1000"), 1).config.model.vocab_size == 1000


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["model.vocab_size=511"], r"model\.vocab_size=511 .*512"),
        (["data.sequence_length=96"], r"data\.sequence_length=96 .*1024"),
        (["evaluation.manifest=/none/manifest.json"], r"/none/manifest\.json"),
        (["global_batch_sequences=6"], r"global_batch_sequences=6 .*2 ranks"),
    ],
)
def test_misfits_are_named(corpus: TinyCorpus, overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        resolve_inputs(configure(corpus, *overrides), 2)


def test_epochs_are_counted_in_steps_once_the_corpus_is_known(corpus: TinyCorpus) -> None:
    config = configure(corpus, "total_steps=null", "total_epochs=3")
    with pytest.raises(ConfigError, match=r"total_epochs=3: .* total_steps or total_tokens"):
        _ = config.n_steps
    n_tokens = Corpus(corpus.manifest).manifest.n_tokens
    assert resolve_inputs(config, 1).config.n_steps == -(-3 * -(-n_tokens // 64) // 8)
    warmup = configure(corpus, "total_steps=null", "total_epochs=1", "schedule.warmup_steps=100000")
    with pytest.raises(ConfigError, match=r"schedule\.warmup_steps=100000 "):
        resolve_inputs(warmup, 1)


def test_heldout_text_of_another_tokenizer_is_refused(corpus: TinyCorpus, foreign: TinyCorpus) -> None:
    with pytest.raises(ConfigError, match="another tokenizer"):
        resolve_inputs(configure(corpus, f"evaluation.manifest={foreign.heldout}"), 1)


def test_a_mixture_of_tokenizers_is_refused(corpus: TinyCorpus, foreign: TinyCorpus) -> None:
    sources = (
        f"data.sources=[{{name: a, manifest: {corpus.manifest}}}, {{name: b, manifest: {foreign.manifest}}}]"
    )
    with pytest.raises(ConfigError, match="another tokenizer"):
        resolve_inputs(configure(corpus, "data.manifest=null", sources), 1)


# --- init_from ---


def folders_that_are_no_runs(root: Path, corpus: TinyCorpus) -> dict[str, str]:
    """Paths that people give as `init_from`, each with what is said of it."""
    (root / "hf").mkdir()
    (root / "hf" / "config.json").write_text('{"model_type": "llama"}')
    (root / "hf" / "model.safetensors").touch()
    (root / "gguf").mkdir()
    (root / "gguf" / "model-q4.gguf").touch()
    (root / "empty").mkdir()
    (root / "begun" / "checkpoints").mkdir(parents=True)
    (root / "begun" / "run.json").write_text("{}")
    (root / "file").touch()
    (root / "deepspeed").mkdir()
    (root / "deepspeed" / "latest").write_text("global_step5")
    (root / "part" / "step-00000004").mkdir(parents=True)
    return {
        str(root / "typo"): "does not exist",
        str(root / "file"): "is a file",
        str(root / "hf"): f"import it (python launch/import_model.py input={root / 'hf'} output=DIR)",
        str(root / "gguf"): "is not the folder of a run",
        str(
            root / "deepspeed"
        ): f"import it (python launch/import_model.py input={root / 'deepspeed'} output=DIR)",
        str(root / "empty"): "is not the folder of a run",
        str(root / "begun"): "has no checkpoint yet",
        str(root / "part"): "is a part of a run",
        str(corpus.folder): "is a corpus",
    }


def test_an_init_from_that_is_no_run_is_said_before_anything_is_read(
    corpus: TinyCorpus, tmp_path: Path
) -> None:
    for path, said in folders_that_are_no_runs(tmp_path, corpus).items():
        with pytest.raises(ConfigError) as caught:
            resolve_inputs(configure(corpus, f"init_from={path}", "data.manifest=nowhere.json"), 1)
        assert f"init_from={path}" in str(caught.value) and said in str(caught.value), caught.value


def test_a_run_that_resumes_no_longer_needs_its_init_from(corpus: TinyCorpus, tmp_path: Path) -> None:
    before = ROOT / "tests/support/before/run"
    resolve_inputs(configure(corpus, f"init_from={before}"), 1)
    own = tmp_path / "run"
    (own / "checkpoints/step-00000004").mkdir(parents=True)
    gone = f"init_from={tmp_path}/gone"
    resolve_inputs(configure(corpus, gone, f"run_dir={own}"), 1)
    resolve_inputs(configure(corpus, gone, f"checkpoint.target={own}"), 1)
    with pytest.raises(ConfigError, match="init_from"):
        resolve_inputs(configure(corpus, gone), 1)


def test_the_tokenizer_of_a_corpus_and_of_its_heldout_part(corpus: TinyCorpus, tmp_path: Path) -> None:
    assert tokenizer_path(str(corpus.manifest)) == corpus.folder.resolve() / "tokenizer.model"
    assert tokenizer_path(str(corpus.heldout)) == corpus.folder.resolve() / "tokenizer.model"
    with pytest.raises(ConfigError, match=r"has no tokenizer\.model"):
        tokenizer_path(str(tmp_path / "x" / "manifest.json"))


# --- corpora behind a URL ---


def test_a_corpus_behind_a_url_fits_like_one_on_a_disk(corpus: TinyCorpus) -> None:
    with FaultyServer(corpus.folder) as server:
        urls = [
            f"data.manifest={server.url}/manifest.json",
            f"evaluation.manifest={server.url}/heldout/manifest.json",
        ]
        config = resolve_inputs(configure(corpus, *urls, "data.read_timeout_s=20"), 1).config
        assert config.model.vocab_size == 512
        for url in (config.data.manifest, config.evaluation.manifest):
            path = tokenizer_path(url)
            assert path == f"{server.url}/tokenizer.model"
            sha256 = hashlib.sha256((corpus.folder / "tokenizer.model").read_bytes()).hexdigest()
            assert Tokenizer(path, sha256).content == (corpus.folder / "tokenizer.model").read_bytes()
        server.script = always("wrong", "tokenizer")
        with pytest.raises(ConfigError, match=r"the tokenizer http.*its sha256 is not"):
            Tokenizer(path, sha256)


def test_a_start_reads_a_manifest_once(corpus: TinyCorpus, tmp_path: Path) -> None:
    with FaultyServer(corpus.folder) as server:
        url = [f"data.manifest={server.url}/manifest.json", f"data.cache_dir={tmp_path}"]
        config, manifests, _ = resolve_inputs(configure(corpus, *url, "data.read_timeout_s=20"), 1)
        batch = {"global_batch_sequences": 8, "micro_batch_sequences": 2}
        TrainLoader(
            config.data, 1, **batch, rank=0, world_size=1, total_steps=2, state=None, manifests=manifests
        )
        assert len(server.asked("manifest")) == 1


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("data.manifest", r"^data\.manifest=http://\*\*\*@host/manifest\.json\?\*\*\* "),
        (
            "evaluation.manifest",
            r"^evaluation\.manifest=http://\*\*\*@host/manifest\.json\?\*\*\* ",
        ),
    ],
)
def test_a_url_with_credentials_is_refused_and_not_shown(corpus: TinyCorpus, key: str, sentence: str) -> None:
    override = f"{key}='http://me:secret@host/manifest.json?signature=hidden'"
    with pytest.raises(ConfigError, match=sentence) as caught:
        resolve_inputs(configure(corpus, override, "data.read_timeout_s=20"), 1)
    assert "secret" not in str(caught.value)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["data.manifest=nowhere://x/manifest.json"], r"nowhere://x/manifest\.json"),
        (
            ["data.manifest=http://127.0.0.1:1/manifest.json", "data.read_timeout_s=60"],
            r"data\.read_timeout_s=60.* watchdog\.step_s=60",
        ),
    ],
)
def test_urls_that_cannot_work_are_named(corpus: TinyCorpus, overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        resolve_inputs(configure(corpus, *overrides), 1)


@pytest.mark.parametrize("key", ["read_timeout_s", "cache_gib", "prefetch_chunks"])
def test_sizes_and_times_are_positive(corpus: TinyCorpus, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{key}=0"):
        configure(corpus, f"data.{key}=0")


def test_the_chat_template_of_a_run(corpus: TinyCorpus, tmp_path: Path) -> None:
    """That of its dialogues, which must be one; without dialogues that of the run it begins with."""
    model = tmp_path / "tokenizer.model"
    train_tokenizer(model)
    source = write_jsonl(tmp_path / "talks.jsonl", dialogues(9))
    other = tmp_path / "other.jinja"
    other.write_text(OWN_TEMPLATE + "{# another #}")
    assert prepare(chat_config(tmp_path / "a", source, model=model)) == 0
    assert prepare(chat_config(tmp_path / "b", source, model=model, **{"chat.template": other})) == 0
    manifests = {str(path): load_manifest(path) for path in tmp_path.glob("?/manifest.json")}
    assert len(manifests) == 2

    def found(*names: str, **more: str) -> str | None:
        listed = ", ".join(f"{{name: {name}, manifest: {tmp_path / name}/manifest.json}}" for name in names)
        given = [
            f"data.sources=[{listed}]",
            "run_dir=unused",
            "total_steps=1",
            *(f"{k}={v}" for k, v in more.items()),
        ]
        return chat_template_of(load_config(TrainConfig, given, "config"), manifests)

    assert found("a") == OWN_TEMPLATE
    assert found("b") == OWN_TEMPLATE + "{# another #}"
    with pytest.raises(ConfigError, match=r"different chat templates.*chat\.template="):
        found("a", "b")
    (tmp_path / "a/chat_template.jinja").write_text("changed")
    with pytest.raises(ConfigError, match="put back the file"):
        found("a")
    manifests[str(tmp_path / "c/manifest.json")] = load_manifest(corpus.manifest)
    assert found("c") is None
    (tmp_path / "run").mkdir()
    (tmp_path / "run/chat_template.jinja").write_text("of the run")
    assert found("c", init_from=str(tmp_path / "run")) == "of the run"
