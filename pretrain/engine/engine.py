"""The model under DeepSpeed: one optimizer step, one evaluation pass, and all state as whole, named tensors.

Only this package imports deepspeed. DeepSpeed's own checkpoints are not used: `Engine.state` gives weights and
moments to `pretrain.checkpoint.tensors`, and takes them from there.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pretrain.device import device_type

# DeepSpeed chooses its accelerator at import. It must use the run's device and not warn about missing devices.
os.environ.setdefault("DS_ACCELERATOR", device_type())

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups, set_z3_leaf_modules

from pretrain.batch import Batch
from pretrain.config import OptimizerName, Precision, Switch, TrainConfig
from pretrain.config.engine import NVME_SUB_GROUP_ELEMENTS
from pretrain.config.launched import launched_local_size
from pretrain.distributed import World, gather_objects, seed_step
from pretrain.engine.adapters import adapt
from pretrain.engine.loss_scale import INITIAL, LossScale
from pretrain.engine.objectives import training_loss
from pretrain.engine.optim import build_optimizer, parameter_groups
from pretrain.engine.state import EngineState
from pretrain.engine.uncompiled import compiling_nothing, leave_compiler_unloaded
from pretrain.errors import ConfigError
from pretrain.model.decoder import Block, Decoder, LossSums
from pretrain.model.kernels import capability_of, least_capable, resolve
from pretrain.model.lora import plain_name
from pretrain.model.sequence_parallel import SequenceGroup
from pretrain.reliability.heartbeat import mark

# DeepSpeed calls collectives by names that torch is renaming. A user can do nothing about these warnings.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step on this rank. The sums are over the rank's own sequences."""

    nll_sum: torch.Tensor
    """Sum of the negative log-likelihoods in nats; a scalar on the device, not yet synchronized."""
    z_sum: torch.Tensor
    """Sum of the squared log-partitions; a scalar on the device."""
    n_predicted: int
    """Number of predicted tokens in the global batch. If it is 0, the engine has computed nothing."""
    grad_norm: float | None
    """Global L2 norm of the gradient before clipping; not finite if the update was skipped, None if there was nothing
    to predict."""
    skipped: bool
    """Whether no update was made, because the gradient was not finite or there was nothing to predict; weights and
    moments are then unchanged."""
    memory_changed: torch.Tensor
    """1 if this rank's weights or moments had changed since the previous update, else 0; a scalar on the device."""


def deepspeed_config(config: TrainConfig, world_size: int, files: Path | None = None) -> dict[str, Any]:
    """The DeepSpeed configuration of a run whose precision has been chosen.

    `files` is the folder for this rank's optimizer state, if the state is kept on NVMe.
    """
    engine, accum_steps = config.engine, config.grad_accum_steps(world_size)
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "reduce_bucket_size": engine.reduce_bucket_elements,
        "contiguous_gradients": True,
        "overlap_comm": device_type() == "cuda",  # gloo has no streams to overlap on
    }
    if engine.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": engine.prefetch_bucket_elements,
            "stage3_param_persistence_threshold": engine.persistence_threshold_elements,
            "stage3_max_live_parameters": engine.max_live_elements,
            "stage3_max_reuse_distance": engine.max_live_elements,
        }
        if engine.hpz_partition_ranks > 1:
            zero["zero_hpz_partition_size"] = engine.hpz_partition_ranks
        zero["zero_quantized_weights"] = engine.quantized_weights
        zero["zero_quantized_gradients"] = engine.quantized_gradients
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device_type() == "cuda"}
    if files is not None:
        zero["offload_optimizer"] |= {"device": "nvme", "nvme_path": str(files)}
        zero["sub_group_size"] = NVME_SUB_GROUP_ELEMENTS
    if engine.offload_params:
        zero["offload_param"] = {"device": "cpu", "pin_memory": device_type() == "cuda"}
    result: dict[str, Any] = {
        "train_batch_size": config.micro_batch * accum_steps * world_size,
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": accum_steps,
        "gradient_clipping": config.optim.max_grad_norm,
        "bf16": {"enabled": engine.precision is Precision.bf16},
        # The scale is fixed so that DeepSpeed does not change it; the engine sets it at each step.
        "fp16": {"enabled": engine.precision is Precision.fp16, "loss_scale": INITIAL},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW serves offload too; nothing is compiled
        "zero_allow_untested_optimizer": config.optim.name is OptimizerName.muon,  # our own optimizer
        "steps_per_print": 2**31,
    }
    if engine.zero_stage == 3:
        # Micro batches are summed in fp32. Stages 1 and 2 sum in 16 bits, because fp32 would select another wrapper.
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    if engine.quantized_gradients:
        # The kernels of qgZ interpret every tensor as fp16 (csrc/quantization/pt_binding.cpp, ds_swizzle_quant).
        result["communication_data_type"] = "fp16"
    return _merged(result, engine.deepspeed_overrides)


def _settle_deepspeed(config: TrainConfig, world: World) -> None:
    """Keep DeepSpeed from doing work that a run does not need, and make it use the existing process group."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed would run a compiler for each of its operators to find the compatible ones, although it uses the
    # answer only for this operator. At each start it would then compile the operator for 30 to 90 s, although only
    # inference uses it, and it leaks shared memory.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    if config.engine.precision is Precision.fp16 and world.device.type == "cpu":
        # DeepSpeed rejects fp16 on a CPU without fp16 hardware. torch emulates it there, which our tests need.
        get_accelerator().is_fp16_supported = lambda: True
    if local_size := 1 if world.size == 1 else launched_local_size():
        # Without LOCAL_SIZE, DeepSpeed on a CPU starts numactl in every step to count devices, and forking a process
        # with threads and gigabytes of memory is slow at best. Only DeepSpeed's own launcher sets LOCAL_SIZE.
        os.environ.setdefault("LOCAL_SIZE", str(local_size))
    deepspeed.init_distributed(dist_init_required=False)


def _host_problem(config: TrainConfig, folder: Path | None) -> str | None:
    """What this host lacks for the configuration; None if nothing. Empties `folder`, the optimizer folder on NVMe."""
    engine = config.engine
    if (engine.quantized_weights or engine.quantized_gradients) and device_type() == "cpu":
        return (
            f"engine.quantized_weights={engine.quantized_weights}, engine.quantized_gradients="
            f"{engine.quantized_gradients}: DeepSpeed quantizes on NVIDIA GPUs only; set both to false"
        )
    if folder is None:
        return None
    if not deepspeed.ops.op_builder.AsyncIOBuilder().is_compatible(verbose=False):
        return f"engine.nvme_path={engine.nvme_path} needs the library libaio (Debian and Ubuntu: libaio-dev)"
    try:
        shutil.rmtree(folder, ignore_errors=True)  # files left by a killed process
        folder.mkdir()
    except OSError as error:
        return f"engine.nvme_path={engine.nvme_path} cannot be written to ({error.strerror}); give an existing folder"
    return None


def nvme_folder(config: TrainConfig, rank: int) -> Path | None:
    """The folder for a rank's optimizer state. Each rank of each run has its own, as they may share a host."""
    if config.engine.nvme_path is None:
        return None
    run = hashlib.sha256(str(Path(config.run_dir).resolve()).encode()).hexdigest()[:12]
    return Path(config.engine.nvme_path) / f"pretrain-{run}-rank{rank}"


def _merged(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Two nested dicts merged; values in `overrides` replace those in `base`."""
    merged = dict(base)
    for key, value in overrides.items():
        inner = merged.get(key)
        merged[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


class Engine:
    """A decoder, its optimizer and DeepSpeed around them, on every rank of the world."""

    def __init__(
        self, config: TrainConfig, world: World, base: dict[str, torch.Tensor] | None = None
    ) -> None:
        """`config.model.vocab_size` must be set. All ranks call this together.

        `base` is needed with `lora.r`: this rank's share of each frozen weight, as `checkpoint.load` returns it.
        """
        falls_back = config.kernels.compile is Switch.auto
        self.capability = least_capable(gather_objects(capability_of(world.device), world))
        """The capability that all devices of the run share."""
        self.config = config = resolve(config, self.capability)
        """The configuration with precision and kernels chosen, identical on all ranks."""
        self.world = world
        compiles = config.kernels.compile is Switch.always
        if not compiles:
            leave_compiler_unloaded()
        _settle_deepspeed(config, world)
        zero_stage, self._files = config.engine.zero_stage, nvme_folder(config, world.rank)
        self._check_hosts()
        settings = deepspeed_config(config, world.size, self._files)
        self._sequences = SequenceGroup(world) if world.sequence_ranks > 1 else None
        model = self._build_model(settings, base)
        if self._sequences is not None:
            model.share_sequences(self._sequences)
        if zero_stage == 3:
            # A block's parameters are gathered and released together, with one set of hooks. Hooks inside the block
            # would break a compiled graph, and could differ when the block is recomputed (torch compares the two
            # passes under selective activation checkpointing).
            set_z3_leaf_modules(model, [Block])
        if compiles:
            if self._sequences is not None:
                self._sequences.keep_out_of_graphs()
            model.compile_parts(fall_back=falls_back)
        named = {plain_name(name): parameter for name, parameter in model.named_parameters()}
        frozen = {name: parameter for name, parameter in named.items() if not parameter.requires_grad}
        self._zero_stage = zero_stage
        self._parameters = {name: parameter for name, parameter in named.items() if name not in frozen}
        self._optimizer = build_optimizer(
            parameter_groups(self._parameters.items(), config.optim), config.optim
        )
        with nullcontext() if compiles else compiling_nothing():
            self._deepspeed, *_ = deepspeed.initialize(
                model=model, optimizer=self._optimizer, config=settings
            )
        self.state = EngineState(
            self._deepspeed.optimizer,
            self._optimizer,
            self._parameters,
            config.optim,
            zero_stage,
            world,
            frozen,
            ema=config.ema.decay is not None,
        )
        """Weights and moments, with the methods that copy them for a checkpoint and restore them."""
        if base is not None:
            self.state.check_base(base)
        self.loss_scale = LossScale() if config.engine.precision is Precision.fp16 else None
        """The loss scale of the next step; None if the precision is not fp16."""

    def _build_model(self, settings: dict[str, Any], base: dict[str, torch.Tensor] | None) -> Decoder:
        """The model with its initial weights, or with those of `base` and adapters; partitioned in stage 3."""
        config = self.config
        with deepspeed.zero.Init(
            config_dict_or_path=settings,
            enabled=config.engine.zero_stage == 3,
            mem_efficient_linear=False,
            # The process group of hpZ, if an earlier engine in this process created it.
            zero_param_parallel_group=groups._get_zero_param_intra_parallel_group(),
        ):
            model = Decoder(config.model, config.seed, config.kernels, config.causal)
        if config.lora.r:
            assert base is not None, "adapters are trained on the weights of another run"
            adapt(model, base, config, self.world)
        return model

    def _check_hosts(self) -> None:
        """Raise ConfigError on all ranks if any host lacks something that only that host can check."""
        found = gather_objects((_host_problem(self.config, self._files), os.uname().nodename), self.world)
        for problem, host in found:
            if problem:
                raise ConfigError(f"{problem} (seen on {host})")

    def close(self) -> None:
        """Delete the files of an optimizer on NVMe. The engine cannot be used afterwards."""
        if self._files is not None:
            shutil.rmtree(self._files, ignore_errors=True)

    def set_micro_batch(self, config: TrainConfig) -> None:
        """Use this configuration's micro batch from the next step on, as if the engine had been created with it."""
        self.config = replace(self.config, micro_batch_sequences=config.micro_batch_sequences)
        self._deepspeed.set_train_micro_batch_size(config.micro_batch)
        accum_steps = config.grad_accum_steps(self.world.size)
        self._deepspeed.set_train_batch_size(config.micro_batch * accum_steps * self.world.size)

    def train_step(
        self,
        batches: list[Batch],
        step: int,
        lr: float,
        loss_limit: float = math.inf,
        give_up: Callable[[], bool] = lambda: False,
    ) -> StepResult | None:
        """One optimizer update from this rank's micro batches. `step` counts from 1.

        All ranks skip the update if the gradient is not finite or if the loss (mean nats over the global batch) is
        above `loss_limit`. `give_up` is called before each micro batch and must return the same on all ranks. If it
        returns True, the result is None, and weights and moments are unchanged. If no rank has a token to predict,
        nothing is computed: an update without a gradient would still decay weights and apply old momentum.
        """
        if self._sequences is not None:
            batches = [self._sequences.own_part(batch) for batch in batches]
        predicted = sum(int((batch.labels >= 0).sum()) for batch in batches)
        n_predicted = torch.tensor(predicted, device=self.world.device)
        if self.world.size > 1:
            dist.all_reduce(n_predicted)
        total = int(n_predicted)  # the device is idle at the start of a step, so this waits for the sum only
        if total == 0:
            none = torch.zeros((), device=self.world.device)
            unchanged = torch.zeros((), dtype=torch.int64)
            return StepResult(none, none, 0, None, skipped=True, memory_changed=unchanged)
        seed_step(self.config.seed, step, self.world.rank)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if self.loss_scale is not None:
            self._deepspeed.optimizer.override_loss_scale(self.loss_scale.value)
        nll_sum = torch.zeros((), device=self.world.device)
        z_sum = torch.zeros((), device=self.world.device)
        # DeepSpeed averages over accumulation steps and ranks; this factor turns that into the mean over tokens.
        scale = float(self._deepspeed.gradient_accumulation_steps() * self.world.size)
        self._deepspeed.train()
        for batch in batches:
            mark("micro batch", step)
            if give_up():
                return None
            # DeepSpeed would count the micro batches itself, but their number differs between the data stages of a run.
            self._deepspeed.set_gradient_accumulation_boundary(batch is batches[-1])
            sums = self._forward(batch)
            nll_sum += sums.nll_sum.detach()
            z_sum += sums.z_sum.detach()
            loss = training_loss(sums, self.config.model.z_loss, n_predicted, scale)
            if batch is batches[-1] and loss_limit < math.inf:
                loss = loss * self._factor(nll_sum, n_predicted, loss_limit)
            self._deepspeed.backward(loss)
            if batch is not batches[-1]:
                self._deepspeed.step()  # this only counts the micro batch; it does not update the weights
        changed = self.state.sums.changed()
        grad_norm, skipped = self._update_and_average(step)
        if skipped:
            # After a skipped update, DeepSpeed frees the small parameters that it keeps whole until the next forward
            # pass, so there is nothing to compare.
            self.state.sums.forget()
        else:
            self.state.sums.remember()
        return StepResult(nll_sum, z_sum, total, grad_norm, skipped, changed)

    @property
    def replica_sum(self) -> torch.Tensor:
        """Bit sum, after the last update, of the tensors that every rank holds whole; a scalar on the device."""
        return self.state.sums.replica

    def _factor(self, nll_sum: torch.Tensor, n_predicted: torch.Tensor, loss_limit: float) -> torch.Tensor:
        """A factor for the loss: NaN if the loss is above the limit, which makes DeepSpeed skip the update, else 1.

        It is computed on the device, and the host does not wait for it.
        """
        total = nll_sum.to(torch.float64, copy=True)
        if self.world.size > 1:
            dist.all_reduce(total)
        one = torch.ones((), device=nll_sum.device)
        return torch.where(total > loss_limit * n_predicted, one * math.nan, one)

    def _update_and_average(self, step: int) -> tuple[float, bool]:
        """`_update`, and then that of the moving average, if one is kept and due."""
        result = self._plain_update() if self._zero_stage == 0 else self._update()
        if (stays := self.config.ema.share_at(step)) is not None:
            self.state.update_ema(stays)
        return result

    def _update(self) -> tuple[float, bool]:
        """Apply the summed gradient. Returns its norm, and whether the update was skipped."""
        self._deepspeed.step()
        skipped = not self._deepspeed.was_step_applied()
        norm = self._deepspeed.get_global_grad_norm()
        return (float("nan") if norm is None or skipped else float(norm)), skipped

    def _plain_update(self) -> tuple[float, bool]:
        """`_update` for ZeRO stage 0, where DeepSpeed reports no norm and does not skip non-finite gradients."""
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        skipped = not math.isfinite(norm)
        if skipped:
            for parameter in self._parameters.values():
                parameter.grad = None
            self._deepspeed.set_gradient_accumulation_boundary(
                False
            )  # otherwise it would clip gradients that no longer exist
        self._deepspeed.step()
        return norm, skipped

    @torch.no_grad()
    def evaluate(self, batch: Batch, by_sequence: bool = False) -> LossSums:
        """The loss sums of this rank's batch, or of each of its sequences, without dropout.

        Under ZeRO stage 3 all ranks call this together.
        """
        mark("evaluation")
        if self._sequences is not None:
            batch = self._sequences.own_part(batch)
        self._deepspeed.eval()
        return self._forward(batch, by_sequence)

    def _forward(self, batch: Batch, by_sequence: bool = False) -> LossSums:
        tokens, labels, positions, document_ids = (
            t.to(self.world.device, non_blocking=True) for t in batch[:4]
        )
        # Then each sequence counts as one document, and causal attention needs no mask.
        if self.config.causal and not self.config.data.document_masking:
            return self._deepspeed(tokens, labels, positions, by_sequence=by_sequence)
        return self._deepspeed(tokens, labels, positions, document_ids, by_sequence=by_sequence)
