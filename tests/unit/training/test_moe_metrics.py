"""How evenly experts are loaded: worked values and laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.earl.load import load_entropy, max_vio
from megatron_ext.training.moe_metrics import ep_rank_load, load_metrics


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


def test_the_busiest_rank_of_an_expert_parallel_group_is_compared_with_the_mean_in_every_layer() -> None:
    """Two ranks of two experts. Layer 0: 8 and 0 tokens, twice the mean; layer 1: 4 and 4, for all that its experts differ. Four ranks: 3 and 2 times."""
    counts = np.array([[6.0, 2.0, 0.0, 0.0], [4.0, 0.0, 4.0, 0.0]])
    assert ep_rank_load(counts, 2) == 1.5 and ep_rank_load(counts, 4) == 2.5 and ep_rank_load(counts, 1) == 1.0


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=16).filter(any), st.integers(1, 50))
def test_only_the_shares_matter_not_the_number_of_tokens_nor_the_names_of_experts(counts: list[int], factor: int) -> None:
    few, many = np.array([counts], float), np.array([counts[::-1]], float) * factor
    assert max_vio(few)[0] == pytest.approx(max_vio(many)[0])
    assert load_entropy(few)[0] == pytest.approx(load_entropy(many)[0])
    assert -1e-12 <= load_entropy(few)[0] <= 1 + 1e-12
