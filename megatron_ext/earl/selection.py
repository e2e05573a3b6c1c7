"""Which pairs of layer and expert are a skill's: significant, strong enough, and not everybody's.

    keep pairs that are significant, risk difference >= min, lift >= min, not in the standing committee      `select`: also on every resample
    -> with a cluster method other than topm, those in a community of the skill                              communities.py
    -> per layer at most k of them, by risk difference                                                       `trimmed`: once, at the end
    -> at most max_layers layers, by the AUROC of the prompts' mass in them                                  `best_layers`

The numbers of experts and layers are a budget and no finding: which of many equally good experts fit in it is left out of the question of stability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ext.config.rl_schema import DiscoverConfig
from megatron_ext.earl.sample import Survey
from megatron_ext.earl.statistics import Effects, Null, auroc, critical_z, false_discovery_p, family_wise_p

_TIE = 1 + 1e-6


@dataclass(frozen=True, eq=False)
class Significance:
    """`p_XLE`: adjusted for all pairs by `discover.correction`. `critical`: the |z| that a pair must exceed, on resamples too; infinite where nothing is
    significant."""

    significant_XLE: np.ndarray
    p_XLE: np.ndarray
    critical: float


def significance(z_XLE: np.ndarray, null: Null, config: DiscoverConfig) -> Significance:
    """`fwer`: against the largest |z| of each permutation. `bh`: each pair's own permutation p, (1 + times reached) / (1 + R), adjusted over all pairs; its
    critical |z| is just below the smallest that this lets through."""
    if config.correction == "fwer":
        critical = critical_z(null.largest_R, config.fwer)
        return Significance(z_XLE > critical * _TIE, family_wise_p(z_XLE, null.largest_R), critical)
    p_XLE = false_discovery_p((1 + null.reached_XLE) / (1 + len(null.largest_R)))
    passed_XLE = p_XLE <= config.fwer
    critical = float(np.abs(z_XLE[passed_XLE]).min()) / _TIE**2 if passed_XLE.any() else float("inf")
    return Significance(passed_XLE & (z_XLE > 0), p_XLE, critical)


def standing_committee(mean_mass_XLE: np.ndarray, top: int) -> np.ndarray:
    """bool [..., L, E]: experts among the `top` largest of EVERY skill in their layer (ties broken by the lower id). More axes may stand in front."""
    if top == 0:
        return np.zeros((*mean_mass_XLE.shape[:-3], *mean_mass_XLE.shape[-2:]), dtype=bool)
    rank_XLE = np.argsort(np.argsort(-mean_mass_XLE, axis=-1, kind="stable"), axis=-1, kind="stable")
    return np.asarray((rank_XLE < top).all(axis=-3))


def select(found: Effects, significant_XLE: np.ndarray, config: DiscoverConfig) -> np.ndarray:
    """bool [..., X, L, E]: the pairs that these effects show. Effects of many resamples have an axis for them in front."""
    committee_LE = standing_committee(found.mean_mass_XLE, config.committee_top)
    strong_XLE = (found.risk_difference_XLE >= config.min_risk_difference) & (found.lift_XLE >= config.min_lift)
    return np.asarray(significant_XLE & strong_XLE & ~np.expand_dims(committee_LE, -3))


def exceeds(z_XLE: np.ndarray, critical: float | np.ndarray) -> np.ndarray:
    """Whether z is above the critical value, and by more than rounding."""
    return np.asarray(z_XLE > critical * _TIE)


def trimmed(chosen_LE: np.ndarray, risk_difference_LE: np.ndarray, config: DiscoverConfig) -> np.ndarray:
    """bool [L, E]: the chosen experts with the largest risk difference of each layer."""
    order_LE = np.argsort(np.where(chosen_LE, -risk_difference_LE, np.inf), axis=1, kind="stable")
    rank_LE = np.argsort(order_LE, axis=1, kind="stable")
    return np.asarray(chosen_LE & (rank_LE < config.experts_per_layer))


def best_layers(survey: Survey, wanted: Sequence[tuple[int, np.ndarray]], config: DiscoverConfig) -> list[np.ndarray]:
    """For each (skill, bool [L, E]): the same pairs in the layers whose mass on them tells the skill's prompts apart best."""
    scores = [np.full(survey.num_layers, -np.inf) for _ in wanted]
    for block in survey.blocks():
        for (skill, chosen_LE), score_L in zip(wanted, scores, strict=True):
            chosen_lE = chosen_LE[block.layers]
            layers = np.flatnonzero(chosen_lE.any(axis=1))
            mass_Nl = np.einsum("nle,le->nl", block.mass_NLE[:, layers], chosen_lE[layers].astype(np.float64))
            score_L[block.layers.start + layers] = [auroc(mass_Nl[:, index], survey.label_N == skill) for index in range(len(layers))]
    kept = []
    for (_, chosen_LE), score_L in zip(wanted, scores, strict=True):
        layers = np.flatnonzero(chosen_LE.any(axis=1))
        best = layers[np.argsort(-score_L[layers], kind="stable")[: config.max_layers]]
        kept_LE = np.zeros_like(chosen_LE)
        kept_LE[best] = chosen_LE[best]
        kept.append(kept_LE)
    return kept
