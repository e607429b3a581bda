"""Runner for Hugging Face: LlamaForCausalLM in its Trainer, with DeepSpeed ZeRO-3 in bf16.

The DeepSpeed configuration is that of Hugging Face's documentation, with "auto" values that the Trainer fills in, and
with torch's fused AdamW, because DeepSpeed's own would have to be built. It does not log or save during measured steps.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.harness.worker import Job, Meter, is_compiled, own_tokens, read_job
from pretrain.device import device_type

JOB, FOLDER = read_job()

from torch.utils.data import Dataset, SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed


class Sequences(Dataset):
    """All sequences of the run in order. The Trainer distributes micro-batches over the ranks in turn."""

    def __init__(self, job: Job) -> None:
        ranks = range(job.ranks)
        steps = [torch.cat([own_tokens(job, step, rank) for rank in ranks]) for step in range(job.all_steps)]
        self._tokens = torch.cat(steps)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = self._tokens[index]
        return {"input_ids": tokens[:-1], "labels": tokens[1:], "shift_labels": tokens[1:]}


class MeteredTrainer(Trainer):
    """A Trainer that reads in order and keeps the losses of a step."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.losses: list[torch.Tensor] = []

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.detach())
        return loss


class Steps(TrainerCallback):
    """Tells the meter when a step starts and ends."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self.meter = Meter(job, FOLDER, device)
        self.trainer: MeteredTrainer | None = None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.meter.begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        losses = self.trainer.losses
        self.meter.end(torch.stack(losses).mean())
        losses.clear()


def deepspeed_settings() -> dict[str, Any]:
    """The DeepSpeed configuration for ZeRO-3 in bf16."""
    return {
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": device_type() == "cuda",
            "contiguous_gradients": True,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
        "zero_force_ds_cpu_optimizer": False,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "steps_per_print": 2**31,
    }


def training_arguments(job: Job) -> TrainingArguments:
    """The Trainer's arguments: batch, optimizer and length of the run."""
    optim = job.optim
    return TrainingArguments(
        output_dir=str(FOLDER / "trainer"),
        max_steps=job.all_steps,
        per_device_train_batch_size=job.micro_batch_sequences,
        gradient_accumulation_steps=job.grad_accum_steps,
        learning_rate=optim["lr"],
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        adam_beta1=optim["beta1"],
        adam_beta2=optim["beta2"],
        adam_epsilon=optim["eps"],
        weight_decay=optim["weight_decay"],
        max_grad_norm=optim["max_grad_norm"],
        bf16=True,
        torch_compile=is_compiled(job),
        use_cpu=device_type() == "cpu",
        deepspeed=deepspeed_settings(),
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=job.seed,
    )


def main() -> None:
    job, shape = JOB, JOB.model
    # These arguments must exist before the model is created, so that it is created in ZeRO-3 partitions.
    arguments = training_arguments(job)
    set_seed(job.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape["vocab_size"],
            hidden_size=shape["d_model"],
            intermediate_size=shape["d_ff"],
            num_hidden_layers=shape["n_layers"],
            num_attention_heads=shape["n_heads"],
            num_key_value_heads=shape["n_kv_heads"],
            head_dim=shape["d_head"],
            rms_norm_eps=shape["norm_eps"],
            rope_theta=shape["rope_theta"],
            max_position_embeddings=job.sequence_length,
            initializer_range=shape["init_std"],
            use_cache=False,
        )
    )
    n_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    steps = Steps(job, arguments.device)
    trainer = MeteredTrainer(model=model, args=arguments, train_dataset=Sequences(job), callbacks=[steps])
    steps.trainer = trainer
    trainer.train()
    steps.meter.report(
        n_parameters, **{name: version(name) for name in ("transformers", "accelerate", "deepspeed")}
    )


if __name__ == "__main__":
    main()
