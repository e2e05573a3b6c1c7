"""Prompts whose skills use experts that we chose: what discovery must find."""

from __future__ import annotations

import numpy as np
import pytest

SKILLS = ("ocr", "count", "colour", "spatial")


def draw(seed: int, num_prompts: int = 160, boost: float = 2.0):
    """mass_NLE, skill_N, template_N and the planted pairs: skill x prefers experts 2x and 2x + 1 in layers 0 and 2, nothing else knows the skill."""
    rng = np.random.default_rng(seed)
    skill_N = [SKILLS[row % len(SKILLS)] for row in range(num_prompts)]
    template_N = [f"t{(row // len(SKILLS)) % 3}" for row in range(num_prompts)]
    logits = rng.normal(scale=0.7, size=(num_prompts, 3, 10))
    planted = {skill: {(layer, 2 * index + step) for layer in (0, 2) for step in (0, 1)} for index, skill in enumerate(SKILLS)}
    for row, skill in enumerate(skill_N):
        for layer, expert in planted[skill]:
            logits[row, layer, expert] += boost
    mass = np.exp(logits)
    return mass / mass.sum(axis=2, keepdims=True), skill_N, template_N, planted


@pytest.fixture(scope="session")
def planted_prompts():
    return draw
