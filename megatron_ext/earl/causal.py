"""Do a skill's experts matter to it? A cluster is found by association; here its experts are taken away, and what that costs is counted.

    right[m, n] = 1 where prompt n is answered right under mask m
    own    = mean over the skill's prompts of   right[nothing] - right[cluster]
    others = the same over the prompts of every other skill, mean over these skills
    random = the same over the skill's prompts with random masks in place of the cluster, mean over the masks

A cluster is `causal` where own - others and own - random both have a confidence interval above 0: losing it hurts its skill more than it hurts the others, and
more than losing as much of anything else. The bootstrap draws prompts again within each skill; a prompt keeps its answers under all masks, so differences are
paired (percentile intervals, Efron and Tibshirani 1993, chapter 13). Random masks are fixed: `random_drops` shows how much they differ among themselves.

A random mask has as many experts in each layer as the cluster, and about their mass. It shares none with the cluster where that is possible: a mask that
overlaps a cluster hurts in the same way, and makes the test harder to pass. How well masks match is part of the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import comb

import numpy as np

from megatron_ext.earl.causal_effect import CausalEffect, Verdict
from megatron_ext.earl.clusters import ExpertClusters

Pairs = tuple[tuple[int, int], ...]

TOLERANCE = 0.2
"""A set of experts has the mass of another within this share of it."""
FEWEST = 3
"""A layer has at least so many sets to draw from: where fewer have the mass, those that come closest."""
LEVEL, RESAMPLES = 0.95, 2000
_ENUMERATED, _DRAWN = 20_000, 500


@dataclass(frozen=True)
class Arm:
    """A mask, and the skill whose prompts are answered under it; empty: the prompts of all skills."""

    pairs: Pairs
    skill: str = ""


@dataclass(frozen=True)
class Trial:
    """The arms of one skill: its cluster masked, and random experts masked."""

    skill: str
    cluster: Arm
    random: tuple[Arm, ...]


def trials_of(clusters: ExpertClusters, num_masks: int, seed: int) -> tuple[Trial, ...]:
    """One for every skill that has a cluster. The same clusters and seed give the same masks."""
    rng = np.random.default_rng(seed)
    trials = []
    for index, found in enumerate(clusters.skills):
        if pairs := clusters.pairs(found.skill):
            masks = matched_masks(pairs, clusters.mean_mass_XLE[index], num_masks, rng)
            trials.append(Trial(found.skill, Arm(pairs), tuple(Arm(mask, found.skill) for mask in masks)))
    return tuple(trials)


def matched_masks(pairs: Pairs, mass_LE: np.ndarray, count: int, rng: np.random.Generator) -> list[Pairs]:
    """At most `count` different masks like `pairs`: in each layer as many experts and about as much of the mass, disjoint from them where such a set exists."""
    layers = sorted({layer for layer, _ in pairs})
    like = {layer: _sets_like(tuple(expert for of, expert in pairs if of == layer), mass_LE[layer], rng) for layer in layers}
    masks: dict[Pairs, None] = {}
    for _ in range(20 * count):
        masks[tuple((layer, expert) for layer in layers for expert in like[layer][rng.integers(len(like[layer]))])] = None
        if len(masks) == count:
            break
    return list(masks)


def _sets_like(members: tuple[int, ...], mass_E: np.ndarray, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Sets of experts to draw from, in place of `members`."""
    target = float(mass_E[list(members)].sum())
    everyone = range(len(mass_E))
    found: dict[tuple[int, ...], float] = {}
    for allowed in ([expert for expert in everyone if expert not in members], list(everyone)):
        found |= {chosen: abs(float(mass_E[list(chosen)].sum()) - target) for chosen in _sets(allowed, len(members), mass_E, target, rng) if chosen != members}
        near = [chosen for chosen, distance in found.items() if distance <= TOLERANCE * target]
        if len(near) >= FEWEST:
            return near
    return sorted(found, key=lambda chosen: (found[chosen], chosen))[:FEWEST]


def _sets(experts: Sequence[int], size: int, mass_E: np.ndarray, target: float, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Every set of this size; where there are too many, some: all but one of their members drawn by mass, the last such that the target is met."""
    if len(experts) < size:
        return []
    if comb(len(experts), size) <= _ENUMERATED:
        return list(combinations(experts, size))
    chance_E = mass_E[experts] + 1e-6
    drawn = set()
    for _ in range(_DRAWN):
        most = rng.choice(experts, size - 1, replace=False, p=chance_E / chance_E.sum())
        missing_E = np.abs(mass_E[experts] + mass_E[most].sum() - target)
        missing_E[np.isin(experts, most)] = np.inf
        drawn.add(tuple(sorted([*most.tolist(), experts[int(missing_E.argmin())]])))
    return sorted(drawn)


def causal_effect(
    trial: Trial, own_AN: np.ndarray, others: Sequence[tuple[np.ndarray, np.ndarray]], mass_LE: np.ndarray, rng: np.random.Generator
) -> CausalEffect:
    """`own_AN`, bool: the skill's prompts answered with nothing masked, with its cluster masked, then under each random mask. `others`: of every other skill
    its prompts answered with nothing masked, and with this cluster masked. `mass_LE`: of the skill's answers."""
    plain_N, masked_N, random_RN = own_AN[0].astype(float), own_AN[1].astype(float), own_AN[2:].astype(float)
    drop_N, beyond_N = plain_N - masked_N, random_RN.mean(axis=0) - masked_N
    drops_of_others = [before.astype(float) - after.astype(float) for before, after in others]
    own_B = _resampled_means(drop_N, rng)
    others_B = np.mean([_resampled_means(drop, rng) for drop in drops_of_others], axis=0)
    beyond_others, beyond_random = _interval(own_B - others_B), _interval(_resampled_means(beyond_N, rng))
    own, other = float(drop_N.mean()), float(np.mean([drop.mean() for drop in drops_of_others]))
    random_drops = tuple(float(drop) for drop in plain_N.mean() - random_RN.mean(axis=1))
    verdict, reason = _verdict(float(plain_N.mean()), own, other, float(np.mean(random_drops)), beyond_others, beyond_random)
    return CausalEffect(
        num_prompts=len(plain_N),
        accuracy=float(plain_N.mean()),
        drop_own=own,
        drop_others=other,
        drop_random=float(np.mean(random_drops)),
        random_drops=random_drops,
        beyond_others=beyond_others,
        beyond_random=beyond_random,
        cluster_mass=_mass(trial.cluster.pairs, mass_LE),
        random_mass=float(np.mean([_mass(arm.pairs, mass_LE) for arm in trial.random])),
        random_overlap=float(np.mean([len({*arm.pairs} & {*trial.cluster.pairs}) / len(arm.pairs) for arm in trial.random])),
        verdict=verdict,
        reason=reason,
    )


def judged(clusters: ExpertClusters, effects: Mapping[str, CausalEffect], enforce: bool) -> ExpertClusters:
    """The clusters with what was found of them. `enforce`: one that is not causal, or could not be tried, gets no bonus."""
    untried = "there was no prompt to show that it matters"
    skills = []
    for found in clusters.skills:
        effect = effects.get(found.skill)
        found = replace(found, causal=effect)
        if enforce and found.status == "ok" and (effect is None or effect.verdict != "causal"):
            found = replace(found, status="correlational", reason=untried if effect is None else effect.reason)
        skills.append(found)
    return replace(clusters, skills=tuple(skills))


def _verdict(
    accuracy: float, own: float, others: float, random: float, beyond_others: tuple[float, float], beyond_random: tuple[float, float]
) -> tuple[Verdict, str]:
    cost = f"masking it costs {own:.2f} of {accuracy:.2f}, the other skills {others:.2f}, and random experts in its place cost {random:.2f}"
    lacking = [
        f"than {what} (95 % interval {low:+.2f} to {high:+.2f})"
        for what, (low, high) in (("the others", beyond_others), ("random experts", beyond_random))
        if low <= 0
    ]
    if lacking:
        return "correlational", f"{cost}: not surely more {' nor '.join(lacking)}"
    return "causal", f"{cost}: surely more than either"


def _resampled_means(values_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[B]"""
    return np.asarray(values_N[rng.integers(len(values_N), size=(RESAMPLES, len(values_N)))].mean(axis=1))


def _interval(values_B: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _mass(pairs: Pairs, mass_LE: np.ndarray) -> float:
    return float(sum(mass_LE[layer, expert] for layer, expert in pairs)) / len({layer for layer, _ in pairs})
