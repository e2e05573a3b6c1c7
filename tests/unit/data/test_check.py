"""Checkers: exact, and total: gold gets 1, everything else less, nothing raises."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.data.suite import SKILLS, check
from megatron_ext.data.suite.composite import COMPOSITES, propose_composite, tagged
from megatron_ext.data.suite.levels import LEVELS
from megatron_ext.data.suite.scene import build
from megatron_ext.data.suite.skills import propose

SUM = {"skill": "composite", "answer": "<ocr>3</ocr><count>4</count><ans>7</ans>", "parts": [["ocr", "3"], ["count", "4"], ["ans", "7"]]}
TWO_COUNTS = {"skill": "composite", "answer": "", "parts": [["count", "2"], ["count", "5"], ["ans", "7"]]}

seeds = st.integers(0, 2**32 - 1)
text_like_answers = st.one_of(
    st.text(),
    st.lists(st.sampled_from(["<ocr>", "</ocr>", "<count>", "</count>", "<ans>", "</ans>", "3", "4", "7", " ", "red", "<|im_end|>", "\n"])).map("".join),
)


def any_meta(seed: int) -> dict[str, object]:
    """The meta of some question about some scene."""
    rng, level = Random(seed), LEVELS[seed % 2]
    name = rng.choice([*SKILLS, *COMPOSITES])
    query, blueprint = propose(name, rng, level) if name in SKILLS else propose_composite(name, rng, level)
    scene = build(blueprint, rng, level, None)
    meta: dict[str, object] = {"skill": query.skill, "answer": query.answer(scene)}
    return meta if name in SKILLS else meta | {"parts": query.steps(scene)}


@given(seeds)
def test_the_gold_answer_gets_one(seed):
    meta = any_meta(seed)
    verdict = check(meta, str(meta["answer"]))
    assert verdict.correct and verdict.well_formed
    assert set(verdict.parts.values()) == {1.0}


@given(seeds, st.data())
def test_an_answer_with_one_changed_character_gets_less(seed, data):
    meta = any_meta(seed)
    gold = str(meta["answer"])
    place = data.draw(st.integers(0, len(gold)))
    cut = data.draw(st.integers(0, 1))
    mutated = gold[:place] + data.draw(st.sampled_from(["", "x", "0", "9", "<", "red"])) + gold[place + cut :]
    verdict = check(meta, mutated)
    assert verdict.correct == (" ".join(mutated.split()) == gold)


@given(seeds, text_like_answers)
def test_any_text_gets_a_verdict(seed, text):
    verdict = check(any_meta(seed), text)
    assert verdict.well_formed or not verdict.correct


@pytest.mark.parametrize("text", ["<ocr>3</ocr><count>4</count><ans>7</ans>", " <ocr> 3</ocr>\n<count>4 </count> <ans>7</ans><|im_end|>"])
def test_white_space_and_the_end_of_the_turn_do_not_matter(text):
    assert check(SUM, text).correct


@pytest.mark.parametrize(
    "text, well_formed, parts",
    [
        ("<ocr>3</ocr><count>5</count><ans>8</ans>", True, (1, 0, 0)),
        ("<ocr>2</ocr><count>5</count><ans>7</ans>", True, (0, 0, 1)),  # the sum is right by accident
        ("<ocr>3</ocr><count>4</count><ans>7</ans> yes", False, (1, 1, 1)),  # says more than was asked
        ("<ocr>1</ocr><ocr>3</ocr><count>4</count><ans>7</ans>", False, (0, 1, 1)),  # only the first try counts
        ("<ans>7</ans><ocr>3</ocr><count>4</count>", False, (1, 1, 1)),  # the final answer comes last
        ("7", False, (0, 0, 0)),
    ],
)
def test_steps_are_judged_one_by_one(text, well_formed, parts):
    verdict = check(SUM, text)
    assert not verdict.correct and verdict.well_formed == well_formed
    assert tuple(verdict.parts.values()) == parts


def test_steps_may_come_in_any_order():
    assert check(SUM, "<count>4</count><ocr>3</ocr><ans>7</ans>").correct
    assert not check(SUM, "<count>3</count><ocr>4</ocr><ans>7</ans>").correct


def test_two_steps_of_one_skill_are_told_apart():
    assert check(TWO_COUNTS, tagged((("count", "5"), ("count", "2"), ("ans", "7")))).parts == {"count": 0.0, "count_2": 0.0, "ans": 1.0}


@pytest.mark.parametrize(
    "skill, well_formed, malformed",
    [("ocr", "4 2", "42 "), ("count", "8", "eight"), ("spatial", "left", "to the left"), ("color", "red", "red circle"), ("compare", "blue", "")],
)
def test_an_answer_of_the_right_form_is_told_from_one_of_the_wrong_form(skill, well_formed, malformed):
    meta = {"skill": skill, "answer": "another"}
    assert check(meta, well_formed).well_formed and not check(meta, malformed).well_formed
