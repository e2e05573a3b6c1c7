"""The EARL bonus: a correct answer that used its skill's experts more than the other correct answers of its group earns a little more advantage.

    mass_i = 1/|T| sum_{t in T} 1/|L*| sum_{l in L*} sum_{e in C_l} gate[t, l, e]      T: positions of the spans; C, L*: cluster and layers of the span's skill
    x_i    = clip((mass_i - mean mass of the group's correct answers) / sigma, -1, 1)   sigma: spread of mass on correct answers of the fine-tuned model, fixed
    B_i    = 1[reward_i >= tau] x_i                                                     0 in a group with fewer than min_correct correct answers
    A_i    = A_task_i + clip(lambda B_i, -rho |A_task_i|, rho |A_task_i|)                   never below a wrong answer of the group

So no advantage changes its sign, wrong answers are untouched and stay below correct ones, groups that are all correct or all wrong still teach nothing, and
length does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from megatron_ext.batch.routing import RouteTrace
from megatron_ext.config.schema import EarlConfig
from megatron_ext.earl.clusters import ExpertClusters
from megatron_ext.earl.spans import Span
from megatron_ext.shapes import check_shape


class EarlBonus:
    """The bonus of one run. `sigma` by skill; one that has none gets no bonus."""

    def __init__(self, clusters: ExpertClusters, config: EarlConfig, sigma: Mapping[str, float]) -> None:
        self._config, self._sigma = config, dict(sigma)
        self._weights: dict[str, np.ndarray] = {}
        for found in clusters.skills:
            mask_LE = clusters.mask(found.skill)
            if mask_LE.any():
                self._weights[found.skill] = mask_LE / mask_LE.any(axis=1).sum()

    def mass(self, trace: RouteTrace, skill: str, start: int, stop: int) -> float:
        """Cluster mass of positions [start, stop) as this skill, in [0, 1]; nan for a skill without a cluster."""
        return self.mass_of_spans(trace, [Span(skill, start, stop)])

    def mass_of_spans(self, trace: RouteTrace, spans: Sequence[Span]) -> float:
        """Mean cluster mass over the positions of all spans whose skill has a cluster; nan where there is none."""
        total, count = 0.0, 0
        for span in spans:
            weights_LE = self._weights.get(span.skill)
            if weights_LE is None:
                continue
            if span.stop > len(trace):
                raise ValueError(f"span [{span.start}, {span.stop}) of {span.skill} is outside the {len(trace)} recorded positions")
            rows = trace.rows(span.start, span.stop)
            experts_TLK = rows.experts_SLK
            layers_L1 = np.arange(experts_TLK.shape[1])[:, None]
            gates_TLK = rows.gates_SLK.astype(np.float64)
            total += float((gates_TLK * weights_LE[layers_L1, experts_TLK]).sum())
            count += span.stop - span.start
        return total / count if count else math.nan

    def bonus(self, mass_PG: np.ndarray, rewards_PG: np.ndarray, valid_PG: np.ndarray, skill_P: Sequence[str]) -> np.ndarray:
        """B [P, G] in [-1, 1]. A nan mass takes no part and gets 0."""
        check_shape("rewards_PG", rewards_PG, *mass_PG.shape)
        check_shape("valid_PG", valid_PG, *mass_PG.shape)
        correct_PG = valid_PG.astype(bool) & (rewards_PG >= self._config.correct_threshold)
        scored_PG = correct_PG & np.isfinite(mass_PG)
        count_P = scored_PG.sum(axis=1)
        mass_PG = np.where(scored_PG, mass_PG, 0.0)
        centre_P = mass_PG.sum(axis=1) / np.maximum(count_P, 1)
        sigma_P = np.array([self._sigma.get(skill, math.inf) for skill in skill_P])
        x_PG = np.clip((mass_PG - centre_P[:, None]) / sigma_P[:, None], -1, 1)
        enough_P = count_P >= self._config.min_correct
        return np.where(scored_PG & enough_P[:, None], x_PG, 0.0)

    def over_skills(self, masses: Mapping[str, np.ndarray], rewards_PG: np.ndarray, valid_PG: np.ndarray) -> np.ndarray:
        """B [P, G] where an answer may have spans of several skills: the mean of what each gives by its own sigma, of those that can be measured. `masses`: by
        skill, [P, G], nan where an answer has no span of it."""
        total_PG, count_PG = np.zeros(rewards_PG.shape), np.zeros(rewards_PG.shape)
        for skill, mass_PG in sorted(masses.items()):
            if math.isfinite(self._sigma.get(skill, math.inf)):
                total_PG += self.bonus(mass_PG, rewards_PG, valid_PG, [skill] * len(mass_PG))
                count_PG += np.isfinite(mass_PG)
        return total_PG / np.maximum(count_PG, 1)


def apply_bonus(advantages_PG: np.ndarray, bonus_PG: np.ndarray, weight: float, max_share: float, wrong_PG: np.ndarray) -> np.ndarray:
    """A = A_task + clip(weight B, -max_share |A_task|, max_share |A_task|), and never below a wrong answer of the group (partial credit may put it close)."""
    limit_PG = max_share * np.abs(advantages_PG)
    with_bonus_PG = advantages_PG + np.clip(weight * bonus_PG, -limit_PG, limit_PG)
    best_wrong_P1 = np.where(wrong_PG, advantages_PG, -np.inf).max(axis=1, keepdims=True)
    return np.where(bonus_PG < 0, np.maximum(with_bonus_PG, np.minimum(best_wrong_P1, advantages_PG)), with_bonus_PG)


def lambda_at(step: int, steps: int, config: EarlConfig) -> float:
    """The weight of the bonus in step 0 .. steps - 1, with u = (step + 1) / steps the share of the run that ends with it.

    bonus * u / warmup in the warm-up, bonus * (1 + cos(pi (u - 1 + cooldown) / cooldown)) / 2 in the last `cooldown` share, the smaller where both apply,
    bonus in between. The last step has 0.
    """
    done = (step + 1) / steps
    rise = done / config.warmup if done < config.warmup else 1.0
    late = done - (1 - config.cooldown)
    fall = 0.5 * (1 + math.cos(math.pi * late / config.cooldown)) if config.cooldown > 0 and late > 0 else 1.0
    return config.bonus * min(rise, fall)
