"""From differences to words, by a rule that is registered with the study.

better, worse            the p-value, adjusted over the study's hypotheses (Holm), is at most 1 - confidence
no effect larger than X  not so, and the interval at Bonferroni's level lies within -X .. X, X the smallest effect of interest
inconclusive             neither: the study was too small to say
unfinished               a registered run of either arm is missing: nothing is said before all are there
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from megatron_ext.config.study_schema import StudyConfig
from megatron_ext.study.outcomes import Scores, differences
from megatron_ext.study.statistics import Effect, bootstrap, effect, holm, least_sign_flip_p, sign_flip_p

Verdict = Literal["better", "worse", "no effect", "inconclusive", "unfinished"]
RULE = (
    "Differences are paired by seed and prompt, and averaged over prompts, skills, seeds. Intervals and p-values take seeds and prompts as crossed random "
    "effects. Better or worse: the p-value adjusted by Holm over all hypotheses is at most 1 - confidence. No effect: otherwise, if the interval at "
    "confidence 1 - (1 - confidence) / hypotheses (Bonferroni) lies within the smallest effect of interest on both sides. Else inconclusive. Nothing is said "
    "before all registered runs are done. Bootstrap intervals and sign-flip p-values accompany this and do not decide."
)
"""A part of what is registered."""


@dataclass(frozen=True)
class Finding:
    """One hypothesis by one endpoint. `low`, `high`: of the interval at `confidence`, which for hypotheses is corrected for their number (`levels`)."""

    arm: str
    other: str
    endpoint: str
    seeds: tuple[int, ...]
    seeds_S: tuple[float, ...]
    difference: float
    low: float
    high: float
    confidence: float
    bootstrap_low: float
    bootstrap_high: float
    p: float
    p_holm: float | None
    sign_flip: float
    sign_flip_least: float
    verdict: Verdict | None
    words: str

    def as_json(self) -> dict[str, Any]:
        return {name: None if isinstance(value, float) and not np.isfinite(value) else value for name, value in asdict(self).items()}


def conclude(config: StudyConfig, scores: Mapping[str, Mapping[str, Mapping[int, Scores]]]) -> list[Finding]:
    """What the study says: of every hypothesis that both arms have runs for, first by the endpoint that decides, then the explored pairs and endpoints.
    `scores`: endpoint -> arm -> seed."""
    deciding = [_pair(pair, scores[config.endpoint]) for pair in config.pairs]
    # Whoever has no runs yet stays in the family: it will be tested, too.
    values = [1.0 if one is None else one.effect.p for one in deciding]
    found = [
        _judged(_finding(config, one, config.endpoint, level), p, config)
        for one, level, p in zip(deciding, levels(values, 1 - config.confidence), holm(values), strict=True)
        if one is not None
    ]
    further = [(config.endpoint, pair) for pair in config.explored]
    further += [(endpoint, pair) for endpoint in config.secondary for pair in (*config.pairs, *config.explored)]
    for endpoint, pair in further:
        explored = _pair(pair, scores[endpoint])
        found += [] if explored is None else [_finding(config, explored, endpoint, config.confidence)]
    return found


def levels(values: Sequence[float], alpha: float) -> list[float]:
    """The confidence of the interval shown with each p-value: Bonferroni's, over all of them; but where Holm rejects, that of its own step, so that the
    interval then lies on one side of 0.

    >>> [round(level, 4) for level in levels([0.03, 0.001, 0.2], 0.05)]
    [0.9833, 0.9833, 0.9833]
    >>> [round(level, 4) for level in levels([0.02, 0.001, 0.2], 0.05)]
    [0.975, 0.9833, 0.9833]
    """
    order, count = sorted(range(len(values)), key=lambda at: values[at]), len(values)
    adjusted = holm(values)
    return [1 - alpha / (count - order.index(at) if adjusted[at] <= alpha else count) for at in range(count)]


def verdict_of(p_holm: float, difference: float, low: float, high: float, config: StudyConfig) -> Verdict:
    """The rule above, of a finished hypothesis."""
    if p_holm <= 1 - config.confidence + 1e-12:
        return "better" if difference > 0 else "worse"
    return "no effect" if -config.smallest_effect < low and high < config.smallest_effect else "inconclusive"


@dataclass(frozen=True)
class _Pair:
    """Two arms by one endpoint, over the seeds that both have."""

    arms: tuple[str, str]
    seeds: tuple[int, ...]
    difference_SP: np.ndarray
    skills: tuple[str, ...]

    @cached_property
    def effect(self) -> Effect:
        return effect(self.difference_SP, self.skills)


def _pair(arms: tuple[str, str], scores: Mapping[str, Mapping[int, Scores]]) -> _Pair | None:
    seeds, difference_SP, skills = differences(scores.get(arms[0], {}), scores.get(arms[1], {}))
    return _Pair(arms, seeds, difference_SP, skills) if seeds else None


def _finding(config: StudyConfig, pair: _Pair, endpoint: str, confidence: float) -> Finding:
    found, seeds = pair.effect, pair.seeds
    low, high = found.interval(confidence)
    around = bootstrap(pair.difference_SP, pair.skills, confidence, config.bootstraps) if len(seeds) > 1 else (low, high)
    return Finding(
        arm=pair.arms[0],
        other=pair.arms[1],
        endpoint=endpoint,
        seeds=seeds,
        seeds_S=found.seeds_S,
        difference=found.difference,
        low=low,
        high=high,
        confidence=confidence,
        bootstrap_low=around[0],
        bootstrap_high=around[1],
        p=found.p,
        p_holm=None,
        sign_flip=sign_flip_p(found.seeds_S),
        sign_flip_least=least_sign_flip_p(len(seeds)),
        verdict=None,
        words="exploratory",
    )


def _judged(finding: Finding, p_holm: float, config: StudyConfig) -> Finding:
    missing: Sequence[int] = [seed for seed in config.seeds if seed not in finding.seeds]
    verdict: Verdict = "unfinished" if missing else verdict_of(p_holm, finding.difference, finding.low, finding.high, config)
    size, least = abs(finding.difference), config.smallest_effect
    small = f", where {least:g} would be of interest" if size < least else ""
    words = {
        "better": f"better by {size:.3f}{small}",
        "worse": f"worse by {size:.3f}{small}",
        "no effect": f"no effect larger than {least:g}",
        "inconclusive": f"inconclusive: anything from {finding.low:+.3f} to {finding.high:+.3f} fits",
        "unfinished": f"unfinished: {len(finding.seeds)} of {len(config.seeds)} seeds, no verdict before all are there",
    }[verdict]
    if verdict == "no effect" and finding.low == finding.high == 0:
        words += ": no prompt was answered differently"
    return Finding(**{**asdict(finding), "p_holm": p_holm, "verdict": verdict, "words": words})
