"""EARL's part of a step's credit: whose cluster counts where, the mass it was given, and what that adds to advantages.

    clusters -> control -> those that are paid for
    scored rollouts -> spans -> mass_R -> Pay: lambda, metrics -> combine -> advantages
                             -> goals: what the learner's routers are taught beside       goals.py, router_goals.py

A span counts by the sigma of its own skill, which comes from discovery. That of a control, which discovery has not measured, is taken from the first correct
answers, before RL has changed much, and kept with its step, so that a resumed run uses the same from the same step on. So is the load that the guard compares.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.batch import Rollout, RouteTrace, ScoredRollout
from megatron_ext.config.schema import RunConfig
from megatron_ext.durable import write_text
from megatron_ext.earl.bonus import EarlBonus, apply_bonus, lambda_at
from megatron_ext.earl.clusters import ExpertClusters
from megatron_ext.earl.controls import controlled
from megatron_ext.earl.load import WEIGHT_UNDER_GUARD, Load, collapsing, expert_counts
from megatron_ext.earl.spans import Span
from megatron_ext.earl.statistics import sigma_from
from megatron_ext.rl.earl_notice import Notice
from megatron_ext.rl.goals import Goals, TagIds, goals_of, spans_of
from megatron_ext.rl.objective.advantage import alike, multi_reward_advantages
from megatron_ext.rl.table import Table

SIGMA_FILE = "earl_sigma.json"
GUARD_FILE = "earl_guard.json"
Advantages = Callable[[np.ndarray], np.ndarray]
"""Of shaped rewards [P, G], without a bonus."""


@dataclass(frozen=True)
class Learnt:
    """A sigma, and the step whose answers it was taken from."""

    sigma: float
    step: int


class EarlCredit:
    """Of one run; see `credit.Credit`. `paid`: the clusters that the bonus pays for."""

    def __init__(self, config: RunConfig, clusters: ExpertClusters, tags: TagIds, stage_dir: Path) -> None:
        self._config, self._tags, self._clusters = config, tags, clusters
        self.paid = controlled(clusters, config.earl.control, config.seed)
        self._sigma_file, self._guard_file = stage_dir / SIGMA_FILE, stage_dir / GUARD_FILE
        self._sigma = self.paid.sigmas()
        self._learnt = {skill: Learnt(**entry) for skill, entry in _read(self._sigma_file).items()}
        first = _read(self._guard_file)
        self._first = Load(tuple(first["max_vio"]), tuple(first["entropy"])) if first else None
        self._spans: list[list[Span]] = []
        self._left = 1.0
        self._notice = Notice()
        if config.earl.control != "none":
            print(f"earl.control = {config.earl.control}: {_said(self.paid)}", flush=True)

    def advantages(
        self, scored: Sequence[ScoredRollout], table: Table, rewards_PG: np.ndarray, shaped_PG: np.ndarray, without: Advantages, step: int
    ) -> tuple[np.ndarray, dict[str, float]]:
        """With the bonus. `rewards_PG`: the task's; `shaped_PG`: with what is added to them."""
        earl = self._config.earl
        self._spans = [spans_of(answer.rollout, earl.subtask, self._tags) for answer in scored]
        guard = self._guard(scored, step)
        self._left = WEIGHT_UNDER_GUARD if guard else 1.0
        weight = lambda_at(step, self._config.rl.steps, earl) * self._left
        bonus = EarlBonus(self.paid, earl, self._sigma_at(step))
        mass_R = self._mass(bonus, scored)
        task_PG = without(shaped_PG)
        if earl.combine == "bounded":
            by_skill = self._by_skill(bonus, scored, mass_R)
            if self._learn_sigma(scored, by_skill, step):
                bonus = EarlBonus(self.paid, earl, self._sigma_at(step))
            bonus_PG = bonus.over_skills({skill: table.spread(of_R) for skill, of_R in by_skill.items()}, rewards_PG, table.valid_PG)
            same_P = alike(rewards_PG, table.valid_PG)
            bonus_PG[same_P] = 0.0  # an advantage over the batch, or shaping, may leave such a group some
            wrong_PG = table.valid_PG & (rewards_PG < earl.correct_threshold)
            advantages_PG = apply_bonus(task_PG, bonus_PG, weight, earl.max_share, wrong_PG)
            paid_share = {"earl/paid_share": self._notice.see(bonus_PG, table.valid_PG & ~wrong_PG & ~same_P[:, None])}
        else:
            bonus_PG = table.spread(np.where(np.isfinite(mass_R), mass_R, 0.0))
            advantages_PG, paid_share = self._summed(shaped_PG, bonus_PG, weight, table.valid_PG, without), {}
        added_R, total_R = np.abs(table.gather(advantages_PG - task_PG)), np.abs(table.gather(advantages_PG))
        metrics = {
            "earl/lambda": weight,
            "earl/bonus_mean": float(np.abs(table.gather(bonus_PG)).mean()),
            "earl/bonus_share": float(added_R.sum() / max(total_R.sum(), 1e-12)),
            "earl/guard": float(len(guard)),
            **paid_share,
            **self._usage(scored, mass_R),
        }
        return advantages_PG, metrics

    def goals(self, scored: Sequence[ScoredRollout]) -> Goals:
        """Of the rollouts whose advantages were asked last. In `pathwise` routes count of correct answers alone; in `router_pg` those that were drawn."""
        earl = self._config.earl
        counts_R = np.array([earl.mode != "pathwise" or answer.reward >= earl.correct_threshold for answer in scored])
        return goals_of(scored, self._spans, self.paid, counts_R, int(earl.mode == "router_pg"), self._left)

    def drawn_layers(self) -> dict[str, tuple[int, ...]]:
        """By skill of the prompt: the layers whose routes are drawn in its answers."""
        if self._config.earl.mode != "router_pg":
            return {}
        return {found.skill: tuple(np.flatnonzero(self.paid.mask(found.skill).any(1)).tolist()) for found in self.paid.skills if self.paid.pairs(found.skill)}

    def _summed(self, shaped_PG: np.ndarray, mass_PG: np.ndarray, weight: float, valid_PG: np.ndarray, without: Advantages) -> np.ndarray:
        if self._config.earl.combine == "add":
            return without(shaped_PG + weight * mass_PG)
        return multi_reward_advantages(np.stack([shaped_PG, mass_PG]), np.array([1.0, weight]), valid_PG)

    def _mass(self, bonus: EarlBonus, scored: Sequence[ScoredRollout]) -> np.ndarray:
        return np.array([bonus.mass_of_spans(answer.rollout.routes, spans) for answer, spans in zip(scored, self._spans, strict=True)])

    def _by_skill(self, bonus: EarlBonus, scored: Sequence[ScoredRollout], mass_R: np.ndarray) -> dict[str, np.ndarray]:
        """The mass of each answer's spans of a skill, nan where it has none."""
        masses: dict[str, np.ndarray] = {}
        for row, (answer, spans) in enumerate(zip(scored, self._spans, strict=True)):
            skills = {span.skill for span in spans}
            for skill in skills:
                whole = len(skills) == 1
                own = mass_R[row] if whole else bonus.mass_of_spans(answer.rollout.routes, [span for span in spans if span.skill == skill])
                masses.setdefault(skill, np.full(len(scored), np.nan))[row] = own
        return masses

    def _usage(self, scored: Sequence[ScoredRollout], mass_R: np.ndarray) -> dict[str, float]:
        """By skill of the prompt, of what is paid for and of the clusters that were found."""
        true_R = mass_R if self.paid is self._clusters else self._mass(EarlBonus(self._clusters, self._config.earl, {}), scored)
        skill_R = np.array([answer.rollout.prompt.skill for answer in scored])
        metrics = {}
        for name, of_R in (("cluster_usage", mass_R), ("true_usage", true_R)):
            for skill in sorted(set(skill_R)):
                used = of_R[(skill_R == skill) & np.isfinite(of_R)]
                if len(used):
                    metrics[f"earl/{name}/{skill}"] = float(used.mean())
        return metrics

    def _guard(self, scored: Sequence[ScoredRollout], step: int) -> list[str]:
        """What it says of layers that are collapsing."""
        now = Load.of(expert_counts([_own_routes(answer.rollout) for answer in scored], self.paid.num_experts))
        if self._first is None or step == 0:
            self._first = now
            _write(self._guard_file, asdict(now))
        said = collapsing(now, self._first)
        if said:
            print(f"step {step + 1}: lambda counts {WEIGHT_UNDER_GUARD:g}, experts are used less evenly than at first: {'; '.join(said)}", flush=True)
        return said

    def _sigma_at(self, step: int) -> dict[str, float]:
        return self._sigma | {skill: learnt.sigma for skill, learnt in self._learnt.items() if learnt.step <= step}

    def _learn_sigma(self, scored: Sequence[ScoredRollout], by_skill: Mapping[str, np.ndarray], step: int) -> bool:
        """Whether a skill got its sigma now."""
        correct_R = np.array([answer.reward for answer in scored]) >= self._config.earl.correct_threshold
        unknown = sorted(by_skill.keys() - self._sigma.keys() - self._learnt.keys())
        found = {skill: sigma_from(by_skill[skill][correct_R & np.isfinite(by_skill[skill])]) for skill in unknown}
        found = {skill: sigma for skill, sigma in found.items() if math.isfinite(sigma)}
        if not found:
            return False
        self._learnt |= {skill: Learnt(sigma, step) for skill, sigma in found.items()}
        _write(self._sigma_file, {skill: asdict(learnt) for skill, learnt in self._learnt.items()})
        return True


def _own_routes(rollout: Rollout) -> RouteTrace:
    """Of the positions behind the prompt, which need no copy; an answer of one token has only the prompt's last."""
    prompt, rows = len(rollout.prompt.tokens_S), len(rollout.routes)
    return rollout.routes.rows(min(prompt, rows - 1), rows)


def _said(paid: ExpertClusters) -> str:
    return "; ".join(f"{found.skill} is paid for {found.reason}" for found in paid.skills if paid.pairs(found.skill))


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _write(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=1))
