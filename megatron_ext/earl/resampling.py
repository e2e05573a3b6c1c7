"""The same selection on many resamples of the prompts: what is not selected again and again is noise.

    halves of the prompts, bootstraps, all templates but one    -> how often each prompt is in each resample: [B, N] (`draw`)
    -> sums over the prompts of a (skill, template), a matrix product  -> effects -> selection: [B, X, L, E] (`selected_again`)
    -> Jaccard index of halves, frequency over bootstraps, AUROC on the template that was left out

B resamples, otherwise as in statistics.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_ext.config.rl_schema import DiscoverConfig
from megatron_ext.earl.sample import Sample, Survey
from megatron_ext.earl.selection import exceeds, select
from megatron_ext.earl.statistics import Effects, auroc

NUM_SPLITS = 20
_TABLE_BYTES = 1 << 25
"""Of a table of effects of the resamples that are computed at once."""


@dataclass(frozen=True, eq=False)
class Resamples:
    """`times_BN`: how often a resample has a prompt. First two halves of each split, one after the other, then bootstraps, then all but `templates[i]`.

    `critical_scale_B`: the same effect gives a z smaller by the root of the share of prompts that are there, so its critical value is smaller by as much.
    """

    times_BN: np.ndarray
    critical_scale_B: np.ndarray
    bootstraps: int
    templates: tuple[int, ...]

    @property
    def halves(self) -> slice:
        return slice(0, 2 * NUM_SPLITS)

    @property
    def drawn_again(self) -> slice:
        return slice(2 * NUM_SPLITS, 2 * NUM_SPLITS + self.bootstraps)

    @property
    def left_out(self) -> slice:
        return slice(2 * NUM_SPLITS + self.bootstraps, len(self.times_BN))


def draw(survey: Survey, bootstraps: int, rng: np.random.Generator) -> Resamples:
    """Halves and bootstraps within each (skill, template). A template can be left out if that leaves every skill some prompts."""
    cells, num_prompts = _cells(survey), survey.num_prompts
    templates = tuple(
        stratum
        for stratum in range(int(survey.stratum_N.max()) + 1)
        if (np.bincount(survey.label_N[survey.stratum_N != stratum], minlength=survey.num_skills) > 0).all()
    )
    times_BN = np.zeros((2 * NUM_SPLITS + bootstraps + len(templates), num_prompts), dtype=np.uint16)
    for split in range(NUM_SPLITS):
        first = np.concatenate([rng.permutation(rows)[: (len(rows) + int(rng.integers(2))) // 2] for rows in cells])
        times_BN[2 * split, first] = 1
        times_BN[2 * split + 1] = 1 - times_BN[2 * split]
    for index in range(2 * NUM_SPLITS, 2 * NUM_SPLITS + bootstraps):
        times_BN[index] = np.bincount(np.concatenate([rng.choice(rows, len(rows)) for rows in cells]), minlength=num_prompts)
    scales = np.concatenate([np.full(2 * NUM_SPLITS, 1 / np.sqrt(2)), np.ones(bootstraps + len(templates))])
    for index, stratum in enumerate(templates, 2 * NUM_SPLITS + bootstraps):
        times_BN[index] = survey.stratum_N != stratum
        scales[index] = np.sqrt(times_BN[index].mean())
    return Resamples(times_BN, scales, bootstraps, templates)


def selected_again(survey: Survey, resamples: Resamples, critical: float, config: DiscoverConfig, poll: Callable[[], None]) -> np.ndarray:
    """bool [B, X, L, E]: what each resample selects. `poll` is called now and then, and may raise."""
    parts = []
    for block in survey.blocks():
        chosen, at_once = [], max(1, _TABLE_BYTES // (8 * block.num_skills * block.mass_NLE[0].size))
        for first in range(0, len(resamples.times_BN), at_once):
            poll()
            few = slice(first, first + at_once)
            found = effects_of(block, resamples.times_BN[few])
            scale_B = resamples.critical_scale_B[few, None, None, None]
            chosen.append(select(found, exceeds(found.z_XLE, critical * scale_B), config))
        parts.append(np.concatenate(chosen))
    return np.concatenate(parts, axis=2)


def effects_of(sample: Sample, times_BN: np.ndarray) -> Effects:
    """`Sample.effects` of many resamples, [B, X, L, E] each: the same formulas, from each cell's sums over its prompts and the strata's sums of squares."""
    mass, contrast = (table.reshape(len(table), -1) for table in (sample.mass_NLE, sample.contrast_NLE))
    shape = (len(times_BN), sample.num_skills, contrast.shape[1])
    count_BX1, mass_BXC, contrast_BXC = np.zeros((*shape[:2], 1)), np.zeros(shape), np.zeros(shape)
    excess_BXC, variance_BXC = np.zeros(shape), np.zeros(shape)
    for stratum in range(int(sample.stratum_N.max()) + 1):
        rows = [np.flatnonzero((sample.label_N == skill) & (sample.stratum_N == stratum)) for skill in range(sample.num_skills)]
        centre_C = contrast[np.concatenate(rows)].mean(axis=0)
        sum_BXC, square_BC, count_BX = np.zeros(shape), np.zeros((shape[0], shape[2])), np.zeros(shape[:2])
        for x, mine in enumerate(rows):
            times_Bn, centred_nC = times_BN[:, mine].astype(np.float64), contrast[mine] - centre_C
            count_BX[:, x] = times_Bn.sum(axis=1)
            sum_BXC[:, x] = times_Bn @ centred_nC
            square_BC += times_Bn @ centred_nC**2
            if sample.controlled:
                mass_BXC[:, x] += times_Bn @ mass[mine]
        count_B1 = count_BX.sum(axis=1)[:, None]
        mean_BC = sum_BXC.sum(axis=1) / np.maximum(count_B1, 1)
        spread_BC = np.maximum(square_BC - count_B1 * mean_BC**2, 0.0) / np.maximum(count_B1 - 1, 1)
        drawn_BX1 = (count_BX * (count_B1 - count_BX) / np.maximum(count_B1, 1))[:, :, None]
        excess_BXC += np.where(count_B1[:, :, None] > 1, sum_BXC - count_BX[:, :, None] * mean_BC[:, None], 0.0)
        variance_BXC += np.where(count_B1[:, :, None] > 1, drawn_BX1 * spread_BC[:, None], 0.0)
        contrast_BXC += sum_BXC + count_BX[:, :, None] * centre_C
        count_BX1 += count_BX[:, :, None]
    return _effects(count_BX1, mass_BXC if sample.controlled else contrast_BXC, contrast_BXC, excess_BXC, variance_BXC, sample.mass_NLE.shape[1:])


def _effects(
    count_BX1: np.ndarray, mass_BXC: np.ndarray, contrast_BXC: np.ndarray, excess_BXC: np.ndarray, variance_BXC: np.ndarray, layers_experts: tuple[int, ...]
) -> Effects:
    total_B11 = count_BX1.sum(axis=1, keepdims=True)
    mean_BXC = mass_BXC / np.maximum(count_BX1, 1)
    rest_BXC = (contrast_BXC.sum(axis=1, keepdims=True) - contrast_BXC) / np.maximum(total_B11 - count_BX1, 1)
    overall_B1C = mass_BXC.sum(axis=1, keepdims=True) / np.maximum(total_B11, 1)
    lift_BXC = np.divide(mean_BXC, overall_B1C, out=np.zeros_like(mean_BXC), where=overall_B1C > 0)
    sd_BXC = np.sqrt(variance_BXC)
    z_BXC = np.divide(excess_BXC, sd_BXC, out=np.zeros_like(sd_BXC), where=sd_BXC > 1e-9)
    tables = (mean_BXC, contrast_BXC / np.maximum(count_BX1, 1) - rest_BXC, lift_BXC, z_BXC)
    return Effects(*(table.reshape(*mean_BXC.shape[:2], *layers_experts) for table in tables))


def split_half_jaccard(chosen_BXLE: np.ndarray) -> np.ndarray:
    """[X]: mean over splits of |A and B| / |A or B|, with A and B the clusters of the two halves (0 where both are empty)."""
    flat = chosen_BXLE.reshape(*chosen_BXLE.shape[:2], -1)
    both, either = (flat[::2] & flat[1::2]).sum(axis=2), (flat[::2] | flat[1::2]).sum(axis=2)
    return np.asarray(np.where(either > 0, both / np.maximum(either, 1), 0.0).sum(axis=0) / len(both))


def transfer_auroc(survey: Survey, resamples: Resamples, chosen_TXLE: np.ndarray) -> list[float | None]:
    """Per skill: the AUROC of the cluster's mass on one template when the cluster was selected on the others (`chosen_TXLE`); the mean over templates that can
    be left out and on which the skill can be told from another. None where there is no such template. A cluster that is not found again scores 0.5."""
    held = [np.flatnonzero(survey.stratum_N == stratum) for stratum in resamples.templates]
    mass = [np.zeros((survey.num_skills, len(rows))) for rows in held]
    for block in survey.blocks():
        for rows, chosen_XLE, mass_XN in zip(held, chosen_TXLE[:, :, block.layers], mass, strict=True):
            for chosen_LE, mass_N in zip(chosen_XLE, mass_XN, strict=True):
                if chosen_LE.any():
                    mass_N += (block.mass_NLE[rows] * chosen_LE).sum(axis=(1, 2))
    scores: list[list[float]] = [[] for _ in range(survey.num_skills)]
    for rows, mass_XN in zip(held, mass, strict=True):
        for skill, mine in enumerate(survey.label_N[rows] == np.arange(survey.num_skills)[:, None]):
            if mine.any() and not mine.all():
                scores[skill].append(auroc(mass_XN[skill], mine))
    return [float(np.mean(values)) if values else None for values in scores]


def _cells(survey: Survey) -> list[np.ndarray]:
    """The prompts of each (skill, template), in order of first appearance: names play no part, so renaming a skill changes nothing."""
    cells: dict[tuple[int, int], list[int]] = {}
    for row, key in enumerate(zip(survey.label_N.tolist(), survey.stratum_N.tolist(), strict=True)):
        cells.setdefault(key, []).append(row)
    return [np.array(rows) for rows in cells.values()]
