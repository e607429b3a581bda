"""A plan as text and as JSON-ready values. Each figure is marked as measured, fitted or projected."""

from __future__ import annotations

from typing import Any

from pretrain.arithmetic import count_parameters
from pretrain.config import TrainConfig
from pretrain.plan.hardware import GIB
from pretrain.plan.ladder import INTERVAL_FRAC, LadderFit, predict
from pretrain.plan.loss import CHINCHILLA
from pretrain.plan.planner import (
    CALIBRATED,
    FITTED,
    MEASURED,
    PROJECTED,
    AssessedOption,
    Plan,
    checkpoints_kept,
    data_bytes_per_s,
    mfu,
    sent_bytes,
    token_bytes,
    uncertainties,
)

# For these parts, the formulas match the storages that were counted in real runs (test_planner.py).
COUNTED = {
    "parameters",
    "persistent parameters",
    "masters",
    "moments",
    "gradients",
    "moving average",
}
RANKED_LINES = 8


class Figure(dict[str, Any]):
    """{value, unit, known}: one number of the report."""

    def __init__(self, value: float | int | str | None, unit: str, known: str) -> None:
        super().__init__(value=value, unit=unit, known=known)


def memory_figures(assessed: AssessedOption) -> dict[str, Figure]:
    """Bytes per rank by part. Parts in host memory are named `host: ...`. Only the COUNTED parts are measured."""
    found = {
        name: Figure(size, "bytes", MEASURED if name in COUNTED else PROJECTED)
        for name, size in assessed.device.items()
    }
    for name, size in assessed.host.items():
        found[f"host: {name}"] = Figure(size, "bytes", PROJECTED)  # runs with offload have not been counted
    return found


def time_figures(plan: Plan) -> dict[str, Figure]:
    """The time of a step by part, and the figures that follow from it: duration, cost, saves and storage."""
    best, step, good = plan.best, plan.best.step, plan.goodput
    calibrated = plan.cluster.gpu.name in CALIBRATED and plan.cluster.n_ranks <= 64
    known = FITTED if calibrated else PROJECTED
    return {
        "step_time_s": Figure(step.total_s, "s", known),
        "compute_s": Figure(step.compute_s, "s", known),
        "exposed_communication_s": Figure(step.exposed_communication_s, "s", known),
        "optimizer_s": Figure(step.optimizer_s, "s", PROJECTED),
        "all_communication_s": Figure(step.communication_s, "s", known),
        "mfu_frac": Figure(mfu(best, plan.cluster), "", known),
        "tokens_per_second": Figure(step.tokens_per_second, "tokens/s", known),
        "tokens_per_second_per_rank": Figure(
            step.tokens_per_second / plan.cluster.n_ranks, "tokens/s", known
        ),
        "steps": Figure(plan.config.n_steps, "", PROJECTED),
        "days": Figure(plan.days, "days", PROJECTED),
        "cost_usd": Figure(plan.usd, "USD", PROJECTED),
        "checkpoint_bytes": Figure(good.checkpoint_bytes, "bytes", MEASURED),
        "save_stall_s": Figure(good.stall_s, "s", PROJECTED),
        "save_write_s": Figure(good.write_s, "s", PROJECTED),
        "mtbf_hours": Figure(good.mtbf_s / 3600, "h", PROJECTED),
        "advised_interval_s": Figure(good.interval_s, "s", PROJECTED),
        "advised_every_steps": Figure(max(1, round(good.interval_s / step.total_s)), "steps", PROJECTED),
        "goodput_frac": Figure(good.frac, "", PROJECTED),
        "data_bytes_per_second": Figure(data_bytes_per_s(plan), "bytes/s", known),
        "corpus_bytes": Figure(token_bytes(plan.config.model) * plan.tokens, "bytes", PROJECTED),
        "checkpoints_bytes": Figure(
            checkpoints_kept(plan.config) * good.checkpoint_bytes, "bytes", PROJECTED
        ),
    }


def loss_figures(config: TrainConfig, n_tokens: int, fit: LadderFit | None = None) -> dict[str, Figure]:
    """The held-out loss at the end of the run: by a published law, or by the user's own ladder.

    Empty where no law speaks of such a run: of masked tokens, or of weights that were trained before.
    """
    if not config.causal or config.init_from is not None:
        return {}
    if fit is None:
        expected = CHINCHILLA.loss(count_parameters(config.model), n_tokens)
        return {"expected_loss": Figure(expected, "nats per token", PROJECTED)}
    found = predict(fit, config.model, n_tokens)
    batch = max(1, round(found.batch_tokens / config.data.sequence_length))
    return {
        "expected_loss": Figure(found.loss, "nats per token", PROJECTED),
        "expected_loss_low": Figure(found.low, "nats per token", PROJECTED),
        "expected_loss_high": Figure(found.high, "nats per token", PROJECTED),
        "beyond_largest_model": Figure(found.beyond_size, "times", PROJECTED),
        "beyond_longest_run": Figure(found.beyond_tokens, "times", PROJECTED),
        "ladder_lr": Figure(found.lr, "", PROJECTED),
        "ladder_global_batch_sequences": Figure(batch, "sequences", PROJECTED),
    }


def loss_lines(config: TrainConfig, n_tokens: int, fit: LadderFit | None = None) -> list[str]:
    """The same as lines of text, with what they hold for."""
    figures = loss_figures(config, n_tokens, fit)
    if not figures:
        return []
    lines = [f"  {name:<32}{_shown(figure)}  {figure['known']}" for name, figure in figures.items()]
    if fit is None:
        about = [
            "  of Chinchilla's text in its 32,000 tokens (Hoffmann et al., 2022, fitted by Besiroglu et al., 2024);",
            "  for your text and tokenizer, train a ladder (launch/ladder.py) and give ladder=DIR",
        ]
    else:
        size, length = figures["beyond_largest_model"]["value"], figures["beyond_longest_run"]["value"]
        about = [
            f"  {fit.metric} of {len(fit.rungs)} runs, which depart from the law by up to {fit.departure_frac:.1%}; "
            f"low and high should hold {INTERVAL_FRAC:.0%} of cases, as far as the law holds"
        ]
        if size > 1 or length > 1:
            about.append(
                f"  EXTRAPOLATED to {max(1.0, size):.3g} times the ladder's largest model and "
                f"{max(1.0, length):.3g} times its longest run: nothing checks the law out there"
            )
    return ["held-out loss at the end", *lines, *about, ""]


def plan_values(plan: Plan, fit: LadderFit | None = None) -> dict[str, Any]:
    """The whole plan as JSON-ready values, with the loss that `fit` predicts."""
    fits = [j for j in plan.ranked if j.problem is None]
    return {
        "ranks": plan.cluster.n_ranks,
        "gpu": plan.cluster.gpu.name,
        "option": plan.best.option.name,
        "overrides": [
            *plan.best.option.overrides,
            f"global_batch_sequences={plan.config.global_batch_sequences}",
        ],
        "memory": memory_figures(plan.best),
        "memory_total": Figure(plan.best.device_total, "bytes", PROJECTED),
        "memory_margin": Figure(plan.cluster.gpu.memory_bytes - plan.best.device_total, "bytes", PROJECTED),
        "sent_bytes_per_step": {
            name: {
                "by_rank": Figure(by_rank, "bytes", MEASURED),
                "into_node": Figure(into_node, "bytes", PROJECTED),
            }
            for name, by_rank, into_node in sent_bytes(plan.best, plan.cluster)
        },
        "time": time_figures(plan),
        "loss": loss_figures(plan.config, plan.tokens, fit),
        "uncertainties": [
            {"what": what, "more_frac": more, "known": PROJECTED} for what, more in uncertainties(plan)
        ],
        "ranked": [
            {
                "option": j.option.name,
                "step_time_s": Figure(j.step.total_s, "s", PROJECTED),
                "memory": Figure(j.device_total, "bytes", PROJECTED),
            }
            for j in fits
        ],
        "left_out": [
            {"option": j.option.name, "why": j.problem, "known": PROJECTED} for j in plan.ranked if j.problem
        ],
    }


def plan_lines(plan: Plan, fit: LadderFit | None = None) -> list[str]:
    """The plan as lines of text, with the loss that `fit` predicts."""
    config, cluster, best = plan.config, plan.cluster, plan.best
    lines = [
        f"{cluster.nodes} nodes x {cluster.gpus_per_node} {cluster.gpu.label}, "
        f"{cluster.nic_bits_per_s / 1e9:g} Gb/s each; nothing below was run on a GPU of this project",
        "measured: the formula gives what CPU runs of 1 and 2 ranks count; fitted: on runs that others published,",
        "of up to 64 GPUs; projected: neither (docs/planning.md)",
        f"sequence_length={config.data.sequence_length}, global_batch_sequences={config.global_batch_sequences} "
        f"({best.step.tokens:,} tokens), vocabulary {config.model.vocab_size:,}, "
        f"document_masking={str(config.data.document_masking).lower()}",
        *trained_lines(plan),
        f"best option: {best.option.name}, {best.option.accum_steps} micro batches per step",
        f"  {' '.join(best.option.overrides)}",
        "",
        "memory per rank",
        *(
            f"  {name:<32}{figure['value'] / GIB:>10.2f} GiB  {figure['known']}"
            for name, figure in memory_figures(best).items()
        ),
        f"  {'device, together':<32}{best.device_total / GIB:>10.2f} GiB of {cluster.gpu.memory_bytes / GIB:.1f}  "
        f"{PROJECTED}",
        "",
        f"{'sent per step':<34}{'by a rank':>10}{'into a node':>17}",
        *(
            f"  {name:<32}{by_rank / 1e9:>10.2f} GB{into_node / 1e9:>14.2f} GB  {MEASURED}"
            for name, by_rank, into_node in sent_bytes(best, cluster)
        ),
        "",
        "time, cost, storage",
        *(f"  {name:<32}{_shown(figure)}  {figure['known']}" for name, figure in time_figures(plan).items()),
        "",
        *loss_lines(plan.config, plan.tokens, fit),
        "what is not known, and how much longer or dearer the run is at its bad end, the widest first",
        *(f"  +{more:>6.1%}  {what}  {PROJECTED}" for what, more in uncertainties(plan)),
        "",
    ]
    return lines + ranked_lines(plan.ranked)


def trained_lines(plan: Plan) -> list[str]:
    """What is trained, where that is not all weights and nothing else."""
    updates, model = plan.best.option.updates, plan.config.model
    lines = []
    if updates.lora.r:
        share = f"{updates.trained(model):,} of {updates.total(model):,} parameters are trained"
        lines.append(
            f"{share}: adapters of rank {updates.lora.r}; the others are frozen and have no gradients"
        )
    if updates.ema.decay is not None:
        lines.append("a moving average of what is trained is kept (ema.decay)")
    return lines


def _shown(figure: Figure) -> str:
    value, unit = figure["value"], figure["unit"]
    if value is None:
        return f"{'unknown; give cluster.usd_per_gpu_hour':>10}"
    if unit in ("bytes", "bytes/s"):
        return f"{value / 1e9:>12,.3f} {unit.replace('bytes', 'GB')}"
    if isinstance(value, int) or value >= 1000:
        return f"{value:>12,.0f} {unit}"
    return f"{value:>12.4g} {unit}"


def ranked_lines(ranked: list[AssessedOption]) -> list[str]:
    """Lines for the best options, and for the options that do not fit, with the reasons."""
    fits, rest = [j for j in ranked if j.problem is None], [j for j in ranked if j.problem]
    lines = [f"options, the fastest first ({len(fits)} fit, {len(rest)} are left out)"]
    for one in fits[:RANKED_LINES]:
        lines.append(
            f"  {one.option.name:<64}{one.step.total_s:>9.3f} s{one.device_total / GIB:>9.1f} GiB  {PROJECTED}"
        )
    for one in sorted(rest, key=lambda j: j.device_total)[:RANKED_LINES]:
        lines.append(f"  left out: {one.option.name}: {one.problem}")
    if len(rest) > RANKED_LINES:
        lines.append(f"  ... and {len(rest) - RANKED_LINES} more; json=true lists all")
    return lines
