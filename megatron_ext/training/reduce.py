"""Metrics of all ranks become one: sums are added, extremes compared, in at most two small all-reduces."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from megatron_ext.batch.metric import Metric


def reduce_metrics(metrics: Mapping[str, Metric], group: Any, device: torch.device) -> dict[str, Metric]:
    """`metrics` merged over the ranks of `group`, which must all hold the same names and kinds. Collective."""
    if group.size() == 1 or not metrics:
        return dict(metrics)
    names = sorted(metrics)
    means = [name for name in names if metrics[name].kind == "mean"]
    extremes = [name for name in names if metrics[name].kind != "mean"]
    sums = [x for name in means for x in (metrics[name].total, metrics[name].count)] + [metrics[name].count for name in extremes]
    added = _all_reduce(sums, torch.distributed.ReduceOp.SUM, group, device)
    reduced = {name: Metric(added[2 * index], added[2 * index + 1]) for index, name in enumerate(means)}
    if extremes:
        signs = [1.0 if metrics[name].kind == "max" else -1.0 for name in extremes]
        peaks = [sign * metrics[name].total if metrics[name].count else -math.inf for sign, name in zip(signs, extremes, strict=True)]
        found = _all_reduce(peaks, torch.distributed.ReduceOp.MAX, group, device)
        counts = added[2 * len(means) :]
        reduced |= {name: Metric(sign * peak, count, metrics[name].kind) for name, sign, peak, count in zip(extremes, signs, found, counts, strict=True)}
    return {name: reduced[name] for name in metrics}


def largest(value: int, group: Any, device: torch.device) -> int:
    """The largest of the ranks' values. Collective."""
    return value if group.size() == 1 else int(_all_reduce([float(value)], torch.distributed.ReduceOp.MAX, group, device)[0])


def total(value: float, group: Any, device: torch.device) -> float:
    """The sum of the ranks' values. Collective."""
    return value if group.size() == 1 else _all_reduce([value], torch.distributed.ReduceOp.SUM, group, device)[0]


def _all_reduce(values: list[float], op: Any, group: Any, device: torch.device) -> list[float]:
    flat = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(flat, op=op, group=group)
    return [float(value) for value in flat.tolist()]
