"""Taking a cluster's experts away: random masks that match it, effects worked by hand, and verdicts that chance does not give."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.config.schema import DiscoverConfig
from megatron_ext.earl.causal import FEWEST, RESAMPLES, TOLERANCE, Arm, Trial, causal_effect, judged, matched_masks, trials_of
from megatron_ext.earl.clusters import ExpertClusters, PairEffect, SkillCluster

TRIAL = Trial("ocr", Arm(((0, 1),)), (Arm(((0, 2),), "ocr"), Arm(((0, 3),), "ocr")))
MASS = np.array([[0.1, 0.4, 0.3, 0.2]])


def pair(expert: int) -> PairEffect:
    return PairEffect(0, expert, 0.1, 2.0, 9.0, 0.01, 1.0, 0.9, 0.3, 0.1, 9.0, 0.9, 0.3)


def clusters(**pairs: tuple[int, ...]) -> ExpertClusters:
    """One layer of four experts; skills with these experts of it."""
    found = [
        SkillCluster(
            skill,
            "ok" if own else "empty",
            "",
            9,
            tuple(pair(e) for e in own),
            0.1 if own else None,
            0.9,
            None,
            1.0,
            None,
        )
        for skill, own in pairs.items()
    ]
    table = np.repeat(MASS[None], len(found), axis=0)
    return ExpertClusters(1, 4, tuple(found), table, table * 0, np.zeros(1), 4.0, DiscoverConfig(), 0, "sft")


def effect(own: list[list[int]], others: list[tuple[list[int], list[int]]], repeats: int = 1):
    own_AN = np.repeat(np.array(own, dtype=bool), repeats, axis=1)
    pairs = [(np.repeat(np.array(a, dtype=bool), repeats), np.repeat(np.array(b, dtype=bool), repeats)) for a, b in others]
    return causal_effect(TRIAL, own_AN, pairs, MASS, np.random.default_rng(0))


def test_an_effect_worked_by_hand() -> None:
    """Of four prompts three are right; without the cluster none; without random experts two and three. Two others lose one of two, and gain one of two."""
    found = effect([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]], [([1, 1], [1, 0]), ([0, 1], [1, 1])], repeats=10)
    assert (found.num_prompts, found.accuracy, found.drop_own, found.drop_others) == (40, 0.75, 0.75, 0)
    assert found.random_drops == pytest.approx((0.25, 0.0)) and found.drop_random == pytest.approx(0.125)
    assert found.beyond_others[0] < 0.75 < found.beyond_others[1] and found.beyond_random[0] < 0.625 < found.beyond_random[1]
    assert found.cluster_mass == 0.4 and found.random_mass == pytest.approx(0.25) and found.random_overlap == 0
    said = "masking it costs 0.75 of 0.75, the other skills 0.00, and random experts in its place cost 0.12: surely more than either"
    assert (found.verdict, found.reason) == ("causal", said)


@pytest.mark.parametrize(
    ("own", "others", "lacking"),
    [
        ([[1, 1], [0, 0], [0, 0], [0, 0]], [([1, 1], [1, 1])], "than random experts (95 % interval +0.00 to +0.00)"),
        ([[1, 1], [0, 0], [1, 1], [1, 1]], [([1, 1], [0, 0])], "than the others (95 % interval +0.00 to +0.00)"),
        ([[0, 0], [0, 0], [0, 0], [0, 0]], [([1, 1], [1, 0])], "than the others (95 % interval -0.65 to -0.35) nor than random experts"),
    ],
    ids=["any experts matter as much", "all skills need it", "nothing to lose"],
)
def test_a_cluster_that_matters_no_more_than_something_else_is_correlational(own, others, lacking) -> None:
    found = effect(own, others, repeats=20)
    assert found.verdict == "correlational" and f"not surely more {lacking}" in found.reason


def test_chance_alone_is_seldom_causal() -> None:
    """Every mask costs the same on average: of 80 such skills about one in forty has either interval above 0, and both at once are rarer."""
    rng = np.random.default_rng(1)
    verdicts = [effect(rng.random((4, 60)) < 0.6, [(rng.random(60) < 0.6, rng.random(60) < 0.6)]).verdict for _ in range(80)]
    assert Counter(verdicts)["causal"] <= 4


def test_a_strong_effect_is_found_with_a_hundred_prompts() -> None:
    """Accuracy 0.6 falls to 0.25, by random experts to 0.5, of the others from 0.6 to 0.5."""
    rng = np.random.default_rng(2)
    own = np.array([rng.random(100) < p for p in (0.6, 0.25, 0.5, 0.5)])
    assert effect(own, [(rng.random(100) < 0.6, rng.random(100) < 0.5)]).verdict == "causal"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(16, 40), st.integers(1, 3))
def test_random_masks_have_the_shape_and_about_the_mass_of_the_cluster(seed: int, experts: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    mass_LE = rng.dirichlet(np.ones(experts), size=3)
    pairs = tuple((layer, int(expert)) for layer in (0, 2) for expert in sorted(rng.choice(experts, size, replace=False)))
    masks = matched_masks(pairs, mass_LE, 5, np.random.default_rng(seed))
    assert masks == matched_masks(pairs, mass_LE, 5, np.random.default_rng(seed)) and len(set(masks)) == len(masks) <= 5
    for mask in masks:
        assert Counter(layer for layer, _ in mask) == {0: size, 2: size} and len(set(mask)) == 2 * size and mask != pairs
        for layer in (0, 2):
            mine, other = ({expert for of, expert in chosen if of == layer} for chosen in (pairs, mask))
            near = _near(mass_LE[layer], mine)
            assert other in near or len(near) < FEWEST, "about its mass, where there are such sets"
            if other & mine:
                assert len([chosen for chosen in near if not chosen & mine]) < FEWEST, "disjoint, where there are such sets"


def _near(mass_E: np.ndarray, mine: set[int]) -> list[set[int]]:
    """All other sets of as many experts with about the mass."""
    target, sets = mass_E[list(mine)].sum(), map(set, combinations(range(len(mass_E)), len(mine)))
    return [chosen for chosen in sets if chosen != mine and abs(mass_E[list(chosen)].sum() - target) <= TOLERANCE * target * (1 + 1e-9)]


def test_masks_of_large_clusters_among_many_experts_are_drawn_and_not_enumerated() -> None:
    """8 of 128 experts with a fifth of the mass."""
    mass_LE = np.random.default_rng(0).dirichlet(np.ones(128), size=1)
    members = np.argsort(-mass_LE[0])[10:18]
    masks = matched_masks(tuple((0, int(e)) for e in sorted(members)), mass_LE, 4, np.random.default_rng(0))
    for mask in masks:
        chosen = [expert for _, expert in mask]
        assert len(masks) == 4 and not set(chosen) & set(members.tolist())
        assert mass_LE[0, chosen].sum() == pytest.approx(mass_LE[0, members].sum(), rel=TOLERANCE)


def test_only_clusters_in_use_are_tried() -> None:
    trials = trials_of(clusters(ocr=(1,), count=()), 2, seed=0)
    assert [(trial.skill, trial.cluster.pairs, {arm.skill for arm in trial.random}) for trial in trials] == [("ocr", ((0, 1),), {"ocr"})]


def test_a_verdict_is_said_or_enforced_and_can_be_overridden() -> None:
    found, weak = clusters(ocr=(1,), count=(2,)), effect([[0, 0], [0, 0], [0, 0], [0, 0]], [([1, 1], [1, 1])])
    strong = replace(weak, verdict="causal")
    said = judged(found, {"ocr": weak, "count": strong}, enforce=False)
    assert said.sigmas() == found.sigmas() and said.pairs("ocr") == ((0, 1),) and said.skills[0].causal == weak
    held = judged(found, {"ocr": weak, "count": strong}, enforce=True)
    assert [skill.status for skill in held.skills] == ["correlational", "ok"] and held.pairs("ocr") == () and held.sigmas() == {"count": 0.1}
    assert held.skills[0].reason == weak.reason
    assert held.forced().sigmas() == found.sigmas()
    untried = judged(found, {}, enforce=True)
    assert untried.skills[0].status == "correlational" and "no prompt" in untried.skills[0].reason
    assert RESAMPLES >= 1000
