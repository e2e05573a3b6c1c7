"""Questions of the suite with a right and a wrong answer, for learning from preferences: pure functions of (split, kind, seed, index).

A wrong answer is of the right form. One thing about it is not true, and what follows from that is as it would then be:

    4 2                                        4 7
    <ocr>3</ocr><count>4</count><ans>7</ans>   <ocr>3</ocr><count>1</count><ans>4</ans>
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from megatron_ext.config.schema import DataConfig
from megatron_ext.data.chat import IMAGE
from megatron_ext.data.digits import Split
from megatron_ext.data.suite.composite import FINAL, INDEPENDENT, Composite, Step, conclusion, tagged
from megatron_ext.data.suite.draw import FRAMES, lead
from megatron_ext.data.suite.levels import DIGITS, RELATIONS, Level
from megatron_ext.data.suite.queries import Compare, Query
from megatron_ext.data.suite.scene import Scene
from megatron_ext.data.suite.skills import SKILLS


@dataclass(frozen=True, slots=True)
class Comparison:
    """A scene, a question that holds its image, and two answers."""

    scene: Scene
    question: str
    chosen: str
    rejected: str


def draw_comparison(split: Split, kind: str, seed: int, index: int, config: DataConfig) -> Comparison:
    """The index-th of its kind, `qa` (every skill as often) or `composite`."""
    rng = Random(f"comparison {split} {kind} {seed} {index}")
    query, scene = lead(rng, "composite" if kind == "composite" else rng.choice(SKILLS), split, config)
    question = rng.choice(list(FRAMES.values())).format(rng.choice(query.wordings()))
    chosen, rejected = _composite_answers(query, scene, rng) if isinstance(query, Composite) else _answers(query, scene, rng)
    return Comparison(scene, f"{IMAGE}\n{question}", chosen, rejected)


def _answers(query: Query, scene: Scene, rng: Random) -> tuple[str, str]:
    right = query.answer(scene)
    if right is None:
        raise RuntimeError(f"{query} has no answer in a scene that was drawn for it: {scene}")
    return right, wrong_answer(query, right, scene.level, rng)


def wrong_answer(query: Query, right: str, level: Level, rng: Random) -> str:
    """Another answer that the question could have."""
    if query.skill == "ocr":
        digits = right.split()
        place = rng.randrange(len(digits))
        digits[place] = _other(DIGITS, digits[place], rng)
        return " ".join(digits)
    if isinstance(query, Compare):
        return query.second if right == query.first else query.first
    known = {"count": tuple(map(str, range(level.max_count + 1))), "spatial": RELATIONS, "color": level.colors}
    return _other(known[query.skill], right, rng)


def _composite_answers(query: Composite, scene: Scene, rng: Random) -> tuple[str, str]:
    """One step of the wrong answer is wrong: the second where it builds on the first, as nothing could follow from another color."""
    steps = query.steps(scene)
    if steps is None:
        raise RuntimeError(f"{query} has no answer in a scene that was drawn for it: {scene}")
    first, second, _ = steps
    if query.second is None or rng.random() < 0.5:
        second = (second[0], _wrong_step(query.second, second, scene.level, rng))
    else:
        first = (first[0], _wrong_step(query.first, first, scene.level, rng))
    wrong: tuple[Step, ...] = (first, second, (FINAL, conclusion(query.kind, first[1], second[1])))
    if query.kind in INDEPENDENT and rng.random() < 0.5:
        steps, wrong = (steps[1], steps[0], steps[2]), (second, first, wrong[2])
    return tagged(steps), tagged(wrong)


def _wrong_step(query: Query | None, step: Step, level: Level, rng: Random) -> str:
    """`query` None: a count of what the step before has found."""
    return _other(tuple(map(str, range(level.max_count + 1))), step[1], rng) if query is None else wrong_answer(query, step[1], level, rng)


def _other(known: tuple[str, ...], right: str, rng: Random) -> str:
    return rng.choice([answer for answer in known if answer != right])
