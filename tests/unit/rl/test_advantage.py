"""Group advantages: by hand, by law, and against verl's documented formula written plainly."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from megatron_ext.rl.objective.advantage import alike, batch_advantages, group_advantages, multi_reward_advantages

SHAPE = (4, 6)
rewards = arrays(np.float64, SHAPE, elements=st.integers(-100, 100).map(lambda number: number / 100))
valid = arrays(np.bool_, SHAPE)
algorithms = st.sampled_from(["grpo", "dr_grpo", "rloo"])
tokens = arrays(np.int64, SHAPE, elements=st.integers(1, 30))
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


def test_rloo_compares_with_the_mean_of_the_others_worked_by_hand():
    """Rewards 3, 0, 0, of which one more has failed: 3 - 0, 0 - 3/2, 0 - 3/2."""
    result = group_advantages(np.array([[3.0, 0.0, 9.0, 0.0]]), np.array([[True, True, False, True]]), "rloo")
    np.testing.assert_allclose(result, [[3.0, -1.5, 0.0, -1.5]])


@given(rewards, valid)
def test_rloo_is_verls_and_trls_formula(rewards_PG, valid_PG):
    result = group_advantages(rewards_PG, valid_PG, "rloo")
    for row in range(SHAPE[0]):
        for column in range(SHAPE[1]):
            others = [rewards_PG[row, other] for other in range(SHAPE[1]) if other != column and valid_PG[row, other]]
            expected = rewards_PG[row, column] - sum(others) / len(others) if others and valid_PG[row, column] else 0.0
            assert result[row, column] == pytest.approx(expected, abs=1e-9)


def verl_whitened(scores: list[float], lengths: list[int]) -> list[float]:
    """`masked_whiten` over every token of every answer, as `compute_reinforce_plus_plus_outcome_advantage` calls it."""
    values = [score for score, length in zip(scores, lengths, strict=True) for _ in range(length)]
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return [(score - mean) / math.sqrt(variance + 1e-8) for score in scores]


def test_reinforce_pp_worked_by_hand():
    """Five tokens earn 1, five earn 0: mean 1/2, variance 10/4 / 9, so A = +-(1/2) / sqrt(5/18) = +-0.949, whatever the groups."""
    result = batch_advantages(np.array([[1.0, 1.0], [0.0, 0.0]]), np.ones((2, 2), bool), np.array([[2, 3], [1, 4]]), baseline=False)
    np.testing.assert_allclose(result, [[0.948683, 0.948683], [-0.948683, -0.948683]], atol=1e-5)


@given(rewards, valid, tokens, st.booleans())
def test_reinforce_pp_is_verls_formula_over_the_valid_answers(rewards_PG, valid_PG, tokens_PG, baseline):
    valid_PG[0, :2] = True
    result = batch_advantages(np.where(valid_PG, rewards_PG, np.nan), valid_PG, tokens_PG, baseline=baseline)
    scores_PG = group_advantages(rewards_PG, valid_PG, "dr_grpo") if baseline else rewards_PG
    expected = verl_whitened(scores_PG[valid_PG].tolist(), tokens_PG[valid_PG].tolist())
    np.testing.assert_allclose(result[valid_PG], expected, atol=1e-6)
    assert (result[~valid_PG] == 0).all()


@given(rewards, tokens, st.permutations(range(SHAPE[1])))
def test_reinforce_pp_does_not_know_groups(rewards_PG, tokens_PG, order):
    result = batch_advantages(rewards_PG, EVERY, tokens_PG, baseline=False)
    shuffled = batch_advantages(rewards_PG.T[order], EVERY.T, tokens_PG.T[order], baseline=False)
    np.testing.assert_allclose(shuffled.T, result[:, order], atol=1e-9)
    assert abs((result * tokens_PG).sum()) < 1e-6, "over tokens it sums to zero"


def test_a_batch_without_differences_or_tokens_gives_zero():
    alone = np.ones((1, 1))
    assert batch_advantages(alone, alone > 0, alone, baseline=False).tolist() == [[0.0]]
    assert batch_advantages(alone, alone < 0, alone, baseline=True).tolist() == [[0.0]]
    assert multi_reward_advantages(np.ones((2, 1, 1)), np.ones(2), alone > 0).tolist() == [[0.0]]


def test_gdpo_keeps_apart_what_a_sum_would_confuse():
    """Rewards (1, 0) and (0, 1) have the same sum, so GRPO sees no difference to each other; (1, 1) is better, (0, 0) worse. With weights 1 and 2 all four
    differ: z = +-0.866 in each reward, summed 2.598, -0.866, 0.866, -2.598, whose standard deviation is 2.236."""
    named = np.array([[[1.0, 1.0, 0.0, 0.0]], [[1.0, 0.0, 1.0, 0.0]]])
    result = multi_reward_advantages(named, np.array([1.0, 2.0]), np.ones((1, 4), bool))
    np.testing.assert_allclose(result, np.array([[2.598076, -0.866025, 0.866025, -2.598076]]) / 2.236068, atol=1e-5)


@given(rewards, rewards, valid, st.floats(0.1, 3))
def test_gdpo_is_trls_normalize_then_sum(first, second, valid_PG, weight):
    """Group by group, reward by reward; then over the standard deviation of the batch."""
    valid_PG[0, :2] = True
    result = multi_reward_advantages(np.stack([first, second]), np.array([1.0, weight]), valid_PG)
    summed = np.full(SHAPE, np.nan)
    for row in range(SHAPE[0]):
        held = np.flatnonzero(valid_PG[row])
        if len(held) > 1:
            parts = [verl_outcome_advantage(reward[row, held].tolist(), True) for reward in (first, second)]
            summed[row, held] = np.array(parts[0]) + weight * np.array(parts[1])
        elif len(held):
            summed[row, held] = 0.0
    expected = (summed - np.nanmean(summed)) / (np.nanstd(summed, ddof=1) + 1e-6)
    np.testing.assert_allclose(result[valid_PG], expected[valid_PG], atol=1e-4)
    np.testing.assert_allclose(result.sum(axis=1), 0, atol=1e-6)
