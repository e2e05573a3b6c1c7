"""The reward of the procedural suite, and of conversations in files that name no other."""

from __future__ import annotations

import math

from megatron_ext.batch.rollout import Prompt
from megatron_ext.data.suite import check
from megatron_ext.data.suite.composite import FINAL

PARTIAL_WEIGHT = 0.4
FORMAT_WEIGHT = 0.1


def skill_reward(prompt: Prompt, response: str) -> dict[str, float]:
    """1 exactly when the answer is fully correct. Otherwise 0 for a single skill, and for a composite at most 0.5:

    reward = 1[correct] + (1 - 1[correct]) (0.4 mean(sub-tasks solved) + 0.1 1[well formed])

    Of your own conversations: 1 when the answer is that of the file, up to white space.
    """
    verdict = check(prompt.meta, response)
    parts = verdict.parts if prompt.skill == "composite" else {}
    partial = math.fsum(parts.values()) / len(parts) if parts else 0.0
    well_formed = float(verdict.well_formed)
    if verdict.correct:
        total = 1.0
    else:
        total = PARTIAL_WEIGHT * partial + FORMAT_WEIGHT * well_formed if parts else 0.0
    return {"reward": total, "correct": float(verdict.correct), "partial": partial, "format": well_formed}


def outcome_reward(prompt: Prompt, response: str) -> dict[str, float]:
    """1 exactly when the final answer is right and the answer well formed, whatever a composite's steps say; else 0. `steps`: the share of them that are right.

    So right answers to one prompt differ in many ways: a sum has many summands.
    """
    verdict = check(prompt.meta, response)
    steps = [value for name, value in verdict.parts.items() if name != FINAL]
    right = float(verdict.correct or (verdict.well_formed and verdict.parts.get(FINAL) == 1))
    return {"reward": right, "correct": right, "steps": math.fsum(steps) / max(len(steps), 1), "format": float(verdict.well_formed)}
