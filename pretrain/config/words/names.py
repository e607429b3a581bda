"""What to say about a key that the configuration does not have: the key that was probably meant, or that there is none.

The names of other programs are known, because people bring their habits with them.
"""

from __future__ import annotations

import difflib
from dataclasses import fields

from pretrain.config.words.kinds import find_kind, kinds_of, leaf_keys

MANY = 16
"""Groups with more keys than this are not listed in an error."""
OF_OTHERS = {
    # learning rate and optimizer
    "learning_rate": "optim.lr",
    "max_lr": "optim.lr",
    "peak_lr": "optim.lr",
    "min_lr": "schedule.min_lr_frac",
    "min_lr_ratio": "schedule.min_lr_frac",
    "wd": "optim.weight_decay",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "adam_epsilon": "optim.eps",
    "adam_eps": "optim.eps",
    "clip_grad": "optim.max_grad_norm",
    "grad_clip": "optim.max_grad_norm",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim",
    "optim_type": "optim",
    "lr_scheduler": "schedule",
    "lr_scheduler_type": "schedule",
    "lr_decay_style": "schedule",
    "scheduler": "schedule",
    "warmup": "schedule.warmup_steps",
    "warmup_iters": "schedule.warmup_steps",
    "num_warmup_steps": "schedule.warmup_steps",
    "lr_warmup_iters": "schedule.warmup_steps",
    "lr_warmup_steps": "schedule.warmup_steps",
    "warmup_ratio": "schedule.warmup_frac",
    "lr_warmup_fraction": "schedule.warmup_frac",
    # batch and length
    "batch_size": "global_batch_sequences",
    "train_batch_size": "global_batch_sequences",
    "global_batch_size": "global_batch_sequences",
    "micro_batch_size": "micro_batch_sequences",
    "device_batch_size": "micro_batch_sequences",
    "train_micro_batch_size_per_gpu": "micro_batch_sequences",
    "per_device_train_batch_size": "micro_batch_sequences",
    "per_device_batch_size": "micro_batch_sequences",
    "gradient_accumulation_steps": "global_batch_sequences",
    "grad_accum_steps": "global_batch_sequences",
    "seq_length": "data.sequence_length",
    "seq_len": "data.sequence_length",
    "max_seq_len": "data.sequence_length",
    "max_seq_length": "data.sequence_length",
    "block_size": "data.sequence_length",
    "context_length": "data.sequence_length",
    "max_position_embeddings": "data.sequence_length",
    "train_iters": "total_steps",
    "max_iters": "total_steps",
    "max_steps": "total_steps",
    "num_steps": "total_steps",
    "num_train_steps": "total_steps",
    "steps": "total_steps",
    "iterations": "total_steps",
    "max_tokens": "total_tokens",
    "train_tokens": "total_tokens",
    "num_train_epochs": "total_epochs",
    "num_epochs": "total_epochs",
    "epochs": "total_epochs",
    "max_epochs": "total_epochs",
    # model
    "hidden_size": "model.d_model",
    "dim": "model.d_model",
    "n_embd": "model.d_model",
    "num_layers": "model.n_layers",
    "n_layer": "model.n_layers",
    "num_hidden_layers": "model.n_layers",
    "num_attention_heads": "model.n_heads",
    "n_head": "model.n_heads",
    "num_key_value_heads": "model.n_kv_heads",
    "num_query_groups": "model.n_kv_heads",
    "intermediate_size": "model.d_ff",
    "ffn_hidden_size": "model.d_ff",
    "head_dim": "model.d_head",
    "checkpoint_activations": "recompute",
    "activation_checkpointing": "recompute",
    "gradient_checkpointing": "recompute",
    "recompute_granularity": "recompute",
    # engine
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "fp32": "engine.precision",
    "dtype": "engine.precision",
    "mixed_precision": "engine.precision",
    "zero": "engine.zero_stage",
    "zero_optimization": "engine",
    "deepspeed": "engine",
    "deepspeed_config": "engine",
    "compile": "kernels.compile",
    "attn_implementation": "kernels.attention",
    "flash_attention": "kernels.attention",
    "use_flash_attn": "kernels.attention",
    # files and intervals
    "output_dir": "run_dir",
    "save_dir": "run_dir",
    "out_dir": "run_dir",
    "save": "run_dir",
    "out": "output",
    "data_path": "data.manifest",
    "train_data_path": "data.manifest",
    "dataset": "data.manifest",
    "train_files": "input",
    "inputs": "input",
    "load": "init_from",
    "model_name_or_path": "init_from",
    "pretrained": "init_from",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "use_lora": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target": "lora.targets",
    "target_modules": "lora.targets",
    "use_dora": "lora.dora",
    "use_rslora": "lora.rank_stabilized",
    "tokenizer_name": "tokenizer.path",
    "tokenizer_path": "tokenizer.path",
    "num_workers": "data.loader_workers",
    "dataloader_num_workers": "data.loader_workers",
    "save_steps": "checkpoint.every_steps",
    "save_interval": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep_last",
    "eval_steps": "evaluation.every_steps",
    "eval_interval": "evaluation.every_steps",
    "log_interval": "logging.every_steps",
    "logging_steps": "logging.every_steps",
    "wandb_project": "logging.wandb_project",
    "project": "logging.wandb_project",
    "report_to": "logging.wandb",
    "random_seed": "seed",
    "config_name": "experiment",
    "config": "experiment",
    # cluster
    "time": "cluster.time_limit",
    "walltime": "cluster.time_limit",
    "gpus": "cluster.gpus_per_node",
    "num_gpus": "cluster.gpus_per_node",
    "num_nodes": "cluster.nodes",
    "nnodes": "cluster.nodes",
    "nodelist": "cluster.constraint",
}
"""Names that other programs give to our keys: Megatron-LM, GPT-NeoX, DeepSpeed, Hugging Face, nanoGPT, Slurm."""
NOT_HERE = {
    "pipeline parallelism": (
        "pipe_parallel_size",
        "pipeline_model_parallel_size",
        "pp",
        "pipeline_parallel_size",
    ),
    "tensor parallelism": ("model_parallel_size", "tensor_model_parallel_size", "tp", "tensor_parallel_size"),
    "expert parallelism": ("expert_model_parallel_size", "num_experts", "ep"),
    "training of 4-bit or 8-bit weights (QLoRA)": (
        *("load_in_4bit", "load_in_8bit", "quantization_bit", "qlora", "quantized"),
    ),
}


def unknown_key(schema: type, key: str, group: type | None = None) -> str:
    """The sentence for a key that `schema` does not have. `group` is the dataclass in which the key was looked up."""
    said = f"{key} is not a key of the configuration"
    found = known_key(schema, key)
    if found is not None:
        return f"{said}; did you mean {found}?"
    for what, names in NOT_HERE.items():
        if plain_name(key) in names:
            return f"{said}; there is no {what} here"
    beside = _names_beside(schema, key, group)
    close = difflib.get_close_matches(key.split(".")[-1], beside, n=1)
    if close:
        return f"{said}; did you mean {close[0]}?"
    if len(beside) <= MANY:
        return f"{said}; allowed: {', '.join(beside)}"
    return f"{said}; --help lists the keys"


def known_key(schema: type, key: str) -> str | None:
    """The key of `schema` that a name of another program, or the end of one of our keys, stands for."""
    name = plain_name(key)
    meant = OF_OTHERS.get(name)
    if meant is not None and _exists(schema, meant):
        return meant
    if _exists(schema, name):
        return name
    ending = [leaf for leaf in leaf_keys(schema) if leaf.rpartition(".")[2] == name]
    return ending[0] if len(ending) == 1 and ending[0] != key else None


def plain_name(key: str) -> str:
    """The last part of a key or option, in lower case and with underscores: `--Learning-Rate` gives learning_rate."""
    return key.lstrip("-+~").rpartition(".")[2].replace("-", "_").lower()


def _exists(schema: type, key: str) -> bool:
    in_training = find_kind(schema, "model.n_layers") is not None
    return find_kind(schema, key) is not None or (in_training and key in ("recompute", "experiment"))


def _names_beside(schema: type, key: str, group: type | None) -> list[str]:
    """The keys that are allowed in the group in which `key` was looked for."""
    if group is not None:
        return [f.name for f in fields(group)]
    kind = find_kind(schema, key.rpartition(".")[0]) if "." in key else None
    return list(kinds_of(kind.type if kind and kind.is_group else schema))
