"""Group advantages: by hand, by law, and against verl's documented formula written plainly."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from megatron_ext.rl.advantage import alike, group_advantages

SHAPE = (4, 6)
rewards = arrays(np.float64, SHAPE, elements=st.integers(-100, 100).map(lambda number: number / 100))
valid = arrays(np.bool_, SHAPE)
algorithms = st.sampled_from(["grpo", "dr_grpo"])
EVERY = np.ones(SHAPE, bool)


def verl_outcome_advantage(scores: list[float], norm_adv_by_std_in_grpo: bool, epsilon: float = 1e-6) -> list[float]:
    """One group by `compute_grpo_outcome_advantage`: (score - mean) / (std + epsilon), torch's std (n - 1), or score - mean."""
    mean = sum(scores) / len(scores)
    std = math.sqrt(sum((score - mean) ** 2 for score in scores) / (len(scores) - 1))
    return [(score - mean) / (std + epsilon) if norm_adv_by_std_in_grpo else score - mean for score in scores]


def test_two_right_of_four_worked_by_hand():
    # mean 1/2, variance 4 * 1/4 / 3 = 1/3, so A = +-(1/2) / (1/sqrt(3)) = +-0.866
    result = group_advantages(np.array([[1.0, 0.0, 1.0, 0.0]]), np.ones((1, 4), bool))
    np.testing.assert_allclose(result, [[0.866024, -0.866024, 0.866024, -0.866024]], atol=1e-5)
    np.testing.assert_allclose(group_advantages(np.array([[1.0, 0.0, 1.0, 0.0]]), np.ones((1, 4), bool), "dr_grpo"), [[0.5, -0.5, 0.5, -0.5]])


def test_failed_answers_get_nothing_and_leave_the_statistics_alone():
    result = group_advantages(np.array([[1.0, np.nan, 0.0, 77.0, 1.0, 0.0]]), np.array([[True, False, True, False, True, True]]))
    np.testing.assert_allclose(result, [[0.866024, 0, -0.866024, 0, 0.866024, -0.866024]], atol=1e-5)


def test_a_group_of_one_has_nothing_to_compare_with():
    assert group_advantages(np.array([[1.0]]), np.array([[True]])).tolist() == [[0.0]]
    assert group_advantages(np.array([[1.0, 0.5]]), np.array([[True, False]])).tolist() == [[0.0, 0.0]]
    assert group_advantages(np.array([[1.0, 0.5]]), np.array([[False, False]])).tolist() == [[0.0, 0.0]]


@given(rewards, st.booleans())
def test_it_is_verls_formula(rewards_PG, normalise):
    result = group_advantages(rewards_PG, EVERY, "grpo" if normalise else "dr_grpo")
    for row, expected in zip(result, rewards_PG, strict=True):
        np.testing.assert_allclose(row, verl_outcome_advantage(expected.tolist(), normalise), atol=1e-9)


@given(rewards, valid, algorithms)
def test_a_group_sums_to_zero_and_keeps_the_order_of_rewards(rewards_PG, valid_PG, algorithm):
    result = group_advantages(rewards_PG, valid_PG, algorithm)
    np.testing.assert_allclose(result.sum(axis=1), 0, atol=1e-9)
    assert (result[~valid_PG] == 0).all()
    for row in range(SHAPE[0]):
        kept = valid_PG[row]
        assert (np.diff(result[row][kept][np.argsort(rewards_PG[row][kept])]) >= -1e-12).all()


@given(rewards, st.sampled_from([-4.0, -0.5, 0.25, 8.0]), algorithms)
def test_adding_a_constant_to_every_reward_changes_nothing(rewards_PG, constant, algorithm):
    np.testing.assert_allclose(group_advantages(rewards_PG + constant, EVERY, algorithm), group_advantages(rewards_PG, EVERY, algorithm), atol=1e-7)


@given(rewards, st.sampled_from([0.25, 2.0, 64.0]))
def test_scale_is_divided_out_by_grpo_and_kept_by_dr_grpo(rewards_PG, scale):
    np.testing.assert_allclose(group_advantages(rewards_PG * scale, EVERY), group_advantages(rewards_PG, EVERY), atol=2e-3)
    np.testing.assert_allclose(group_advantages(rewards_PG * scale, EVERY, "dr_grpo"), scale * group_advantages(rewards_PG, EVERY, "dr_grpo"), atol=1e-9)


@given(rewards, algorithms, st.permutations(range(SHAPE[1])))
def test_the_order_of_answers_does_not_matter(rewards_PG, algorithm, order):
    result = group_advantages(rewards_PG, EVERY, algorithm)
    np.testing.assert_allclose(group_advantages(rewards_PG[:, order], EVERY, algorithm), result[:, order], atol=1e-9)


@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0, 1 / 3])
def test_a_group_whose_answers_are_alike_gives_exactly_zero(reward):
    assert (group_advantages(np.full((2, 7), reward), np.ones((2, 7), bool)) == 0).all()


def test_alike_counts_valid_answers_only():
    rewards_PG = np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    valid_PG = np.array([[True, True, False], [True, True, True], [False, False, False]])
    assert alike(rewards_PG, valid_PG).tolist() == [True, False, True]
