"""Log-odds with a prior and normalised mutual information, against hand-worked numbers and laws."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.earl.effect_sizes import PRIOR_PROMPTS, log_odds, npmi
from megatron_ext.earl.statistics import effects

MEAN_XLE = np.array([[[0.6, 0.4, 0.0]], [[0.2, 0.8, 0.0]]])


def drawn(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(4), size=(3, 2)), rng.integers(1, 50, 3)


def test_log_odds_worked_by_hand():
    """10 prompts of each skill: 6 and 2 of expert 0, mean mass 0.4, so the prior is 20 x 0.4 = 8 of 20."""
    assert PRIOR_PROMPTS == 20
    found = log_odds(MEAN_XLE, np.array([10, 10]))
    assert found[0, 0, 0] == pytest.approx(math.log((6 + 8) / (10 + 20 - 14)) - math.log((2 + 8) / (10 + 20 - 10)))
    assert found[1, 0, 0] == pytest.approx(-found[0, 0, 0]) and found[0, 0, 1] == pytest.approx(-found[0, 0, 0])
    assert found[0, 0, 2] == 0, "an expert that nobody uses"


def test_log_odds_of_few_prompts_are_shrunken_and_of_many_are_those_of_the_means():
    few, many = (log_odds(MEAN_XLE, np.array([n, n]))[0, 0, 0] for n in (1, 10_000_000))
    plain = math.log(0.6 / 0.4) - math.log(0.2 / 0.8)
    assert 0 < few < 0.1 * plain and many == pytest.approx(plain, abs=1e-4)


def test_npmi_worked_by_hand():
    """p(x) = 1/2, p(e) = 0.4, p(x, e) = 0.3: ln(0.3 / 0.2) / -ln 0.3."""
    found = npmi(MEAN_XLE, np.array([10, 10]))
    assert found[0, 0, 0] == pytest.approx(math.log(1.5) / -math.log(0.3))
    assert found[0, 0, 2] == 0
    alone = npmi(np.array([[[1.0, 0.0]], [[0.0, 1.0]]]), np.array([5, 5]))
    assert alone[:, 0].tolist() == [[1.0, -1.0], [-1.0, 1.0]], "only together, and never"


@given(st.integers(0, 1000))
def test_both_have_the_sign_of_what_is_more_than_elsewhere(seed):
    mean_XLE, count_X = drawn(seed)
    label_N = np.repeat(np.arange(3), count_X)
    found = effects(mean_XLE[label_N], label_N, np.zeros(len(label_N), int), 3)
    for value in (log_odds(mean_XLE, count_X), npmi(mean_XLE, count_X)):
        assert (np.sign(np.round(value, 9)) == np.sign(np.round(found.risk_difference_XLE, 9)))[np.abs(found.risk_difference_XLE) > 1e-6].all()
    np.testing.assert_allclose(np.sign(npmi(mean_XLE, count_X)), np.sign(np.log(found.lift_XLE)))
    assert (np.abs(npmi(mean_XLE, count_X)) <= 1).all()
