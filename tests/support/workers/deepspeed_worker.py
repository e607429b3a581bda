"""One rank of a program that trains a model of transformers with DeepSpeed and saves DeepSpeed's own checkpoints.

Arguments: the folder of a Hugging Face model, and the folder to write `stage-1`, `stage-2` and `stage-3` to.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2"}

import deepspeed
import torch
import transformers

deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}  # else DeepSpeed runs a compiler


def save(stage: int, source: str, folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    names = {True: [], False: []}  # two groups, as most programs have
    for name, parameter in model.named_parameters():
        names["norm" in name].append(parameter)
    groups = [{"params": names[False], "weight_decay": 0.1}, {"params": names[True], "weight_decay": 0.0}]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(groups, lr=1e-2),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 64},
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    tokens = torch.arange(12)[None] + 5
    engine.backward(engine(tokens, labels=tokens).loss)
    engine.step()
    engine.save_checkpoint(str(folder / f"stage-{stage}"))


if __name__ == "__main__":
    deepspeed.init_distributed("gloo")
    for stage in (1, 2, 3):
        save(stage, sys.argv[1], Path(sys.argv[2]))
