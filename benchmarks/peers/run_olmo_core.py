"""Runner for ai2-olmo-core: its Llama-like model and TransformerTrainModule, with FSDP or DDP for several ranks.

The settings are those of its own scripts: FSDP computes in bf16 and reduces in fp32; DDP and a single process use bf16
autocast. Weights and optimizer state are fp32. OLMo-core compiles on a GPU; with kernels=compiled this runner calls its
`apply_compile` on a CPU too.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.harness.worker import Job, Meter, is_compiled, launched, own_tokens, read_job
from pretrain.device import device_type

JOB, FOLDER = read_job()  # must come before the import of the peer, which might keep aliases of collectives

from olmo_core.config import DType
from olmo_core.distributed.parallel import DataParallelType
from olmo_core.nn.feed_forward import FeedForwardConfig
from olmo_core.nn.transformer import Transformer, TransformerConfig
from olmo_core.optim import AdamWConfig
from olmo_core.train import prepare_training_environment, teardown_training_environment
from olmo_core.train.train_module import TransformerDataParallelConfig, TransformerTrainModuleConfig


class Recorder:
    """Replaces OLMo-core's trainer, from which a training step needs only that it accepts metrics."""

    def __init__(self) -> None:
        self.loss = torch.zeros(())

    def record_metric(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Accept a metric."""

    def record_ce_loss(self, value: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Accept the mean loss of this rank."""
        self.loss = value


def build_model(job: Job) -> Transformer:
    """OLMo-core's model with the shape of the job's model."""
    shape = job.model
    model = TransformerConfig.llama_like(
        d_model=shape["d_model"],
        vocab_size=shape["vocab_size"],
        n_layers=shape["n_layers"],
        n_heads=shape["n_heads"],
        n_kv_heads=shape["n_kv_heads"],
        head_dim=shape["d_head"],
        feed_forward=FeedForwardConfig(hidden_size=shape["d_ff"], bias=False),
        rope_theta=int(shape["rope_theta"]),
        layer_norm_eps=shape["norm_eps"],
    ).build(init_device="cpu")
    if is_compiled(job) and device_type() == "cpu":
        model.apply_compile()
    return model


def main() -> None:
    job = JOB
    rank, size = launched()
    on_gpu = device_type() == "cuda"
    if size > 1:
        prepare_training_environment(backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    data_parallel = None
    if size > 1:
        sharded = job.runner == "olmo_core_fsdp"
        data_parallel = TransformerDataParallelConfig(
            name=DataParallelType.fsdp if sharded else DataParallelType.ddp,
            param_dtype=DType.bfloat16 if sharded else None,
            reduce_dtype=DType.float32,
        )
    optim = job.optim
    train_module = TransformerTrainModuleConfig(
        rank_microbatch_size=job.micro_batch_sequences * job.sequence_length,
        max_sequence_length=job.sequence_length,
        optim=AdamWConfig(
            lr=optim["lr"],
            betas=(optim["beta1"], optim["beta2"]),
            eps=optim["eps"],
            weight_decay=optim["weight_decay"],
            fused=True,
        ),
        compile_model=is_compiled(job),
        dp_config=data_parallel,
        autocast_precision=None if data_parallel and data_parallel.param_dtype else DType.bfloat16,
        max_grad_norm=optim["max_grad_norm"],
    ).build(build_model(job), device=device)
    recorder = Recorder()
    train_module._trainer = recorder
    batches = [own_tokens(job, step, rank) for step in range(job.all_steps)]
    meter = Meter(job, FOLDER, device)

    def train_step(step: int) -> torch.Tensor:
        own = batches[step].to(device)
        train_module.zero_grads()
        train_module.train_batch({"input_ids": own[:, :-1].contiguous(), "labels": own[:, 1:].contiguous()})
        train_module.optim_step()
        return recorder.loss

    meter.measure(train_step)
    n_parameters = sum(p.numel() for p in train_module.model.parameters())
    meter.report(n_parameters, olmo_core=version("ai2-olmo-core"))
    if size > 1:
        teardown_training_environment()


if __name__ == "__main__":
    main()
