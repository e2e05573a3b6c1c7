"""A number that knows how it is reduced: over microbatches, over ranks, over steps. One merge law, so that a reported mean is the mean over everything.

loss function -> {name: Metric} -> merge over microbatches -> merge over ranks -> Metric.value -> metrics.jsonl
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """`kind` mean: `total` is a sum over `count` items. max / min: `total` is the extreme of `count` items. A metric of no items has the value nan.

    >>> Metric(6.0, 2).merge(Metric(0.0, 1)).value
    2.0
    >>> Metric(6.0, 2, "max").merge(Metric(7.0, 1, "max")).value
    7.0
    """

    total: float
    count: float
    kind: Literal["mean", "max", "min"] = "mean"

    @property
    def value(self) -> float:
        if self.count == 0:
            return math.nan
        return self.total / self.count if self.kind == "mean" else self.total

    def merge(self, other: Metric) -> Metric:
        """The metric of both sets of items together. Associative and commutative; a metric of no items changes nothing."""
        if self.kind != other.kind:
            raise ValueError(f"a {self.kind} metric cannot be merged with a {other.kind} metric")
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        if self.kind == "mean":
            total = self.total + other.total
        else:
            total = max(self.total, other.total) if self.kind == "max" else min(self.total, other.total)
        return Metric(total, self.count + other.count, self.kind)


def merge_metrics(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Merges name by name; a name that only some parts hold keeps what there is."""

    def join(left: dict[str, Metric], right: Mapping[str, Metric]) -> dict[str, Metric]:
        return {**left, **{name: left[name].merge(metric) if name in left else metric for name, metric in right.items()}}

    return reduce(join, parts, {})
