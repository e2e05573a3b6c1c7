"""Clusters that should not help: what a bonus for them achieves is no merit of the clusters that were found.

    random      per skill and layer as many experts as its cluster has, others, with as nearly the same mass as can be had
    shuffled    each skill gets the cluster of the next one, cyclically, in alphabetical order, of the skills that have one

Random experts are matched by mass, since experts that take more tokens are paid for more whoever they are. In each layer up to 1000 sets of the right size are
drawn from the experts outside the cluster, all of them in random order where there are no more, and the first whose mean mass on the skill's prompts comes
nearest to that of the cluster is taken. Where fewer experts are outside than needed, all of them are taken, and the rest is drawn from the cluster.

A control has no sigma of its own: it is learnt from the first correct answers, like that of any cluster that discovery has not measured (`rl/earl_credit.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import combinations
from math import comb
from typing import Any

import numpy as np

from megatron_ext.config.rl_schema import Control
from megatron_ext.earl.clusters import ExpertClusters, PairEffect, SkillCluster

DRAWS = 1000


def controlled(clusters: ExpertClusters, control: Control, seed: int) -> ExpertClusters:
    """The clusters that the bonus pays for. Pure: the same clusters and seed give the same."""
    if control == "none":
        return clusters
    return random_clusters(clusters, seed) if control == "random" else shuffled_clusters(clusters)


def random_clusters(clusters: ExpertClusters, seed: int) -> ExpertClusters:
    mass_LE = {found.skill: clusters.mean_mass_XLE[index] for index, found in enumerate(clusters.skills)}

    def drawn(found: SkillCluster) -> SkillCluster:
        rng = np.random.default_rng([seed, *found.skill.encode()])
        true_LE = clusters.mask(found.skill)
        pairs = tuple(
            (layer, expert) for layer in np.flatnonzero(true_LE.any(1)).tolist() for expert in matched(mass_LE[found.skill][layer], true_LE[layer], rng)
        )
        true, ours = (sum(mass_LE[found.skill][pair] for pair in of) for of in (clusters.pairs(found.skill), pairs))
        return _as_control(found, pairs, f"a control: random experts with mass {ours:.4f} in all, its cluster has {true:.4f}")

    return _with(clusters, drawn)


def shuffled_clusters(clusters: ExpertClusters) -> ExpertClusters:
    """With one skill alone there is no other cluster, and it keeps its own."""
    skills = sorted(found.skill for found in clusters.skills if clusters.pairs(found.skill))
    following = dict(zip(skills, skills[1:] + skills[:1], strict=True))
    return _with(clusters, lambda found: _as_control(found, clusters.pairs(following[found.skill]), f"a control: the cluster of {following[found.skill]}"))


def matched(mass_E: np.ndarray, cluster_E: np.ndarray, rng: np.random.Generator) -> tuple[int, ...]:
    """As many experts as the cluster of a layer has, in rising order.

    >>> matched(np.array([0.4, 0.3, 0.2, 0.1]), np.array([True, False, False, False]), np.random.default_rng(0))
    (1,)
    """
    size, outside = int(cluster_E.sum()), np.flatnonzero(~cluster_E)
    if size >= len(outside):
        rest = rng.choice(np.flatnonzero(cluster_E), size - len(outside), replace=False)
        return tuple(sorted(int(expert) for expert in (*outside, *rest)))
    if comb(len(outside), size) <= DRAWS:
        sets_MK = rng.permutation(np.array(list(combinations(outside, size))))
    else:
        sets_MK = np.array([rng.choice(outside, size, replace=False) for _ in range(DRAWS)])
    distance_M = np.abs(mass_E[sets_MK].sum(1) - mass_E[cluster_E].sum())
    return tuple(sorted(int(expert) for expert in sets_MK[distance_M.argmin()]))


def _with(clusters: ExpertClusters, changed: Callable[[SkillCluster], SkillCluster]) -> ExpertClusters:
    return replace(clusters, skills=tuple(changed(found) if clusters.pairs(found.skill) else found for found in clusters.skills))


def _as_control(found: SkillCluster, pairs: Sequence[tuple[int, int]], reason: str) -> SkillCluster:
    """No evidence speaks for its pairs: zeros."""
    nothing: dict[str, Any] = {field.name: 0.0 for field in fields(PairEffect)}
    effects = tuple(PairEffect(**{**nothing, "layer": int(layer), "expert": int(expert)}) for layer, expert in pairs)
    return replace(found, pairs=effects, reason=reason, sigma=None)
