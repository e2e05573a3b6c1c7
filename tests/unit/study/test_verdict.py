"""Verdicts: which words a difference gets, and that no word is said too early."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_ext.config.study_schema import StudyConfig
from megatron_ext.errors import DataError
from megatron_ext.observe.results import PromptVerdict
from megatron_ext.study.outcomes import Scores, differences, score
from megatron_ext.study.verdict import conclude, verdict_of


def study(**changes: object) -> StudyConfig:
    said = {"name": "one", "recipe": Path("r.yaml"), "arms": {"base": {}, "more": {"rl.steps": 2}}, "baseline": "base", "seeds": (0, 1, 2, 3, 4)}
    return StudyConfig.model_validate({**said, "endpoint": "greedy", "smallest_effect": 0.05, "bootstraps": 200, **changes})


def scores(shift: float, seeds: range = range(5), spread: float = 0.0) -> dict[int, Scores]:
    """Forty prompts of two skills; a seed's scores are those of all, and its own luck."""
    common_P = np.tile([0.25, 0.5, 0.75, 0.5], 10)
    keys, skills = tuple(f"p/{at}" for at in range(40)), ("count",) * 20 + ("color",) * 20
    return {seed: Scores(keys, skills, common_P + shift + spread * (seed - 2)) for seed in seeds}


@pytest.mark.parametrize(
    "p, difference, low, high, expected",
    [
        (0.05, 0.1, 0.01, 0.19, "better"),
        (0.01, -0.1, -0.19, -0.01, "worse"),
        (0.4, 0.01, -0.03, 0.04, "no effect"),
        (0.4, 0.01, -0.03, 0.06, "inconclusive"),
        (0.06, 0.1, -0.001, 0.2, "inconclusive"),
    ],
)
def test_a_verdict_follows_from_the_corrected_p_and_the_interval(p: float, difference: float, low: float, high: float, expected: str) -> None:
    assert verdict_of(p, difference, low, high, study()) == expected


@pytest.mark.parametrize(
    "shift, spread, words",
    [
        (0.2, 0.001, "better by 0.200"),
        (-0.2, 0.001, "worse by 0.200"),
        (0.02, 0.001, "better by 0.020, where 0.05 would be of interest"),
        (0.0, 0.001, "no effect larger than 0.05"),
        (0.1, 0.2, "inconclusive"),
    ],
)
def test_a_study_ends_in_words(shift: float, spread: float, words: str) -> None:
    (found,) = conclude(study(), {"greedy": {"base": scores(0), "more": scores(shift, spread=spread)}})
    assert found.words.startswith(words) and found.difference == pytest.approx(shift)


def test_arms_that_never_differ_are_suspicious_and_said_to_be_so() -> None:
    """An option without any effect, or a model that cannot answer at all, looks like a precise null result."""
    (found,) = conclude(study(), {"greedy": {"base": scores(0), "more": scores(0)}})
    assert found.words == "no effect larger than 0.05: no prompt was answered differently"


def test_nothing_is_said_before_all_seeds_are_there() -> None:
    (found,) = conclude(study(), {"greedy": {"base": scores(0), "more": scores(0.5, range(4))}})
    assert found.verdict == "unfinished" and found.words == "unfinished: 4 of 5 seeds, no verdict before all are there"


def test_a_hypothesis_without_runs_still_counts_among_those_corrected_for() -> None:
    arms = {"base": {}, "more": {"rl.steps": 2}, "later": {"rl.steps": 3}}
    (alone,) = conclude(study(), {"greedy": {"base": scores(0), "more": scores(0.1, spread=0.05)}})
    (first,) = conclude(study(arms=arms), {"greedy": {"base": scores(0), "more": scores(0.1, spread=0.05), "later": {}}})
    assert first.p == alone.p and first.p_holm == pytest.approx(2 * first.p) and first.confidence == pytest.approx(0.975)


def test_an_interval_that_is_shown_agrees_with_its_verdict() -> None:
    """Three hypotheses, of which the second is rejected at the second step of Holm's procedure only: its interval is that of the step."""
    arms = {"base": {}, "first": {"a": 1}, "second": {"a": 2}, "third": {"a": 3}}
    of = {"base": scores(0), "first": scores(0.2, spread=0.001), "second": scores(0.1, spread=0.0378), "third": scores(0.0, spread=0.1)}
    found = conclude(study(arms=arms), {"greedy": of})
    assert [one.verdict for one in found] == ["better", "better", "inconclusive"]
    assert [round(one.confidence, 4) for one in found] == [0.9833, 0.975, 0.9833]
    assert found[1].low > 0 and found[1].p > 0.05 / 3


def test_explored_pairs_and_secondary_endpoints_get_no_verdict_and_cost_none() -> None:
    more = study(secondary=("pass@2",), explored=(("base", "more"),))
    of = {"base": scores(0), "more": scores(0.1, spread=0.05)}
    found = conclude(more, {"greedy": of, "pass@2": of})
    assert [one.verdict is None for one in found] == [False, True, True, True]
    assert found[0] == conclude(study(), {"greedy": of})[0]


def test_endpoints_are_read_off_each_prompt_s_verdicts() -> None:
    verdicts = [PromptVerdict("a", "count", True, (True, False)), PromptVerdict("b", "color", False, (True, True)), PromptVerdict("c", "color", True, ())]
    assert score(verdicts, "greedy").score_P.tolist() == [1, 0, 1] and score(verdicts, "greedy").mean == 0.75
    assert score(verdicts, "mean@2").score_P.tolist() == [0.5, 1] and score(verdicts, "pass@2/color").score_P.tolist() == [1]
    with pytest.raises(DataError, match=r"holds nothing about mean@8: it has count, color, with \[0, 2\] samples a prompt"):
        score(verdicts, "mean@8")


def test_runs_that_answered_different_prompts_are_not_paired() -> None:
    other = {0: Scores(("q/0",), ("count",), np.array([1.0]))}
    with pytest.raises(DataError, match="different prompts"):
        differences(scores(0), other)
