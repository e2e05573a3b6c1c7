"""Do the prompts of a skill use an expert more than other prompts do? Effect sizes, and a test whose unit is the PROMPT.

Tokens of one answer are not independent, so tests over tokens find differences where there are none. Here prompt n is one observation: `mass_NLE[n, l, e]`
is the mean gate mass that its span gave expert e in layer l (it sums to 1 over e). Significance comes from permuting the skill labels of prompts
within strata (templates): what a template explains is never credited to a skill.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np

_CHUNK_BYTES = 1 << 26
_TIE = 1e-6
"""Permutations are computed in float32: a |z| that comes so close to another is taken to reach it."""


@dataclass(frozen=True, eq=False)
class Effects:
    """Per skill x, layer l, expert e:

    `risk_difference` = mean mass of the skill's prompts - mean mass of all other prompts;
    `lift` = mean mass of the skill's prompts / mean mass of all prompts (0 where no prompt uses the expert);
    `z` = (T - E[T]) / sd[T] for T = the summed mass of the skill's prompts, with the exact mean and deviation of T under permutation within strata
    (0 where permutation cannot change T).
    """

    mean_mass_XLE: np.ndarray
    risk_difference_XLE: np.ndarray
    lift_XLE: np.ndarray
    z_XLE: np.ndarray

    @staticmethod
    def joined(blocks: Sequence[Effects]) -> Effects:
        """Of all layers, from those of blocks of layers."""
        names = [field.name for field in fields(Effects)]
        return Effects(*(np.concatenate([getattr(block, name) for block in blocks], axis=1) for name in names))


def effects(mass_NLE: np.ndarray, label_N: np.ndarray, stratum_N: np.ndarray, num_skills: int) -> Effects:
    """The effects of every skill. `label_N` and `stratum_N` are integers from 0. A skill without prompts has mean mass 0."""
    num_prompts, num_layers, num_experts = mass_NLE.shape
    flat = mass_NLE.reshape(num_prompts, -1)
    member_XN = _one_hot(label_N, num_skills)
    count_X1 = member_XN.sum(axis=1, keepdims=True)
    sum_XC = member_XN @ flat
    mean_XC, rest_XC = sum_XC / np.maximum(count_X1, 1), (flat.sum(axis=0) - sum_XC) / np.maximum(num_prompts - count_X1, 1)
    overall_C = flat.mean(axis=0)
    lift_XC = np.divide(mean_XC, overall_C, out=np.zeros_like(mean_XC), where=overall_C > 0)
    centred_NC, inverse_sd_XC = _permutation_moments(flat, label_N, stratum_N, num_skills)
    z_XC = (member_XN @ centred_NC) * inverse_sd_XC
    shape = (num_skills, num_layers, num_experts)
    return Effects(mean_XC.reshape(shape), (mean_XC - rest_XC).reshape(shape), lift_XC.reshape(shape), z_XC.reshape(shape))


def permuted_labels(label_N: np.ndarray, stratum_N: np.ndarray, num_permutations: int, rng: np.random.Generator) -> np.ndarray:
    """[R, N]: labels permuted R times, each within its stratum only; in the smallest type that holds them."""
    label_N = label_N.astype(np.min_scalar_type(int(label_N.max())))
    permuted_RN = np.empty((num_permutations, len(label_N)), dtype=label_N.dtype)
    for stratum in range(int(stratum_N.max()) + 1):
        where = np.flatnonzero(stratum_N == stratum)
        permuted_RN[:, where] = rng.permuted(np.broadcast_to(label_N[where], (num_permutations, len(where))), axis=1)
    return permuted_RN


@dataclass(frozen=True, eq=False)
class Null:
    """What permuted labels show. `largest_R`: the largest |z| over all skills, layers and experts in each permutation; `reached_XLE`: in how many permutations
    a pair's |z| reached what it was asked for."""

    largest_R: np.ndarray
    reached_XLE: np.ndarray

    @staticmethod
    def joined(blocks: Sequence[Null]) -> Null:
        """Of all layers, from those of blocks of layers."""
        return Null(np.max([block.largest_R for block in blocks], axis=0), np.concatenate([block.reached_XLE for block in blocks], axis=1))


def permutation_null(
    mass_NLE: np.ndarray, permuted_RN: np.ndarray, stratum_N: np.ndarray, asked_XLE: np.ndarray, poll: Callable[[], None] = lambda: None
) -> Null:
    """The null of these layers, counting for each pair how often |z| reaches `asked_XLE`. `poll` is called now and then, and may raise."""
    num_skills, flat = len(asked_XLE), mass_NLE.reshape(len(mass_NLE), -1)
    centred_NC, inverse_sd_XC = _permutation_moments(flat, permuted_RN[0], stratum_N, num_skills)
    centred_NC, inverse_sd_XC = centred_NC.astype(np.float32), inverse_sd_XC.astype(np.float32)
    asked_XC = (np.abs(asked_XLE) * (1 - _TIE)).reshape(num_skills, -1).astype(np.float32)
    chunk = max(1, _CHUNK_BYTES // (4 * num_skills * max(flat.shape)))
    largest, reached_XC = [], np.zeros(asked_XC.shape, dtype=np.int64)
    for first in range(0, len(permuted_RN), chunk):
        poll()
        member_RXN = (permuted_RN[first : first + chunk, None, :] == np.arange(num_skills)[None, :, None]).astype(np.float32)
        z = (member_RXN.reshape(-1, member_RXN.shape[-1]) @ centred_NC).reshape(len(member_RXN), num_skills, -1)
        z *= inverse_sd_XC
        np.abs(z, out=z)
        largest.append(z.max(axis=(1, 2)))
        reached_XC += (z >= asked_XC).sum(axis=0)
    return Null(np.concatenate(largest).astype(np.float64), reached_XC.reshape(asked_XLE.shape))


def max_z_null(mass_NLE: np.ndarray, permuted_RN: np.ndarray, stratum_N: np.ndarray, num_skills: int) -> np.ndarray:
    """[R]: the largest |z| of each permutation. Comparing every |z| with it controls the family-wise error rate (Westfall, Young 1993)."""
    return permutation_null(mass_NLE, permuted_RN, stratum_N, np.zeros((num_skills, *mass_NLE.shape[1:]))).largest_R


def family_wise_p(z: np.ndarray, null_R: np.ndarray) -> np.ndarray:
    """p = (1 + #{permutations whose largest |z| reaches this |z|}) / (1 + R), for every entry of `z`."""
    ordered = np.sort(null_R)
    reached = len(ordered) - np.searchsorted(ordered, np.abs(z) * (1 - _TIE), side="left")
    return np.asarray((1 + reached) / (1 + len(ordered)))


def critical_z(null_R: np.ndarray, fwer: float) -> float:
    """The |z| above which `family_wise_p` is at most `fwer`; infinite where there are too few permutations to say so."""
    allowed = int(np.floor(fwer * (1 + len(null_R)) + 1e-9)) - 1
    return float(np.sort(null_R)[len(null_R) - 1 - allowed]) if 0 <= allowed < len(null_R) else float("inf")


def false_discovery_p(p: np.ndarray) -> np.ndarray:
    """p adjusted so that taking what is at most q keeps the expected share of false discoveries at q (Benjamini, Hochberg 1995; for independent tests and
    those that depend on each other positively): of the m p in ascending order, q_i = min over j >= i of m p_j / j."""
    ascending = np.argsort(p, axis=None)
    steps = np.minimum.accumulate((p.flat[ascending] * p.size / np.arange(1, p.size + 1))[::-1])[::-1]
    adjusted = np.empty(p.size)
    adjusted[ascending] = np.minimum(steps, 1.0)
    return adjusted.reshape(p.shape)


def information(mass_NLE: np.ndarray, label_N: np.ndarray, num_skills: int) -> np.ndarray:
    """[L]: mutual information I(skill; expert) in bits, skills equally likely: sum_x 1/X sum_e p(e|x) log2(p(e|x) / p(e))."""
    return _information(mass_NLE, label_N[None], num_skills)[0]


def _information(mass_NLE: np.ndarray, label_RN: np.ndarray, num_skills: int) -> np.ndarray:
    """[R, L]: `information` by each row of labels."""
    member_RXN = np.asarray(label_RN[:, None, :] == np.arange(num_skills)[:, None], dtype=np.float64)
    summed_RXC = (member_RXN.reshape(-1, len(mass_NLE)) @ mass_NLE.reshape(len(mass_NLE), -1)).reshape(*member_RXN.shape[:2], -1)
    given_RXLE = (summed_RXC / member_RXN.sum(axis=2, keepdims=True)).reshape(*member_RXN.shape[:2], *mass_NLE.shape[1:])
    ratio = np.divide(given_RXLE, given_RXLE.mean(axis=1, keepdims=True), out=np.ones_like(given_RXLE), where=given_RXLE > 0)
    return np.asarray((given_RXLE * np.log2(ratio)).sum(axis=3).mean(axis=1))


def excess_information(mass_NLE: np.ndarray, label_N: np.ndarray, permuted_RN: np.ndarray, num_skills: int) -> np.ndarray:
    """[L]: `information` minus its mean over permuted labels: what finite samples alone would show is taken off."""
    at_once = 1 if mass_NLE.nbytes < _CHUNK_BYTES else 10  # masses that fit no cache are read for several permutations together
    chance = [_information(mass_NLE, permuted_RN[first : first + at_once], num_skills) for first in range(0, len(permuted_RN), at_once)]
    return np.asarray(information(mass_NLE, label_N, num_skills) - np.mean(np.concatenate(chance), axis=0))


def auroc(score_N: np.ndarray, positive_N: np.ndarray) -> float:
    """The chance that a positive scores above a negative, ties counting half. 0.5 where either class is empty."""
    positives, negatives = score_N[positive_N], np.sort(score_N[~positive_N])
    if len(positives) == 0 or len(negatives) == 0:
        return 0.5
    below = np.searchsorted(negatives, positives, side="left") + np.searchsorted(negatives, positives, side="right")
    return float(below.mean() / (2 * len(negatives)))


def _one_hot(label_N: np.ndarray, num_skills: int) -> np.ndarray:
    return np.asarray(label_N[None, :] == np.arange(num_skills)[:, None], dtype=np.float64)


def _permutation_moments(flat_NC: np.ndarray, label_N: np.ndarray, stratum_N: np.ndarray, num_skills: int) -> tuple[np.ndarray, np.ndarray]:
    """The mass centred within strata, and 1 / sd of its sum over a skill's prompts under permutation within strata.

    Drawing k of n values without replacement, their sum has the variance k (n - k) / n * s^2, with s^2 the sample variance of the n; strata are independent.
    """
    centred_NC = np.zeros(flat_NC.shape)
    variance_XC = np.zeros((num_skills, flat_NC.shape[1]))
    for stratum in range(int(stratum_N.max()) + 1):
        where = stratum_N == stratum
        values = flat_NC[where]
        total = len(values)
        if total > 1:
            centred_NC[where] = values - values.mean(axis=0)
            drawn_X = np.bincount(label_N[where], minlength=num_skills)
            variance_XC += (drawn_X * (total - drawn_X) / total)[:, None] * values.var(axis=0, ddof=1)
    sd_XC = np.sqrt(variance_XC)
    return centred_NC, np.divide(1.0, sd_XC, out=np.zeros_like(sd_XC), where=sd_XC > 1e-9)


def cluster_mass(mass_NLE: np.ndarray, chosen_LE: np.ndarray) -> np.ndarray:
    """[N]: the share of gate mass that went to the chosen experts, averaged over the layers that have one (0 without any)."""
    num_layers = int(chosen_LE.any(axis=1).sum())
    return np.asarray(np.einsum("nle,le->n", mass_NLE, chosen_LE.astype(np.float64)) / max(num_layers, 1))


def sigma_from(mass_N: np.ndarray, floor: float = 0.01) -> float:
    """sigma of a skill: the standard deviation (n - 1) of cluster mass over correct answers of the fine-tuned model, never below `floor`.

    A floor, because a model that always uses the cluster alike would turn noise of the last digit into a full bonus. Fewer than two answers say nothing
    about spread: infinity, which makes every bonus 0.
    """
    mass_N = np.asarray(mass_N, dtype=np.float64)
    return max(float(mass_N.std(ddof=1)), floor) if len(mass_N) >= 2 else float("inf")
