"""The guard compares each layer's load with what it was at first."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ext.batch.routing import RouteTrace
from megatron_ext.earl.ceilings import BINS, ceiling_of
from megatron_ext.earl.load import Load, collapsing, expert_counts


def test_experts_are_counted_by_layer() -> None:
    """Two positions, two layers, two experts each, in two traces."""
    one = RouteTrace(np.array([[[0, 1], [2, 3]]], np.uint8), np.full((1, 2, 2), 0.5, np.float16))
    other = RouteTrace(np.array([[[0, 2], [2, 1]]], np.uint8), np.full((1, 2, 2), 0.5, np.float16))
    assert expert_counts([one, other], 4).tolist() == [[2, 1, 1, 0], [0, 1, 2, 1]]


def test_the_guard_is_silent_up_to_its_bounds_and_names_the_layer_beyond() -> None:
    """Counts 3, 2, 2, 1 have MaxVio 3 / 2 - 1 = 0.5, so that 0.75 is the most: 3.5, 1.5, 1.5, 1.5 is, 3.6, 1.4, 1.4, 1.6 is beyond."""
    first = Load.of(np.array([[3.0, 2.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]]))
    assert first.max_vio == (0.5, 0.0)
    assert collapsing(Load.of(np.array([[3.5, 1.5, 1.5, 1.5], [1.0, 1.0, 1.0, 1.0]])), first) == []
    assert collapsing(Load.of(np.array([[3.6, 1.4, 1.4, 1.6], [1.0, 1.0, 1.0, 1.0]])), first) == ["layer 0: MaxVio 0.8, at first 0.5"]


def test_a_layer_whose_entropy_fell_by_a_tenth_is_named() -> None:
    """Half of the experts unused: MaxVio 1 both times, entropy from 0.9 on a log scale down to a half."""
    first, now = Load((1.0,), (0.9,)), Load((1.0,), (0.5,))
    assert collapsing(now, first) == ["layer 0: load entropy 0.5, at first 0.9"]
    assert collapsing(Load((1.0,), (0.82,)), first) == []


@pytest.mark.parametrize("share", [0.5, 0.75])
def test_a_ceiling_agrees_with_the_percentile_to_a_bin_and_parts_add_up(share: float) -> None:
    values = np.random.default_rng(0).beta(2, 5, 1000)
    counts = [np.bincount((part * BINS).astype(int), minlength=BINS) for part in np.split(values, 4)]
    assert ceiling_of(sum(counts), share) == pytest.approx(np.quantile(values, share), abs=2 / BINS)
    assert np.isnan(ceiling_of(np.zeros(BINS, int)))
