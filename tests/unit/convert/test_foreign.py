"""Checkpoints of other programs become the same weights, and nothing in their pickles is run.

The formats of Hugging Face's `.bin`, of torch.distributed.checkpoint and of DeepSpeed are written by these libraries
themselves (DeepSpeed in tests/integration/test_foreign_deepspeed.py). The layouts of litgpt, Megatron and GPT-NeoX are
imitated by support/foreign.py, and were never tried on a published checkpoint.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from pretrain.config import ModelConfig
from pretrain.convert.foreign.archive import Archive
from pretrain.convert.foreign.pickled import Made, Name, PickledError, decode
from pretrain.convert.foreign.worker import extract
from pretrain.convert.hugging_face import export
from pretrain.errors import ConfigError, RunError
from pretrain.trained import load_trained
from support import ROOT
from support.foreign import write_hf_bin, write_litgpt, write_megatron, write_neox
from support.trained_run import SMALL, make_run, script

pytest.importorskip("transformers")

BIASED = replace(SMALL, attention_bias=True)


def exported(folder: Path, model: ModelConfig = SMALL) -> tuple[Path, dict[str, torch.Tensor], ModelConfig]:
    """A model as a Hugging Face folder, its weights under their names there, and its shape."""
    model = replace(model)
    make_run(folder / "run", model)
    export(load_trained(folder / "run"), folder / "hf", dtype=torch.float32)
    weights = load_file(folder / "hf" / "model.safetensors")
    (folder / "hf" / "model.safetensors").unlink()
    return folder / "hf", weights, model


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor], ModelConfig]:
    return exported(tmp_path_factory.mktemp("small"))


def extracted(folder: Path, output: Path, **given: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    found = extract(folder, output / "out.safetensors", given)
    return found, load_file(output / "out.safetensors")


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype and torch.equal(found[name], weight), name


# ---- the kinds ----


def test_a_bin_of_hugging_face_goes_the_whole_way(small: Any, tmp_path: Path) -> None:
    """From the command to a run folder, whose export has the same bytes as the weights that were put in."""
    hf, weights, _ = small
    folder = tmp_path / "bin"
    shutil.copytree(hf, folder)
    write_hf_bin(folder, weights)
    launch = script("import_model")
    launch.main(launch.ImportConfig(input=str(folder), output=str(tmp_path / "imported")))
    export(load_trained(tmp_path / "imported"), tmp_path / "again", dtype=torch.float32)
    same(load_file(tmp_path / "again" / "model.safetensors"), weights)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_checkpoint_without_a_tokenizer_says_which_key_to_give(tmp_path: Path) -> None:
    launch = script("import_model")
    (tmp_path / "latest").write_text("global_step5")
    with pytest.raises(ConfigError, match=r"has no tokenizer\.model or tokenizer\.json; give tokenizer="):
        launch.main(launch.ImportConfig(input=str(tmp_path), output=str(tmp_path / "out")))


def test_a_bin_in_several_files_and_of_halves(small: Any, tmp_path: Path) -> None:
    hf, weights, _ = small
    rounded = {name: weight.bfloat16() for name, weight in weights.items()}
    shutil.copy(hf / "config.json", tmp_path)
    write_hf_bin(tmp_path, rounded, sharded=True)
    found, read = extracted(tmp_path, tmp_path)
    assert (found["kind"], found["sequence_length"]) == ("hf", 64)
    same(read, rounded)


@pytest.mark.parametrize("old", [False, True])
def test_litgpt(small: Any, tmp_path: Path, old: bool) -> None:
    _, weights, model = small
    write_litgpt(tmp_path, weights, model, old)
    found, read = extracted(tmp_path, tmp_path)
    assert found["kind"] == "litgpt" and found["model"]["n_kv_heads"] == 2
    same(read, weights)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("shape", [SMALL, BIASED], ids=["plain", "biased"])
def test_megatron(tmp_path: Path, shape: ModelConfig, ranks: int) -> None:
    _, weights, model = exported(tmp_path, shape)
    (tmp_path / "megatron").mkdir()
    write_megatron(tmp_path / "megatron", weights, model, ranks)
    found, read = extracted(tmp_path / "megatron", tmp_path)
    assert found["kind"] == "megatron" and found["model"]["attention_bias"] is model.attention_bias
    same(read, weights)


@pytest.mark.parametrize("n_kv_heads", [4, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_neox(tmp_path: Path, ranks: int, n_kv_heads: int) -> None:
    _, weights, model = exported(tmp_path, replace(SMALL, n_kv_heads=n_kv_heads))
    (tmp_path / "neox").mkdir()
    write_neox(tmp_path / "neox", weights, model, ranks)
    found, read = extracted(tmp_path / "neox", tmp_path)
    assert found["kind"] == "neox"
    same(read, weights)


def test_dcp(small: Any, tmp_path: Path) -> None:
    """Written by torch itself, within other state, with names of torch.compile, and stated on the command line."""
    _, weights, model = small
    inner = {name.replace("layers.1.", "layers.1._orig_mod."): weight for name, weight in weights.items()}
    state = {"app": {"model": inner, "optim": {"step": 3, "exp_avg": {n: w * 0 for n, w in inner.items()}}}}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    shape = {"n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48}
    found, read = extracted(tmp_path / "dcp", tmp_path, **shape)
    assert (found["kind"], found["model"]["vocab_size"]) == ("dcp", model.vocab_size)
    same(read, weights)


def test_dcp_with_the_names_of_torchtitan(small: Any, tmp_path: Path) -> None:
    """Imitated. Rotary positions of queries and keys pair neighbors there, and the halves of a head here."""
    _, weights, model = small
    names = {"embed_tokens": "tok_embeddings", "lm_head": "output", "self_attn.o_proj": "attention.wo"}
    names |= {f"self_attn.{part}_proj": f"attention.w{part}" for part in "qkv"}
    names |= {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
    }
    state = {"train_state": {"step": torch.tensor(3)}}
    for full, weight in weights.items():
        name = full.removeprefix("model.")
        for ours, theirs in names.items():
            name = name.replace(f"{ours}.weight", f"{theirs}.weight")
        if name.endswith(("wq.weight", "wk.weight")):
            halves = weight.unflatten(0, (-1, 2, model.head_width // 2))
            weight = torch.stack([halves[:, 0], halves[:, 1]], dim=2).flatten(0, 2)
        state[name] = weight
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    shape = {"n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48}
    _, read = extracted(tmp_path / "dcp", tmp_path, **shape)
    same(read, weights)


# ---- what is refused ----


def test_a_model_that_does_not_fit_is_named_with_its_values(small: Any, tmp_path: Path) -> None:
    hf, weights, model = small
    write_litgpt(tmp_path, weights, model)

    def refused(named: str, folder: Path = tmp_path, **given: Any) -> None:
        with pytest.raises((PickledError, ConfigError), match=named):
            extract(folder, tmp_path / "out.safetensors", given)

    refused(r"down_proj\.weight is \[32, 48\], and \[32, 40\] in a model with .*model\.d_ff=40", d_ff=40)
    refused(r"attn\.qkv\.weight has the shape \[64, 32\], but model\.n_heads=8", n_heads=8)
    refused(r"layers\.2\..* is absent", n_layers=3)
    refused(r"k_norm\.weight is absent", qk_norm=True)
    config = tmp_path / "model_config.yaml"
    config.write_text(config.read_text().replace("LLaMAMLP", "GptNeoxMLP"))
    refused("mlp_class_name=GptNeoxMLP")
    config.unlink()
    refused("give model.n_layers=, model.d_model=, model.n_heads=, model.d_ff=")
    bin_folder = tmp_path / "bin"
    shutil.copytree(hf, bin_folder)
    write_hf_bin(bin_folder, {"a": torch.ones(3)})
    refused("no model.embed_tokens.weight.*it has a", bin_folder)
    (tmp_path / "empty").mkdir()
    refused("it holds none of", tmp_path / "empty")
    refused("swiglu=False", _megatron(tmp_path / "m", weights, model, swiglu=False))
    incomplete = _megatron(tmp_path / "n", weights, model)
    shutil.rmtree(incomplete / "iter_0000010" / "mp_rank_00")
    refused(r"only those of the ranks \[1\]", incomplete)


def _megatron(folder: Path, weights: Any, model: ModelConfig, **arguments: Any) -> Path:
    folder.mkdir()
    write_megatron(folder, weights, model, **arguments)
    return folder


class Canary:
    """Writes a file when its pickle is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_a_hostile_pickle_runs_nothing(small: Any, tmp_path: Path) -> None:
    """It is read, and what it would call is left as a name."""
    hf, weights, _ = small
    shutil.copy(hf / "config.json", tmp_path)
    canary = tmp_path / "canary"
    torch.save({**weights, "x": Canary(canary)}, tmp_path / "pytorch_model.bin")
    _, read = extracted(tmp_path, tmp_path)
    same(read, weights)
    called = decode(pickle.dumps(Canary(canary)))
    assert (
        isinstance(called, Made)
        and called.kind.endswith("system")
        and called.arguments == (f"touch {canary}",)
    )
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists(), "the pickle would have done it"


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_is_decoded_as_pickle_would(protocol: int) -> None:
    value = {
        "a": [1, -1, 2**40, 2**200, 1.5, None, True, False, "é", b"\xff\x00" if protocol > 2 else "", ()],
        ("b", 2): {"c": (1,), "d": (1, 2), "e": (1, 2, 3), "f": (1, 2, 3, 4)},
        "g": {1, 2} if protocol > 3 else None,
        "long": ["x" * 300] * 2000,
    }
    assert decode(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "ends early|damaged"),
        (b"N", "ends early|damaged"),
        (b".", "damaged"),
        (b"(.", "mark"),
        (b"cos\nsystem\n(S'x'\nibuiltins\neval\n.", "INST"),
        (b"Nb.", "damaged|state"),
        (b"}(]Nu.", "key of type list"),
        (b"K\x01K\x02a.", "no list"),
        (b"g5\n.", "damaged"),
        (b"\x82\x01.", "EXT1"),
    ],
)
def test_damaged_pickles_are_refused(content: bytes, named: str) -> None:
    with pytest.raises(PickledError, match=named):
        decode(content)


def test_tensors_that_do_not_fit_their_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    honest = torch.arange(6.0).view(2, 3)
    torch.save({"t": honest.t(), "narrow": honest[1], "scalar": torch.tensor(2.0)}, path)
    tensors = Archive(path).tensors(Archive(path).root)
    assert torch.equal(tensors["t"].whole(), honest.t()) and torch.equal(tensors["narrow"].whole(), honest[1])
    assert tensors["scalar"].whole().item() == 2 and tensors["narrow"].read(1, 3).tolist() == [4, 5]
    torch.save({"big": torch.ones(1).expand(1 << 20)}, path)
    with pytest.raises(PickledError, match=r"\[1048576\] that does not fit"):
        Archive(path).tensors(Archive(path).root)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(PickledError, match="no archive"):
        Archive(path)
    torch.save(1, path, _use_new_zipfile_serialization=False)
    with pytest.raises(PickledError, match=r"before 1\.6"):
        Archive(path)


def test_names_are_only_names() -> None:
    assert decode(pickle.dumps(subprocess.Popen)) == Name("subprocess", "Popen")


# ---- the process that reads ----


def test_the_reading_process_has_no_network_no_secrets_and_a_limit(tmp_path: Path) -> None:
    code = (
        "import json, os, resource, socket, sys; from pathlib import Path\n"
        "from pretrain.convert.foreign.worker import bound_memory, leave_network\n"
        "left = leave_network(); bound_memory(Path(sys.argv[1]))\n"
        "probe = socket.socket(); probe.settimeout(5)\n"
        "code = probe.connect_ex(('127.0.0.1', int(sys.argv[2])))\n"
        "print(json.dumps([left, code, resource.getrlimit(resource.RLIMIT_DATA)[0]]))"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-c", code, str(tmp_path), str(server.getsockname()[1])]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    left, refused, limit = json.loads(done.stdout)
    assert limit < 5 << 30
    if not left:
        pytest.skip("this kernel lets no process give up the network")
    assert refused != 0


def test_the_process_loads_no_pickle(small: Any, tmp_path: Path) -> None:
    """Seen by the shim that watches a whole run in tests/unit/repository/test_security.py."""
    hf, weights, _ = small
    shutil.copy(hf / "config.json", tmp_path)
    write_hf_bin(tmp_path, weights)
    command = [
        sys.executable,
        "-m",
        "pretrain.convert.foreign.worker",
        str(tmp_path),
        str(tmp_path / "out"),
        "{}",
    ]
    shim, log = ROOT / "tests/support/fault_shims/pickles", tmp_path / "log"
    env = {**os.environ, "PYTHONPATH": str(shim), "PICKLE_LOG": str(log)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"]["d_ff"] == 48
    same(load_file(tmp_path / "out"), weights)
    assert not log.exists() or not log.read_text()


def test_a_secret_of_the_environment_does_not_reach_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pretrain.convert import foreign_import

    seen: list[dict[str, str]] = []

    def run(command: list[str], **options: Any) -> Any:
        seen.append(options["env"])
        return subprocess.CompletedProcess(command, len(seen) + 1, "", "a warning\nit is damaged\n")

    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(foreign_import.subprocess, "run", run)
    with pytest.raises(ConfigError, match="cannot be imported: it is damaged"):
        foreign_import._read(tmp_path, tmp_path / "out", {})
    with pytest.raises(RunError, match=r"ended with code 3 \(it is damaged\)"):
        foreign_import._read(tmp_path, tmp_path / "out", {})
    assert "HF_TOKEN" not in seen[0] and "PATH" in seen[0]
