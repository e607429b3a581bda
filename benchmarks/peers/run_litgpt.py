"""Runner for litgpt: its GPT, Fabric, loss and order of a step as in litgpt/pretrain.py, in a single process.

`litgpt` uses its default precision, bf16-mixed: fp32 weights and optimizer state with bf16 autocast. `litgpt_bf16_true`
keeps weights and optimizer state in bf16, so it does less work than the others. litgpt's pretraining always compiles
the whole model; here kernels.compile decides.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.harness.worker import Job, Meter, is_compiled, own_tokens, read_job
from pretrain.device import device_type

JOB, FOLDER = read_job()

import lightning as L
from litgpt.model import GPT, Config
from litgpt.pretrain import initialize_weights
from litgpt.utils import chunked_cross_entropy, instantiate_torch_optimizer, num_parameters


def model_config(job: Job) -> Config:
    """litgpt's configuration for the job's model."""
    shape = job.model
    return Config(
        name="benchmark",
        block_size=job.sequence_length,
        vocab_size=shape["vocab_size"],
        padded_vocab_size=shape["vocab_size"],
        n_layer=shape["n_layers"],
        n_embd=shape["d_model"],
        n_head=shape["n_heads"],
        n_query_groups=shape["n_kv_heads"],
        head_size=shape["d_head"],
        intermediate_size=shape["d_ff"],
        rotary_percentage=1.0,
        rope_base=int(shape["rope_theta"]),
        norm_eps=shape["norm_eps"],
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )


def main() -> None:
    job, optim = JOB, JOB.optim
    precision = "bf16-true" if job.runner == "litgpt_bf16_true" else "bf16-mixed"
    fabric = L.Fabric(accelerator=device_type(), devices=1, strategy="auto", precision=precision)
    fabric.launch()
    fabric.seed_everything(job.seed)
    config = model_config(job)
    with fabric.init_module(empty_init=True):
        model = GPT(config)
    initialize_weights(fabric, model, n_layer=config.n_layer, n_embd=config.n_embd)
    model.max_seq_length = job.sequence_length
    n_parameters = num_parameters(model)
    model = fabric.setup(torch.compile(model) if is_compiled(job) else model)
    settings = {
        "class_path": "torch.optim.AdamW",
        "init_args": {
            "lr": optim["lr"],
            "betas": [optim["beta1"], optim["beta2"]],
            "eps": optim["eps"],
            "weight_decay": optim["weight_decay"],
        },
    }
    # litgpt uses the fused optimizer only on a GPU, but it is faster on a CPU too.
    optimizer = fabric.setup_optimizers(instantiate_torch_optimizer(settings, model.parameters(), fused=True))
    batches = [own_tokens(job, step, rank=0) for step in range(job.all_steps)]
    meter = Meter(job, FOLDER, fabric.device)

    def train_step(step: int) -> torch.Tensor:
        total = torch.zeros((), device=fabric.device)
        for number, own in enumerate(
            batches[step].to(fabric.device).split(job.micro_batch_sequences), start=1
        ):
            is_accumulating = number < job.grad_accum_steps
            with fabric.no_backward_sync(model, enabled=is_accumulating):
                logits = model(own[:, :-1].contiguous())
                loss = chunked_cross_entropy(logits, own[:, 1:].contiguous())
                fabric.backward(loss / job.grad_accum_steps)
            total += loss.detach() / job.grad_accum_steps
        if optim["max_grad_norm"] > 0:
            fabric.clip_gradients(model, optimizer, max_norm=optim["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        return total

    meter.measure(train_step)
    meter.report(n_parameters, litgpt=version("litgpt"), lightning=version("lightning"))


if __name__ == "__main__":
    main()
