"""Runner for the baseline: the same model in a plain PyTorch training loop.

It has bf16 weights, fp32 master weights with torch's fused AdamW, the copy back to bf16, clipping, and the same loss.
With several ranks the gradients are all-reduced once per step, as one flat tensor. It does not use the engine.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from own_batches import synthetic_batches, train_config

from benchmarks.harness.worker import Meter, read_job
from pretrain.batch import Batch
from pretrain.config import Precision, Switch, TrainConfig
from pretrain.distributed import World, init_world, shutdown_world
from pretrain.engine.objectives import training_loss
from pretrain.engine.optim import build_optimizer, parameter_groups
from pretrain.model.decoder import Decoder
from pretrain.model.kernels import capability_of, resolve


def build_model(config: TrainConfig, device: torch.device) -> Decoder:
    """The decoder with its initial weights."""
    kernels = resolve(config, capability_of(device)).kernels
    model = Decoder(config.model, config.seed, kernels).to(device)
    if config.engine.precision is Precision.bf16:
        model.bfloat16()
    if kernels.compile is Switch.always:
        model.compile_parts()
    return model


class Loop:
    """A model with its master weights and its optimizer."""

    def __init__(self, config: TrainConfig, world: World, model: Decoder) -> None:
        self.config, self.world, self.model = config, world, model
        self.names, self.weights = zip(*model.named_parameters(), strict=True)
        self.masters = [
            w if w.dtype is torch.float32 else torch.nn.Parameter(w.detach().float()) for w in self.weights
        ]
        named = zip(self.names, self.masters, strict=True)
        self.optimizer = build_optimizer(parameter_groups(named, config.optim), config.optim)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The micro-batch's part of the step's loss, and its sum of negative log-likelihoods."""
        arguments = [t.to(self.world.device) for t in batch[: 4 if self.config.data.document_masking else 3]]
        sums = self.model(*arguments)
        n_predicted = self.config.global_batch_sequences * self.config.data.sequence_length
        return training_loss(sums, self.config.model.z_loss, n_predicted, 1.0), sums.nll_sum.detach()

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum the gradients over the ranks."""
        gradients = [w.grad for w in self.weights]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        pieces = flat.split([g.numel() for g in gradients])
        torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(pieces, gradients, strict=True)])

    @torch.no_grad()
    def update(self) -> None:
        """Clip the gradients, update the master weights, and copy them to the weights."""
        apart = self.masters[0] is not self.weights[0]
        if apart:
            for master, weight in zip(self.masters, self.weights, strict=True):
                master.grad, weight.grad = weight.grad.float(), None
        if self.config.optim.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.masters, self.config.optim.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if apart:
            torch._foreach_copy_(self.weights, self.masters)


def main() -> None:
    job, folder = read_job()
    config = train_config(job)
    world = init_world(config.engine.timeout_s)
    loop = Loop(config, world, build_model(config, world.device))
    batches = synthetic_batches(job, world.rank)
    meter = Meter(job, folder, world.device)
    forward = meter.part("forward", loop.forward)
    backward = meter.part("backward", lambda loss: loss.backward())
    reduce = meter.part("backward", loop.reduce)
    update = meter.part("optimizer", loop.update)
    own_predicted = config.global_batch_sequences // world.size * config.data.sequence_length

    def train_step(step: int) -> torch.Tensor:
        nll_sum = torch.zeros((), device=world.device)
        for batch in next(batches):
            loss, nll = forward(batch)
            backward(loss)
            nll_sum += nll
        if world.size > 1:
            reduce()
        update()
        return nll_sum / own_predicted

    meter.measure(train_step)
    meter.report(sum(w.numel() for w in loop.weights))
    shutdown_world()


if __name__ == "__main__":
    main()
