"""Finds the weights of a checkpoint in the files that other programs write, under the names that they have there.

`find` looks at which files a folder has. Weights are not read here: each is a `Weight`, which knows where its values
are. Everything is untrusted; what does not fit is a PickledError.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]

from pretrain.convert.foreign.archive import Archive, numbers_of
from pretrain.convert.foreign.pickled import MAX_BYTES, Made, PickledError, decode, plain
from pretrain.convert.streamed import Weight, weight_of
from pretrain.files import read_capped
from pretrain.stored import is_file_name

_MAX_CONFIG_BYTES = 16 << 20
_WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True)
class Found:
    """A checkpoint of another program."""

    kind: str
    """Which program wrote it: hf, dcp, deepspeed, universal, litgpt, megatron or neox."""
    weights: dict[str, Weight]
    """By name. Parts that the ranks of tensor parallelism held are named `NAME@RANK`."""
    config: dict[str, Any]
    """What lies beside it and describes the model; empty if there is nothing."""


def find(folder: Path) -> Found:
    """The checkpoint in a folder. Raises PickledError where there is none that can be read."""
    for tag in ("latest_universal", "latest", "latest_checkpointed_iteration.txt"):
        if (folder / tag).is_file():
            name = read_capped(folder / tag, 4096).decode("utf-8", "replace").strip()
            name = f"iter_{int(name):07d}" if tag.endswith(".txt") and name.isdecimal() else name
            if is_file_name(name) and (folder / name).is_dir():
                return find(folder / name)
    names = {path.name for path in folder.iterdir()}
    if names & {"pytorch_model.bin", "pytorch_model.bin.index.json"}:
        return Found("hf", _hugging_face(folder), _hugging_face_config(folder))
    if "lit_model.pth" in names:
        config = _yaml(folder / "model_config.yaml") if "model_config.yaml" in names else {}
        return Found("litgpt", _litgpt(folder / "lit_model.pth"), config)
    if ".metadata" in names:
        return Found("dcp", _unwrapped(_dcp(folder)), _hugging_face_config(folder))
    if "zero" in names and (folder / "zero").is_dir():
        return Found("universal", _unwrapped(_universal(folder / "zero")), _hugging_face_config(folder))
    if any(re.fullmatch(r"layer_\d+-model_\d+-model_states\.pt", name) for name in names):
        return Found("neox", _neox(folder), _neox_config(folder))
    if any(re.fullmatch(r"mp_rank_\d+(_\d+)?", name) for name in names):
        return _megatron(folder)
    if any(name.endswith("_optim_states.pt") for name in names):
        return Found("deepspeed", _unwrapped(_deepspeed(folder)), _hugging_face_config(folder))
    raise PickledError(
        "it holds none of model.safetensors, pytorch_model.bin, lit_model.pth, .metadata (of "
        "torch.distributed.checkpoint), zero/ or *_optim_states.pt (DeepSpeed), layer_*-model_states.pt (GPT-NeoX), "
        "mp_rank_* (Megatron), or a file `latest` that "
        "names a folder with one of them"
    )


def _unwrapped(weights: dict[str, Weight]) -> dict[str, Weight]:
    """Without the names of modules that torch.compile, FSDP and activation checkpointing put around others."""
    return {_WRAPPERS.sub("", name): weight for name, weight in weights.items()}


# ---- files that describe a model ----


def _hugging_face_config(folder: Path) -> dict[str, Any]:
    """config.json in the folder, or in the one above, where Hugging Face's Trainer keeps it."""
    for place in (folder, folder.parent):
        if (place / "config.json").is_file():
            return _object(
                place / "config.json", json.loads(read_capped(place / "config.json", _MAX_CONFIG_BYTES))
            )
    return {}


def _yaml(path: Path) -> dict[str, Any]:
    return _object(path, yaml.safe_load(read_capped(path, _MAX_CONFIG_BYTES)))


def _object(path: Path, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PickledError(f"its {path.name} is not a list of keys and values")
    return value


def _neox_config(folder: Path) -> dict[str, Any]:
    """All files of configs/, which NeoX writes beside its checkpoints, with underscores in their keys."""
    places = [folder / "configs", folder.parent / "configs"]
    files = [path for place in places for path in sorted(place.glob("*.y*ml")) if path.is_file()]
    found = {key: value for path in files[:100] for key, value in _yaml(path).items()}
    return {str(key).replace("-", "_"): value for key, value in found.items()}


# ---- one file after another ----


def _hugging_face(folder: Path) -> dict[str, Weight]:
    index = folder / "pytorch_model.bin.index.json"
    files = ["pytorch_model.bin"]
    if index.is_file():
        listed = _object(index, json.loads(read_capped(index, _MAX_CONFIG_BYTES))).get("weight_map")
        files = sorted({str(name) for name in listed.values()}) if isinstance(listed, dict) else []
    found: dict[str, Weight] = {}
    for name in files:
        if not is_file_name(name):
            raise PickledError(f"its index names the file {name!r}, which is not in its folder")
        archive = Archive(folder / name)
        found |= archive.tensors(archive.root)
    return found


def _litgpt(path: Path) -> dict[str, Weight]:
    archive = Archive(path)
    root = plain(archive.root)
    return archive.tensors(root["model"] if isinstance(root, dict) and "model" in root else archive.root)


def _universal(folder: Path) -> dict[str, Weight]:
    """One folder per parameter, with fp32.pt: its value as `param`, or one from ZeRO stage 3 flat and by itself."""
    found = {}
    for path in sorted(folder.glob("*/fp32.pt")):
        archive = Archive(path)
        root = archive.root
        weight = archive.tensor_of(root.get("param") if isinstance(root, dict) else root)
        if weight is None:
            raise PickledError(f"its {path.parent.name}/fp32.pt holds no tensor `param`")
        found[path.parent.name] = weight
    return found


def _dcp(folder: Path) -> dict[str, Weight]:
    """torch.distributed.checkpoint: `.metadata` says which part of which tensor is where in which file."""
    root = plain(decode(read_capped(folder / ".metadata", MAX_BYTES)))
    places: dict[Any, Any] = {}
    for index, info in _dict_of(root, "storage_data").items():
        where = plain(index)
        if isinstance(where, dict):
            places[str(where.get("fqn")), numbers_of(where.get("offset"))] = plain(info)
    found = {}
    for name, entry in _dict_of(root, "state_dict_metadata").items():
        described = plain(entry)
        if isinstance(name, str) and isinstance(described, dict) and "chunks" in described:
            found[name] = _dcp_weight(folder, name, described, places)
    return found


def _dict_of(value: Any, key: str) -> dict[Any, Any]:
    found = plain(value.get(key)) if isinstance(value, dict) else None
    if not isinstance(found, dict):
        raise PickledError(f"it has no {key}")
    return found


def _dcp_weight(folder: Path, name: str, described: dict[str, Any], places: dict[Any, Any]) -> Weight:
    shape = numbers_of(described.get("size"))
    chunks: list[tuple[tuple[int, ...], Weight]] = []
    for chunk in described["chunks"] if isinstance(described["chunks"], list) else []:
        part = plain(chunk)
        if not isinstance(part, dict):
            raise PickledError(f"a part of its tensor {name!r} is not described")
        offsets, sizes = (numbers_of(part.get(key)) for key in ("offsets", "sizes"))
        info = places.get((name, offsets), places.get((name, None)))
        file = info.get("relative_path") if isinstance(info, dict) else None
        if not isinstance(info, dict) or not isinstance(file, str) or not is_file_name(file):
            raise PickledError(f"it has no place for the tensor {name!r}")
        place = numbers_of((info.get("offset"), info.get("length")))
        if place is None or offsets is None:
            raise PickledError(f"the place of its tensor {name!r} is no number")
        archive = Archive(folder / file, *place)
        weight = archive.tensor_of(archive.root)
        if weight is None or weight.shape != sizes:
            raise PickledError(f"the file of its tensor {name!r} holds something else")
        chunks.append((offsets, weight))
    if shape is None or sum(math.prod(weight.shape) for _, weight in chunks) != math.prod(shape):
        raise PickledError(f"the parts of its tensor {name!r} are not the whole")
    for offsets, weight in chunks:
        if any(o + n > whole for o, n, whole in zip(offsets, weight.shape, shape, strict=True)):
            raise PickledError(f"a part of its tensor {name!r} is outside of it")
    if len(chunks) == 1:
        return chunks[0][1]

    def make() -> torch.Tensor:
        whole = torch.empty(shape, dtype=chunks[0][1].dtype)
        for offsets, weight in chunks:
            whole[tuple(slice(o, o + n) for o, n in zip(offsets, weight.shape, strict=True))] = weight.whole()
        return whole

    return weight_of(shape, chunks[0][1].dtype, make)


# ---- DeepSpeed ----

_ZERO_STAGES = {"optimizer_states": 1, "gradients": 2, "weights": 3}


def _deepspeed(folder: Path) -> dict[str, Weight]:
    """The fp32 weights in the partitions of ZeRO: deepspeed/utils/zero_to_fp32.py describes the layout."""
    pattern = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
    matches = [match for path in folder.iterdir() if (match := pattern.fullmatch(path.name))]
    if any(int(match[2]) for match in matches):
        raise PickledError("it was written with tensor parallelism; only ZeRO is read")
    files = [folder / match[0] for match in sorted(matches, key=lambda match: int(match[1]))]
    states = [_optimizer_state(Archive(path)) for path in files]
    if not states:
        raise PickledError("it has no file zero_pp_rank_*_optim_states.pt, so it was not written by ZeRO")
    stage, count = states[0][1].get("zero_stage"), states[0][1].get("partition_count")
    count = max(count) if isinstance(count, list) and count else count
    if isinstance(stage, Made) and stage.arguments:  # an enum by its value or, from some Pythons, by its name
        stage = stage.arguments[-1]
        stage = _ZERO_STAGES.get(stage) if isinstance(stage, str) else stage
    if stage not in (1, 2, 3) or count != len(files):
        raise PickledError(
            f"it is of ZeRO stage {stage} and has {len(files)} files of the optimizer for {count} ranks"
        )
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    flats = [[_flat(archive, value) for value in _list_of(state, key)] for archive, state in states]
    names = ("zero_pp_rank_0_mp_rank_00_model_states.pt", "mp_rank_00_model_states.pt")
    model = next((folder / name for name in names if (folder / name).is_file()), None)
    if model is None:
        raise PickledError(f"it lacks {names[stage != 3]}")
    root = plain(Archive(model).root)
    shapes = [_shapes(group) for group in _list_of(root, "param_shapes")]
    if root.get("frozen_param_shapes") and plain(root["frozen_param_shapes"]):
        raise PickledError("it has frozen parameters, which are not read")
    paddings = states[0][1].get("param_alignment_paddings")
    found = _of_stage_3(flats, shapes) if stage == 3 else _of_stage_2(flats, shapes, paddings)
    shared = plain(root.get("shared_params"))
    for name, source in shared.items() if isinstance(shared, dict) else ():
        if isinstance(name, str) and source in found:
            found[name] = found[source]
    return found


def _optimizer_state(archive: Archive) -> tuple[Archive, dict[str, Any]]:
    root = plain(archive.root)
    state = plain(root.get("optimizer_state_dict")) if isinstance(root, dict) else None
    if not isinstance(state, dict):
        raise PickledError(f"its {archive.path.name} has no optimizer_state_dict")
    return archive, state


def _list_of(value: Any, key: str) -> list[Any]:
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, list):
        raise PickledError(f"it has no {key}")
    return found


def _flat(archive: Archive, value: Any) -> Weight:
    weight = archive.tensor_of(value)
    if weight is None or len(weight.shape) != 1:
        raise PickledError("it has a partition that is no flat tensor")
    return weight


def _shapes(group: Any) -> dict[str, tuple[int, ...]]:
    found = {str(name): numbers_of(shape) for name, shape in _items(group)}
    if any(shape is None for shape in found.values()):
        raise PickledError("it has a parameter without a shape")
    return found  # type: ignore[return-value]


def _items(value: Any) -> list[tuple[Any, Any]]:
    value = plain(value)
    return list(value.items()) if isinstance(value, dict) else []


def _span(parts: list[Weight], start: int, shape: tuple[int, ...]) -> Weight:
    """A tensor that begins at element `start` of the parts, one behind the other. Raises PickledError."""
    borders = list(accumulate((part.shape[0] for part in parts), initial=0))
    if start + math.prod(shape) > borders[-1]:
        raise PickledError("its partitions are shorter than its parameters")

    def read(first: int, stop: int) -> torch.Tensor:
        first, stop = first + start, stop + start
        found = [
            part.read(max(first, low) - low, min(stop, high) - low)
            for part, low, high in zip(parts, borders, borders[1:], strict=False)
            if max(first, low) < min(stop, high)
        ]
        return torch.cat(found) if found else torch.empty(0, dtype=parts[0].dtype)

    return Weight(shape, parts[0].dtype, read)


def _of_stage_2(
    flats: list[list[Weight]], shapes: list[dict[str, tuple[int, ...]]], paddings: Any
) -> dict[str, Weight]:
    """Stages 1 and 2 put the parameters of a group one behind the other, and cut the whole evenly over the ranks."""
    found: dict[str, Weight] = {}
    if any(len(rank) != len(shapes) for rank in flats):
        raise PickledError("its ranks have different numbers of groups")
    for number, group in enumerate(shapes):
        parts, at = [rank[number] for rank in flats], 0
        gaps = paddings[number] if isinstance(paddings, list) and number < len(paddings) else []
        for order, (name, shape) in enumerate(group.items()):
            found[name] = _span(parts, at, shape)
            gap = numbers_of((gaps[order],)) if isinstance(gaps, list) and order < len(gaps) else (0,)
            at += math.prod(shape) + (gap[0] if gap else 0)
    return found


def _of_stage_3(flats: list[list[Weight]], shapes: list[dict[str, tuple[int, ...]]]) -> dict[str, Weight]:
    """Stage 3 cuts every parameter evenly over the ranks; the parts of a rank are one behind the other."""
    found: dict[str, Weight] = {}
    at = 0
    for group in shapes:
        for name, shape in group.items():
            share = -(-math.prod(shape) // len(flats))
            own = [_span(rank, at, (share,)) for rank in flats]
            found[name] = _span(own, 0, shape)
            at += share
    return found


# ---- tensor parallelism ----


def _neox(folder: Path) -> dict[str, Weight]:
    """One file per layer of the pipeline and rank of tensor parallelism. The first two layers hold no block."""
    found: dict[str, Weight] = {}
    for path in sorted(folder.iterdir()):
        match = re.fullmatch(r"layer_(\d+)-model_(\d+)-model_states\.pt", path.name)
        if match:
            archive = Archive(path)
            for name, weight in archive.tensors(archive.root).items():
                found[f"{int(match[1])}.{name}@{int(match[2])}"] = weight
    return found


def _megatron(folder: Path) -> Found:
    """One folder per rank of tensor parallelism, and of the pipeline if its name has a second number."""
    found: dict[str, Weight] = {}
    config: dict[str, Any] = {}
    for path in sorted(folder.glob("mp_rank_*/model_optim_rng.pt")):
        match = re.fullmatch(r"mp_rank_(\d+)(?:_(\d+))?", path.parent.name)
        if match is None or int(match[2] or 0):
            raise PickledError("it was written with pipeline parallelism; only tensor parallelism is read")
        archive = Archive(path)
        root = plain(archive.root)
        if not isinstance(root, dict) or "model" not in root:
            raise PickledError(f"its {path.parent.name}/model_optim_rng.pt has no model")
        for name, weight in archive.tensors(root["model"]).items():
            found[f"{name}@{int(match[1])}"] = weight
        arguments = plain(root.get("args"))
        config = arguments if isinstance(arguments, dict) and not config else config
    if not found:
        raise PickledError(
            "it has no file mp_rank_*/model_optim_rng.pt; distributed formats of Megatron are not read"
        )
    return Found("megatron", found, {key: value for key, value in config.items() if isinstance(key, str)})


def parts_of(weights: dict[str, Weight]) -> dict[str, list[Weight]]:
    """The parts `NAME@RANK` by name, in the order of the ranks. Raises PickledError where one is missing."""
    found: dict[str, dict[int, Weight]] = {}
    for full, weight in weights.items():
        name, _, rank = full.rpartition("@")
        found.setdefault(name, {})[int(rank)] = weight
    for name, parts in found.items():
        if sorted(parts) != list(range(len(parts))):
            raise PickledError(
                f"it lacks a part of {name!r}: only those of the ranks {sorted(parts)} are there"
            )
    return {name: [parts[rank] for rank in sorted(parts)] for name, parts in found.items()}
