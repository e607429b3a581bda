"""The recipes of conf/experiment/, each on the hardware that it is meant for: the table of docs/recipes.md."""

from __future__ import annotations

from typing import NamedTuple

from pretrain.arithmetic import count_parameters
from pretrain.config import Precision, TrainConfig, load_config
from pretrain.plan.hardware import GIB, known_gpu
from pretrain.plan.loss import CHINCHILLA
from pretrain.plan.planner import Plan, Site, make_plan
from pretrain.plan.time import Cluster


class Hardware(NamedTuple):
    """The devices that a recipe is planned for."""

    gpu: str
    nodes: int
    gpus_per_node: int


RECIPES = {
    "125m_one_gpu": Hardware("h100", 1, 1),
    "1b_one_node": Hardware("h100", 1, 8),
    "7b_cluster": Hardware("h100", 8, 8),
    "nanogpt/125m": Hardware("h100", 1, 1),
    "olmo/190m": Hardware("h100", 1, 8),
    "olmo/370m": Hardware("h100", 1, 8),
    "olmo/760m": Hardware("h100", 1, 8),
    "olmo/1.3b": Hardware("h100", 1, 8),
    "olmo2/1b": Hardware("h100", 8, 8),
    "smollm2/135m": Hardware("h100", 8, 8),
    "smollm2/360m": Hardware("h100", 8, 8),
    "smollm2/1.7b": Hardware("h100", 32, 8),
    "tinyllama/1.1b": Hardware("a100_40", 2, 8),
}
VOCABULARY = 32_000
"""Rows of the embedding where a recipe leaves them to the corpus; those of Llama 2."""
STORAGE_BYTES_PER_S, RESTART_S = 10 * GIB, 600.0


def recipe(name: str) -> TrainConfig:
    """The configuration of a recipe, but for the data."""
    config = load_config(
        TrainConfig, ["run_dir=unused", "data.manifest=unused", f"experiment={name}"], "config"
    )
    config.engine.precision = Precision.bf16  # which all devices below have
    config.model.vocab_size = config.model.vocab_size or VOCABULARY
    return config


def plan_recipe(name: str) -> Plan:
    """The fastest plan of a recipe on its hardware."""
    hardware = RECIPES[name]
    gpu = known_gpu(hardware.gpu)
    cluster = Cluster(
        gpu=gpu,
        nodes=hardware.nodes,
        gpus_per_node=hardware.gpus_per_node,
        nic_bits_per_s=gpu.nic_bits_per_s,
    )
    site = Site(
        usd_per_gpu_hour=gpu.usd_per_hour,
        storage_bytes_per_s=STORAGE_BYTES_PER_S,
        restart_s=RESTART_S,
        host_bytes_per_node=gpu.host_bytes * hardware.gpus_per_node,
    )
    return make_plan(recipe(name), cluster, site)


def recipes_table() -> str:
    """A Markdown table with a row for each recipe."""
    lines = [
        "| `experiment=` | parameters | tokens | batch, tokens | rate | GPUs | memory, projected | time, projected "
        "| loss, projected |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, hardware in RECIPES.items():
        plan = plan_recipe(name)
        size = count_parameters(plan.config.model)
        loss = CHINCHILLA.loss(size, plan.tokens)
        lines.append(
            f"| `{name}` | {size / 1e6:,.0f}M | {plan.tokens / 1e9:,.1f}B | {plan.best.step.tokens:,} "
            f"| {plan.config.optim.lr:g} | {hardware.nodes * hardware.gpus_per_node} {hardware.gpu} "
            f"| {plan.best.device_total / GIB:.0f} GiB | {_duration(plan.days)} | {loss:.2f} |"
        )
    return "\n".join(lines)


def _duration(days: float) -> str:
    return f"{days:.1f} days" if days >= 1 else f"{24 * days:.1f} h"
