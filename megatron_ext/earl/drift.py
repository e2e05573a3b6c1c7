"""How far clusters have drifted from what the model does now.

    jaccard = |old and new| / |old or new|      the pairs in use, and those found again in fresh answers
    mass    = the old pairs' share of the skill's gate mass in fresh answers, beside what it was when they were found
    stale   = the share of skills whose jaccard is below `discover.stability_jaccard`: the overlap that two halves of one sample must have

Only skills with a cluster in use, and with enough fresh answers to find one, are compared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megatron_ext.earl.clusters import ExpertClusters, pairs_mask
from megatron_ext.earl.statistics import cluster_mass
from megatron_ext.earl.verdicts import MIN_PROMPTS


@dataclass(frozen=True)
class SkillDrift:
    """One skill. `num_prompts`: fresh correct answers. `jaccard`, `mass`: None where there were too few. `status`, `reason`: of the new cluster; None where
    there was no answer at all."""

    skill: str
    num_prompts: int
    status: str | None
    reason: str | None
    jaccard: float | None
    mass: float | None
    mass_before: float


def drift(old: ExpertClusters, new: ExpertClusters | None, mass_NLE: np.ndarray, skill_N: np.ndarray) -> tuple[SkillDrift, ...]:
    """One for every skill with a cluster in use. `new`: found in these answers, of `mass_NLE` and `skill_N`; None: nothing could be looked for."""
    return tuple(_of_skill(row, old, new, mass_NLE, skill_N) for row, found in enumerate(old.skills) if old.pairs(found.skill))


def stale_share(drifts: tuple[SkillDrift, ...], threshold: float) -> float | None:
    """None where no skill could be compared."""
    known = [one.jaccard for one in drifts if one.jaccard is not None]
    return sum(jaccard < threshold for jaccard in known) / len(known) if known else None


def followed(old: ExpertClusters, new: ExpertClusters) -> ExpertClusters:
    """`old`, with the clusters in use replaced by those that passed every test again. A skill that has none keeps the one it had; one that was not paid for
    is not paid for now."""
    again = {found.skill: (found, row) for row, found in enumerate(new.skills) if found.status == "ok"}
    skills, mass_XLE, difference_XLE = list(old.skills), old.mean_mass_XLE.copy(), old.risk_difference_XLE.copy()
    for row, found in enumerate(old.skills):
        if old.pairs(found.skill) and found.skill in again:
            skills[row], other = again[found.skill]
            mass_XLE[row], difference_XLE[row] = new.mean_mass_XLE[other], new.risk_difference_XLE[other]
    return replace(old, skills=tuple(skills), mean_mass_XLE=mass_XLE, risk_difference_XLE=difference_XLE)


def _of_skill(row: int, old: ExpertClusters, new: ExpertClusters | None, mass_NLE: np.ndarray, skill_N: np.ndarray) -> SkillDrift:
    skill = old.skills[row].skill
    mask_LE, mine_N = old.mask(skill), skill_N == skill
    before = float(cluster_mass(old.mean_mass_XLE[row][None], mask_LE)[0])
    found = None if new is None else next((found for found in new.skills if found.skill == skill), None)
    status, reason = (None, None) if found is None else (found.status, found.reason)
    if found is None or mine_N.sum() < MIN_PROMPTS:
        return SkillDrift(skill, int(mine_N.sum()), status, reason, None, None, before)
    again_LE = pairs_mask([(pair.layer, pair.expert) for pair in found.pairs], old.num_layers, old.num_experts)
    jaccard = float((mask_LE & again_LE).sum() / (mask_LE | again_LE).sum())
    return SkillDrift(skill, int(mine_N.sum()), status, reason, jaccard, float(cluster_mass(mass_NLE[mine_N], mask_LE).mean()), before)
