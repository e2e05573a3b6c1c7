"""The policy loss: per-token clipped ratio with dual clip, and the k3 estimate of KL(policy || reference). Tensors in; a sum, its divisor and metrics out.

    l = log pi, o = log pi_old (recomputed by the learner), mu = log-prob at rollout, m = response mask;   all [B, S], position s holding the token s
    r = exp(clamp(l - o, -20, 20))
    clipped = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))
    pg      = clipped if A >= 0 else min(clipped, -A dual_clip)
    k3      = exp(-d) + d - 1, d = l - ref
    loss    = sum_m (pg + kl_coeff k3) / divisor

PPO, arXiv 1707.06347; dual clip, arXiv 1912.09729; two bounds, DAPO, arXiv 2503.14476;
k3, http://joschu.net/blog/kl-approx.html; verl `compute_policy_loss_vanilla`.

The divisor is summed over microbatches and ranks before dividing, so the loss is the same however the batch is split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ext.batch.metric import Metric
from megatron_ext.shapes import check_shape

LOG_RATIO_LIMIT = 20.0


@dataclass(frozen=True)
class LossSettings:
    """`constant_length` unset: the mean over response tokens (GRPO with token mean, DAPO). Set: the divisor is rows x this constant (Dr. GRPO)."""

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 3.0
    kl_coeff: float = 0.0
    constant_length: int | None = None


class PolicyLoss(NamedTuple):
    """`loss_sum` carries the gradient; divide by the global sum of `divisor`."""

    loss_sum: Tensor
    divisor: Tensor
    metrics: dict[str, Metric]


def policy_loss(
    logprobs_BS: Tensor,
    old_logprobs_BS: Tensor,
    rollout_logprobs_BS: Tensor,
    advantages_B: Tensor,
    mask_BS: Tensor,
    settings: LossSettings,
    *,
    ref_logprobs_BS: Tensor | None = None,
    entropy_BS: Tensor | None = None,
    num_rows: int | None = None,
) -> PolicyLoss:
    """Gradient flows through `logprobs_BS` only; what masked positions hold is never read. `ref_logprobs_BS` is needed when `kl_coeff` is above 0.
    `num_rows`: the rows with a response that count here for a constant length; unset: those of the mask. (Ranks that share a row must count it once.)"""
    rows, length = logprobs_BS.shape
    for name, value in (("old_logprobs_BS", old_logprobs_BS), ("rollout_logprobs_BS", rollout_logprobs_BS), ("mask_BS", mask_BS)):
        check_shape(name, value, rows, length)
    check_shape("advantages_B", advantages_B, rows)
    if settings.kl_coeff > 0 and ref_logprobs_BS is None:
        raise ValueError("kl_coeff is above 0 but there are no reference log-probs")
    mask_BS = mask_BS.bool()
    # One flat list of response tokens: padding and prompts never enter, so garbage there cannot become a nan gradient.
    new_n, old_n, rollout_n = logprobs_BS[mask_BS].float(), old_logprobs_BS[mask_BS].float().detach(), rollout_logprobs_BS[mask_BS].float().detach()
    advantages_n = advantages_B.float()[:, None].expand(rows, length)[mask_BS]
    ratio_n = _ratio(new_n - old_n)
    pg_n = clipped_surrogate(ratio_n, advantages_n, settings)
    loss_n = pg_n
    kl_n = None
    if ref_logprobs_BS is not None:
        kl_n = k3(new_n, ref_logprobs_BS[mask_BS].float().detach())
        loss_n = pg_n + settings.kl_coeff * kl_n
    entropy_n = None if entropy_BS is None else entropy_BS[mask_BS].float()
    metrics = _metrics(pg_n, loss_n, ratio_n, advantages_n, new_n - old_n, rollout_n - old_n, settings, kl_n, entropy_n)
    if settings.constant_length is None:
        divisor = mask_BS.sum()
    else:
        divisor = (mask_BS.any(dim=1).sum() if num_rows is None else torch.tensor(num_rows)) * settings.constant_length
    return PolicyLoss(loss_n.sum(), divisor, metrics)


def clipped_surrogate(ratio_n: Tensor, advantages_n: Tensor, settings: LossSettings) -> Tensor:
    """max(-A r, -A clip(r)), and for A < 0 never above -A dual_clip: one token with a huge ratio cannot own the gradient."""
    clipped_n = torch.maximum(-advantages_n * ratio_n, -advantages_n * ratio_n.clamp(1 - settings.clip_low, 1 + settings.clip_high))
    return torch.where(advantages_n < 0, torch.minimum(clipped_n, -advantages_n * settings.dual_clip), clipped_n)


def k3(new_n: Tensor, ref_n: Tensor) -> Tensor:
    """exp(-d) + d - 1 with d = log pi - log ref: an unbiased, never negative estimate of KL(pi || ref) for tokens drawn from pi."""
    log_ratio_n = (ref_n - new_n).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return log_ratio_n.exp() - log_ratio_n - 1


def _ratio(log_ratio_n: Tensor) -> Tensor:
    return log_ratio_n.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


@torch.no_grad()
def _metrics(
    pg_n: Tensor,
    loss_n: Tensor,
    ratio_n: Tensor,
    advantages_n: Tensor,
    log_ratio_n: Tensor,
    drift_n: Tensor,
    settings: LossSettings,
    kl_n: Tensor | None,
    entropy_n: Tensor | None,
) -> dict[str, Metric]:
    """`clipfrac_low` and `clipfrac_high`: the share of tokens whose gradient the lower and the upper bound cut off. `drift_n`:
    rollout minus recomputed log-probs; `mismatch/kl` estimates KL(rollout || recomputed) from them."""
    low_n = (advantages_n < 0) & (ratio_n < 1 - settings.clip_low)
    high_n = (advantages_n > 0) & (ratio_n > 1 + settings.clip_high)
    means = {
        "actor/pg_loss": pg_n,
        "actor/loss": loss_n,
        "actor/ppo_kl": -log_ratio_n,
        "actor/clipfrac_low": low_n,
        "actor/clipfrac_high": high_n,
        "mismatch/logprob_abs_diff_mean": drift_n.abs(),
        "mismatch/kl": k3(drift_n, torch.zeros_like(drift_n)),
        **({} if kl_n is None else {"actor/kl_ref": kl_n}),
        **({} if entropy_n is None else {"actor/entropy": entropy_n}),
    }
    largest = {"actor/ratio_max": ratio_n, "mismatch/logprob_abs_diff_max": drift_n.abs()}
    count = pg_n.numel()
    sums = _numbers([value.float().sum() for value in means.values()])
    peaks = _numbers([value.max() for value in largest.values()]) if count else [0.0] * len(largest)
    metrics = {name: Metric(total, count) for name, total in zip(means, sums, strict=True)}
    return metrics | {name: Metric(peak, count, "max") for name, peak in zip(largest, peaks, strict=True)}


def _numbers(scalars: Sequence[Tensor]) -> list[float]:
    """One transfer from the device for all."""
    return [float(value) for value in torch.stack(list(scalars)).tolist()]
