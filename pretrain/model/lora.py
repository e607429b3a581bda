"""Adapters of the package peft in our decoder: put in, named, and merged into the weights.

`peft` is an optional package (the extra `finetune`) and imports transformers, so it is imported where it is used.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.config import ModelConfig
from pretrain.config.objective import LoraConfig
from pretrain.errors import ConfigError, RunError
from pretrain.model.decoder import Decoder, Linear
from pretrain.model.streamed import LazyWeights

Gathered = Callable[[list[nn.Parameter]], AbstractContextManager]
HEAD = "head.weight"
"""The name of the head's weight in a decoder."""
_ADAPTER = "default"
"""The name that peft gives to the only adapter of a model. It is a part of its parameters' names."""


def require_peft() -> None:
    """Raise ConfigError where the optional package is not installed."""
    # transformers, which peft imports, imports torchao where it is installed, and that warns of its own files.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"LoRA needs the package {error.name}; install it with: pip install 'pretrain[finetune]'"
        ) from error


def peft_config(lora: LoraConfig, targets: Sequence[str], head: str | None = None) -> Any:
    """peft's description of the same adapters. `targets` are the names of the adapted modules in their model, and
    `head` that of a classifier's head, which is trained too."""
    import peft

    return peft.LoraConfig(
        r=lora.r,
        # Programs that serve adapters want an integer.
        lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=list(targets),
        use_dora=lora.dora,
        use_rslora=lora.rank_stabilized,
        bias="none",
        modules_to_save=None if head is None else [head],
        task_type="CAUSAL_LM" if head is None else "SEQ_CLS",
    )


def plain_name(name: str) -> str:
    """A parameter's name without what peft adds to it: that of the base model, or of an adapter in checkpoints."""
    return name.replace(".base_layer.", ".").replace(f".{_ADAPTER}.", ".")


def is_adapter(name: str) -> bool:
    """Whether a parameter, by its name, belongs to an adapter."""
    return ".lora_" in name


def is_trained(name: str, model: ModelConfig) -> bool:
    """Whether a parameter, by its name, is trained beside frozen weights: it belongs to an adapter, or is the head of a
    classifier, which no base has."""
    return is_adapter(name) or (bool(model.classes) and name == HEAD)


def n_adapters(names: Sequence[str]) -> int:
    """Number of adapted matrices, by the plain names of parameters."""
    return sum(name.endswith(".lora_B.weight") for name in names)


def expected_adapters(lora: LoraConfig, model: ModelConfig) -> int:
    """Number of matrices that get an adapter."""
    return len(set(lora.targets)) * model.n_layers


def add_adapters(
    model: Decoder, lora: LoraConfig, seed: int, gathered: Gathered = lambda parameters: nullcontext()
) -> None:
    """Put adapters beside the target matrices of every block, and freeze all other weights but a classifier's head.

    The weights of `model` must have been loaded, because DoRA begins with their norms. `gathered` makes parameters
    whole within a block, as ZeRO stage 3 needs. The new weights are a pure function of (configuration, seed) and, for
    DoRA, the base: they are drawn in fp32 on the CPU and rounded to the type of the base.
    """
    require_peft()
    import peft

    config = peft_config(lora, lora.targets)
    model.requires_grad_(False)
    model.head.requires_grad_(bool(model.config.classes))
    with torch.random.fork_rng(devices=[]):
        # Another stream than that of the initial weights, which the base may have been given with the same seed.
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"lora {seed}".encode()).digest()[:7]))
        for block in model.blocks:
            with gathered(list(block.parameters())):
                peft.inject_adapter_in_model(config, block)
    # Without a gradient at its input, DeepSpeed would not release a block after its backward pass, or gather it before.
    model.embed.register_forward_hook(
        lambda module, arguments, output: output.requires_grad_(module.training)
    )
    trained = [plain_name(name) for name, p in model.named_parameters() if p.requires_grad]
    found, expected = n_adapters(trained), expected_adapters(lora, model.config)
    if found != expected or not all(is_trained(name, model.config) for name in trained):
        raise RunError(
            f"{found} adapters were made of {expected} that lora.targets={lora.targets} asks for, so training would "
            "leave out some of them; report this, with the version of peft"
        )


def adapter_shapes(model: ModelConfig, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter of the adapters, by its plain name."""
    with torch.device("meta"):
        decoder = Decoder(model, seed=0)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in decoder.named_modules():
        if isinstance(module, Linear) and name.rpartition(".")[2] in lora.targets:
            shapes[f"{name}.lora_A.weight"] = (lora.r, module.in_features)
            shapes[f"{name}.lora_B.weight"] = (module.out_features, lora.r)
            if lora.dora:
                shapes[f"{name}.lora_magnitude_vector.weight"] = (module.out_features,)
    return shapes


def merged(
    model: ModelConfig, lora: LoraConfig, base: Mapping[str, Tensor], adapters: Mapping[str, Tensor]
) -> LazyWeights:
    """The weights of an ordinary decoder that computes the same as `base` with `adapters`.

    Each is merged whenever it is read, so that none but the adapters must be in memory. `adapters` also holds the head
    of a classifier, which `base` lacks. Raises ConfigError where the adapters are not those of the configuration.
    """
    head = {name: weight for name, weight in adapters.items() if not is_adapter(name)}
    expected = adapter_shapes(model, lora)
    if model.classes:
        expected[HEAD] = (len(model.classes), model.d_model)
    if {name: tuple(weight.shape) for name, weight in adapters.items()} != expected:
        raise ConfigError("the adapters in the checkpoint are not those that its configuration describes")
    adapted = {f"{name.partition('.lora_')[0]}.weight" for name in adapters.keys() - head.keys()}

    def read(name: str) -> Tensor:
        if name in head:
            return head[name]
        return _merged_weight(lora, name, base[name], adapters) if name in adapted else base[name]

    return LazyWeights([*base, *head], read)


def _merged_weight(lora: LoraConfig, name: str, weight: Tensor, adapters: Mapping[str, Tensor]) -> Tensor:
    """One matrix with its adapter, as peft merges them. `weight` is left as it is."""
    import peft

    with torch.device("meta"):
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    holder = nn.ModuleDict({"matrix": linear})
    with torch.random.fork_rng(devices=[]):  # peft draws values, which are replaced here
        peft.inject_adapter_in_model(peft_config(lora, ["matrix"]), holder)
    layer: Any = holder["matrix"]
    for part, parameter in layer.named_parameters():
        if is_adapter(f".{part}"):
            parameter.data.copy_(adapters[plain_name(f"{name.removesuffix('.weight')}.{part}")])
    layer.merge()
    return layer.get_base_layer().weight.detach()
