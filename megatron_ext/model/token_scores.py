"""Log-probabilities of given tokens, and entropies, from logits whose vocabulary may be split: what supervised training and the policy's learner learn from.

    z = logits, or logits / temperature with banned tokens at -inf        log Z = log sum_v exp z_v
    l = z_target - log Z                                                  H = log Z - sum_v p_v z_v,   p_v = exp(z_v - log Z)
    dl/dz = one-hot - p

One pass over the logits, in chunks of positions. Where a gradient will be asked for, exp(z - peak) overwrites them, and the backward pass overwrites that with
the gradient: memory for [S, vocab] is there once, in the model's own dtype. Whoever reads logits reads them before; whoever computes with them again is told so
by autograd. Ranks that hold parts of the vocabulary tell each other three or four numbers a position. Rollouts sample from the same distribution
(`heads.policy_logits`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron_ext.model.heads import policy_logits

CHUNK_NUMEL = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Logits of one chunk: few enough for the caches, and on a GPU enough for its launches."""
_NOTHING = -200.0
"""exp of it is 0 in float32."""
_LEAST = -1e30
"""In place of the peak of a part whose tokens are all banned."""


def token_logprobs(logits_SBV: torch.Tensor, targets_BS: torch.Tensor, tp_group: Any, chunk_numel: int | None = None) -> torch.Tensor:
    """log softmax of the logits at the targets, float32 [B, S]. The caller shifts (`heads.decided`): `targets[:, s]` is what position s predicts. Logits are
    this rank's part of the vocabulary; they are overwritten where they need a gradient. Collective over the group."""
    return _scores(logits_SBV, targets_BS, _Rule(tp_group, None, chunk_numel))[0]


def policy_scores(
    logits_SBV: torch.Tensor, targets_BS: torch.Tensor, temperature: float, banned_V: torch.Tensor, tp_group: Any, chunk_numel: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probs of the targets under the policy, entropies without gradient), float32 [B, S]; otherwise like `token_logprobs`."""
    return _scores(logits_SBV, targets_BS, _Rule(tp_group, (temperature, banned_V), chunk_numel))


@dataclass(frozen=True)
class _Rule:
    """`policy`: temperature and banned tokens; None: the logits as they are, and no entropies. `chunk_numel`: None is what suits the device. `overwrites`:
    logits may be lost."""

    tp_group: Any
    policy: tuple[float, torch.Tensor] | None
    chunk_numel: int | None
    overwrites: bool = False

    @property
    def temperature(self) -> float:
        return 1.0 if self.policy is None else self.policy[0] or 1.0


def _scores(logits_SBV: torch.Tensor, targets_BS: torch.Tensor, rule: _Rule) -> tuple[torch.Tensor, torch.Tensor]:
    targets_SB = targets_BS.transpose(0, 1).contiguous()
    rule = replace(rule, overwrites=torch.is_grad_enabled() and logits_SBV.requires_grad)
    logprobs_N, entropy_N = _Scores.apply(logits_SBV.flatten(0, 1), targets_SB.flatten(), rule)
    return logprobs_N.view_as(targets_SB).transpose(0, 1), entropy_N.view_as(targets_SB).transpose(0, 1)


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, targets_N: torch.Tensor, rule: _Rule) -> tuple[torch.Tensor, torch.Tensor]:
        place_N, here_N = _places(targets_N, logits_NV.shape[1], rule.tp_group)
        rows = max(1, (rule.chunk_numel or CHUNK_NUMEL[logits_NV.device.type]) // logits_NV.shape[1])
        parts = zip(logits_NV.split(rows), place_N.split(rows), here_N.split(rows), strict=True)
        found = [_one_pass(logits, place, here, rule) for logits, place, here in parts]
        own_peak_N, own_total_N, own_target_N, *own_weighted_N = torch.cat(found, dim=1)
        peak_N = own_peak_N.clone()
        _reduce(peak_N, torch.distributed.ReduceOp.MAX, rule.tp_group)
        below_N = own_peak_N - peak_N  # 0 on one rank: sums about this rank's peak become sums about that of all
        sums = [own_total_N * below_N.exp(), torch.where(here_N, own_target_N - peak_N, 0.0)]
        sums += [(weighted_N + own_total_N * below_N) * below_N.exp() for weighted_N in own_weighted_N]
        reduced = torch.stack(sums)
        _reduce(reduced, torch.distributed.ReduceOp.SUM, rule.tp_group)
        total_N, target_N, *weighted = reduced
        log_total_N = total_N.log()
        logprobs_N = target_N - log_total_N
        entropy_N = log_total_N - weighted[0] / total_N if weighted else torch.zeros_like(logprobs_N)
        ctx.temperature, ctx.rows = rule.temperature, rows
        ctx.save_for_backward(logits_NV, place_N, here_N, below_N - log_total_N, logprobs_N)
        ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: torch.Tensor, _entropy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """(one-hot - p) / temperature, over what the forward pass left of the logits. At the target, where p may be nearly 1, from its log-probability."""
        weights_NV, place_N, here_N, share_N, logprobs_N = ctx.saved_tensors
        grad_N = grad_N / ctx.temperature
        for weights, factor in zip(weights_NV.split(ctx.rows), (-grad_N * share_N.exp()).split(ctx.rows), strict=True):
            weights.mul_(factor[:, None])  # in float32, whatever the weights are kept in
        d_logits_NV = weights_NV
        at_target_N = (-grad_N * torch.expm1(logprobs_N)).to(d_logits_NV.dtype)
        place_N1 = place_N[:, None]
        d_logits_NV.scatter_(1, place_N1, torch.where(here_N[:, None], at_target_N[:, None], d_logits_NV.gather(1, place_N1)))
        return d_logits_NV, None, None


def _one_pass(logits: torch.Tensor, place: torch.Tensor, here: torch.Tensor, rule: _Rule) -> torch.Tensor:
    """Of a chunk the peak, sum of exp(z - peak), z of the target, and for entropies sum of exp(z - peak) (z - peak): [3 or 4, positions]."""
    z = logits if rule.policy is None else policy_logits(logits, *rule.policy)
    target = torch.where(here, z.gather(1, place[:, None])[:, 0].float(), 0.0)
    peak = z.amax(-1).float().clamp_(min=_LEAST)
    may_change = rule.policy is not None or (rule.overwrites and logits.dtype == torch.float32)
    z = z.sub_(peak[:, None]) if may_change else z - peak[:, None]  # in float32
    weights = z.exp_() if rule.policy is None else z.exp()
    found = [peak, weights.sum(-1), target]
    if rule.policy is not None:
        found.append(torch.linalg.vecdot(weights, z.clamp_(min=_NOTHING)))
    if rule.overwrites and weights.data_ptr() != logits.data_ptr():
        logits.copy_(weights)
    return torch.stack(found)


def _places(targets_N: torch.Tensor, size: int, tp_group: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Where in this rank's part of the vocabulary each target stands, and whether it does; 0 where not."""
    place_N = targets_N - size * tp_group.rank()
    here_N = (place_N >= 0) & (place_N < size)
    return torch.where(here_N, place_N, 0), here_N


def _reduce(x: torch.Tensor, operation: Any, tp_group: Any) -> None:
    if tp_group.size() > 1:
        torch.distributed.all_reduce(x, op=operation, group=tp_group)
