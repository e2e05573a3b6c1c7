"""The laws of the bonus, with hypothesis, and its numbers by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from megatron_ext.batch.routing import RouteTrace
from megatron_ext.config.schema import DiscoverConfig, EarlConfig
from megatron_ext.earl.bonus import EarlBonus, apply_bonus, lambda_at
from megatron_ext.earl.clusters import ExpertClusters, PairEffect, SkillCluster
from megatron_ext.earl.spans import Span

CONFIG = EarlConfig()
SHAPE = (3, 6)
masses = arrays(np.float64, SHAPE, elements=st.floats(0, 1))
zero_one = arrays(np.float64, SHAPE, elements=st.sampled_from([0.0, 0.5, 1.0]))
valid = arrays(np.bool_, SHAPE)
weights = st.floats(0, 5)
shares = st.floats(0, 0.99)


def pair(layer: int, expert: int) -> PairEffect:
    return PairEffect(layer, expert, 0.1, 2.0, 5.0, 0.01, 1.0, 0.9, 0.3, 0.1, 5.0, 0.9, 0.3)


def clusters_of(pairs: dict[str, list[tuple[int, int]]], num_layers: int = 3, num_experts: int = 4, status: str = "ok") -> ExpertClusters:
    skills = tuple(SkillCluster(skill, status, "", 10, tuple(pair(*place) for place in where), 0.1, 0.9, None, 1.0, None) for skill, where in pairs.items())
    table = np.zeros((len(skills), num_layers, num_experts))
    return ExpertClusters(num_layers, num_experts, skills, table, table, np.zeros(num_layers), 4.0, DiscoverConfig(), 0, "")


def trace_of(seed: int, length: int) -> RouteTrace:
    rng = np.random.default_rng(seed)
    experts = rng.permuted(np.tile(np.arange(4), (length, 3, 1)), axis=2)[:, :, :2].astype(np.uint8)
    first = rng.choice([0.5, 0.625, 0.75], size=(length, 3, 1))  # exact in float16
    return RouteTrace(experts, np.concatenate([first, 1 - first], axis=2).astype(np.float16))


def grpo(rewards: np.ndarray) -> np.ndarray:
    return (rewards - rewards.mean(axis=1, keepdims=True)) / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-6)


BONUS = EarlBonus(clusters_of({"ocr": [(0, 1), (0, 2), (2, 3)], "count": [(1, 0)]}), CONFIG, {"ocr": 0.1, "count": 0.2})


def test_mass_worked_by_hand():
    experts = np.array([[[1, 0], [0, 1], [3, 2]], [[2, 1], [1, 3], [0, 1]]], np.uint8)
    gates = np.array([[[0.75, 0.25], [0.5, 0.5], [0.625, 0.375]], [[0.5, 0.5], [0.75, 0.25], [0.5, 0.5]]], np.float16)
    trace = RouteTrace(experts, gates)
    # ocr uses layers 0 and 2: position 0: (0.75 + 0.625) / 2; position 1: (1.0 + 0) / 2
    assert BONUS.mass(trace, "ocr", 0, 1) == 0.6875
    assert BONUS.mass(trace, "ocr", 0, 2) == (0.6875 + 0.5) / 2
    # count uses layer 1: position 0: 0.5, position 1: 0
    assert BONUS.mass_of_spans(trace, [Span("ocr", 0, 1), Span("count", 0, 2), Span("spatial", 0, 2)]) == (0.6875 + 0.5 + 0.0) / 3
    assert math.isnan(BONUS.mass(trace, "spatial", 0, 2))
    with pytest.raises(ValueError, match="outside the 2 recorded positions"):
        BONUS.mass(trace, "ocr", 1, 3)


@given(st.integers(0, 50), st.integers(1, 6), st.integers(1, 5))
def test_mass_does_not_depend_on_length(seed, length, repeats):
    trace = trace_of(seed, length)
    longer = RouteTrace(np.tile(trace.experts_SLK, (repeats, 1, 1)), np.tile(trace.gates_SLK, (repeats, 1, 1)))
    assert BONUS.mass(longer, "ocr", 0, length * repeats) == pytest.approx(BONUS.mass(trace, "ocr", 0, length), abs=1e-12)


def test_mass_is_one_when_every_gate_goes_to_the_cluster():
    everything = EarlBonus(clusters_of({"ocr": [(layer, expert) for layer in (0, 2) for expert in range(4)]}), CONFIG, {"ocr": 0.1})
    assert everything.mass(trace_of(0, 5), "ocr", 0, 5) == 1.0


def test_a_cluster_that_is_not_ok_scores_nothing():
    unstable = EarlBonus(clusters_of({"ocr": [(0, 1)]}, status="unstable"), CONFIG, {"ocr": 0.1})
    assert math.isnan(unstable.mass(trace_of(0, 2), "ocr", 0, 2))


def test_the_bonus_worked_by_hand():
    mass = np.array([[0.50, 0.56, 0.62, 0.90], [0.30, 0.40, 0.50, 0.60]])
    rewards = np.array([[1.0, 1.0, 1.0, 0.5], [1.0, 0.0, 0.0, 0.0]])
    bonus = BONUS.bonus(mass, rewards, np.ones((2, 4), bool), ["ocr", "ocr"])
    # first group: mean of the correct 0.56, sigma 0.1; the wrong answer gets 0. second: one correct answer is fewer than two
    np.testing.assert_allclose(bonus, [[-0.6, 0.0, 0.6, 0.0], [0, 0, 0, 0]], atol=1e-12)
    advantages = np.array([[1.0, 0.2, 1.0, -1.5], [1.5, -0.5, -0.5, -0.5]])
    np.testing.assert_allclose(apply_bonus(advantages, bonus, 0.3, 0.5, rewards < 1), [[0.82, 0.2, 1.18, -1.5], [1.5, -0.5, -0.5, -0.5]], atol=1e-12)
    np.testing.assert_allclose(apply_bonus(advantages, bonus, 3.0, 0.5, rewards < 1)[0], [0.5, 0.2, 1.5, -1.5], atol=1e-12)


def test_a_correct_answer_is_never_pushed_below_a_nearly_correct_one():
    """Two correct answers at 1.0, one with partial credit at 0.7: half of 1.0 would be below it."""
    advantages, wrong = np.array([[1.0, 1.0, 0.7]]), np.array([[False, False, True]])
    np.testing.assert_allclose(apply_bonus(advantages, np.array([[-1.0, 1.0, 0.0]]), 3.0, 0.5, wrong), [[0.7, 1.5, 0.7]])


def test_skills_have_their_own_sigma_and_a_skill_without_one_gets_nothing():
    mass = np.array([[0.4, 0.5]] * 3)
    bonus = BONUS.bonus(mass, np.ones((3, 2)), np.ones((3, 2), bool), ["ocr", "count", "spatial"])
    np.testing.assert_allclose(bonus, [[-0.5, 0.5], [-0.25, 0.25], [0, 0]], atol=1e-12)


def test_failed_answers_and_answers_without_a_mass_take_no_part():
    mass = np.array([[0.4, 0.5, 9.9, np.nan]])
    bonus = BONUS.bonus(mass, np.array([[1.0, 1.0, 1.0, 1.0]]), np.array([[True, True, False, True]]), ["ocr"])
    np.testing.assert_allclose(bonus, [[-0.5, 0.5, 0, 0]], atol=1e-12)


@given(masses, zero_one, valid)
def test_the_bonus_is_bounded_zero_on_wrong_answers_and_below_min_correct(mass, rewards, valid_PG):
    bonus = BONUS.bonus(mass, rewards, valid_PG, ["ocr", "count", "ocr"])
    correct = valid_PG & (rewards >= 1)
    assert (np.abs(bonus) <= 1).all() and (bonus[~correct] == 0).all()
    assert (bonus[correct.sum(axis=1) < CONFIG.min_correct] == 0).all()


sizes = st.just(0.0) | st.floats(1e-6, 5) | st.floats(-5, -1e-6)


@given(arrays(np.float64, SHAPE, elements=sizes), arrays(np.float64, SHAPE, elements=st.floats(-1, 1)), weights, shares, valid)
def test_the_bonus_never_changes_a_sign_nor_exceeds_its_share(advantages, bonus, weight, share, wrong):
    after = apply_bonus(advantages, bonus, weight, share, wrong)
    assert (np.sign(after) == np.sign(advantages)).all()
    assert (np.abs(after - advantages) <= share * np.abs(advantages) + 1e-12).all()


@given(masses, zero_one, weights, shares)
def test_correct_stays_above_wrong_and_wrong_is_untouched(mass, rewards, weight, share):
    advantages = grpo(rewards)
    after = apply_bonus(advantages, BONUS.bonus(mass, rewards, np.ones(SHAPE, bool), ["ocr"] * 3), weight, share, rewards < 1)
    for row in range(SHAPE[0]):
        correct = rewards[row] >= 1
        np.testing.assert_array_equal(after[row][~correct], advantages[row][~correct])
        assert (after[row][correct][:, None] >= after[row][~correct]).all()
        if correct.any() and not correct.all():
            assert after[row][correct].min() > 0


@given(masses, st.sampled_from([0.0, 1.0]), weights, shares)
def test_groups_that_are_all_correct_or_all_wrong_still_teach_nothing(mass, reward, weight, share):
    rewards = np.full(SHAPE, reward)
    bonus = BONUS.bonus(mass, rewards, np.ones(SHAPE, bool), ["ocr"] * 3)
    assert (apply_bonus(np.zeros(SHAPE), bonus, weight, share, np.ones(SHAPE, bool)) == 0).all()


@given(masses, zero_one, st.permutations(range(SHAPE[1])))
def test_the_order_of_answers_in_a_group_does_not_matter(mass, rewards, order):
    one, every = BONUS.bonus(mass, rewards, np.ones(SHAPE, bool), ["ocr"] * 3), np.ones(SHAPE, bool)
    np.testing.assert_allclose(BONUS.bonus(mass[:, order], rewards[:, order], every, ["ocr"] * 3), one[:, order], atol=1e-9)


def test_lambda_rises_over_a_tenth_stays_and_falls_along_a_cosine():
    weights_by_hand = [lambda_at(step, 20, CONFIG) for step in range(20)]
    # warm-up ends with step 1 (u = 2/20): half, then all; the fall starts after u = 0.7 and takes 6 steps
    expected = [0.15] + [0.3] * 13 + [0.3 * (1 + math.cos(math.pi * part / 6)) / 2 for part in range(1, 7)]
    assert weights_by_hand == pytest.approx(expected)
    assert weights_by_hand[-1] == pytest.approx(0, abs=1e-12) and weights_by_hand[16] == pytest.approx(0.15)


def test_lambda_without_warm_up_and_cool_down_is_constant():
    assert [lambda_at(step, 5, EarlConfig(warmup=0, cooldown=0, bonus=0.2)) for step in range(5)] == [0.2] * 5
