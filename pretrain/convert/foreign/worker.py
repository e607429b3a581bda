"""Reads a checkpoint of another program in a process of its own, and leaves its weights as safetensors.

    python -m pretrain.convert.foreign.worker FOLDER OUTPUT GIVEN

GIVEN is JSON with keys of our models that the user states. The process gives up the network, if the kernel lets it, and
bounds its memory before it looks at the folder. It prints one line of JSON: the kind, the model, the length, the hash
of OUTPUT. What cannot be read is one sentence on stderr, with exit code 2.
"""

from __future__ import annotations

import ctypes
import json
import math
import resource
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

_CLONE_NEWUSER, _CLONE_NEWNET, _PR_SET_NO_NEW_PRIVS = 0x10000000, 0x40000000, 38
_FREE_BYTES = 4 << 30


def leave_network() -> bool:
    """Move this process into a network namespace without interfaces. Returns whether the kernel has done so.

    This must come before anything starts a thread. A process without privileges needs a user namespace, which some
    systems do not allow.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return libc.unshare(_CLONE_NEWNET) == 0 or libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0


def bound_memory(folder: Path) -> None:
    """Limit the memory of this process to what it uses now, 4 GiB, and twice the largest file of the folder."""
    largest = max((path.stat().st_size for path in folder.rglob("*") if path.is_file()), default=0)
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    limit = used + _FREE_BYTES + 2 * largest
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def extract(folder: Path, output: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Write the weights of the checkpoint in `folder` to the file `output`. Returns what it is.

    Raises PickledError or ConfigError where the checkpoint cannot be read or is not the model that is stated.
    """
    from pretrain.checkpoint.folder import hash_file
    from pretrain.config import to_dict
    from pretrain.convert.foreign.layouts import find
    from pretrain.convert.foreign.naming import renamed, settings_of, vocabulary
    from pretrain.convert.streamed import write_safetensors

    found = find(folder)
    settings, length = settings_of(found)
    if "vocab_size" not in settings and "vocab_size" not in given:
        settings["vocab_size"] = vocabulary(found)
    model = _model(settings | given)
    weights = renamed(found, model)
    if model.tie_embeddings and found.kind in ("megatron", "neox"):
        weights.pop("lm_head.weight", None)  # the pipeline's copy of the embedding
    expected = _shapes(model)
    if found.kind == "universal":
        weights = {name: _shaped(weight, expected.get(name)) for name, weight in weights.items()}
    _check(weights, expected, model)
    write_safetensors(output, weights)
    return {
        "kind": found.kind,
        "model": to_dict(model),
        "sequence_length": length,
        "xxh3_128": hash_file(output),
    }


def _model(settings: dict[str, Any]) -> Any:
    from pretrain.config import ModelConfig
    from pretrain.convert.foreign.pickled import PickledError

    needed = ("n_layers", "d_model", "n_heads", "d_ff", "vocab_size")
    missing = [f"model.{key}=" for key in needed if settings.get(key) is None]
    if missing:
        raise PickledError(
            f"nothing beside it describes the model; give {', '.join(missing)} and what else it needs"
        )
    return ModelConfig(**settings)


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each weight under its name in Hugging Face's classes."""
    import torch

    from pretrain.convert.hugging_face import hugging_face_names
    from pretrain.model.decoder import Decoder

    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in Decoder(model, seed=0).named_parameters()}
    return {theirs: shapes[ours] for ours, theirs in hugging_face_names(model).items()}


def _shaped(weight: Any, shape: tuple[int, ...] | None) -> Any:
    """A flat weight in the shape that it has in the model, if it has as many values."""
    if shape is None or len(weight.shape) != 1 or weight.shape[0] != math.prod(shape):
        return weight
    return replace(weight, shape=shape)


def _check(weights: dict[str, Any], expected: dict[str, tuple[int, ...]], model: Any) -> None:
    """Raise PickledError unless these are exactly the weights of the model."""
    from pretrain.convert.foreign.pickled import PickledError
    from pretrain.convert.streamed import DTYPES

    keys = ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_head", "d_ff", "vocab_size")
    values = ", ".join(
        f"model.{key}={getattr(model, key)}" for key in keys if getattr(model, key) is not None
    )
    for name in sorted(weights.keys() | expected.keys()):
        if name not in expected and (name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"):
            continue
        has = list(weights[name].shape) if name in weights else "absent"
        needs = list(expected[name]) if name in expected else "absent"
        if has != needs:
            raise PickledError(f"its {name} is {has}, and {needs} in a model with {values}")
        if weights[name].dtype not in DTYPES.values():
            raise PickledError(
                f"its {name} has the type {weights[name].dtype}, which is no floating-point type"
            )


def main() -> int:
    folder, output, given = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    isolated = leave_network()
    import torch  # before memory is bounded, since it takes much at once

    from pretrain.convert.foreign.pickled import PickledError
    from pretrain.errors import ConfigError

    torch.set_num_threads(1)
    bound_memory(folder)
    try:
        result = extract(folder, output, given)
    except (PickledError, ConfigError) as error:
        print(str(error), file=sys.stderr)
        return 2
    except (ValueError, RecursionError, MemoryError, OSError) as error:
        print(
            f"it cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:300]})",
            file=sys.stderr,
        )
        return 2
    print(json.dumps(result | {"isolated": isolated}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
