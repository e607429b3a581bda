"""The forms in which a model can be exported. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from pretrain.config import Precision
from pretrain.errors import ConfigError


class Format(Enum):
    """The files of an export."""

    hugging_face = "hugging_face"  # a folder for transformers, vLLM and the like
    gguf = "gguf"  # one file for llama.cpp and the like


class Stored(Enum):
    """How the matrices of an export are stored."""

    auto = "auto"  # in a Hugging Face folder the precision in which the run last computed, in GGUF fp16
    fp32 = "fp32"  # the master weights
    bf16 = "bf16"
    fp16 = "fp16"
    int8 = "int8"  # weights only; torchao's rows with one scale, or GGUF's Q8_0


@dataclass(frozen=True)
class Form:
    """A form of an export, without `auto`."""

    format: Format
    stored: Stored

    @property
    def name(self) -> str:
        """The form in the words of those who read it."""
        if self.format is Format.gguf:
            return "GGUF Q8_0" if self.stored is Stored.int8 else "GGUF F16"
        return "int8 weights (torchao)" if self.stored is Stored.int8 else self.stored.value


def form_of(format: Format, stored: Stored, precision: Precision) -> Form:
    """The form that is meant, for a run that computed in `precision`. Raises ConfigError where there is none."""
    if format is Format.gguf:
        if stored not in (Stored.auto, Stored.fp16, Stored.int8):
            raise ConfigError(f"dtype={stored.value} is not written as GGUF; use dtype=fp16 or dtype=int8")
        return Form(format, Stored.fp16 if stored is Stored.auto else stored)
    return Form(format, Stored(precision.value) if stored is Stored.auto else stored)
