"""A metric means the same however its items were split over microbatches, ranks and steps."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.batch.metric import Metric, merge_metrics

kinds = st.sampled_from(["mean", "max", "min"])
whole = st.integers(-1000, 1000).map(float)


def metric_of(values: list[float], kind: str) -> Metric:
    if not values:
        return Metric(0.0, 0, kind)
    return Metric({"mean": sum, "max": max, "min": min}[kind](values), len(values), kind)


@given(kinds, st.lists(whole), st.lists(whole), st.lists(whole))
def test_merging_the_parts_is_the_metric_of_the_whole_in_any_grouping(kind, left, middle, right):
    a, b, c = (metric_of(values, kind) for values in (left, middle, right))
    whole_metric = metric_of(left + middle + right, kind)
    for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b)):
        assert (merged.count, merged.kind) == (whole_metric.count, kind)
        assert merged.value == whole_metric.value or (math.isnan(merged.value) and math.isnan(whole_metric.value))


def test_a_mean_over_unequal_parts_weighs_items_not_parts():
    assert merge_metrics([{"loss": Metric(30.0, 3)}, {"loss": Metric(2.0, 1)}])["loss"].value == 8.0


def test_a_metric_that_only_one_part_holds_is_kept():
    merged = merge_metrics([{"a": Metric(1.0, 1)}, {"b": Metric(5.0, 1, "max")}, {"b": Metric(4.0, 1, "max")}])
    assert (merged["a"].value, merged["b"].value) == (1.0, 5.0)


def test_a_metric_of_nothing_is_nan_and_kinds_do_not_mix():
    assert math.isnan(Metric(0.0, 0).value)
    with pytest.raises(ValueError, match="max metric cannot be merged with a mean metric"):
        Metric(1.0, 1, "max").merge(Metric(1.0, 1))
