"""One rank of the engine tests. Trains on fixed batches and writes losses, and can save and load a checkpoint.

Argument: a JSON list of jobs {stage, precision, steps, out, load?, save?, overrides?, micro?, nothing_to_predict?,
half_to_predict?, before_load?, loss_scale?, ema?}, done one after another. `micro` is the number of sequences per
forward pass in each step, 2 by default. `nothing_to_predict` lists steps whose labels are all ignored, and
`half_to_predict` those where the labels of the first half of the batch are: all that rank 0 of 2 has. `before_load` is
the number of steps on other data before the checkpoint is loaded. `loss_scale` is the loss scale of the first step.
`ema` is the decay of a moving average, which is then followed step by step.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import torch

from pretrain.batch import Batch
from pretrain.checkpoint import tensors as checkpoint
from pretrain.config import TrainConfig, load_config
from pretrain.distributed import World, init_world, shutdown_world, sum_over_ranks
from pretrain.engine.engine import Engine
from pretrain.engine.loss_scale import LossScale
from support.run_states import run_state

T, VOCAB, GLOBAL, MICRO, LR = 32, 128, 8, 2, 3e-3


def small_config(stage: int, precision: str, overrides: list[str]) -> TrainConfig:
    return load_config(
        TrainConfig,
        [
            "run_dir=unused",
            "data.manifest=unused",
            "total_steps=20",
            f"global_batch_sequences={GLOBAL}",
            f"micro_batch_sequences={MICRO}",
            f"data.sequence_length={T}",
            "model.n_layers=2",
            "model.d_model=32",
            "model.d_ff=80",
            # Every stage and optimizer is tested with biases too; a model has these or QK-norm.
            f"model.attention_bias={'model.qk_norm=true' not in overrides}",
            f"model.vocab_size={VOCAB}",
            f"optim.lr={LR}",
            f"engine.zero_stage={stage}",
            f"engine.precision={precision}",
            "engine.persistence_threshold_elements=64",
            *overrides,
        ],
        "config",
    )


def batch_of(samples: np.ndarray) -> Batch:
    """Predictable sequences with different numbers of ignored labels, so that a wrong mean shows. In some samples all
    labels are ignored, so some micro batches have nothing to predict."""
    rows = [torch.Generator().manual_seed(int(s)) for s in samples]
    start = torch.stack([torch.randint(0, VOCAB, (1,), generator=g) for g in rows])
    tokens = (start + torch.arange(T) * 3) % VOCAB
    labels = (tokens + 3) % VOCAB
    keep = torch.tensor([0 if int(s) % GLOBAL < MICRO else 4 + int(s) % (T - 4) for s in samples])
    labels[torch.arange(T)[None] >= keep[:, None]] = -100
    positions = torch.arange(T).expand(len(samples), T).contiguous()
    return Batch(tokens, labels, positions, torch.zeros_like(tokens), samples)


def batches_of_step(step: int, world: World, micro: int = MICRO) -> list[Batch]:
    mine = np.arange(GLOBAL // world.size) + (step - 1) * GLOBAL + world.rank * (GLOBAL // world.size)
    return [batch_of(mine[i : i + micro]) for i in range(0, len(mine), micro)]


def without_first_half(batch: Batch) -> Batch:
    ignored = torch.from_numpy(batch.samples % GLOBAL < GLOBAL // 2)
    return batch._replace(labels=batch.labels.masked_fill(ignored[:, None], -100))


def whole_state(engine: Engine) -> dict[str, torch.Tensor]:
    """This rank's part of all weights and moments, working weights among them, and the optimizer's own step."""
    state = engine.state
    found = {key: partition.values.clone() for key, partition in state.snapshot().items()}
    found |= {f"replicated.{n}": t.detach().clone() for n, t in enumerate(state._replicated_state())}
    found |= {f"partitioned.{n}": t.detach().clone() for n, t in enumerate(state._partitioned_state())}
    return found | {"step": torch.tensor(state.optimizer_step)}


class Follower:
    """Computes the average of the weights anew from each snapshot, and notes the largest difference to the engine's."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.difference, self.loss, self.changed = engine, 0.0, 0.0, []
        self.expected = {k: v.clone() for k, v in self.shares("ema").items()}

    def shares(self, kind: str) -> dict[str, torch.Tensor]:
        snapshot = self.engine.state.snapshot()
        return {k.split(".", 1)[1]: p.values.clone() for k, p in snapshot.items() if k.startswith(f"{kind}.")}

    def follow(self, step: int) -> None:
        ema = self.engine.config.ema
        if step % ema.every_steps == 0:
            stays = min(ema.decay, (1 + step) / (10 + step)) ** ema.every_steps
            weights = self.shares("weight")
            self.expected = {k: stays * v + (1 - stays) * weights[k] for k, v in self.expected.items()}
        found = self.shares("ema")
        differences = [(found[k] - v).abs().max() for k, v in self.expected.items() if v.numel()]
        self.difference = max(self.difference, float(max(differences)))

    def exchange(self, world: World) -> None:
        """Evaluate the average, and compare every bit before and after."""
        before, average = whole_state(self.engine), self.shares("ema")
        with self.engine.state.averaged():
            exchanged = self.shares("weight")
            found = [self.engine.evaluate(batch).nll_sum for batch in batches_of_step(1, world)]
        (self.loss,) = sum_over_ranks([float(sum(found))], world)
        after = whole_state(self.engine)
        bits = lambda tensor: tensor.reshape(-1).view(torch.uint8)  # noqa: E731
        self.changed = [key for key in before if not torch.equal(bits(before[key]), bits(after[key]))]
        self.changed += [key for key in average if not torch.equal(average[key], exchanged[key])]


def run(job: dict, world: World) -> None:
    averaging = [f"ema.decay={job['ema']}"] if "ema" in job else []
    config = small_config(job["stage"], job["precision"], [*job.get("overrides", []), *averaging])
    engine = Engine(config, world)
    first = 1
    for step in range(90, 90 + job.get("before_load", 0)):  # as before a rollback
        batches = batches_of_step(step, world)
        engine.train_step(batches, step, lr=LR)
        engine.evaluate(batches[0])
    if "load" in job:
        found = checkpoint.find_latest(Path(job["load"]).parent.parent, world).verified
        assert found is not None
        state, held = found.state, engine.state
        keys = held.weight_keys + held.moment_keys + (held.ema_keys if state.get("ema") else [])
        loaded = checkpoint.load(found, keys, held.shapes, world)
        held.restore(loaded, state["optimizer_step"])
        if engine.loss_scale is not None:
            engine.loss_scale = LossScale(state["loss_scale"])
        first = state["step"] + 1
    if "loss_scale" in job:
        engine.loss_scale = LossScale({"value": job["loss_scale"], "applied": 0})
    losses, norms, scales, changed = [], [], [], []
    follower = Follower(engine) if "ema" in job else None
    for step in range(first, first + job["steps"]):
        micro = job["micro"][step - first] if "micro" in job else MICRO
        batches = batches_of_step(step, world, micro)
        if step in job.get("nothing_to_predict", []):
            batches = [batch._replace(labels=torch.full_like(batch.labels, -100)) for batch in batches]
        if step in job.get("half_to_predict", []):
            batches = [without_first_half(batch) for batch in batches]
        before = whole_state(engine) if "nothing_to_predict" in job else {}
        result = engine.train_step(batches, step, lr=LR)
        changed.append(
            [key for key, value in before.items() if not torch.equal(value, whole_state(engine)[key])]
        )
        assert not result.memory_changed, "nothing flips bits here"
        if follower is not None:
            follower.follow(step)
            follower.exchange(world)
        # An evaluation between two updates must not change the training.
        whole, each = engine.evaluate(batches[0]), engine.evaluate(batches[0], by_sequence=True)
        assert torch.allclose(each.nll_sum.sum(), whole.nll_sum, rtol=1e-4)
        assert each.n_predicted.tolist() == (batches[0].labels != -100).sum(-1).tolist()
        (nll,) = sum_over_ranks([float(result.nll_sum)], world)
        losses.append(nll / result.n_predicted if result.n_predicted else None)
        norms.append(result.grad_norm)
        if engine.loss_scale is not None:
            scales.append(engine.loss_scale.value)
        if engine.loss_scale is not None and losses[-1] is not None:
            engine.loss_scale.update(applied=not result.skipped, loss=losses[-1], limit=math.inf)
    last = first + job["steps"] - 1
    if "save" in job:
        state = run_state(
            last,
            engine.state.shapes,
            optimizer_step=engine.state.optimizer_step,
            loss_scale=engine.loss_scale.state() if engine.loss_scale else None,
            ema="ema" in job,
        )
        checkpoint.save(Path(job["save"]), last, engine.state.snapshot(), state, world)
    if world.is_main:
        files = [path.name for path in Path(config.engine.nvme_path or "/none").rglob("*.swp")]
        parameters = engine._parameters.values()
        seconds = sum(getattr(p, "ds_secondary_tensor", None) is not None for p in parameters)
        result = {"losses": losses, "norms": norms, "step": last, "files": files, "second_copies": seconds}
        result |= {"loss_scales": scales, "changed": changed}
        if follower is not None:
            result |= {"ema_difference": follower.difference, "ema_loss": follower.loss}
            result |= {"changed": follower.changed}
        Path(job["out"]).write_text(json.dumps(result))
    engine.close()


def main() -> None:
    world = init_world(60)
    for job in json.loads(sys.argv[1]):
        run(job, world)
    shutdown_world()


def losses(root: Path, name: str) -> list[float]:
    """The losses by step that a job wrote to `root`/`name`.json, its `out`."""
    return json.loads((root / f"{name}.json").read_text())["losses"]


if __name__ == "__main__":
    main()
