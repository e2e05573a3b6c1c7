"""What routers are taught by beside the answers' advantages: pure functions of one layer's log-probs, for tokens n of the spans that count.

    p = softmax of the router's scores over ALL experts;  C: the cluster of the token's skill;  e_1 .. e_K: the experts chosen, in their order;  sg: no gradient

    pathwise     - sum_n w_n min(p_n(C), q_n)                    p(C) = sum_{e in C} p(e): also experts that were not chosen get a gradient, up to q
    router_pg    sum_n w_n max(-A r, -A clip(r))                 r = exp(log P(e_1 .. e_K) - log P_old), clip to 1 +- eps
                 log P(e_1 .. e_K) = sum_k log p(e_k) - log(1 - p(e_1) - .. - p(e_{k-1}))           Plackett-Luce: a draw without replacement
    router_kl    sum_n w_n KL(p_n || p0_n)                       p0: of the router that RL started from, at the same hidden state

A reward that depends on the policy's own parameters, as the mass of a cluster does, has the gradient E[grad log pi (r + b)] + E[grad b]. Advantages give the
first term alone; `pathwise` is the second, for b = lambda 1[correct] min(p(C), q). `router_pg` makes routes a part of what was drawn, so that a bonus of them
is a reward like any other. By enumeration: docs/studies/gradient_modes.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext.rl.objective.surrogates import clipped, ratio


def cluster_mass(logprobs_nE: Tensor, member_nE: Tensor) -> Tensor:
    """p(C) of each token, in [0, 1]."""
    return (logprobs_nE.exp() * member_nE).sum(-1)


def pathwise_loss(mass_n: Tensor, ceiling_n: Tensor, weight_n: Tensor) -> Tensor:
    """A sum. Nothing pulls where the mass has reached its ceiling."""
    return -(weight_n * torch.minimum(mass_n, ceiling_n)).sum()


def route_logprob(logprobs_nE: Tensor, experts_nK: Tensor) -> Tensor:
    """log P of the experts in their order.

    >>> route_logprob(torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[1, 0]])).exp()  # 0.3 * 0.5 / 0.7
    tensor([0.2143])
    """
    left_nE, total_n = logprobs_nE, torch.zeros_like(logprobs_nE[:, 0])
    for place in range(experts_nK.shape[1]):
        expert_n1 = experts_nK[:, place : place + 1]
        total_n = total_n + logprobs_nE.gather(1, expert_n1).squeeze(1) - left_nE.logsumexp(-1)
        left_nE = left_nE.scatter(1, expert_n1, -torch.inf)
    return total_n


def route_loss(logprob_n: Tensor, old_n: Tensor, advantages_n: Tensor, weight_n: Tensor, clip: float) -> Tensor:
    """A sum: PPO's surrogate of the routes."""
    return (weight_n * clipped(ratio(logprob_n - old_n.detach()), advantages_n, clip, clip)).sum()


def router_kl(logprobs_nE: Tensor, start_nE: Tensor) -> Tensor:
    """KL(p || p0) of each token, exactly: over all experts."""
    return (logprobs_nE.exp() * (logprobs_nE - start_nE)).sum(-1)
