"""What paired runs say about a difference: its size, its uncertainty, and tests of no difference at all.

The data of a hypothesis are paired twice: every seed has been run in both arms, and every run has answered the same prompts. With S seeds and P prompts of X
skills, D[s, p] is what the arm scored on prompt p minus what the other arm did.

    d_s        = mean over skills of the mean over their prompts of D[s, p]          a seed's difference
    delta      = mean over seeds of d_s
    v_seeds    = var(d_s) / S                                                        what seeds scatter, S - 1 degrees of freedom
    v_prompts  = mean over skills of var over prompts of mean over seeds of D / P    what prompts scatter, P - X degrees of freedom
    v_rest     = of what neither explains, which both of them hold
    reach(c)^2 = max(t_{S-1}(c)^2 v_seeds + t_{P-X}(c)^2 max(v_prompts - v_rest, 0), t_{P-X}(c)^2 v_prompts)
    interval   = delta -+ reach(confidence)            p = 1 - the confidence at which the interval touches 0

Crossed random effects (Cornfield and Tukey 1956), each with the quantile of its own degrees of freedom (Cochran 1964): it never falls below its level,
however the scatter is shared out, and reaches it where seeds dominate. Seeds alone would speak of these prompts only, prompts alone of these seeds only. A
bootstrap of five seeds does not hold its level, nor do Satterthwaite's degrees of freedom at the small levels of corrected tests: docs/studies/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.special import stdtrit

MOST_ENUMERATED = 12
"""Seeds of which all 2^S signs are tried; beyond, RANDOM_FLIPS of them."""
RANDOM_FLIPS = 20000
_CHUNK, _HALVINGS = 500, 60
Numbers = float | np.ndarray


@dataclass(frozen=True)
class Effect:
    """A difference in units of the endpoint. `seeds_S`: d_s; `prompts`: P - X. With fewer than two seeds nothing is known of its uncertainty."""

    difference: float
    seeds_S: tuple[float, ...]
    prompts: int
    v_seeds: float
    v_prompts: float
    v_rest: float

    def interval(self, confidence: float) -> tuple[float, float]:
        """Two-sided."""
        far = self._reach(1 - confidence)
        return self.difference - far, self.difference + far

    @property
    def p(self) -> float:
        """Of no difference, two-sided; at least 1e-100, beyond which the quantiles of Student's t are no numbers."""
        if not self.difference or len(self.seeds_S) < 2:
            return 1.0
        low, high = -100.0, 0.0  # of its logarithm to the base 10
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if self._reach(10**middle) < abs(self.difference) else (middle, high)
        return float(10**high)

    def _reach(self, alpha: float) -> float:
        seeds = len(self.seeds_S)
        return float(reach(alpha, seeds, self.prompts, self.v_seeds, self.v_prompts, self.v_rest)) if seeds > 1 else math.inf


def reach(alpha: float, seeds: int, prompts: int, v_seeds: Numbers, v_prompts: Numbers, v_rest: Numbers) -> Numbers:
    """How far the interval at confidence 1 - alpha goes on either side, for single numbers or arrays of them. `prompts`: P - X."""
    of_seeds, of_prompts = stdtrit(seeds - 1, alpha / 2) ** 2, stdtrit(prompts, alpha / 2) ** 2
    return np.sqrt(np.maximum(of_seeds * v_seeds + of_prompts * np.maximum(v_prompts - v_rest, 0.0), of_prompts * v_prompts))


def effect(difference_SP: np.ndarray, skill_P: Sequence[str]) -> Effect:
    """The effect in float64 differences [S, P] of prompts whose skills are `skill_P`."""
    parts = [difference_SP[:, members] for members in members_of(skill_P)]
    seeds, left = len(difference_SP), max(difference_SP.shape[1] - len(parts), 1)
    seeds_S = np.mean([part.mean(axis=1) for part in parts], axis=0)
    v_seeds = float(seeds_S.var(ddof=1)) / seeds if seeds > 1 else math.inf
    v_prompts = sum(_v_prompts(part) for part in parts) / len(parts) ** 2
    v_rest = sum(_v_rest(part) for part in parts) / len(parts) ** 2
    return Effect(float(seeds_S.mean()), tuple(seeds_S.tolist()), left, v_seeds, v_prompts, v_rest)


def bootstrap(difference_SP: np.ndarray, skill_P: Sequence[str], confidence: float, resamples: int, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the hierarchical paired bootstrap: seeds are drawn anew, and within every skill prompts, the same ones for all seeds, because all
    seeds answered the same (the pigeonhole bootstrap, Owen 2007, arXiv 0712.1111)."""
    rng, seeds = np.random.default_rng(seed), len(difference_SP)
    parts = [difference_SP[:, members] for members in members_of(skill_P)]
    found: list[np.ndarray] = []
    for start in range(0, resamples, _CHUNK):
        count = min(_CHUNK, resamples - start)
        weights_BS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), count) / seeds
        means_BS = np.zeros((count, seeds))
        for part in parts:
            prompts = part.shape[1]
            means_BS += rng.multinomial(prompts, np.full(prompts, 1 / prompts), count) / prompts @ part.T
        found.append((weights_BS * means_BS).sum(axis=1) / len(parts))
    low, high = np.quantile(np.concatenate(found), [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def sign_flip_p(seeds_S: Sequence[float], seed: int = 0) -> float:
    """Two-sided p of no difference, of nothing but that each seed's difference is as likely to have the other sign: the share of the 2^S signs, tried one by
    one up to MOST_ENUMERATED seeds, under which the mean is at least as far from 0.

    >>> sign_flip_p([0.1, 0.2, 0.3])
    0.25
    """
    differences_S = np.asarray(seeds_S, dtype=float)
    bound = abs(differences_S.sum()) * (1 - 1e-12)
    if len(differences_S) <= MOST_ENUMERATED:
        flips = np.array(list(product((1.0, -1.0), repeat=len(differences_S))))
        return float(np.mean(np.abs(flips @ differences_S) >= bound))
    flips = np.random.default_rng(seed).choice((-1.0, 1.0), (RANDOM_FLIPS, len(differences_S)))
    return float((1 + np.sum(np.abs(flips @ differences_S) >= bound)) / (1 + RANDOM_FLIPS))


def least_sign_flip_p(seeds: int) -> float:
    """What `sign_flip_p` cannot go below, whatever the differences: 1/16 with five seeds."""
    return 2.0 ** (1 - seeds) if 0 < seeds <= MOST_ENUMERATED else 1 / (1 + RANDOM_FLIPS) if seeds else 1.0


def holm(values: Sequence[float]) -> list[float]:
    """P-values adjusted over their family (Holm 1979): those at most alpha may be rejected together, with a chance of at most alpha that any is so wrongly.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, at in enumerate(sorted(range(len(values)), key=lambda at: values[at])):
        highest = max(highest, min(1.0, (len(values) - rank) * values[at]))
        adjusted[at] = highest
    return adjusted


def members_of(skill_P: Sequence[str]) -> list[list[int]]:
    """The places of every skill's prompts."""
    return [[at for at, skill in enumerate(skill_P) if skill == name] for name in dict.fromkeys(skill_P)]


def _v_prompts(part_SP: np.ndarray) -> float:
    prompts = part_SP.shape[1]
    return float(part_SP.mean(axis=0).var(ddof=1)) / prompts if prompts > 1 else 0.0


def _v_rest(part_SP: np.ndarray) -> float:
    seeds, prompts = part_SP.shape
    if seeds < 2 or prompts < 2:
        return 0.0
    rest_SP = part_SP - part_SP.mean(axis=0) - part_SP.mean(axis=1, keepdims=True) + part_SP.mean()
    return float((rest_SP**2).sum()) / ((seeds - 1) * (prompts - 1)) / (seeds * prompts)
