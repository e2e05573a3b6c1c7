"""How evenly experts are loaded: worked values and laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.training.moe_metrics import load_entropy, load_metrics, max_vio


def test_the_worst_layer_and_the_mean_entropy_are_reported() -> None:
    """Layer 0: 6 of 8 tokens at one of four experts, 6 / 2 - 1 = 2. Layer 1: even, 0 and entropy 1."""
    counts = np.array([[6.0, 2.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    metrics = load_metrics(counts)
    first = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert metrics["moe/max_vio"] == 2.0
    assert metrics["moe/load_entropy"] == pytest.approx((first + 1.0) / 2)


@given(st.integers(2, 16), st.data())
def test_a_collapsed_router_reaches_the_bounds(experts: int, data: st.DataObject) -> None:
    """All tokens at the same K experts: max_vio = E / K - 1 and entropy = ln K / ln E."""
    chosen = data.draw(st.integers(1, experts))
    counts = np.where(np.arange(experts) < chosen, 5.0, 0.0)[None]
    assert max_vio(counts)[0] == pytest.approx(experts / chosen - 1)
    assert load_entropy(counts)[0] == pytest.approx(math.log(chosen) / math.log(experts))


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=16).filter(any), st.integers(1, 50))
def test_only_the_shares_matter_not_the_number_of_tokens_nor_the_names_of_experts(counts: list[int], factor: int) -> None:
    few, many = np.array([counts], float), np.array([counts[::-1]], float) * factor
    assert max_vio(few)[0] == pytest.approx(max_vio(many)[0])
    assert load_entropy(few)[0] == pytest.approx(load_entropy(many)[0])
    assert -1e-12 <= load_entropy(few)[0] <= 1 + 1e-12
