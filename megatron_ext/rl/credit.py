"""From the rewards of a step to advantages: shaping, comparison, then the EARL bonus.

    scored rollouts -> table [P, G] -> + overlong, KL -> advantage.py -> + clip(lambda B, ...) -> advantages_R, in the order of the rollouts

Rollouts that failed leave holes in the table: they take no part in their group's statistics.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_ext.batch import ScoredRollout
from megatron_ext.config.schema import RunConfig
from megatron_ext.earl.bonus import EarlBonus, apply_bonus, lambda_at
from megatron_ext.earl.clusters import ExpertClusters
from megatron_ext.earl.spans import Span, tag_spans
from megatron_ext.earl.statistics import sigma_from
from megatron_ext.errors import UserError
from megatron_ext.rl.objective.advantage import alike, batch_advantages, group_advantages, multi_reward_advantages
from megatron_ext.rl.objective.shaping import overlong

SIGMA_FILE = "earl_sigma.json"
TagIds = Mapping[str, tuple[int, int]]
ReferenceKl = Callable[[Sequence[ScoredRollout]], np.ndarray]


@dataclass(frozen=True)
class Table:
    """The scored rollouts by prompt and sample. `row_R`, `column_R`: where each stands."""

    row_R: np.ndarray
    column_R: np.ndarray
    skill_P: tuple[str, ...]
    valid_PG: np.ndarray

    @classmethod
    def of(cls, scored: Sequence[ScoredRollout], samples: int) -> Table:
        prompts = {answer.rollout.prompt.key: answer.rollout.prompt.skill for answer in scored}
        index = {key: row for row, key in enumerate(prompts)}
        row_R = np.array([index[answer.rollout.prompt.key] for answer in scored])
        column_R = np.array([answer.rollout.sample for answer in scored])
        valid_PG = np.zeros((len(prompts), samples), dtype=bool)
        valid_PG[row_R, column_R] = True
        return cls(row_R, column_R, tuple(prompts.values()), valid_PG)

    def spread(self, values_R: np.ndarray) -> np.ndarray:
        """float64 [P, G], nan where there is no rollout."""
        spread_PG = np.full(self.valid_PG.shape, np.nan)
        spread_PG[self.row_R, self.column_R] = values_R
        return spread_PG

    def gather(self, values_PG: np.ndarray) -> np.ndarray:
        return values_PG[self.row_R, self.column_R]


@dataclass(frozen=True)
class Learnt:
    """A sigma, and the step whose answers it was taken from."""

    sigma: float
    step: int


class Credit:
    """The credit of one run; see `loop.Recipe`. Without clusters there is no bonus. `reference_kl`: how far answers are from the reference; asked where
    the reward pays for that.

    A skill's sigma comes from discovery. One that discovery does not know (a composite whose sub-tasks are scored) is taken from the first correct answers,
    before RL has changed much, and kept in `stage_dir` with its step, so that a resumed run uses the same from the same step on.
    """

    def __init__(self, config: RunConfig, clusters: ExpertClusters | None, tags: TagIds, stage_dir: Path, reference_kl: ReferenceKl | None = None) -> None:
        self._config, self._clusters, self._tags, self._file = config, clusters, tags, stage_dir / SIGMA_FILE
        self._reference_kl = reference_kl
        self._sigma: dict[str, float] = {}
        self._learnt: dict[str, Learnt] = {}
        if clusters is not None:
            self._sigma = clusters.sigmas()
            self._learnt = {skill: Learnt(**entry) for skill, entry in json.loads(self._file.read_text()).items()} if self._file.exists() else {}

    def __call__(self, scored: Sequence[ScoredRollout], step: int) -> tuple[np.ndarray, dict[str, float]]:
        table = Table.of(scored, self._config.rl.rollouts_per_prompt)
        rewards_PG = table.spread(np.array([answer.reward for answer in scored]))
        shaping_R, metrics = self._shaping(scored)
        advantages_PG = self._advantages(scored, table, rewards_PG + table.spread(shaping_R))
        if self._clusters is not None:
            advantages_PG, earl_metrics = self._with_bonus(self._clusters, scored, table, rewards_PG, advantages_PG, step)
            metrics |= earl_metrics
        advantages_R = table.gather(advantages_PG)
        metrics |= {f"advantage/{name}": float(getattr(advantages_R, name)()) for name in ("mean", "min", "max")}
        return advantages_R, metrics

    def _shaping(self, scored: Sequence[ScoredRollout]) -> tuple[np.ndarray, dict[str, float]]:
        """What is added to each task reward."""
        rl, metrics = self._config.rl, {}
        lengths_R = np.array([answer.rollout.num_sampled for answer in scored])
        shaping_R = overlong(lengths_R, self._config.rollout.max_new_tokens, rl.overlong_share, rl.overlong_penalty)
        if rl.overlong_share > 0:
            metrics["reward/overlong/mean"] = float(shaping_R.mean())
        if self._reference_kl is not None:
            kl_R = rl.kl_coeff * self._reference_kl(scored)
            shaping_R = shaping_R - kl_R
            metrics["reward/kl/mean"] = -float(kl_R.mean())
        return shaping_R, metrics

    def _advantages(self, scored: Sequence[ScoredRollout], table: Table, rewards_PG: np.ndarray) -> np.ndarray:
        rl = self._config.rl
        if rl.advantage == "gdpo":
            named_KPG = np.stack([table.spread(np.array([_part(answer, name) for answer in scored])) for name in rl.reward_weights])
            return multi_reward_advantages(named_KPG, np.array(list(rl.reward_weights.values())), table.valid_PG)
        if rl.advantage == "reinforce_pp" or rl.advantage == "reinforce_pp_baseline":
            tokens_PG = table.spread(np.array([answer.rollout.num_sampled for answer in scored]))
            return batch_advantages(rewards_PG, table.valid_PG, tokens_PG, baseline=rl.advantage == "reinforce_pp_baseline")
        return group_advantages(rewards_PG, table.valid_PG, rl.advantage)

    def _with_bonus(
        self, clusters: ExpertClusters, scored: Sequence[ScoredRollout], table: Table, rewards_PG: np.ndarray, task_PG: np.ndarray, step: int
    ) -> tuple[np.ndarray, dict[str, float]]:
        earl = self._config.earl
        bonus = EarlBonus(clusters, earl, self._sigma_at(step))
        mass_R = np.array([self._mass(bonus, answer) for answer in scored])
        if self._learn_sigma(scored, mass_R, step):
            bonus = EarlBonus(clusters, earl, self._sigma_at(step))
        bonus_PG = bonus.bonus(table.spread(mass_R), rewards_PG, table.valid_PG, table.skill_P)
        bonus_PG[alike(rewards_PG, table.valid_PG)] = 0.0  # an advantage over the batch, or shaping, may leave such a group some
        weight = lambda_at(step, self._config.rl.steps, earl)
        wrong_PG = table.valid_PG & (rewards_PG < earl.correct_threshold)
        advantages_PG = apply_bonus(task_PG, bonus_PG, weight, earl.max_share, wrong_PG)
        added_R, total_R = np.abs(table.gather(advantages_PG - task_PG)), np.abs(table.gather(advantages_PG))
        metrics = {
            "earl/lambda": weight,
            "earl/bonus_mean": float(np.abs(table.gather(bonus_PG)).mean()),
            "earl/bonus_share": float(added_R.sum() / max(total_R.sum(), 1e-12)),
        }
        skill_R = np.array(table.skill_P)[table.row_R]
        for skill in sorted(set(table.skill_P)):
            used = mass_R[(skill_R == skill) & np.isfinite(mass_R)]
            if len(used):
                metrics[f"earl/cluster_usage/{skill}"] = float(used.mean())
        return advantages_PG, metrics

    def _mass(self, bonus: EarlBonus, answer: ScoredRollout) -> float:
        rollout = answer.rollout
        turns, first = rollout.sampled_rows, rollout.response_rows[0]
        tagged = turns if self._config.earl.subtask == "tags" else []
        spans = [span for start, stop in tagged for span in tag_spans(rollout.response_T[start - first : stop - first], start, self._tags)]
        return bonus.mass_of_spans(rollout.routes, spans or [Span(rollout.prompt.skill, *rows) for rows in turns])

    def _sigma_at(self, step: int) -> dict[str, float]:
        return self._sigma | {skill: learnt.sigma for skill, learnt in self._learnt.items() if learnt.step <= step}

    def _learn_sigma(self, scored: Sequence[ScoredRollout], mass_R: np.ndarray, step: int) -> bool:
        """Whether a skill got its sigma now."""
        correct_R = np.array([answer.reward for answer in scored]) >= self._config.earl.correct_threshold
        skill_R = np.array([answer.rollout.prompt.skill for answer in scored])
        unknown = sorted(set(skill_R) - self._sigma.keys() - self._learnt.keys())
        found = {skill: sigma_from(mass_R[correct_R & np.isfinite(mass_R) & (skill_R == skill)]) for skill in unknown}
        found = {skill: sigma for skill, sigma in found.items() if math.isfinite(sigma)}
        if not found:
            return False
        self._learnt |= {skill: Learnt(sigma, step) for skill, sigma in found.items()}
        draft = self._file.with_suffix(".partial")
        draft.write_text(json.dumps({skill: asdict(learnt) for skill, learnt in self._learnt.items()}, indent=1))
        draft.replace(self._file)
        return True


def _part(answer: ScoredRollout, name: str) -> float:
    if name not in answer.rewards:
        given = ", ".join(answer.rewards) or "none"
        raise UserError(f"rl.reward_weights.{name}", f"the reward of {answer.rollout.prompt.key} has no such part; its parts: {given}", "weigh one that it has")
    return answer.rewards[name]
