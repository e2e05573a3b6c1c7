"""From differences to words, by a rule that is registered with the study.

better, worse            the p-value, adjusted over the study's hypotheses (Holm), is at most 1 - confidence
no effect larger than X  not so, and the simultaneous interval (Bonferroni) lies within -X .. X, X the smallest effect of interest
inconclusive             neither: the study was too small to say
unfinished               a registered run of either arm is missing: nothing is said before all are there
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from megatron_ext.config.study_schema import StudyConfig
from megatron_ext.study.outcomes import Scores, differences
from megatron_ext.study.statistics import bootstrap, effect, holm, least_sign_flip_p, sign_flip_p

Verdict = Literal["better", "worse", "no effect", "inconclusive", "unfinished"]
RULE = (
    "Differences are paired by seed and prompt, and averaged over prompts, skills, seeds. Intervals and p-values take seeds and prompts as crossed random "
    "effects. Better or worse: the p-value adjusted by Holm over all hypotheses is at most 1 - confidence. No effect: otherwise, if the interval at confidence "
    "1 - (1 - confidence) / hypotheses lies within the smallest effect of interest on both sides. Else inconclusive. Nothing is said before all runs "
    "registered are done. Bootstrap intervals and sign-flip p-values accompany this and do not decide."
)
"""A part of what is registered."""


@dataclass(frozen=True)
class Finding:
    """One hypothesis by one endpoint. `low`, `high`: of the interval at `confidence`, which for the deciding endpoint is simultaneous over all hypotheses."""

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
    """What the study says: of every hypothesis that both arms have runs for, first by the endpoint that decides, then by the others.
    `scores`: endpoint -> arm -> seed."""
    alpha = 1 - config.confidence
    deciding = [_finding(config, pair, config.endpoint, scores[config.endpoint], 1 - alpha / len(config.pairs)) for pair in config.pairs]
    # Whoever has no runs yet stays in the family: it will be tested, too.
    adjusted = holm([1.0 if finding is None else finding.p for finding in deciding])
    findings = [_judged(finding, p, config) for finding, p in zip(deciding, adjusted, strict=True) if finding is not None]
    further = [(config.endpoint, pair) for pair in config.explored]
    further += [(endpoint, pair) for endpoint in config.secondary for pair in (*config.pairs, *config.explored)]
    explored = [_finding(config, pair, endpoint, scores[endpoint], config.confidence) for endpoint, pair in further]
    findings += [finding for finding in explored if finding is not None]
    return findings


def verdict_of(p_holm: float, difference: float, low: float, high: float, config: StudyConfig) -> Verdict:
    """The rule above, of a finished hypothesis."""
    if p_holm <= 1 - config.confidence + 1e-12:
        return "better" if difference > 0 else "worse"
    return "no effect" if -config.smallest_effect < low and high < config.smallest_effect else "inconclusive"


def _finding(config: StudyConfig, pair: tuple[str, str], endpoint: str, scores: Mapping[str, Mapping[int, Scores]], confidence: float) -> Finding | None:
    arm, other = pair
    seeds, difference_SP, skills = differences(scores.get(arm, {}), scores.get(other, {}))
    if not seeds:
        return None
    found = effect(difference_SP, skills)
    low, high = found.interval(confidence)
    around = bootstrap(difference_SP, skills, confidence, config.bootstraps) if len(seeds) > 1 else (low, high)
    flips = sign_flip_p(found.seeds_S), least_sign_flip_p(len(seeds))
    return Finding(arm, other, endpoint, seeds, found.seeds_S, found.difference, low, high, confidence, *around, found.p, None, *flips, None, "exploratory")


def _judged(finding: Finding, p_holm: float, config: StudyConfig) -> Finding:
    missing: Sequence[int] = [seed for seed in config.seeds if seed not in finding.seeds]
    verdict: Verdict = "unfinished" if missing else verdict_of(p_holm, finding.difference, finding.low, finding.high, config)
    size, least = abs(finding.difference), config.smallest_effect
    words = {
        "better": f"better by {size:.3f}" + (", which is less than anybody would care about" if size < least else ""),
        "worse": f"worse by {size:.3f}" + (", which is less than anybody would care about" if size < least else ""),
        "no effect": f"no effect larger than {least:g}",
        "inconclusive": f"inconclusive: anything from {finding.low:+.3f} to {finding.high:+.3f} fits",
        "unfinished": f"unfinished: {len(finding.seeds)} of {len(config.seeds)} seeds, no verdict before all are there",
    }[verdict]
    if verdict == "no effect" and finding.low == finding.high == 0:
        words += ": no prompt was answered differently"
    return Finding(**{**asdict(finding), "p_holm": p_holm, "verdict": verdict, "words": words})
