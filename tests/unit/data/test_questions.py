"""Questions: answers are balanced and true, texts reveal nothing, and every prompt carries its evidence."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.config.schema import DataConfig, VisionConfig
from megatron_ext.data.suite import ALL_SKILLS, KINDS, SKILLS, chance, draw_conversation, draw_prompts
from megatron_ext.data.suite.composite import COMPOSITES, offer_composite, propose_composite
from megatron_ext.data.suite.draw import draw_dialogue
from megatron_ext.data.suite.levels import LEVELS
from megatron_ext.data.suite.queries import ColorOf, Compare, Count, ReadDigits, Relation
from megatron_ext.data.suite.scene import Blueprint, Item, Scene, build
from megatron_ext.data.suite.skills import offer, propose
from megatron_ext.data.suite.sprites import drawn_sprite

levels = st.sampled_from(LEVELS)
seeds = st.integers(0, 2**32 - 1)
CONFIGS = {0: DataConfig(), 1: DataConfig(level=1, image_size=48)}
VISION = VisionConfig()


def scene_of(*objects: tuple[int, int, str, str]) -> Scene:
    return Scene(LEVELS[0], tuple(Item(row, column, kind, color, drawn_sprite(kind, 0)) for row, column, color, kind in objects), 0)


#   red circle    .    blue circle   .
#       .         .        4         .
#   red square    .        .         7
EXAMPLE = scene_of((0, 0, "red", "circle"), (0, 2, "blue", "circle"), (1, 2, "white", "4"), (2, 0, "red", "square"), (2, 3, "white", "7"))


@pytest.mark.parametrize(
    "query, answer",
    [
        (ReadDigits(), "4 7"),
        (Count("circle"), "2"),
        (Count("red"), "2"),
        (Count("green"), "0"),
        (Relation(("red", "circle"), ("blue", "circle")), "left"),
        (Relation(("red", "square"), ("red", "circle")), "below"),
        (Relation(("red", "square"), ("blue", "circle")), None),  # as far to the left as below
        (Relation(("red", "square"), None), "left"),  # 1.5 cells left of the centre, 0.5 below
        (Relation(("blue", "circle"), None), "above"),
        (Relation(("red", "circle"), None), None),  # in a corner
        (Relation(("green", "square"), ("blue", "circle")), None),  # there is no green square
        (ColorOf("square"), "red"),
        (ColorOf("circle"), None),  # two circles
        (Compare("blue", "red"), "red"),
        (Compare("yellow", "green"), None),  # none of either
    ],
)
def test_answers_of_a_scene_that_can_be_checked_by_eye(query, answer):
    assert query.answer(EXAMPLE) == answer


@settings(max_examples=150)
@given(levels, st.sampled_from(SKILLS), seeds)
def test_a_question_has_an_answer_in_every_scene_drawn_for_it(level, skill, seed):
    rng = Random(seed)
    query, blueprint = propose(skill, rng, level)
    scenes = [build(blueprint, rng, level, None) for _ in range(3)]
    answers = {query.answer(scene) for scene in scenes}
    assert len(answers) == 1 and None not in answers
    assert query.skill == skill


@settings(max_examples=150)
@given(levels, st.sampled_from(COMPOSITES), seeds)
def test_both_steps_of_a_composite_have_answers_in_every_scene_drawn_for_it(level, kind, seed):
    rng = Random(seed)
    query, blueprint = propose_composite(kind, rng, level)
    scenes = [build(blueprint, rng, level, None) for _ in range(3)]
    steps = {query.steps(scene) for scene in scenes}
    assert len(steps) == 1 and None not in steps
    assert [name for name, _ in steps.pop()] == [*kind.split("+"), "ans"]


@given(levels, st.sampled_from(SKILLS), seeds)
def test_what_a_scene_offers_it_also_answers(level, skill, seed):
    rng = Random(seed)
    scene = build(Blueprint((), lambda look: True), rng, level, None)
    query = offer(skill, rng, scene)
    assert query is None or query.answer(scene) is not None


@given(seeds)
def test_an_offered_composite_never_names_the_color_it_asks_for(seed):
    rng = Random(seed)
    scene = build(Blueprint((), lambda look: True), rng, LEVELS[0], None)
    query = offer_composite("spatial+color", rng, scene)
    if query is not None:
        assert isinstance(query.first, Relation) and isinstance(query.second, ColorOf)
        assert query.second.shape not in query.first.names_shapes()


@pytest.mark.parametrize("skill", SKILLS)
def test_answers_are_balanced_so_a_model_that_does_not_see_is_at_chance(skill):
    rng, level = Random(0), LEVELS[0]
    by_text: dict[str, Counter[str]] = {}
    for _ in range(6000):
        query, blueprint = propose(skill, rng, level)
        by_text.setdefault(query.wordings()[0], Counter())[query.answer(build(blueprint, rng, level, None)) or ""] += 1
    # the best blind strategy: for every text its most frequent answer, fitted on these very questions (which flatters it)
    asked = sum(sum(answers.values()) for answers in by_text.values())
    blind = sum(answers.most_common(1)[0][1] for answers in by_text.values()) / asked
    flattery = 0.04 if skill != "spatial" else 0.16  # 240 texts of 25 questions each
    assert chance(skill, DataConfig()) - 0.01 <= blind <= chance(skill, DataConfig()) + flattery


@pytest.mark.parametrize(
    "kind, best", [("ocr+count", 1 / 60), ("count+count", 1 / 16), ("color+count", 1 / 16), ("compare+count", 1 / 8), ("spatial+color", 1 / 16)]
)
def test_composite_answers_are_balanced_over_both_steps(kind, best):
    rng = Random(1)
    answers: Counter[tuple[object, ...]] = Counter()
    for _ in range(3000):
        query, blueprint = propose_composite(kind, rng, LEVELS[0])
        steps = query.steps(build(blueprint, rng, LEVELS[0], None))
        first = steps[0][1] == query.first.first if kind == "compare+count" else steps[0][1]  # which of the two named colors
        answers[(first, steps[1][1])] += 1
    assert len(answers) == round(1 / best)
    assert max(answers.values()) / 3000 == pytest.approx(best, abs=0.03)


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("skill", ALL_SKILLS)
def test_a_prompt_carries_what_a_reward_and_a_reader_need(skill, level, tokenizer):
    config = CONFIGS[level]
    vision = VisionConfig(image_size=config.image_size)
    for prompt in draw_prompts("test", [skill], 6, seed=3, config=config, tokenizer=tokenizer, vision=vision):
        assert json.loads(json.dumps(prompt.meta)) == prompt.meta
        assert prompt.meta["skill"] == prompt.skill == skill and prompt.meta["answer"] == prompt.answer
        assert prompt.tiles.pixels_IHWC[0].shape == (config.image_size, config.image_size, 3)
        assert (prompt.tokens_S == tokenizer.image_id).sum() == (config.image_size // 8) ** 2
        assert all(0 <= top < bottom <= config.image_size and 0 <= left < right <= config.image_size for top, left, bottom, right in prompt.meta["boxes"])
        assert len(tokenizer.encode(prompt.answer)) <= (14 if skill == "composite" else 3)
        assert tokenizer.decode(prompt.tokens_S).endswith("<|im_start|>assistant\n")


def test_prompts_are_a_function_of_seed_and_index_so_any_part_can_be_drawn_alone(tokenizer):
    whole = draw_prompts("val", ["count", "composite"], 6, 5, DataConfig(), tokenizer, VISION)
    part = draw_prompts("val", ["count", "composite"], 2, 5, DataConfig(), tokenizer, VISION, start=4)
    assert [prompt.key for prompt in part] == [whole[index].key for index in (4, 5, 10, 11)]
    assert all(
        np.array_equal(a.tokens_S, b.tokens_S) and np.array_equal(a.tiles.pixels_IHWC, b.tiles.pixels_IHWC)
        for a, b in zip(part, [whole[i] for i in (4, 5, 10, 11)], strict=True)
    )
    other = draw_prompts("val", ["count"], 6, 6, DataConfig(), tokenizer, VISION)
    assert [prompt.meta["boxes"] for prompt in other] != [prompt.meta["boxes"] for prompt in whole[:6]]


def test_every_skill_is_asked_in_every_frame(tokenizer):
    prompts = draw_prompts("train", ALL_SKILLS, 40, 0, DataConfig(), tokenizer, VISION)
    seen = {(prompt.skill, prompt.meta["template"]) for prompt in prompts}
    assert len(seen) == 3 * len(ALL_SKILLS)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from((0, 1)), st.integers(0, 10**6))
def test_a_conversation_asks_the_configured_number_of_questions_and_repeats_none(kind, level, index):
    turns = draw_conversation("train", kind, 0, index, CONFIGS[level]).turns
    assert len(turns) == 6 or (kind == "composite" and 1 <= len(turns) <= 3)
    assert sum(question.count("<image>") for question, _ in turns) == 1 and "<image>" in turns[0][0]
    assert all(answer for _, answer in turns)


def test_maps_name_every_cell_in_raster_order():
    dialogue = draw_dialogue("train", "caption", 0, 0, DataConfig())
    answers = dict(dialogue.turns)
    cells = next(answer for question, answer in answers.items() if "content" in question).split()
    assert len(cells) == 16
    assert [cell for cell in cells if cell != "empty"] == [item.kind for item in dialogue.scene.items]
    assert all(cells[4 * item.row + item.column] == item.kind for item in dialogue.scene.items)


def test_tallies_count_what_the_scene_holds():
    dialogue = draw_dialogue("train", "caption", 0, 0, DataConfig())
    words = next(answer for question, answer in dialogue.turns if "color" in question and ("count" in question or "how many" in question)).split()
    tally = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    shapes = Counter(item.color for item in dialogue.scene.items if not item.is_digit)
    assert tally == {color: shapes[color] for color in dialogue.scene.level.colors}


def test_relations_are_asked_more_often_in_training_and_no_skill_is_left_out():
    words = {
        "spatial": ("where is", "which side"),
        "ocr": ("digits",),
        "compare": ("more",),
        "color": ("what color", "which color"),
        "count": ("how many", "number of"),
    }
    asked = Counter[str]()
    for index in range(300):
        for question, _ in draw_dialogue("train", "qa", 0, index, DataConfig()).turns:
            asked.update(skill for skill, marks in words.items() if any(mark in question for mark in marks))
    assert asked.total() == 6 * 300
    assert asked["spatial"] > 1.5 * asked["ocr"] and min(asked.values()) > 150


@pytest.mark.parametrize(
    "asked, query",
    [
        (Relation(("red", "circle"), ("blue", "circle")), Relation(("blue", "circle"), ("red", "circle"))),
        (Relation(("red", "square"), ("blue", "circle")), ColorOf("square")),
        (Relation(("red", "square"), None), ColorOf("square")),
        (Count("red"), Count("red")),
    ],
)
def test_a_question_that_an_earlier_one_answers_is_not_offered(asked, query):
    level = LEVELS[1] if isinstance(query, Relation) else LEVELS[0]
    scene = replace(EXAMPLE, level=level)
    offered = {offer(query.skill, Random(seed), scene) for seed in range(100)}
    still_offered = {offer(query.skill, Random(seed), scene, [asked]) for seed in range(100)}
    assert query in offered and query not in still_offered
