"""Exports a checkpoint as a Hugging Face folder, published only if it gives the same logits and tokens as the run.

The folder holds config.json, generation_config.json, model*.safetensors (LlamaForCausalLM, Qwen3ForCausalLM with
QK-norm, Qwen2ForCausalLM or SeedOssForCausalLM with biases; after masked language modeling EuroBertForMaskedLM, which
is Llama with attention in both directions), a tokenizer that `transformers.AutoTokenizer` loads and, for a
sentencepiece tokenizer, its model file. `transformers` is an optional package, so it is imported where it is used.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pretrain.arithmetic import count_parameters
from pretrain.config import ModelConfig, Pooling, RopeType, TrainConfig
from pretrain.corpus.chat_template import CHAT_TEMPLATE_NAME
from pretrain.corpus.tokenizer import CHECK_TEXT, SPACE_SYMBOL, Tokenizer, frame
from pretrain.errors import ConfigError, RunError
from pretrain.files import published_together, write_atomically
from pretrain.model.decoder import Decoder
from pretrain.model.streamed import LazyWeights, stream_weights, streamed_decoder
from pretrain.trained import TrainedModel

WEIGHTS_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
"""The file of weights and, where there are several, the one that says which weight is in which of them."""
MAX_SHARD_BYTES = 1_000_000_000
"""Size limit of a file of weights. It is in memory while it is written."""
WHOLE_MODEL_BYTES = 2 << 30
"""A model whose fp32 weights are larger is read from the disk in parts while it is compared."""
CLASS_HEAD = "score.weight"
"""Name of the weight of a classifier's head in the classes of transformers."""
RELATIVE_TOLERANCE = 1e-4
"""Largest accepted difference of two fp32 logits, relative to the largest logit. Summing in another order causes far
smaller differences."""
MIN_ARGMAX_AGREEMENT = 0.99
_UNREACHABLE_SCORE = -1e4
_LARGE_CHECK_TOKENS = 128  # a 7B model takes minutes for them on two cores
_IN_PARTS_BYTES = (
    1 << 20
)  # what the package accelerate may keep in memory; no layer fits, so all stay on the disk


@dataclass(frozen=True)
class Parity:
    """How well the exported model, as `transformers` loads it in fp32, agrees with the trained one on a text."""

    tokens: int
    """Number of tokens in the text."""
    max_difference: float
    """Largest difference between two corresponding logits."""
    tolerance: float
    """Largest accepted value of `max_difference`."""
    argmax_agreement: float
    """Fraction of positions with the same most probable token."""

    @property
    def holds(self) -> bool:
        """Whether the logits agree within the tolerance. It is also False where a logit is NaN."""
        return self.max_difference <= self.tolerance and self.argmax_agreement >= MIN_ARGMAX_AGREEMENT

    def require(self, output: Path) -> None:
        """Raise RunError unless it holds. `output` is the folder that is not written then."""
        if not self.holds:
            raise RunError(
                f"the exported model differs from the trained one: logits by up to {self.max_difference:.3g} "
                f"(allowed {self.tolerance:.3g}), same most probable token at {self.argmax_agreement:.1%} "
                f"of {self.tokens} positions; {output} was not written"
            )


def require_transformers() -> None:
    """Raise ConfigError where the optional packages are not installed."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # not every progress bar of transformers heeds its own switch
    # transformers imports torchao where it is installed, and that warns of its own files.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    require("tokenizers", "eval")
    require("transformers", "eval")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # what matters is raised


def require(package: str, extra: str) -> None:
    """Raise ConfigError unless an optional package is installed; `extra` is the group that holds it."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"this needs the package {error.name}; install it with: pip install 'pretrain[{extra}]'"
        ) from error


def check_output(output: Path, overwrite: bool) -> None:
    """Raise ConfigError where `output` is a file, or a folder with files that may not be replaced."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output={output} is a file; give a folder")
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise ConfigError(f"output={output} is not empty; give another folder or overwrite=true")


def export(
    trained: TrainedModel,
    output: Path,
    *,
    dtype: torch.dtype,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int], None] = lambda n_bytes: None,
) -> Parity:
    """Write the folder `output`, which appears complete and checked or not at all.

    `progress` is called with the bytes of weights that have been written since its last call.

    Raises ConfigError where `output` may not be replaced or the tokenizer cannot be converted, RunError where the
    exported model or tokenizer differs from the trained one, and OSError or RunError where writing fails.
    """
    require_transformers()
    check_output(output, overwrite)
    with published_together(output) as folder:
        return write_checked(
            trained, folder, output, dtype=dtype, max_shard_bytes=max_shard_bytes, progress=progress
        )


def write_checked(
    trained: TrainedModel,
    folder: Path,
    output: Path,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int], None] = lambda n_bytes: None,
) -> Parity:
    """Write the model and its tokenizer into `folder`, which will become `output`, and compare them with the run's."""
    try:
        write_model(trained, folder, dtype, max_shard_bytes, progress)
    except SafetensorError as error:
        raise RunError(f"{output} cannot be written: {error}") from error
    write_tokenizer_of(trained, folder)
    parity = compare_logits(trained, folder, dtype)
    parity.require(output)
    return parity


# --- the model ---


def hugging_face_config(config: TrainConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> Any:
    """The `transformers` configuration of the same model, for the class that `architecture` names."""
    import transformers

    model, name = config.model, architecture(config, tokenizer)
    if not hasattr(transformers, name):
        raise ConfigError(
            f"this version of transformers ({transformers.__version__}) has no {name}, which a model trained with "
            "objective=mlm needs; install a newer one"
        )
    others: dict[str, Any] = {}
    if not config.causal:
        others = {"is_causal": False} if model.qk_norm else {"mask_token_id": tokenizer.mask_id}
    if name.startswith("SeedOss"):
        others = {"attention_bias": True, "attention_out_bias": False}
        others |= {"residual_dropout": 0.0, "attention_dropout": 0.0}
    if model.classes:
        others["id2label"] = dict(enumerate(model.classes))
        others["label2id"] = {label: number for number, label in enumerate(model.classes)}
    return getattr(transformers, name).config_class(
        architectures=[name],
        vocab_size=model.vocab_size,
        hidden_size=model.d_model,
        intermediate_size=model.d_ff,
        num_hidden_layers=model.n_layers,
        num_attention_heads=model.n_heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_width,
        max_position_embeddings=config.data.sequence_length,
        rms_norm_eps=model.norm_eps,
        rope_parameters=_rope_parameters(model),
        tie_word_embeddings=model.tie_embeddings and not model.classes,
        initializer_range=model.init_std,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=padding_id(config, tokenizer),
        dtype=dtype,
        **others,
    )


def architecture(config: TrainConfig, tokenizer: Tokenizer) -> str:
    """The class of `transformers` that computes the model without code of our own.

    With QK-norm there is none with a head for masked tokens, but Qwen3 attends in both directions where `is_causal` of
    its configuration is false. Raises ConfigError where there is no such class.
    """
    model = config.model
    if model.pooling is Pooling.mean:
        raise ConfigError(
            "model.pooling=mean: the classes of transformers read the last token only, so a classifier that was "
            "trained with the mean cannot be exported; train it with model.pooling=last"
        )
    if not config.causal and model.attention_bias:
        raise ConfigError(
            "transformers has no class for a model with objective=mlm and model.attention_bias=true, so it cannot be "
            "exported; import and export are for such models with objective=causal"
        )
    task = "SequenceClassification" if model.classes else "CausalLM"
    if model.qk_norm:
        return f"Qwen3For{task}"
    if model.attention_bias:
        return f"{_biased_family(tokenizer)}For{task}"
    return f"LlamaFor{task}" if config.causal else "EuroBertForMaskedLM"


def padding_id(config: TrainConfig, tokenizer: Tokenizer) -> int:
    """The token that pads texts in a batch.

    A classifier of transformers reads the last token that is not padding, and that has to be eos. Where the tokenizer
    pads with eos, bos takes its place, which ends no text. Raises ConfigError where these are one token.
    """
    if not config.model.classes or tokenizer.pad_id != tokenizer.eos_id:
        return tokenizer.pad_id
    if tokenizer.bos_id == tokenizer.eos_id:
        raise ConfigError(
            "the tokenizer has one token for bos, eos and padding, and a classifier of transformers needs eos and "
            "padding to differ, so it cannot be exported; use a tokenizer with a padding token"
        )
    return tokenizer.bos_id


def _biased_family(tokenizer: Tokenizer) -> str:
    """Qwen2 or SeedOss, which compute the same with biases.

    `AutoTokenizer` reads the tokenizer beside a Qwen2 model as if it were Qwen2's own, whatever its files say. Where
    that gives other tokens, the model becomes a SeedOss, which has the same biases and reads any tokenizer.
    """
    if tokenizer.is_sentencepiece:
        return "SeedOss"
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(tokenizer, Path(folder), 2048)
        Path(folder, "config.json").write_text('{"model_type": "qwen2"}')
        try:
            check_tokenizer(tokenizer, Path(folder))
        except Exception:  # tokenizers raises plain ones, for example where a vocabulary is not of BPE
            return "SeedOss"
    return "Qwen2"


def _rope_parameters(model: ModelConfig) -> dict[str, Any]:
    """Rotary positions as `transformers` names them; keys that the type does not use are left out."""
    scaling = model.rope_scaling
    used: tuple[str, ...] = ()
    match scaling.rope_type:
        case RopeType.linear:
            used = ("factor",)
        case RopeType.llama3:
            used = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        case RopeType.yarn:
            used = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate")
            used += ("attention_factor",) if scaling.attention_factor is not None else ()
    found = {key: getattr(scaling, key) for key in used}
    return {"rope_type": scaling.rope_type.value, "rope_theta": model.rope_theta, **found}


def hugging_face_names(model: ModelConfig) -> dict[str, str]:
    """Maps our parameter names to those of the classes that `architecture` names. The shapes are the same."""
    names = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    if model.classes:
        names["head.weight"] = CLASS_HEAD
    elif not model.tie_embeddings:
        names["head.weight"] = "lm_head.weight"
    inner = {
        "attention_norm": "input_layernorm",
        "attention.q": "self_attn.q_proj",
        "attention.k": "self_attn.k_proj",
        "attention.v": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "feed_forward_norm": "post_attention_layernorm",
        "feed_forward.gate": "mlp.gate_proj",
        "feed_forward.up": "mlp.up_proj",
        "feed_forward.down": "mlp.down_proj",
    }
    if model.qk_norm:
        inner |= {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"}
    for layer in range(model.n_layers):
        for ours, theirs in inner.items():
            names[f"blocks.{layer}.{ours}.weight"] = f"model.layers.{layer}.{theirs}.weight"
        for part in "qkv" if model.attention_bias else "":
            names[f"blocks.{layer}.attention.{part}.bias"] = (
                f"model.layers.{layer}.self_attn.{part}_proj.bias"
            )
    return names


def exported_bytes(trained: TrainedModel, dtype: torch.dtype) -> int:
    """Size in bytes of the weights that `export` writes."""
    return count_parameters(trained.config.model) * dtype.itemsize


def write_model(
    trained: TrainedModel,
    folder: Path,
    dtype: torch.dtype,
    max_shard_bytes: int,
    progress: Callable[[int], None],
) -> None:
    """Write config.json, generation_config.json and the weights, in files of at most `max_shard_bytes`.

    Weights are read and converted one file at a time. `progress` is called with the bytes of each file.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    write_config(trained, folder, dtype)
    ours_of = {theirs: ours for ours, theirs in hugging_face_names(trained.config.model).items()}
    shapes = parameter_shapes(trained.config.model)
    sizes = {
        theirs: torch.empty(shapes[ours], device="meta", dtype=dtype) for theirs, ours in ours_of.items()
    }
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_bytes)
    for file, members in split.filename_to_tensors.items():
        weights = {theirs: trained.weights[ours_of[theirs]].to(dtype).contiguous() for theirs in members}
        save_file(weights, folder / file, {"format": "pt"})
        progress(sum(weight.nbytes for weight in weights.values()))
    if split.is_sharded:
        write_index(folder, split.tensor_to_filename, split.metadata["total_size"])


def write_config(trained: TrainedModel, folder: Path, dtype: torch.dtype, **more: Any) -> None:
    """Write config.json, with the keys `more` in addition, and generation_config.json."""
    from transformers import GenerationConfig

    tokenizer = trained.tokenizer
    config = hugging_face_config(trained.config, tokenizer, dtype)
    config.update(more)
    config.save_pretrained(folder)
    if not trained.config.causal or trained.config.model.classes:
        return  # such a model generates nothing
    end_ids = _end_ids(trained)
    filling = list(range(tokenizer.vocab_size, config.vocab_size))  # embedding rows without a token
    GenerationConfig(
        bos_token_id=tokenizer.bos_id,
        eos_token_id=end_ids[0] if len(end_ids) == 1 else end_ids,
        pad_token_id=tokenizer.pad_id,
        max_length=trained.sequence_length,  # without it, some programs stop after 20 tokens
        suppress_tokens=filling or None,
    ).save_pretrained(folder)


def write_index(folder: Path, file_of: dict[str, str], total_bytes: int) -> None:
    """Write the file that says which tensor is in which of several files."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": file_of}
    write_atomically(folder / INDEX_NAME, json.dumps(index, indent=2).encode())


def parameter_shapes(model: ModelConfig) -> dict[str, torch.Size]:
    """The shape of each parameter of a decoder by name."""
    with torch.device("meta"):
        return {name: weight.shape for name, weight in Decoder(model, seed=0).named_parameters()}


def _end_ids(trained: TrainedModel) -> list[int]:
    """The tokens at which generation stops: eos and, for a model of dialogues, what ends an answer."""
    if trained.chat_template is None:
        return [trained.tokenizer.eos_id]
    chat = trained.chat()
    chat.close()
    return sorted(chat.end_ids)


@torch.no_grad()
def compare_logits(trained: TrainedModel, folder: Path, dtype: torch.dtype | None, **reading: Any) -> Parity:
    """Load the folder with `transformers` and compare its logits with ours, both in fp32 on the CPU.

    Our model also uses weights rounded to `dtype`, as they were written; None means as they are. A large model is not
    held whole on either side. `reading` are further arguments of `from_pretrained`.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

    # In the second row the same text is stretched over the whole context, where a scaling of positions shows.
    n_tokens = min(
        trained.sequence_length, _LARGE_CHECK_TOKENS if is_large(trained) else trained.sequence_length
    )
    ids = trained.tokenizer.encode_document(CHECK_TEXT)[:n_tokens]
    stretched = max(1, trained.sequence_length // len(ids))
    positions = torch.arange(len(ids)) * torch.tensor([[1], [stretched]])
    tokens = torch.tensor([ids, ids])
    rounded = LazyWeights(
        list(trained.weights), lambda name: trained.weights[name].to(dtype or torch.float32).float()
    )
    ours = streamed_decoder(trained.config.model, rounded, trained.config.causal)
    expected = ours.logits(tokens, positions)
    auto: Any = AutoModelForCausalLM
    if architecture(trained.config, trained.tokenizer).endswith("ForMaskedLM"):
        auto = AutoModelForMaskedLM
    if trained.config.model.classes:
        auto, expected = AutoModelForSequenceClassification, expected[:, -1]
    if is_large(trained):
        model = _streamed_model(folder, auto)
    else:
        model = auto.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **reading)
    # Without a mask, transformers would take a gap between positions for the border of two texts.
    found = model(tokens, position_ids=positions, attention_mask=torch.ones_like(tokens)).logits
    return Parity(
        tokens=len(ids),
        max_difference=float((found - expected).abs().max()),
        tolerance=RELATIVE_TOLERANCE * max(1.0, float(expected.abs().max())),
        argmax_agreement=float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
    )


def is_large(trained: TrainedModel) -> bool:
    """Whether a model is too large to be held whole in fp32."""
    return 4 * count_parameters(trained.config.model) > WHOLE_MODEL_BYTES


def _streamed_model(folder: Path, auto: Any) -> Any:
    """The model that `auto`, a class of `transformers`, makes for a folder; it reads each weight when it needs it.

    `from_pretrained` with weights left on the disk maps all files into memory and touches every page of them.
    """
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with init_empty_weights():
        model = auto.from_config(config, dtype=torch.float32)
    model.tie_weights()
    weights = stored_tensors(folder)
    if missing := {name for name, _ in model.named_parameters()} - set(weights):
        raise RunError(f"the files of {folder} lack {min(missing)}")
    stream_weights(
        model, weights
    )  # what else is there, such as a tied head, transformers does not use either
    return model


def stored_tensors(folder: Path) -> LazyWeights:
    """The tensors in the safetensors files of a model, by the names that they have there.

    Other files of its folder, such as the same weights in the form of another program, are not among them.
    """
    index = folder / INDEX_NAME
    names = {WEIGHTS_NAME}
    if index.exists():
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    file_of: dict[str, Path] = {}
    for path in sorted(folder / name for name in names):
        with safe_open(path, framework="pt") as file:
            file_of |= dict.fromkeys(file.keys(), path)

    def read(name: str) -> torch.Tensor:
        with safe_open(file_of[name], framework="pt") as file:
            return file.get_tensor(name)

    return LazyWeights(list(file_of), read)


# --- the tokenizer ---


def write_tokenizer_of(trained: TrainedModel, folder: Path) -> None:
    """Write a run's tokenizer, with its chat template, and check that `transformers` gives the same tokens."""
    fills_masks, classifies = not trained.config.causal, bool(trained.config.model.classes)
    write_tokenizer(
        trained.tokenizer,
        folder,
        trained.sequence_length - classifies,  # the last place of a sequence was that of the label
        trained.chat_template,
        fills_masks=fills_masks,
        pads_with=padding_id(trained.config, trained.tokenizer) if classifies else None,
    )
    check_tokenizer(trained.tokenizer, folder, with_eos=fills_masks or classifies)
    if trained.chat_template is not None:
        check_chat_template(trained, folder)


def write_tokenizer(
    tokenizer: Tokenizer,
    folder: Path,
    max_tokens: int,
    chat_template: str | None = None,
    *,
    fills_masks: bool = False,
    pads_with: int | None = None,
) -> None:
    """Write tokenizer.json, tokenizer_config.json, chat_template.jinja where there is a template and, for a
    sentencepiece tokenizer, its model file.

    With `fills_masks`, a text is a whole document, with eos after it, and the name of the mask token in it stands for
    that token. So do the names of the other special tokens then. With `pads_with`, the id of the padding token of a
    classifier, a text is a whole document too.
    """
    from transformers import PreTrainedTokenizerFast

    named, with_eos = tokenizer.named_tokens, fills_masks or pads_with is not None
    if pads_with is not None:
        named["pad_token"] = tokenizer.piece(pads_with)
    if fills_masks and tokenizer.mask_id is not None:
        named["mask_token"] = tokenizer.piece(tokenizer.mask_id)
    settings: dict[str, Any] = {
        "model_max_length": max_tokens,
        # Batched generation needs prompts that end at the same position.
        "padding_side": "left" if pads_with is None else "right",
        "clean_up_tokenization_spaces": False,
        # "</s>" in a text is ordinary text, unless a chat template needs to write it or a mask is to be filled.
        "split_special_tokens": chat_template is None and not fills_masks,
        **named,
    }
    if chat_template is not None:
        settings["chat_template"] = chat_template
        (folder / CHAT_TEMPLATE_NAME).write_bytes(chat_template.encode())
    if tokenizer.is_sentencepiece:
        converted = PreTrainedTokenizerFast(
            tokenizer_object=convert_tokenizer(tokenizer, with_eos=with_eos), **settings
        )
        converted.save_pretrained(folder)
        (folder / tokenizer.file_name).write_bytes(tokenizer.content)
        return
    description = json.loads(tokenizer.content)
    bos, eos = (settings["bos_token"], tokenizer.bos_id), (settings["eos_token"], tokenizer.eos_id)
    # Eos would end a prompt.
    description["post_processor"] = frame(bos, eos if with_eos else None)
    settings["tokenizer_class"] = PreTrainedTokenizerFast.__name__
    for name, value in ((tokenizer.file_name, description), ("tokenizer_config.json", settings)):
        (folder / name).write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")


def convert_tokenizer(tokenizer: Tokenizer, with_eos: bool = False) -> Any:
    """A sentencepiece model converted to a `tokenizers.Tokenizer`, with bos before a text (and eos after it).

    sentencepiece writes a space as U+2581. Where a model leaves text unchanged, as those trained by
    `data_tools.prepare` do, the converted vocabulary has a real space instead. A U+2581 in a text is then outside the
    vocabulary and is encoded as bytes, as in our tokenizer. Other models keep U+2581 and read it as a space.
    """
    import tokenizers
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto()
    model.ParseFromString(tokenizer.content)
    kinds = proto.ModelProto.SentencePiece
    space = " " if tokenizer.encode(SPACE_SYMBOL) != tokenizer.encode(" ") else SPACE_SYMBOL
    learned = {
        piece.piece.replace(SPACE_SYMBOL, space): (number, piece.score)
        for number, piece in enumerate(model.pieces)
        if piece.type == kinds.NORMAL
    }
    others = {
        piece.piece.replace(SPACE_SYMBOL, " ") if piece.type == kinds.USER_DEFINED else piece.piece: number
        for number, piece in enumerate(model.pieces)
        if piece.type != kinds.NORMAL
    }
    is_bpe = model.trainer_spec.model_type == proto.TrainerSpec.BPE
    assert tokenizer.unk_id is not None  # every sentencepiece model has one
    build = _bpe if is_bpe else _unigram
    converted = tokenizers.Tokenizer(build(learned, others, tokenizer.unk_id))
    if (splits := _splits(learned, others)) is not None:
        converted.pre_tokenizer = splits
    if (normalizer := _normalizer(model.normalizer_spec, space)) is not None:
        converted.normalizer = normalizer
    converted.decoder = _decoder(model.normalizer_spec, space)
    bos, eos = tokenizer.piece(tokenizer.bos_id), tokenizer.piece(tokenizer.eos_id)
    converted.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{bos} $A {eos}" if with_eos else f"{bos} $A",
        pair=f"{bos} $A {eos} {bos}:1 $B:1 {eos}:1" if with_eos else f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.bos_id), (eos, tokenizer.eos_id)][: 1 + with_eos],
    )
    special = [piece.piece for piece in model.pieces if piece.type in (kinds.UNKNOWN, kinds.CONTROL)]
    mask = None if tokenizer.mask_id is None else tokenizer.piece(tokenizer.mask_id)
    # Pieces begin with the space before a word, so the mask stands for that space too, as in `encode_masked`.
    converted.add_special_tokens(
        [tokenizers.AddedToken(p, special=True, normalized=False, lstrip=p == mask) for p in special]
    )
    # The package matches these before all other pieces. A piece with a real space can be left out: it never matches,
    # since a normalized text has no real space.
    own = [
        p.piece.replace(SPACE_SYMBOL, " ")
        for p in model.pieces
        if p.type == kinds.USER_DEFINED and " " not in p.piece
    ]
    converted.add_tokens([tokenizers.AddedToken(piece, normalized=False) for piece in own])
    return converted


def _normalizer(spec: Any, space: str) -> Any:
    """The normalization that a sentencepiece model applies to a text; None if it applies none."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(space))
    if space != " ":
        steps.append(normalizers.Replace(" ", space))
    return normalizers.Sequence(steps) if steps else None


def _decoder(spec: Any, space: str) -> Any:
    """The decoder that turns pieces into text as the sentencepiece model does."""
    from tokenizers import decoders

    steps: list[Any] = [decoders.Replace(space, " ")] if space != " " else []
    steps += [decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _bpe(learned: dict[str, tuple[int, float]], others: dict[str, int], unk_id: int) -> Any:
    """A BPE model. sentencepiece merges the two pieces whose result has the best score, and `tokenizers` merges the
    pair that comes first in a list. The list therefore holds every pair that makes a piece, better pieces first.
    """
    from tokenizers.models import BPE

    merges = []
    for piece in sorted(learned, key=lambda piece: -learned[piece][1]):
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [(left, right) for left, right in pairs if left in learned and right in learned]
        merges += sorted(known, key=lambda pair: (learned[pair[0]][0], learned[pair[1]][0]))
    vocabulary = others | {piece: number for piece, (number, _) in learned.items()}
    (unk,) = (piece for piece, number in others.items() if number == unk_id)
    return BPE(vocab=vocabulary, merges=merges, unk_token=unk, byte_fallback=True, fuse_unk=True)


def _unigram(learned: dict[str, tuple[int, float]], others: dict[str, int], unk_id: int) -> Any:
    """A unigram model. Byte pieces such as "<0x0A>" get a score below that of any six characters.

    Otherwise `tokenizers` would match the text "<0x0A>" to the byte piece, which sentencepiece never does.
    """
    from tokenizers.models import Unigram

    scores = {number: (piece, score) for piece, (number, score) in learned.items()}
    scores |= {number: (piece, _UNREACHABLE_SCORE) for piece, number in others.items()}
    ordered = [scores[number] for number in range(len(scores))]
    return Unigram(ordered, unk_id=unk_id, byte_fallback=True)


def _splits(learned: dict[str, tuple[int, float]], others: dict[str, int]) -> Any:
    """The pre-tokenizer that cuts a text before it is encoded, or None. It cuts only where no piece can span the cut.

    It cuts after newlines, for speed, as in our tokenizer. It also cuts at characters that occur in byte pieces such
    as "<0x0A>" but are not in the vocabulary: otherwise a unigram model could prefer the byte piece to several unknown
    characters.
    """
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Sequence, Split

    splits = []
    if not any(re.search(r"\n[^\n]", piece) for piece in learned):
        splits.append(Split(Regex(r"[^\n]*\n+|[^\n]+"), behavior="isolated"))
    unknown = sorted({character for piece in others for character in piece} - learned.keys())
    if unknown:
        splits.append(Split(Regex("|".join(map(re.escape, unknown))), behavior="isolated"))
    return Sequence(splits) if splits else None


def check_tokenizer(tokenizer: Tokenizer, folder: Path, with_eos: bool = False) -> None:
    """Raise RunError where the tokenizer in `folder` encodes or decodes `CHECK_TEXT` differently from the run's.

    The same pieces in another order are accepted: they are equally probable to a unigram model, so rounding decides.
    """
    from transformers import AutoTokenizer

    exported = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    expected = [tokenizer.bos_id, *tokenizer.encode(CHECK_TEXT), *[tokenizer.eos_id] * with_eos]
    found = exported.encode(CHECK_TEXT, verbose=False, split_special_tokens=True)
    text = exported.decode(found, skip_special_tokens=True)
    if sorted(found) != sorted(expected) or text != tokenizer.decode(expected):
        at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(expected))
        raise RunError(
            f"the exported tokenizer differs from {tokenizer.path}: token {at} of the check text is "
            f"{found[at : at + 1]} instead of {expected[at : at + 1]}"
        )


_TURNS = [
    ("user", "What is a shard?"),
    ("assistant", "A tar file: 12 道\n  of chunks."),
    ("user", "🎉"),
    ("assistant", "a  b"),
]


def check_chat_template(trained: TrainedModel, folder: Path) -> None:
    """Raise RunError where `apply_chat_template` of the tokenizer in `folder` gives other tokens than the training
    had."""
    from transformers import AutoTokenizer

    exported = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    turns = [{"role": role, "content": content} for role, content in _TURNS]
    chat = trained.chat()
    try:
        for n_turns in range(1, len(turns) + 1):
            is_asked = turns[n_turns - 1]["role"] == "user"
            given = turns[:n_turns]
            expected = chat.encode_prompt(given) if is_asked else chat.encode_dialogue(given).tokens
            quiet = {
                "verbose": False
            }  # of the warning that a text is longer than what the model was trained on
            found = exported.apply_chat_template(
                given, add_generation_prompt=is_asked, return_dict=False, tokenizer_kwargs=quiet
            )
            if found != expected:
                raise RunError(
                    f"the exported chat template differs: a dialogue of {n_turns} turns has the tokens {found[:20]} "
                    f"instead of {expected[:20]}"
                )
    finally:
        chat.close()
