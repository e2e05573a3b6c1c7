"""Rollouts come from another engine than gradients do, and from older weights. Tokens are weighed by what that changed: w = pi_old / mu, as the learner's
present weights and as the rollout had it.

    tis              min(w, cap)                       truncated importance sampling, fengyao.notion.site/off-policy-rl; verl `rollout_corr_helper.py`
    icepop           w within the band, 0 outside      IcePop, arXiv 2510.18855; slime `icepop_function`
    sequence_mask    min(w, cap), and 0 for all of an answer whose exp(mean_t log w) is outside the band      richardli.xyz/rl-collapse; verl's
                                                       `rollout_is: token` with `rollout_rs: geometric`; NeMo RL's `seq-mask-tis`, which has no cap

With it the objective is the decoupled one (arXiv 2110.00641; AReaL, 2505.24298, equation 5): bounds are about the weights before the step's first update,
whatever weights sampled.

    loss = -E_mu[w min(r A, clip(r) A)],   w = pi_old / mu,   r = pi / pi_old

Without gradient. A token of weight 0 counts in the divisor as before: of a batch that was almost all left out, what remains does not get the step of a whole
one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext.config.algorithms import Correction
from megatron_ext.rl.objective.surrogates import ratio


def mismatch_weights(how: Correction, log_weight_n: Tensor, answer_log_weight_n: Tensor, cap: float, band: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """(weights, which of them were cut) of tokens with log w = `log_weight_n`, in answers where its mean is `answer_log_weight_n`. With `none`: ones."""
    weight_n = ratio(log_weight_n).detach()
    if how == "tis":
        return weight_n.clamp(max=cap), weight_n > cap
    if how == "icepop":
        outside_n = outside(weight_n, band)
        return torch.where(outside_n, 0.0, weight_n), outside_n
    if how == "sequence_mask":
        outside_n = outside(ratio(answer_log_weight_n).detach(), band)
        return torch.where(outside_n, 0.0, weight_n.clamp(max=cap)), outside_n | (weight_n > cap)
    return torch.ones_like(weight_n), torch.zeros_like(weight_n, dtype=torch.bool)


def outside(weight_n: Tensor, band: tuple[float, float]) -> Tensor:
    return (weight_n < band[0]) | (weight_n > band[1])
