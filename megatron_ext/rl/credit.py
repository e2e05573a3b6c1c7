"""From the rewards of a step to advantages: shaping, comparison, then the EARL bonus.

    scored rollouts -> table [P, G] -> + overlong, KL -> advantage.py -> + clip(lambda B, ...) -> advantages_R, in the order of the rollouts

Rollouts that failed leave holes in the table: they take no part in their group's statistics. The bonus: `earl_credit.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from megatron_ext.batch import ScoredRollout
from megatron_ext.config.schema import RunConfig
from megatron_ext.earl.clusters import ExpertClusters
from megatron_ext.errors import UserError
from megatron_ext.rl.earl_credit import EarlCredit
from megatron_ext.rl.goals import Goals, TagIds
from megatron_ext.rl.objective.advantage import batch_advantages, group_advantages, multi_reward_advantages
from megatron_ext.rl.objective.shaping import overlong
from megatron_ext.rl.table import Table

ReferenceKl = Callable[[Sequence[ScoredRollout]], np.ndarray]


class Credit:
    """The credit of one run; see `loop.Recipe`. Without clusters there is no bonus (`earl`). `reference_kl`: how far answers are from the reference; asked
    where the reward pays for that."""

    def __init__(self, config: RunConfig, clusters: ExpertClusters | None, tags: TagIds, stage_dir: Path, reference_kl: ReferenceKl | None = None) -> None:
        self._config, self._reference_kl = config, reference_kl
        self.earl = None if clusters is None else EarlCredit(config, clusters, tags, stage_dir)

    def __call__(self, scored: Sequence[ScoredRollout], step: int) -> tuple[np.ndarray, dict[str, float]]:
        table = Table.of(scored, self._config.rl.rollouts_per_prompt)
        rewards_PG = table.spread(np.array([answer.reward for answer in scored]))
        shaping_R, metrics = self._shaping(scored)
        shaped_PG, without = rewards_PG + table.spread(shaping_R), partial(self._advantages, scored, table)
        if self.earl is None:
            advantages_PG = without(shaped_PG)
        else:
            advantages_PG, earl_metrics = self.earl.advantages(scored, table, rewards_PG, shaped_PG, without, step)
            metrics |= earl_metrics
        advantages_R = table.gather(advantages_PG)
        metrics |= {f"advantage/{name}": float(getattr(advantages_R, name)()) for name in ("mean", "min", "max")}
        return advantages_R, metrics

    def goals(self, scored: Sequence[ScoredRollout]) -> Goals:
        """What the learner's routers are taught beside, of the rollouts that were credited last. There must be a bonus."""
        assert self.earl is not None
        return self.earl.goals(scored)

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


def _part(answer: ScoredRollout, name: str) -> float:
    if name not in answer.rewards:
        given = ", ".join(answer.rewards) or "none"
        raise UserError(f"rl.reward_weights.{name}", f"the reward of {answer.rollout.prompt.key} has no such part; its parts: {given}", "weigh one that it has")
    return answer.rewards[name]
