"""Checkpoints that DeepSpeed itself has written are read as its own converter reads them, without loading a pickle."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain.convert.foreign.pickled import PickledError
from pretrain.convert.foreign.worker import extract
from pretrain.convert.hugging_face import export
from pretrain.trained import load_trained
from support.launching import run_ranks
from support.trained_run import make_run, script

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of two ranks with ZeRO 1, 2 and 3, after one step in bf16 with fp32 master weights."""
    root = tmp_path_factory.mktemp("deepspeed")
    make_run(root / "run")
    export(load_trained(root / "run"), root / "hf", dtype=torch.float32)
    worker = "tests/support/workers/deepspeed_worker.py"
    run_ranks(2, worker, str(root / "hf"), str(root), log_dir=root / "logs")
    return root


def with_config(saved: Path, stage: int, tmp_path: Path) -> Path:
    """The checkpoint as Hugging Face's Trainer leaves it: config.json and the tokenizer lie beside."""
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(saved / f"stage-{stage}", folder)
    for path in (saved / "hf").iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.long), 2, 3])
def test_the_weights_are_those_of_deepspeeds_own_converter(saved: Path, stage: int, tmp_path: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = with_config(saved, stage, tmp_path)
    expected = get_fp32_state_dict_from_zero_checkpoint(str(saved / f"stage-{stage}"))
    found = extract(folder, tmp_path / "out.safetensors", {})
    read = load_file(tmp_path / "out.safetensors")
    assert found["kind"] == "deepspeed" and read.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(read[name], weight), name
    before = load_file(saved / "hf" / "model.safetensors")
    assert not torch.equal(read["model.norm.weight"], before["model.norm.weight"]), "it was trained"


@pytest.mark.long
def test_one_goes_the_whole_way(saved: Path, tmp_path: Path) -> None:
    """The quick form, with another kind of checkpoint, is in tests/unit/convert/test_foreign.py."""
    folder = with_config(saved, 3, tmp_path)
    launch = script("import_model")
    launch.main(launch.ImportConfig(input=str(folder), output=str(tmp_path / "imported")))
    assert load_trained(tmp_path / "imported").sequence_length == 64


def test_one_with_a_lost_rank_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = with_config(saved, 3, tmp_path)
    next(folder.glob("*/*zero_pp_rank_1_mp_rank_00_optim_states.pt")).unlink()
    with pytest.raises(PickledError, match="1 files of the optimizer for 2 ranks"):
        extract(folder, tmp_path / "out.safetensors", {})


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.long), 3])
def test_a_universal_checkpoint(saved: Path, stage: int, tmp_path: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    source = next((saved / f"stage-{stage}").glob("global_step*"))
    arguments = argparse.Namespace(
        input_folder=str(source), output_folder=str(tmp_path / "universal"),
        num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False, strict=False, inject_missing_state=True,
    )  # fmt: skip
    ds_to_universal.main(arguments)
    shutil.copy(saved / "hf" / "config.json", tmp_path)
    found = extract(tmp_path / "universal", tmp_path / "out.safetensors", {})
    expected = get_fp32_state_dict_from_zero_checkpoint(str(saved / f"stage-{stage}"))
    read = load_file(tmp_path / "out.safetensors")
    assert found["kind"] == "universal" and read.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(read[name], weight), name
