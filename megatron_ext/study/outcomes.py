"""What a study's runs scored, prompt by prompt, and the differences between two arms.

<arm>/seed-<k>/evaluate/<stage>/verdicts.jsonl  ->  scores per endpoint [prompts]  ->  arm minus other arm, seed by seed [S, P]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ext.config.study_schema import split_endpoint
from megatron_ext.errors import DataError
from megatron_ext.observe.results import PromptVerdict, read_verdicts


@dataclass(frozen=True)
class Scores:
    """Of one run by one endpoint: a score from 0 to 1 for every prompt that it is about."""

    keys: tuple[str, ...]
    skills: tuple[str, ...]
    score_P: np.ndarray

    @property
    def mean(self) -> float:
        """Over skills, of the mean over prompts."""
        return float(np.mean([self.score_P[[name == skill for name in self.skills]].mean() for skill in dict.fromkeys(self.skills)]))


def read_scores(evaluation: Path, endpoint: str) -> Scores:
    """The scores in the folder beside an evaluation's file. Raises DataError where the evaluation did not measure the endpoint."""
    return score(read_verdicts(evaluation), endpoint, str(evaluation))


def score(verdicts: Sequence[PromptVerdict], endpoint: str, where: str = "evaluation") -> Scores:
    """The verdicts by one endpoint: `greedy` is 0 or 1, `mean@k` the share of right samples, `pass@k` whether any is."""
    measure, skill = split_endpoint(endpoint)
    kind, _, count = measure.partition("@")
    asked = [one for one in verdicts if skill in (None, one.skill) and (not count or len(one.samples) == int(count))]
    if not asked:
        known = ", ".join(dict.fromkeys(one.skill for one in verdicts))
        sampled = sorted({len(one.samples) for one in verdicts})
        raise DataError(where, f"holds nothing about {endpoint}: it has {known or 'no prompts'}, with {sampled} samples a prompt", "ask for what is measured")
    values = {
        "greedy": lambda one: float(one.greedy),
        "mean": lambda one: sum(one.samples) / len(one.samples),
        "pass": lambda one: float(any(one.samples)),
    }[kind]
    return Scores(tuple(one.key for one in asked), tuple(one.skill for one in asked), np.array([values(one) for one in asked]))


def differences(arm: Mapping[int, Scores], other: Mapping[int, Scores]) -> tuple[tuple[int, ...], np.ndarray, tuple[str, ...]]:
    """Over the seeds that both have: the seeds, arm minus other [S, P], the prompts' skills. Raises DataError unless all have answered the same prompts."""
    seeds = tuple(sorted(arm.keys() & other.keys()))
    keys = {scores.keys for seed in seeds for scores in (arm[seed], other[seed])}
    if len(keys) > 1:
        raise DataError("evaluate", "runs of the study were asked different prompts", "all arms must share `evaluate` and `data`: the comparison is paired")
    return seeds, np.array([arm[seed].score_P - other[seed].score_P for seed in seeds]), arm[seeds[0]].skills if seeds else ()
