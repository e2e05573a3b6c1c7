"""What stands for the policy in the loss: a ratio of probabilities, bounded, times the advantage. One value per response token; nothing here knows rows.

    l = log pi, o = log pi_old;  r = exp(l - o);  sg: no gradient;  clip(r) = r within [1 - low, 1 + high]

    clip    max(-A r, -A clip(r)), and for A < 0 at most -A dual_clip     PPO, arXiv 1707.06347; dual clip, 1912.09729; two bounds, DAPO, 2503.14476
    gspo    max(-A s, -A clip(s)),  s = sg(m) exp(l - sg(l)),  m = exp(mean_t(l - o)) over the answer's tokens         GSPO, arXiv 2507.18071 (GSPO-token)
    cispo   -sg(clip(r)) A l                                              MiniMax-M1, arXiv 2506.13585

verl `compute_policy_loss_{vanilla,gspo,cispo}`; TRL's GRPOTrainer (`delta` is the dual clip, its `epsilon_high` of CISPO is 1 + high).
"""

from __future__ import annotations

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0


def ratio(log_ratio_n: Tensor) -> Tensor:
    """exp, of what is cut at +-20."""
    return log_ratio_n.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def answer_ratio(logprobs_n: Tensor, mean_log_ratio_n: Tensor) -> Tensor:
    """The ratio of the token's whole answer, whose mean log-ratio is given (without gradient), with the gradient of the token's own log-prob."""
    return ratio(mean_log_ratio_n.detach()) * (logprobs_n - logprobs_n.detach()).exp()


def clipped(ratio_n: Tensor, advantages_n: Tensor, low: float, high: float) -> Tensor:
    return torch.maximum(-advantages_n * ratio_n, -advantages_n * ratio_n.clamp(1 - low, 1 + high))


def dual_clipped(ratio_n: Tensor, advantages_n: Tensor, low: float, high: float, dual_clip: float) -> Tensor:
    """For A < 0 never above -A dual_clip: one token with a huge ratio cannot own the gradient."""
    clipped_n = clipped(ratio_n, advantages_n, low, high)
    return torch.where(advantages_n < 0, torch.minimum(clipped_n, -advantages_n * dual_clip), clipped_n)


def clipped_weight(ratio_n: Tensor, logprobs_n: Tensor, advantages_n: Tensor, low: float, high: float) -> Tensor:
    """CISPO: bounds cut a token's weight, never its gradient."""
    return -ratio_n.detach().clamp(1 - low, 1 + high) * advantages_n * logprobs_n
