"""What the learner needs of its logits: log-probabilities and entropies of the distribution that is sampled from, over a vocabulary that may be split.

    z = logits / temperature, banned tokens at -inf        log Z = log sum_v exp z_v
    l = z_target - log Z                                   H = log Z - sum_v p_v z_v,   p_v = exp(z_v - log Z)

In chunks of positions, from the logits as the model gave them: neither a float32 copy of all of them nor the whole vocabulary of a position is ever held. Ranks
that hold parts of the vocabulary tell each other four numbers a position. Rollouts sample from the same distribution (`heads.policy_logits`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron_ext.model.heads import CHUNK_NUMEL, policy_logits

_NOTHING = -200.0
"""exp of it is 0 in float32."""
_LEAST = -1e30
"""In place of the peak of a part whose tokens are all banned."""


def policy_scores(
    logits_SBV: torch.Tensor, targets_BS: torch.Tensor, temperature: float, banned_V: torch.Tensor, tp_group: Any, chunk_numel: int = CHUNK_NUMEL
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probs of the targets, entropies without gradient), float32 [B, S]. The caller shifts: `targets[:, s]` is what position s decides. Logits and banned
    tokens are this rank's part of the vocabulary. Collective over the group."""
    targets_SB = targets_BS.transpose(0, 1).contiguous()
    rows = max(1, chunk_numel // logits_SBV.shape[-1])
    logprobs_N, entropy_N = _PolicyScores.apply(logits_SBV.flatten(0, 1), targets_SB.flatten(), banned_V, temperature, tp_group, rows)
    return logprobs_N.view_as(targets_SB).transpose(0, 1), entropy_N.view_as(targets_SB).transpose(0, 1)


class _PolicyScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_NV: torch.Tensor, targets_N: torch.Tensor, banned_V: torch.Tensor, temperature: float, tp_group: Any, rows: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        place_N, here_N = _places(targets_N, logits_NV.shape[1], tp_group)
        found = []
        for logits, place, here in zip(*(tensor.split(rows) for tensor in (logits_NV, place_N, here_N)), strict=True):
            z = policy_logits(logits, temperature, banned_V)
            target = torch.where(here, z.gather(1, place[:, None])[:, 0], 0.0)
            own_peak = z.amax(-1).clamp(min=_LEAST)
            weights = z.sub_(own_peak[:, None]).exp()
            found.append(torch.stack([own_peak, weights.sum(-1), torch.linalg.vecdot(weights, z.clamp_(min=_NOTHING)), target]))
        own_peak_N, own_total_N, own_weighted_N, own_target_N = torch.cat(found, dim=1)
        peak_N = own_peak_N.clone()
        _reduce(peak_N, torch.distributed.ReduceOp.MAX, tp_group)
        below_N = own_peak_N - peak_N  # 0 on one rank: sums about this rank's peak become sums about that of all
        sums_3N = torch.stack(
            [own_total_N * below_N.exp(), (own_weighted_N + own_total_N * below_N) * below_N.exp(), torch.where(here_N, own_target_N - peak_N, 0.0)]
        )
        _reduce(sums_3N, torch.distributed.ReduceOp.SUM, tp_group)
        total_N, weighted_N, target_N = sums_3N
        log_total_N = total_N.log()
        ctx.temperature, ctx.rows = temperature, rows
        ctx.save_for_backward(logits_NV, banned_V, place_N, here_N, peak_N + log_total_N)
        entropy_N = log_total_N - weighted_N / total_N
        ctx.mark_non_differentiable(entropy_N)
        return target_N - log_total_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: torch.Tensor, _entropy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """(one-hot - p) / temperature."""
        logits_NV, banned_V, place_N, here_N, partition_N = ctx.saved_tensors
        grad_N = grad_N / (ctx.temperature or 1.0)
        d_logits_NV = torch.empty_like(logits_NV)
        parts = (tensor.split(ctx.rows) for tensor in (logits_NV, place_N, here_N, partition_N, grad_N, d_logits_NV))
        for logits, place, here, partition, grad, d_logits in zip(*parts, strict=True):
            d = policy_logits(logits, ctx.temperature, banned_V).sub_(partition[:, None]).exp_().mul_(-grad[:, None])
            d_logits.copy_(d.scatter_add_(1, place[:, None], torch.where(here, grad, 0.0)[:, None]))
        return d_logits_NV, None, None, None, None, None


def _places(targets_N: torch.Tensor, size: int, tp_group: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Where in this rank's part of the vocabulary each target stands, and whether it does; 0 where not."""
    place_N = targets_N - size * tp_group.rank()
    here_N = (place_N >= 0) & (place_N < size)
    return torch.where(here_N, place_N, 0), here_N


def _reduce(x: torch.Tensor, operation: Any, tp_group: Any) -> None:
    if tp_group.size() > 1:
        torch.distributed.all_reduce(x, op=operation, group=tp_group)
