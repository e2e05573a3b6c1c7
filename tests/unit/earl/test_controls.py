"""Controls pay for clusters that should not help: of the same size, of nearly the same mass, and not those that were found."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.config.schema import RunConfig
from megatron_ext.earl.clusters import ExpertClusters, PairEffect, SkillCluster
from megatron_ext.earl.controls import controlled, matched, random_clusters, shuffled_clusters

SKILLS = ("count", "ocr", "spatial")


def effect(layer: int, expert: int) -> PairEffect:
    values: dict[str, Any] = {field.name: 0.5 for field in fields(PairEffect)}
    return PairEffect(**{**values, "layer": layer, "expert": expert})


def clusters_of(pairs: dict[str, list[tuple[int, int]]], mass_XLE: np.ndarray) -> ExpertClusters:
    found = tuple(
        SkillCluster(skill, "ok" if of else "empty", "", 9, tuple(effect(*pair) for pair in of), 0.1 if of else None, 0.9, None, 1.0, None)
        for skill, of in pairs.items()
    )
    return ExpertClusters(mass_XLE.shape[1], mass_XLE.shape[2], found, mass_XLE, mass_XLE * 0, np.zeros(mass_XLE.shape[1]), 4.0, RunConfig().discover, 0, "sft")


def drawn(seed: int, layers: int = 3, experts: int = 16, per_layer: int = 2) -> ExpertClusters:
    rng = np.random.default_rng(seed)
    mass_XLE = rng.dirichlet(np.ones(experts), size=(len(SKILLS), layers))
    pairs = {
        skill: [(layer, int(expert)) for layer in range(1, layers) for expert in rng.choice(experts, rng.integers(1, per_layer + 1), replace=False)]
        for skill in SKILLS
    }
    return clusters_of(pairs, mass_XLE)


def test_random_experts_have_the_nearest_mass_that_others_offer() -> None:
    """Cluster {0} of mass 0.30; others have 0.28, 0.22, 0.20: expert 1."""
    mass_XLE = np.array([[[0.30, 0.28, 0.22, 0.20]]])
    assert random_clusters(clusters_of({"ocr": [(0, 0)]}, mass_XLE), seed=3).pairs("ocr") == ((0, 1),)


def test_where_most_experts_are_in_the_cluster_the_rest_comes_from_it() -> None:
    chosen = matched(np.array([0.4, 0.3, 0.2, 0.1]), np.array([True, True, True, False]), np.random.default_rng(0))
    assert len(set(chosen)) == 3 and 3 in chosen


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 5))
def test_random_clusters_are_disjoint_as_large_in_every_layer_and_nearer_in_mass_than_most(seed: int, run: int) -> None:
    true = drawn(seed)
    control = random_clusters(true, run)
    rng = np.random.default_rng(seed)
    for index, skill in enumerate(SKILLS):
        ours_LE, true_LE = control.mask(skill), true.mask(skill)
        assert not (ours_LE & true_LE).any() and (ours_LE.sum(1) == true_LE.sum(1)).all()
        for layer in np.flatnonzero(true_LE.any(1)):
            mass_E, size = true.mean_mass_XLE[index, layer], int(true_LE[layer].sum())
            target = mass_E[true_LE[layer]].sum()
            others = [abs(mass_E[rng.choice(np.flatnonzero(~true_LE[layer]), size, replace=False)].sum() - target) for _ in range(20)]
            assert abs(mass_E[ours_LE[layer]].sum() - target) <= min(others) + 1e-12


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_a_control_is_a_function_of_clusters_and_seed_and_of_no_other_skill(seed: int) -> None:
    true = drawn(seed)
    assert all(random_clusters(true, 1).pairs(skill) == random_clusters(true, 1).pairs(skill) for skill in SKILLS)
    fewer = replace(true, skills=true.skills[:1], mean_mass_XLE=true.mean_mass_XLE[:1], risk_difference_XLE=true.risk_difference_XLE[:1])
    assert random_clusters(fewer, 1).pairs(SKILLS[0]) == random_clusters(true, 1).pairs(SKILLS[0])


def test_among_many_experts_the_seed_decides() -> None:
    true = drawn(0, experts=64, per_layer=4)
    assert len({random_clusters(true, run).pairs("ocr") for run in range(6)}) > 1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_shuffling_gives_every_cluster_once_and_nobody_its_own(seed: int) -> None:
    true = drawn(seed)
    control = shuffled_clusters(true)
    assert [control.pairs(skill) for skill in SKILLS] == [true.pairs(skill) for skill in ("ocr", "spatial", "count")]


def test_a_skill_without_a_cluster_takes_no_part() -> None:
    mass_XLE = np.full((3, 1, 4), 0.25)
    true = clusters_of({"count": [(0, 1)], "ocr": [], "spatial": [(0, 2)]}, mass_XLE)
    control = shuffled_clusters(true)
    assert control.pairs("count") == ((0, 2),) and control.pairs("spatial") == ((0, 1),) and control.pairs("ocr") == ()
    assert random_clusters(true, 0).pairs("ocr") == ()


@pytest.mark.parametrize("control", ["random", "shuffled"])
def test_a_control_has_no_evidence_and_no_sigma_of_its_own(control: Any) -> None:
    found = controlled(drawn(1), control, 0)
    assert found.sigmas() == {} and all("control" in skill.reason for skill in found.skills)
    assert all(pair.z == 0 for skill in found.skills for pair in skill.pairs)


def test_without_a_control_the_clusters_are_those_that_were_found() -> None:
    true = drawn(1)
    assert controlled(true, "none", 0) is true
