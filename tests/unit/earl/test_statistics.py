"""Effects and tests whose unit is the prompt, against hand-worked numbers and plain loops."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import false_discovery_control

from megatron_ext.earl.statistics import (
    auroc,
    cluster_mass,
    critical_z,
    effects,
    excess_information,
    false_discovery_p,
    family_wise_p,
    information,
    max_z_null,
    permutation_null,
    permuted_labels,
    sigma_from,
)


def one_layer(first_expert_mass: list[float]) -> np.ndarray:
    first = np.array(first_expert_mass)
    return np.stack([first, 1 - first], axis=1)[:, None, :]


def random_mass(rng: np.random.Generator, num_prompts: int, num_layers: int = 2, num_experts: int = 5) -> np.ndarray:
    return rng.dirichlet(np.ones(num_experts), size=(num_prompts, num_layers))


def test_risk_difference_and_lift_worked_by_hand():
    found = effects(one_layer([0.8, 0.6, 0.2, 0.4]), np.array([0, 0, 1, 1]), np.zeros(4, int), 2)
    assert found.mean_mass_XLE[0, 0] == pytest.approx([0.7, 0.3])
    assert found.risk_difference_XLE[:, 0, 0] == pytest.approx([0.4, -0.4])
    assert found.lift_XLE[:, 0, 0] == pytest.approx([0.7 / 0.5, 0.3 / 0.5])


def test_z_is_exact_under_all_permutations_within_templates():
    rng = np.random.default_rng(0)
    mass, label, stratum = random_mass(rng, 7), np.array([0, 0, 1, 1, 0, 1, 1]), np.array([0, 0, 0, 0, 1, 1, 1])
    sums = []
    for first, second in itertools.product(itertools.permutations(label[:4]), itertools.permutations(label[4:])):
        sums.append(mass[np.array(first + second) == 0].sum(axis=0))
    observed = mass[label == 0].sum(axis=0)
    expected = (observed - np.mean(sums, axis=0)) / np.std(sums, axis=0)
    np.testing.assert_allclose(effects(mass, label, stratum, 2).z_XLE[0], expected, rtol=1e-10)


def test_the_null_agrees_with_computing_the_effects_of_every_permutation():
    rng = np.random.default_rng(1)
    mass, label, stratum = random_mass(rng, 30), np.arange(30) % 3, np.arange(30) // 10
    permuted = permuted_labels(label, stratum, 20, rng)
    plain = [np.abs(effects(mass, row, stratum, 3).z_XLE).max() for row in permuted]
    np.testing.assert_allclose(max_z_null(mass, permuted, stratum, 3), plain, rtol=1e-4)


def test_labels_are_permuted_within_templates_only():
    label, stratum = np.array([0, 0, 1, 1, 1, 2]), np.array([0, 1, 0, 1, 1, 1])
    permuted = permuted_labels(label, stratum, 50, np.random.default_rng(2))
    for value in (0, 1):
        assert (np.sort(permuted[:, stratum == value], axis=1) == np.sort(label[stratum == value])).all()
    assert len(np.unique(permuted, axis=0)) > 4


def test_what_a_template_explains_is_not_credited_to_a_skill():
    mass = one_layer([0.9, 0.9, 0.1, 0.1])
    assert effects(mass, np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1]), 2).z_XLE.tolist() == np.zeros((2, 1, 2)).tolist()


def test_family_wise_p_counts_permutations_and_agrees_with_the_critical_value():
    null = np.array([1.0, 2.0, 3.0, 4.0])
    assert family_wise_p(np.array([5.0, -3.5, 0.5]), null).tolist() == [1 / 5, 2 / 5, 5 / 5]
    assert critical_z(null, 0.4) == 3.0  # p <= 0.4 allows one permutation to reach z
    assert critical_z(null, 0.1) == math.inf  # four permutations never give p <= 0.1


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=30))
def test_benjamini_hochberg_is_that_of_scipy(p):
    np.testing.assert_allclose(false_discovery_p(np.array(p)), false_discovery_control(p))


def test_benjamini_hochberg_worked_by_hand():
    """p m / rank: 0.04, 0.04, 0.04, 0.5; each is at most what follows it."""
    assert false_discovery_p(np.array([[0.01, 0.5], [0.03, 0.02]])).tolist() == [[0.04, 0.5], [0.04, 0.04]]


def test_each_pairs_own_permutations_are_counted():
    rng = np.random.default_rng(4)
    mass, label, stratum = random_mass(rng, 30), np.arange(30) % 3, np.arange(30) // 10
    permuted, asked = permuted_labels(label, stratum, 40, rng), effects(mass, label, stratum, 3).z_XLE
    plain = sum((np.abs(effects(mass, row, stratum, 3).z_XLE) >= np.abs(asked) * (1 - 1e-6)).astype(int) for row in permuted)
    assert np.abs(permutation_null(mass, permuted, stratum, asked).reached_XLE - plain).max() <= 1  # float32


def test_information_is_one_bit_when_the_expert_names_one_of_two_skills():
    label = np.array([0, 1, 0, 1])
    assert information(one_layer([1, 0, 1, 0]), label, 2) == pytest.approx([1.0])
    assert information(one_layer([0.5, 0.5, 0.5, 0.5]), label, 2) == pytest.approx([0.0])
    # p(e|x) = (3/4, 1/4) and (1/4, 3/4): 1 - H(1/4) = 0.1887 bits
    assert information(one_layer([0.75, 0.25, 0.75, 0.25]), label, 2) == pytest.approx([0.18872], abs=1e-5)


def test_information_of_random_labels_is_near_zero_once_chance_is_taken_off():
    rng = np.random.default_rng(3)
    mass, label, stratum = random_mass(rng, 60), np.arange(60) % 3, np.zeros(60, int)
    excess = excess_information(mass, label, permuted_labels(label, stratum, 100, rng), 3)
    assert (np.abs(excess) < 0.02).all() and (information(mass, label, 3) > 0).all()


def test_auroc_counts_pairs_with_ties_as_half():
    score, positive = np.array([3.0, 1.0, 2.0, 1.0]), np.array([True, True, False, False])
    assert auroc(score, positive) == (1 + 1 + 0 + 0.5) / 4
    assert auroc(score, np.zeros(4, bool)) == 0.5


def test_cluster_mass_averages_over_the_layers_that_have_an_expert():
    mass = np.array([[[0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [1.0, 0.0, 0.0]]])
    chosen = np.array([[True, False, False], [False, True, True], [False, False, False]])
    assert cluster_mass(mass, chosen) == pytest.approx([(0.5 + 0.8) / 2])


def test_sigma_is_the_sample_deviation_with_a_floor():
    assert sigma_from([0.1, 0.3]) == pytest.approx(math.sqrt(0.02))
    assert sigma_from([0.2, 0.2, 0.2]) == 0.01
    assert sigma_from([0.2]) == math.inf
