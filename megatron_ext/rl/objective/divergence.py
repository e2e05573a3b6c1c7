"""Estimates of KL(pi || reference) from tokens that were drawn from pi. http://joschu.net/blog/kl-approx.html; verl `kl_penalty_forward`.

    d = log pi - log reference
    k1   d                   unbiased, of either sign
    k2   d^2 / 2             biased by little where the two are near; as a loss, on-policy, its gradient is that of the KL
    k3   exp(-d) + d - 1     unbiased, never negative; as a loss its gradient is that of the KL the other way round

As a loss k1 pushes nowhere: the gradient of log pi has mean zero under pi. It belongs into the reward, where its sum over an answer is what the answer pays.
"""

from __future__ import annotations

from torch import Tensor

from megatron_ext.config.algorithms import KlEstimator
from megatron_ext.rl.objective.surrogates import LOG_RATIO_LIMIT


def kl_estimate(estimator: KlEstimator, logprobs_n: Tensor, reference_n: Tensor) -> Tensor:
    difference_n = logprobs_n - reference_n
    if estimator == "k1":
        return difference_n
    if estimator == "k2":
        return difference_n**2 / 2
    return k3(difference_n)


def k3(difference_n: Tensor) -> Tensor:
    """exp(-d) + d - 1, d cut at +-20."""
    difference_n = difference_n.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return (-difference_n).exp() + difference_n - 1
