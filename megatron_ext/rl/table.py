"""The scored rollouts of a step as a table: a row for each prompt, a column for each sample. Those that failed leave holes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ext.batch import ScoredRollout


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
