"""Exports the adapters of a LoRA run in peft's format: adapter_config.json and adapter_model.safetensors.

They belong on the exported base, which is the folder `base/` of the run. The folder is published only if peft, with it
on that base, gives the logits of the merged model.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from pretrain.checkpoint.tensors import load_base_weights
from pretrain.convert.hugging_face import (
    CLASS_HEAD,
    RELATIVE_TOLERANCE,
    Parity,
    check_output,
    hugging_face_config,
    hugging_face_names,
    require_transformers,
)
from pretrain.corpus.tokenizer import CHECK_TEXT
from pretrain.errors import ConfigError, RunError
from pretrain.files import published_together
from pretrain.model.lora import is_adapter, n_adapters, peft_config, require_peft
from pretrain.trained import Adapters, TrainedModel


class ExportedAdapters(NamedTuple):
    """What was written, and how well peft agrees with it."""

    adapters: int
    """Number of adapted matrices."""
    parity: Parity
    """peft's logits, with the adapters on the base, against those of the merged model, both in fp32."""


def export_adapters(
    trained: TrainedModel,
    run_dir: str,
    output: Path,
    *,
    target: str | None = None,
    overwrite: bool = False,
) -> ExportedAdapters:
    """Write the folder `output`, which appears complete and checked or not at all.

    Raises ConfigError where the run has no adapters or `output` may not be replaced, and RunError where peft reads back
    something else than what was trained.
    """
    adapters = trained.adapters
    if adapters is None:
        raise ConfigError(f"adapters=true, but run_dir={run_dir} has trained all weights; leave it out")
    require_transformers()
    require_peft()
    check_output(output, overwrite)
    model = _base_model(trained, load_base_weights(run_dir, adapters.base, target))
    theirs = _peft_names(trained, adapters)
    with published_together(output) as folder:
        model = _write(model, adapters, theirs, folder)
        _check_written(adapters, theirs, folder, output)
        parity = _compare(trained, model, folder)
        if not parity.holds:
            raise RunError(
                f"peft computes something else with the exported adapters: logits differ by up to "
                f"{parity.max_difference:.3g} (allowed {parity.tolerance:.3g}); {output} was not written"
            )
    return ExportedAdapters(n_adapters(list(adapters.weights)), parity)


def _base_model(trained: TrainedModel, base: dict[str, Tensor]) -> Any:
    """The frozen weights as a model of transformers, in fp32 on the CPU."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config = hugging_face_config(trained.config, trained.tokenizer, torch.float32)
    auto: Any = AutoModelForSequenceClassification if trained.config.model.classes else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32)
    names = hugging_face_names(trained.config.model)
    weights = {theirs: base[ours] for ours, theirs in names.items() if ours in base}
    missing, unknown = model.load_state_dict(weights, strict=False)
    # A tied head is the embedding, and that of a classifier is not in its base.
    assert not unknown and set(missing) <= {"lm_head.weight", CLASS_HEAD}
    return model.eval()


def _peft_names(trained: TrainedModel, adapters: Adapters) -> dict[str, str]:
    """Maps our names of the adapters' parameters to those in adapter_model.safetensors."""
    modules = {
        ours.removesuffix(".weight"): theirs.removesuffix(".weight")
        for ours, theirs in hugging_face_names(trained.config.model).items()
    }
    names = {}
    for name in adapters.weights:
        if not is_adapter(name):  # the head of a classifier
            names[name] = f"base_model.model.{CLASS_HEAD}"
            continue
        module, _, part = name.partition(".lora_")
        part = part.removesuffix(".weight") if part.startswith("magnitude") else part
        names[name] = f"base_model.model.{modules[module]}.lora_{part}"
    return names


def _write(model: Any, adapters: Adapters, theirs: dict[str, str], folder: Path) -> Any:
    """Let peft write the folder. Returns the model without adapters."""
    from peft import get_peft_model, set_peft_model_state_dict

    adapted_names = [theirs[name] for name in adapters.weights if is_adapter(name)]
    targets = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in adapted_names})
    head = CLASS_HEAD.removesuffix(".weight") if len(adapted_names) < len(theirs) else None
    adapted = get_peft_model(model, peft_config(adapters.config, targets, head))
    set_peft_model_state_dict(adapted, {theirs[name]: weight for name, weight in adapters.weights.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # a form that nobody has filled in
    path = folder / "adapter_config.json"
    written = json.loads(path.read_text()) | {"target_modules": targets}  # a set, in another order each time
    written["modules_to_save"] = None if head is None else [head]
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    return adapted.unload()


def _check_written(adapters: Adapters, theirs: dict[str, str], folder: Path, output: Path) -> None:
    """Raise RunError unless the file holds exactly the trained values."""
    written = load_file(folder / "adapter_model.safetensors")
    wrong = [
        name
        for name, key in theirs.items()
        if not torch.equal(written.pop(key, torch.empty(0)), adapters.weights[name])
    ]
    if wrong or written:
        raise RunError(
            f"adapter_model.safetensors does not hold what was trained: {[*wrong, *written][0]} differs "
            f"({len(wrong) + len(written)} in all); {output} was not written"
        )


@torch.no_grad()
def _compare(trained: TrainedModel, model: Any, folder: Path) -> Parity:
    """Read the folder back with peft, and compare its logits with those of the merged model."""
    from peft import PeftModel

    ids = trained.tokenizer.encode_document(CHECK_TEXT)[: trained.sequence_length]
    tokens = torch.tensor([ids])
    expected = trained.decoder(torch.device("cpu"), torch.float32).logits(tokens)
    if trained.config.model.classes:
        expected = expected[:, -1]
    found = PeftModel.from_pretrained(model, folder).eval()(tokens).logits
    return Parity(
        tokens=len(ids),
        max_difference=float((found - expected).abs().max()),
        tolerance=RELATIVE_TOLERANCE * max(1.0, float(expected.abs().max())),
        argmax_agreement=float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
    )
