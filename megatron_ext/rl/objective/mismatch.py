"""Rollouts come from another engine than gradients do. Tokens are weighed by what that changed: w = pi_old / mu, as the learner and as the rollout had it.

    tis      min(w, cap)                       truncated importance sampling, fengyao.notion.site/off-policy-rl; verl `rollout_corr_helper.py`
    icepop   w within the band, 0 outside      IcePop, arXiv 2510.18855; slime `icepop_function`

Without gradient; a token of weight 0 counts in the divisor as before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext.config.algorithms import Correction
from megatron_ext.rl.objective.surrogates import ratio


def mismatch_weights(how: Correction, old_n: Tensor, rollout_n: Tensor, cap: float, band: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """(weights, which of them were cut). With `none`: ones."""
    weight_n = ratio(old_n - rollout_n).detach()
    if how == "tis":
        return weight_n.clamp(max=cap), weight_n > cap
    if how == "icepop":
        outside_n = (weight_n < band[0]) | (weight_n > band[1])
        return torch.where(outside_n, 0.0, weight_n), outside_n
    return torch.ones_like(weight_n), torch.zeros_like(weight_n, dtype=torch.bool)
