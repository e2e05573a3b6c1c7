"""One selection of clusters from one sample of prompts, and the same selection on many resamples: what is not selected again and again is noise.

keep pairs with  z above the critical value,  risk difference >= min,  lift >= min,  not in the standing committee      `select`: on every resample
-> per layer at most k of them, by risk difference                                                                  `within_budget`: once, at the end
-> at most max_layers layers, by the AUROC of the prompts' mass in them

The numbers of experts and layers are a budget and no finding: which of many equally good experts fit in it is left out of the question of stability.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_ext.config.schema import DiscoverConfig
from megatron_ext.earl.statistics import Effects, auroc, effects

NUM_SPLITS = 20
_TIE = 1 + 1e-6


@dataclass(frozen=True, eq=False)
class Sample:
    """Prompts with integer labels. `mass` is what the router did; `contrast` is what is compared between skills: the mass, or the mass minus token control."""

    mass_NLE: np.ndarray
    contrast_NLE: np.ndarray
    label_N: np.ndarray
    stratum_N: np.ndarray
    num_skills: int

    def take(self, rows: np.ndarray) -> Sample:
        mass_NLE = self.mass_NLE[rows]
        contrast_NLE = mass_NLE if self.contrast_NLE is self.mass_NLE else self.contrast_NLE[rows]
        return Sample(mass_NLE, contrast_NLE, self.label_N[rows], self.stratum_N[rows], self.num_skills)

    def effects(self) -> Effects:
        """Risk difference and z of the contrast; mean mass and lift of the mass itself."""
        compared = effects(self.contrast_NLE, self.label_N, self.stratum_N, self.num_skills)
        if self.contrast_NLE is self.mass_NLE:
            return compared
        plain = effects(self.mass_NLE, self.label_N, self.stratum_N, self.num_skills)
        return Effects(plain.mean_mass_XLE, compared.risk_difference_XLE, plain.lift_XLE, compared.z_XLE)


def standing_committee(mean_mass_XLE: np.ndarray, top: int) -> np.ndarray:
    """bool [L, E]: experts among the `top` largest of EVERY skill in their layer (ties broken by the lower id)."""
    if top == 0:
        return np.zeros(mean_mass_XLE.shape[1:], dtype=bool)
    rank_XLE = np.argsort(np.argsort(-mean_mass_XLE, axis=2, kind="stable"), axis=2, kind="stable")
    return np.asarray((rank_XLE < top).all(axis=0))


def select(found: Effects, critical: float, config: DiscoverConfig) -> np.ndarray:
    """bool [X, L, E]: the clusters that these effects show."""
    committee_LE = standing_committee(found.mean_mass_XLE, config.committee_top)
    eligible_XLE = (found.z_XLE > critical * _TIE) & (found.risk_difference_XLE >= config.min_risk_difference) & (found.lift_XLE >= config.min_lift)
    return np.asarray(eligible_XLE & ~committee_LE)


def within_budget(chosen_LE: np.ndarray, sample: Sample, found: Effects, skill: int, config: DiscoverConfig) -> np.ndarray:
    """bool [L, E]: the chosen experts with the largest risk difference of each layer, in the layers whose mass on them tells the skill's prompts apart best."""
    order_LE = np.argsort(np.where(chosen_LE, -found.risk_difference_XLE[skill], np.inf), axis=1, kind="stable")
    rank_LE = np.argsort(order_LE, axis=1, kind="stable")
    chosen_LE = chosen_LE & (rank_LE < config.experts_per_layer)
    layers = np.flatnonzero(chosen_LE.any(axis=1))
    mass_NL = np.einsum("nle,le->nl", sample.mass_NLE[:, layers], chosen_LE[layers].astype(np.float64))
    scores = np.array([auroc(mass_NL[:, index], sample.label_N == skill) for index in range(len(layers))])
    kept_LE = np.zeros_like(chosen_LE)
    kept = layers[np.argsort(-scores, kind="stable")[: config.max_layers]]
    kept_LE[kept] = chosen_LE[kept]
    return kept_LE


def split_half_jaccard(sample: Sample, critical: float, config: DiscoverConfig, rng: np.random.Generator) -> np.ndarray:
    """[X]: mean over random halvings of |A and B| / |A or B|, with A and B the clusters of the two halves (0 where both are empty).

    The same effect gives a z smaller by sqrt(2) on half the prompts, so the critical value is smaller by as much.
    """
    jaccard_X = np.zeros(sample.num_skills)
    for _ in range(NUM_SPLITS):
        first = np.concatenate([rng.permutation(rows)[: (len(rows) + int(rng.integers(2))) // 2] for rows in _cells(sample)])
        second = np.setdiff1d(np.arange(len(sample.label_N)), first)
        left, right = (_resampled(sample, rows, critical / np.sqrt(2), config).reshape(sample.num_skills, -1) for rows in (first, second))
        either = (left | right).sum(axis=1)
        jaccard_X += np.where(either > 0, (left & right).sum(axis=1) / np.maximum(either, 1), 0.0)
    return jaccard_X / NUM_SPLITS


def bootstrap_frequency(
    sample: Sample, critical: float, config: DiscoverConfig, rng: np.random.Generator, poll: Callable[[], None] = lambda: None
) -> np.ndarray:
    """[X, L, E]: how often a pair is selected when prompts are drawn again with replacement, within skill and template. `poll`, called each time, may raise."""
    total = np.zeros((sample.num_skills, *sample.mass_NLE.shape[1:]))
    for _ in range(config.bootstraps):
        poll()
        total += _resampled(sample, np.concatenate([rng.choice(rows, len(rows)) for rows in _cells(sample)]), critical, config)
    return total / config.bootstraps


def transfer_auroc(sample: Sample, critical: float, config: DiscoverConfig) -> list[float | None]:
    """Per skill: the AUROC of the cluster's mass on one template when the cluster was selected on the others; the mean over templates that can be left out.

    None where no template can: leaving it out must leave the skill and other prompts on both sides. A cluster that is not found again scores 0.5.
    """
    scores: list[list[float]] = [[] for _ in range(sample.num_skills)]
    for stratum in range(int(sample.stratum_N.max()) + 1):
        held = sample.stratum_N == stratum
        inside, outside = (np.bincount(sample.label_N[side], minlength=sample.num_skills) for side in (held, ~held))
        if (outside == 0).any():
            continue
        chosen_XLE = _resampled(sample, np.flatnonzero(~held), critical * float(np.sqrt(np.mean(~held))), config)
        for skill in np.flatnonzero((inside > 0) & (inside < held.sum())):
            mass_N = (sample.mass_NLE[held] * chosen_XLE[skill]).sum(axis=(1, 2))
            scores[skill].append(auroc(mass_N, sample.label_N[held] == skill))
    return [float(np.mean(values)) if values else None for values in scores]


def _resampled(sample: Sample, rows: np.ndarray, critical: float, config: DiscoverConfig) -> np.ndarray:
    return select(sample.take(np.sort(rows)).effects(), critical, config)


def _cells(sample: Sample) -> list[np.ndarray]:
    """The prompts of each (skill, template), in order of first appearance: names play no part, so renaming a skill changes nothing."""
    cells: dict[tuple[int, int], list[int]] = {}
    for row, key in enumerate(zip(sample.label_N.tolist(), sample.stratum_N.tolist(), strict=True)):
        cells.setdefault(key, []).append(row)
    return [np.array(rows) for rows in cells.values()]
