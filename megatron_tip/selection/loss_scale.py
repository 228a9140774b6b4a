"""The one division of the loss: its denominator, and each row's weight."""

from typing import Literal

import torch
from torch import Tensor

from megatron_tip.selection.budget import Budget, Kept
from megatron_tip.selection.ranking import Ranking
from megatron_tip.selection.rule import Rule
from megatron_tip.selection.sampling import inclusion_probabilities

LossScale = Literal["selected", "valid", "importance"]


def row_weights(
    mask: Tensor, loss_scale: LossScale, num_valid: int, num_selected: int, inclusion: Tensor | float = 1.0
) -> Tensor:
    """Returns row weights, `[n]` float32: 0 for rows that are not selected, and for the others

    - "selected": 1 / num_selected, the mean over selected rows (TIP Eq. 1 and 9, TA-OPD Eq. 7);
    - "valid": 1 / num_valid, the same gradient scale at every budget;
    - "importance": 1 / (num_valid p_t), p_t the `inclusion` probability: an unbiased estimate of the mean over all
      valid rows (TIP, appendix: (1/m) sum of g_t / p_t).
    """
    scale = 1.0 / (num_selected if loss_scale == "selected" else num_valid)
    if loss_scale == "importance":
        scale = scale / torch.as_tensor(inclusion, dtype=torch.float64, device=mask.device)
    return torch.where(mask, scale, 0.0).to(torch.float32)


def inclusion(rule: Rule, ranking: Ranking, kept: Kept, budget: Budget) -> Tensor | float:
    """Returns each row's probability of selection; `[n]` or one number. 1 for rules that do not sample.

    Uniform draws: the known share n / m of the row's budget. Weighted draws: see `inclusion_probabilities`; they need
    the budget's runner-ups.
    """
    if rule.take != "sample":
        return 1.0
    if rule.score is None:
        return budget.uniform_inclusion()
    return inclusion_probabilities(ranking.weights, kept.runner_up)
