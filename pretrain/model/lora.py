"""Adapters of the package peft in our decoder: put in, named, and merged into the weights.

`peft` is an optional package (the extra `finetune`) and imports transformers, so it is imported where it is used.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.config import ModelConfig
from pretrain.config.lora import LoraConfig
from pretrain.errors import ConfigError, RunError
from pretrain.model.decoder import Decoder, build_decoder

Gathered = Callable[[list[nn.Parameter]], AbstractContextManager]
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


def peft_config(lora: LoraConfig, targets: Sequence[str]) -> Any:
    """peft's description of the same adapters. `targets` are the names of the adapted modules in their model."""
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
        task_type="CAUSAL_LM",
    )


def plain_name(name: str) -> str:
    """A parameter's name without what peft adds to it: that of the base model, or of an adapter in checkpoints."""
    return name.replace(".base_layer.", ".").replace(f".{_ADAPTER}.", ".")


def is_adapter(name: str) -> bool:
    """Whether a parameter, by its name, belongs to an adapter."""
    return ".lora_" in name


def n_adapters(names: Sequence[str]) -> int:
    """Number of adapted matrices, by the plain names of parameters."""
    return sum(name.endswith(".lora_B.weight") for name in names)


def expected_adapters(lora: LoraConfig, model: ModelConfig) -> int:
    """Number of matrices that get an adapter."""
    return len(set(lora.targets)) * model.n_layers


def add_adapters(
    model: Decoder, lora: LoraConfig, seed: int, gathered: Gathered = lambda parameters: nullcontext()
) -> None:
    """Put adapters beside the target matrices of every block, and freeze all other weights.

    The weights of `model` must have been loaded, because DoRA begins with their norms. `gathered` makes parameters
    whole within a block, as ZeRO stage 3 needs. The new weights are a pure function of (configuration, seed) and, for
    DoRA, the base: they are drawn in fp32 on the CPU and rounded to the type of the base.
    """
    require_peft()
    import peft

    config = peft_config(lora, lora.targets)
    model.requires_grad_(False)
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
    if found != expected or not all(map(is_adapter, trained)):
        raise RunError(
            f"{found} adapters were made of {expected} that lora.targets={lora.targets} asks for, so training would "
            "leave out some of them; report this, with the version of peft"
        )


def adapted_decoder(
    model: ModelConfig, lora: LoraConfig, base: dict[str, Tensor], adapters: dict[str, Tensor]
) -> Decoder:
    """A decoder in fp32 on the CPU, in evaluation mode, with adapters that are not merged."""
    decoder = build_decoder(model, base, "cpu", torch.float32)
    add_adapters(decoder, lora, seed=0)
    parameters = {plain_name(name): p for name, p in decoder.named_parameters() if p.requires_grad}
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    if shapes != {name: weight.shape for name, weight in adapters.items()}:
        raise ConfigError("the adapters in the checkpoint are not those that its configuration describes")
    for name, parameter in parameters.items():
        parameter.data.copy_(adapters[name])
    return decoder.eval().requires_grad_(False)


def merged(
    model: ModelConfig, lora: LoraConfig, base: dict[str, Tensor], adapters: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The weights of an ordinary decoder that computes the same as `base` with `adapters`. It reuses the memory of
    `base`."""
    from peft.tuners.lora import LoraLayer

    decoder = adapted_decoder(model, lora, base, adapters)
    for module in decoder.modules():
        if isinstance(module, LoraLayer):
            module.merge()  # type: ignore[operator]
    return {
        plain_name(name): parameter.detach()
        for name, parameter in decoder.named_parameters()
        if not is_adapter(name)
    }
