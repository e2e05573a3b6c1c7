"""Paired differences: worked examples, laws, and how often the rule errs where nothing is to be found."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.study.statistics import bootstrap, effect, holm, least_sign_flip_p, sign_flip_p

SKILLS = ["count", "count", "color", "color"]


def drawn(rng: np.random.Generator, seeds: int, prompts: int, of_seeds: float, of_prompts: float, rest: float) -> np.ndarray:
    """Scores of an arm: what seeds add, what prompts add, and noise."""
    return rng.normal(0, of_seeds, (seeds, 1)) + rng.normal(0, of_prompts, (1, prompts)) + rng.normal(0, rest, (seeds, prompts))


def test_an_effect_is_a_mean_over_seeds_of_means_over_skills_of_means_over_prompts() -> None:
    """Seed 0: count (1 + 0) / 2, color (0 + 0) / 2, so 0.25. Seed 1: count 1, color 0.5, so 0.75."""
    found = effect(np.array([[1.0, 0, 0, 0], [1, 1, 0, 1]]), SKILLS)
    assert found.seeds_S == (0.25, 0.75) and found.difference == 0.5
    assert found.v_seeds == pytest.approx(0.125 / 2)


def test_prompts_that_all_seeds_agree_upon_leave_the_uncertainty_of_prompts() -> None:
    """No scatter over seeds; over prompts var(1, 0, 1, 1 | 0, 0, 0, 1) = 1/4 in either skill, of 4 prompts: (1/16 + 1/16) / 2^2."""
    found = effect(np.array([[1.0, 0, 1, 1, 0, 0, 0, 1]] * 3), ["a"] * 4 + ["b"] * 4)
    assert found.v_seeds == 0 and found.v_rest == pytest.approx(0) and found.v_prompts == pytest.approx(1 / 32)
    low, high = found.interval(0.95)
    assert (low + high) / 2 == pytest.approx(0.5) and high - low == pytest.approx(2 * 2.4469 * math.sqrt(1 / 32), rel=1e-4)


def test_one_seed_says_nothing_about_its_uncertainty() -> None:
    found = effect(np.array([[1.0, 0, 1, 1]]), SKILLS)
    assert found.interval(0.95) == (-math.inf, math.inf) and found.p == 1


def test_equal_arms_differ_by_nothing_for_certain() -> None:
    found = effect(np.zeros((5, 4)), SKILLS)
    assert found.interval(0.99) == (0, 0) and found.p == 1


def test_arms_that_always_differ_by_the_same_are_certainly_different() -> None:
    found = effect(np.full((4, 4), 0.1), SKILLS)
    assert found.interval(0.99) == pytest.approx((0.1, 0.1)) and found.p == pytest.approx(0, abs=1e-60)


@given(st.integers(2, 6), st.integers(0, 1000), st.floats(0.1, 10), st.floats(-1, 1))
def test_the_p_value_is_where_the_interval_touches_zero_and_units_do_not_matter(seeds: int, seed: int, scale: float, shift: float) -> None:
    difference_SP = drawn(np.random.default_rng(seed), seeds, 8, 0.1, 0.1, 0.3) + shift
    skills = ["a"] * 4 + ["b"] * 4
    found, scaled = effect(difference_SP, skills), effect(-scale * difference_SP, skills)
    low, high = found.interval(1 - found.p)
    assert min(abs(low), abs(high)) < 1e-6 * (abs(found.difference) + 1)
    assert scaled.p == pytest.approx(found.p, rel=1e-6) and scaled.difference == pytest.approx(-scale * found.difference)


def test_five_seeds_that_agree_have_the_least_p_that_flipping_signs_can_give() -> None:
    assert sign_flip_p([0.1, 0.2, 0.1, 0.3, 0.1]) == least_sign_flip_p(5) == 1 / 16
    assert sign_flip_p([0.1, -0.1, 0.1, -0.1]) == 1


def test_with_many_seeds_signs_are_drawn() -> None:
    differences = [0.1 + 0.01 * at for at in range(14)]
    assert sign_flip_p(differences) == pytest.approx(2 ** (1 - 14), abs=3e-4) and sign_flip_p(differences) >= least_sign_flip_p(14)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_no_correction_and_bonferroni_and_keeps_the_order(values: list[float]) -> None:
    adjusted = holm(values)
    assert all(value <= found <= min(1.0, len(values) * value) + 1e-12 for value, found in zip(values, adjusted, strict=True))
    order = np.argsort(values, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()


def test_the_bootstrap_surrounds_the_difference_and_repeats_itself() -> None:
    difference_SP = drawn(np.random.default_rng(3), 5, 40, 0.05, 0.1, 0.4) + 0.2
    skills = ["a"] * 20 + ["b"] * 20
    low, high = bootstrap(difference_SP, skills, 0.95, 800)
    assert low < effect(difference_SP, skills).difference < high
    assert (low, high) == bootstrap(difference_SP, skills, 0.95, 800)


def test_the_bootstrap_of_equal_prompts_has_the_spread_of_resampled_seeds() -> None:
    """One number a seed, so only seeds scatter: the bootstrap's standard deviation is sqrt((S - 1) / S) of the standard error, 0.0632 for 0, .1, .2, .3, .4."""
    low, high = bootstrap(np.repeat([[0.0], [0.1], [0.2], [0.3], [0.4]], 4, axis=1), SKILLS, 0.683, 4000)
    assert high - low == pytest.approx(2 * 0.0632, rel=0.1)


@pytest.mark.parametrize("of_seeds, of_prompts, rest", [(0.2, 0.0, 0.2), (0.05, 0.2, 0.4), (0.0, 0.0, 0.4)])
def test_five_seeds_without_any_effect_seldom_find_one(of_seeds: float, of_prompts: float, rest: float) -> None:
    """Three arms against one baseline, 250 studies: any wrong `better` or `worse` in at most 5 %, but for the luck of the draw (3 standard errors). The longer
    simulation, of tools/studies/simulate.py, is in docs/studies/README.md."""
    rng, skills = np.random.default_rng(7), ["a"] * 20 + ["b"] * 20 + ["c"] * 20
    wrong = covered = 0
    for _ in range(250):
        base_SP, *arms = (drawn(rng, 5, 60, of_seeds, of_prompts, rest) for _ in range(4))
        found = [effect(arm_SP - base_SP, skills) for arm_SP in arms]
        wrong += min(holm([one.p for one in found])) <= 0.05
        low, high = found[0].interval(0.95)
        covered += low <= 0 <= high
    assert wrong <= 250 * (0.05 + 3 * 0.0138)
    assert covered >= 250 * (0.95 - 3 * 0.0138)
