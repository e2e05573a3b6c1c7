"""Token control predicts an answer's mass from its words, with every skill heard alike and rare words trusted little."""

import numpy as np
import pytest

from megatron_ext.batch.routing import RouteTrace, gate_mass
from megatron_ext.earl.token_control import TokenTable


def trace_of(experts: list[int]) -> RouteTrace:
    """One layer, top-1 of 3 experts."""
    return RouteTrace(np.array(experts, np.uint8)[:, None, None], np.ones((len(experts), 1, 1), np.float16))


def test_expected_gates_worked_by_hand():
    table = TokenTable(num_experts=3, kappa=2.0)
    table.add(trace_of([0, 0, 0, 1]), np.array([7, 7, 7, 8]), 0, 4, "ocr")  # id 7 -> expert 0 three times, id 8 -> expert 1
    table.add(trace_of([2]), np.array([7]), 0, 1, "count")  # id 7 -> expert 2 once
    # over all tokens: ocr (3/4, 1/4, 0), count (0, 0, 1); balanced (3/8, 1/8, 1/2)
    # id 7: balanced (1/2, 0, 1/2), seen 4 times: (4 (1/2, 0, 1/2) + 2 (3/8, 1/8, 1/2)) / 6
    assert table.expected(np.array([7]))[0] == pytest.approx([2.75 / 6, 0.25 / 6, 3 / 6])
    assert table.expected(np.array([99]))[0] == pytest.approx([3 / 8, 1 / 8, 1 / 2])
    assert table.expected(np.array([7, 99]))[0] == pytest.approx(((np.array([2.75, 0.25, 3]) / 6) + [3 / 8, 1 / 8, 1 / 2]) / 2)


def test_without_shrinkage_a_word_that_always_goes_to_one_expert_explains_all_of_its_mass():
    table, trace, tokens = TokenTable(num_experts=3, kappa=0.0), trace_of([1, 2, 1, 2]), np.array([5, 6, 5, 6])
    table.add(trace, tokens, 0, 4, "ocr")
    np.testing.assert_allclose(table.expected(tokens[1:4]), gate_mass(trace, 3, 1, 4))


def test_expected_mass_sums_to_one_over_experts():
    rng = np.random.default_rng(0)
    experts = rng.permuted(np.tile(np.arange(6), (20, 2, 1)), axis=2)[:, :, :2].astype(np.uint8)
    gates = np.full((20, 2, 2), 0.5, np.float16)
    table = TokenTable(num_experts=6, kappa=20.0)
    tokens = rng.integers(0, 5, 20)
    table.add(RouteTrace(experts, gates), tokens, 3, 20, "ocr")
    np.testing.assert_allclose(table.expected(tokens).sum(axis=1), [1, 1])


def test_nothing_to_predict_from_is_an_error():
    table = TokenTable(num_experts=3, kappa=1.0)
    with pytest.raises(ValueError, match="at least one token"):
        table.expected(np.array([1]))
    with pytest.raises(ValueError, match="2 routed positions but only 1 tokens"):
        table.add(trace_of([0, 1]), np.array([4]), 0, 1, "ocr")
