"""The training objective: it turns the sums that the model returns into one scalar to minimize."""

from __future__ import annotations

from torch import Tensor

from pretrain.model.decoder import LossSums


def training_loss(
    sums: LossSums, z_loss_weight: float, n_predicted_global: Tensor | int, scale: float
) -> Tensor:
    """One micro batch's part of the loss of either objective: fp32 scalar.

    It is scale x (nll_sum + z_loss_weight x z_sum) / n_predicted_global, where `n_predicted_global` counts the
    predicted tokens of the whole optimizer step, over micro batches and ranks. So every token of the step has
    the same weight, however unevenly the micro batches are filled. `scale` undoes the averaging over ranks and
    accumulation steps that the engine applies to gradients.
    """
    return scale * (sums.nll_sum + z_loss_weight * sums.z_sum) / n_predicted_global
