"""Worlds whose truth is known, and what the study of discovery says of them, in small."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.earl.planted import World, planted


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("discovery_truth", Path(__file__).parents[3] / "tools" / "studies" / "discovery_truth.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_a_world_is_what_it_says():
    data = planted(World(num_prompts=60), seed=0)
    assert data.mass_NLE.shape == (60, 4, 16) and len(data.gates_TLE) == len(data.prompt_T)
    np.testing.assert_allclose(data.mass_NLE.sum(axis=2), 1, atol=1e-6)
    np.testing.assert_allclose(data.gates_TLE.sum(axis=2), 1, atol=1e-6)
    assert (np.count_nonzero(data.gates_TLE, axis=2) == 4).all(), "4 experts of a token"
    np.testing.assert_allclose(data.mass_NLE[3], data.gates_TLE[data.prompt_T == 3].mean(axis=0), atol=1e-6)
    assert data.truth_XLE.sum(axis=(1, 2)).tolist() == [4, 4, 4, 4] and not data.truth_XLE[:, 1].any()
    assert data.mass_NLE[:, :, 14:].mean() > 2 * data.mass_NLE[:, :, :14].mean(), "the committee"


def test_tokens_of_a_prompt_are_alike_and_nothing_is_planted_without_boost():
    data = planted(World(num_prompts=40, boost=0.0, prompt_sd=0.0, template_sd=0.0), seed=1)
    assert not data.truth_XLE.any()
    same = data.prompt_T[1:] == data.prompt_T[:-1]
    used = (data.gates_TLE > 0).astype(float)
    together = (used[1:] * used[:-1]).mean(axis=(1, 2))
    assert together[same].mean() > 1.1 * together[~same].mean()


def test_templates_go_with_skills():
    data = planted(World(num_prompts=400, leaning=0.8), seed=2)
    favourite = [template == "template 0" for skill, template in zip(data.skill_N, data.template_N, strict=True) if skill == "skill 0"]
    assert np.mean(favourite) > 0.7


@pytest.mark.parametrize("method", ["topm", "nmf", "spectral", "louvain"])
def test_every_method_finds_nine_of_ten_planted_experts_and_no_others(study, method):
    found = study.power(study.gates(study.METHODS[method]), study.WORLD, repetitions=1)
    assert found["power"] >= 0.9 and found["false"] == 0.0


def test_the_test_keeps_its_rate_where_one_by_tokens_or_over_pooled_templates_finds_something_in_every_world(study):
    """Eight worlds without anything planted: 5 % in each, more than two wrong ones have a chance of 0.6 %."""
    assert study.errors(study.alone({}), 8)["rate"] <= 2 / 8
    assert study.errors(study.gates({}), 3)["rate"] == 0
    for naive in (study.pooled, study.by_tokens):
        assert study.errors(naive, 2)["rate"] == 1.0
