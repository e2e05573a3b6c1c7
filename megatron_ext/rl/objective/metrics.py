"""What is told of tokens: means and extremes over them, and how far rollouts are from the learner's present weights.

    d = mu - o, of a token's log-probs at rollout and under the present weights, before the step's first update;   w = exp(-d)

    mismatch/{logprob_abs_diff_mean, logprob_abs_diff_max, kl}     where both have the same weights: engines alone differ, by rounding
    staleness/{logprob_abs_diff_mean, logprob_abs_diff_max, kl}    where older weights sampled, at least a part of the answer
    mismatch/{weight_mean, weight_square_mean}                     of all tokens: the share of them that would tell as much if all weighed the same, the
                                                                   effective sample size, is (mean w)^2 / mean w^2

`kl` is the estimate k3 of KL(rollout || present weights).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_ext.batch.metric import Metric
from megatron_ext.rl.objective.divergence import k3
from megatron_ext.rl.objective.surrogates import ratio

WEIGHT, WEIGHT_SQUARE, ESS = "mismatch/weight_mean", "mismatch/weight_square_mean", "mismatch/ess"


def drift_metrics(drift_n: Tensor, stale_n: Tensor | None) -> dict[str, Metric]:
    """`stale_n`: tokens of answers that older weights had a part in; None where there may be none, and no metric of them."""
    weight_n = ratio(-drift_n)
    metrics = per_token({WEIGHT: weight_n, WEIGHT_SQUARE: weight_n**2})
    if stale_n is None:
        return metrics | _distance("mismatch", drift_n)
    return metrics | _distance("mismatch", drift_n[~stale_n]) | _distance("staleness", drift_n[stale_n])


def effective_sample_size(metrics: dict[str, float]) -> None:
    """Puts `mismatch/ess` in the place of the two means that it is made of."""
    mean, square = metrics.pop(WEIGHT), metrics.pop(WEIGHT_SQUARE)
    metrics[ESS] = mean**2 / square


def _distance(name: str, drift_n: Tensor) -> dict[str, Metric]:
    means = per_token({f"{name}/logprob_abs_diff_mean": drift_n.abs(), f"{name}/kl": k3(drift_n)})
    return means | largest({f"{name}/logprob_abs_diff_max": drift_n.abs()})


def exact(value: Tensor) -> Tensor:
    """In fp32, or in fp64 where it is that."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def per_token(values: Mapping[str, Tensor]) -> dict[str, Metric]:
    count = next(iter(values.values())).numel()
    return {name: Metric(total, count) for name, total in zip(values, numbers([exact(value_n).sum() for value_n in values.values()]), strict=True)}


def largest(values: Mapping[str, Tensor]) -> dict[str, Metric]:
    count = next(iter(values.values())).numel()
    peaks = numbers([value_n.max() for value_n in values.values()]) if count else [0.0] * len(values)
    return {name: Metric(peak, count, "max") for name, peak in zip(values, peaks, strict=True)}


def numbers(scalars: Sequence[Tensor]) -> list[float]:
    """One transfer from the device for all."""
    return [float(value) for value in torch.stack(list(scalars)).detach().tolist()]
