"""What the learner's routers are pulled to, as it travels with the rollouts: of each response token, whose cluster counts where it was decided.

scored rollouts, clusters -> goals_of -> a goal per token, in each `parcels.Row` -> `router_goals.py`, on the learner's ranks
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_ext.batch import Rollout, ScoredRollout
from megatron_ext.earl.clusters import ExpertClusters
from megatron_ext.earl.spans import Span, tag_spans
from megatron_ext.shapes import check_shape

NO_GOAL = 0
TagIds = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Clusters:
    """Of a step: `member_XLE` bool, of the skill `skills[x]`, which the goal x + 1 of a token stands for. `weight`: what the guards leave of the weights of the
    routers' terms, in [0, 1]."""

    skills: tuple[str, ...]
    member_XLE: np.ndarray
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_shape("member_XLE", self.member_XLE, len(self.skills), None, None)


@dataclass(frozen=True, eq=False)
class Goals:
    """`of_rollouts`: int16 [T] each, in the order of the rollouts."""

    clusters: Clusters
    of_rollouts: Sequence[np.ndarray]


GoalsOf = Callable[[Sequence[ScoredRollout]], Goals]


def spans_of(rollout: Rollout, subtask: Literal["prompt", "tags"], tags: TagIds) -> list[Span]:
    """Rows of the trace that are scored: of every sub-task that the answer tags, or of the whole answer as its prompt's skill where it tags none."""
    turns, first = rollout.sampled_rows, rollout.response_rows[0]
    tagged = turns if subtask == "tags" else []
    spans = [span for start, stop in tagged for span in tag_spans(rollout.response_T[start - first : stop - first], start, tags)]
    return spans or [Span(rollout.prompt.skill, *rows) for rows in turns]


def goals_of(
    scored: Sequence[ScoredRollout], spans: Sequence[Sequence[Span]], clusters: ExpertClusters, counts_R: np.ndarray, first: int, weight: float
) -> Goals:
    """`counts_R` bool: answers whose routes count. `first`: the first position of each span that does, 1 where routes are drawn: those of a prompt are not."""
    skills = tuple(found.skill for found in clusters.skills if clusters.pairs(found.skill))
    number = {skill: index + 1 for index, skill in enumerate(skills)}
    shape = len(skills), clusters.num_layers, clusters.num_experts
    member_XLE = np.stack([clusters.mask(skill) for skill in skills]) if skills else np.zeros(shape, dtype=bool)
    goals = []
    for answer, of_answer, counts in zip(scored, spans, counts_R, strict=True):
        goal_T = np.full(len(answer.rollout.response_T), NO_GOAL, np.int16)
        start = answer.rollout.response_rows[0]
        for span in of_answer if counts else ():
            goal_T[max(span.start - start, first) : span.stop - start] = number.get(span.skill, NO_GOAL)
        goals.append(goal_T)
    return Goals(Clusters(skills, member_XLE, weight), goals)
