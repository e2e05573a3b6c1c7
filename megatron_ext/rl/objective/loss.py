"""The policy loss of a micro-batch. Tensors in; a sum, its divisor and metrics out.

    l = log pi, o = log pi_old (recomputed by the learner), mu = log-prob at rollout, m = response mask;   all [B, S], position s holding the token s

    loss = sum_m weight (w surrogate(l, o, A) + kl_coeff KL(l, ref)) / divisor          surrogates.py, divergence.py
           w from o and mu, 1 unless asked for                                          mismatch.py
           weight and divisor by the aggregation                                        aggregation.py

The divisor is summed over micro-batches and ranks before dividing, so the loss is the same however the batch is split.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from megatron_ext.batch.metric import Metric
from megatron_ext.config.algorithms import Aggregation, Correction, KlEstimator, Surrogate
from megatron_ext.rl.objective.aggregation import Rows, divisor, token_weights
from megatron_ext.rl.objective.divergence import kl_estimate
from megatron_ext.rl.objective.metrics import drift_metrics, exact, largest, numbers, per_token
from megatron_ext.rl.objective.mismatch import mismatch_weights
from megatron_ext.rl.objective.surrogates import answer_ratio, clipped, clipped_weight, dual_clipped, ratio
from megatron_ext.shapes import check_shape


@dataclass(frozen=True)
class LossSettings:
    """`longest`: tokens that an answer may have, the constant of `seq_mean_token_sum_norm`. The others are as in `RLConfig`."""

    surrogate: Surrogate = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 3.0
    kl_coeff: float = 0.0
    kl_estimator: KlEstimator = "k3"
    correction: Correction = "none"
    tis_cap: float = 2.0
    icepop_band: tuple[float, float] = (0.5, 5.0)
    sequence_band: tuple[float, float] = (0.9, 1.1)
    aggregation: Aggregation = "token_mean"
    longest: int = 1


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
    rows: Rows | None = None,
) -> PolicyLoss:
    """Gradient flows through `logprobs_BS` only; what masked positions hold is never read. `ref_logprobs_BS` is needed when `kl_coeff` is above 0.
    `rows`: the whole answers where a rank holds slices of them; unset: the mask's rows are whole. Computes in fp32, or in fp64 where that is given."""
    num_rows, length = logprobs_BS.shape
    for name, value in (("old_logprobs_BS", old_logprobs_BS), ("rollout_logprobs_BS", rollout_logprobs_BS), ("mask_BS", mask_BS)):
        check_shape(name, value, num_rows, length)
    check_shape("advantages_B", advantages_B, num_rows)
    if settings.kl_coeff > 0 and ref_logprobs_BS is None:
        raise ValueError("kl_coeff is above 0 but there are no reference log-probs")
    mask_BS = mask_BS.bool()
    rows = rows or Rows(mask_BS.sum(1))
    # One flat list of response tokens: padding and prompts never enter, so garbage there cannot become a nan gradient.
    row_n = mask_BS.nonzero()[:, 0]
    new_n, old_n, rollout_n = (exact(value_BS[mask_BS]) for value_BS in (logprobs_BS, old_logprobs_BS.detach(), rollout_logprobs_BS.detach()))
    advantages_n, lengths_n = advantages_B.to(new_n.dtype)[row_n], rows.lengths_B.to(new_n.dtype)[row_n]
    log_ratio_n, log_weight_n = new_n - old_n, old_n - rollout_n

    def answer_mean(value_n: Tensor) -> Tensor:
        return rows.joined(value_n.new_zeros(num_rows).index_add(0, row_n, value_n))[row_n] / lengths_n

    ratio_n = answer_ratio(new_n, answer_mean(log_ratio_n.detach())) if settings.surrogate == "gspo" else ratio(log_ratio_n)
    whole_n, band = (answer_mean(log_weight_n), settings.sequence_band) if settings.correction == "sequence_mask" else (log_weight_n, settings.icepop_band)
    correction_n, cut_n = mismatch_weights(settings.correction, log_weight_n, whole_n, settings.tis_cap, band)
    pg_n = correction_n * _surrogate(ratio_n, new_n, advantages_n, settings)
    loss_n, optional = pg_n, {}
    if ref_logprobs_BS is not None:
        optional["actor/kl_ref"] = kl_estimate(settings.kl_estimator, new_n, exact(ref_logprobs_BS[mask_BS].detach()))
        loss_n = pg_n + settings.kl_coeff * optional["actor/kl_ref"]
    if entropy_BS is not None:
        optional["actor/entropy"] = entropy_BS[mask_BS]
    if settings.correction != "none":
        optional |= {"is/weight_mean": correction_n, "is/clipped_frac": cut_n}
    weight_n, share_n = token_weights(settings.aggregation, lengths_n, settings.longest)
    metrics = {
        **_losses({"actor/pg_loss": pg_n * weight_n, "actor/loss": loss_n * weight_n}, share_n),
        **per_token({**_off_policy(ratio_n, log_ratio_n, advantages_n, settings), **optional}),
        **largest({"actor/ratio_max": ratio_n}),
        **drift_metrics(-log_weight_n, None if rows.stale_B is None else rows.stale_B[row_n]),
    }
    return PolicyLoss((loss_n * weight_n).sum(), divisor(settings.aggregation, rows, mask_BS.sum(), settings.longest), metrics)


def _surrogate(ratio_n: Tensor, logprobs_n: Tensor, advantages_n: Tensor, settings: LossSettings) -> Tensor:
    bounds = settings.clip_low, settings.clip_high
    if settings.surrogate == "cispo":
        return clipped_weight(ratio_n, logprobs_n, advantages_n, *bounds)
    if settings.surrogate == "gspo":
        return clipped(ratio_n, advantages_n, *bounds)
    return dual_clipped(ratio_n, advantages_n, *bounds, settings.dual_clip)


def _off_policy(ratio_n: Tensor, log_ratio_n: Tensor, advantages_n: Tensor, settings: LossSettings) -> dict[str, Tensor]:
    """`clipfrac_low` and `clipfrac_high`: the share of tokens whose gradient the lower and the upper bound cut off, or (CISPO) whose weight they cut."""
    below_n, above_n = ratio_n < 1 - settings.clip_low, ratio_n > 1 + settings.clip_high
    if settings.surrogate != "cispo":
        below_n, above_n = below_n & (advantages_n < 0), above_n & (advantages_n > 0)
    return {"actor/ppo_kl": -log_ratio_n, "actor/clipfrac_low": below_n, "actor/clipfrac_high": above_n}


def _losses(weighted: Mapping[str, Tensor], share_n: Tensor) -> dict[str, Metric]:
    *sums, shares = numbers([*(value_n.sum() for value_n in weighted.values()), share_n.sum()])
    return {name: Metric(total, shares) for name, total in zip(weighted, sums, strict=True)}
