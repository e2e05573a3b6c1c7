"""Balanced drawing of single-skill questions, in both directions.

propose(skill)  draws the question and its ANSWER first, uniformly, and returns the blueprint of scenes in which that answer is true.
                This is how evaluation and RL prompts are made: text and answer are independent, so a model that does not see is at chance.
offer(skill)    finds a further question about a scene that exists: an answer uniformly among those the scene offers, then a question with it.
                This is how several questions are packed into one training conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random

from megatron_ext.data.suite.levels import DIGITS, RELATIONS, Level
from megatron_ext.data.suite.queries import ColorOf, Compare, Count, Query, ReadDigits, Relation
from megatron_ext.data.suite.scene import Blueprint, Look, Scene

SKILLS = ("ocr", "count", "spatial", "color", "compare")
SKILL_WEIGHTS = {"ocr": 1, "count": 1, "spatial": 3, "color": 1, "compare": 1}
"""Shares in training conversations: small models learn relations last, and not every scene offers one, so these are asked for three times as often."""


def propose(skill: str, rng: Random, level: Level) -> tuple[Query, Blueprint]:
    """A question with a uniformly drawn answer, as the blueprint of the scenes in which it is the answer."""
    return _PROPOSE[skill](rng, level)


def offer(skill: str, rng: Random, scene: Scene, asked: Sequence[Query] = ()) -> Query | None:
    """A question of the skill that the scene answers and that questions asked before do not, or None. Answers that several questions share are not
    preferred; large counts are."""
    by_answer: dict[str, list[Query]] = {}
    for query in _CANDIDATES[skill](scene):
        answer = query.answer(scene)
        if answer is not None and not _given_away(query, asked):
            by_answer.setdefault(answer, []).append(query)
    if not by_answer:
        return None
    answers = sorted(by_answer)
    # scenes offer small counts far more often than large ones, so a large one is taken where there is one
    weights = [1 + int(answer) for answer in answers] if skill == "count" else None
    return rng.choice(by_answer[rng.choices(answers, weights)[0]])


def _given_away(query: Query, asked: Sequence[Query]) -> bool:
    """Whether this was asked before, or an earlier question tells the answer: "where is the red circle" names the color of the circle, and where A is
    seen from B says where B is seen from A."""
    for earlier in asked:
        if isinstance(earlier, Relation):
            if isinstance(query, ColorOf) and query.shape in earlier.names_shapes():
                return True
            if isinstance(query, Relation) and (query.subject, query.anchor) == (earlier.anchor, earlier.subject):
                return True
    return query in asked


def chance(skill: str, level: Level) -> float:
    """Accuracy of the best constant answer given the text of the question: what a model reaches that does not see."""
    return {
        "ocr": 1 / level.max_digits / 10,
        "count": 1 / (level.max_count + 1),
        "spatial": 1 / len(RELATIONS),
        "color": 1 / len(level.colors),
        "compare": 1 / 2,
    }[skill]


def looks_of(target: str, level: Level) -> list[Look]:
    """Every look that a count of `target` counts."""
    return [look for look in level.looks if target in look]


def _propose_ocr(rng: Random, level: Level) -> tuple[Query, Blueprint]:
    digits = tuple(rng.choices(DIGITS, k=rng.randint(1, level.max_digits)))
    return ReadDigits(), Blueprint((), lambda look: True, digits=digits)


def _propose_count(rng: Random, level: Level) -> tuple[Query, Blueprint]:
    target = rng.choice(level.shapes + level.colors)
    shapes = tuple(rng.choices(looks_of(target, level), k=rng.randint(0, level.max_count)))
    return Count(target), Blueprint(shapes, lambda look: target not in look)


def _propose_spatial(rng: Random, level: Level) -> tuple[Query, Blueprint]:
    placed = tuple(rng.sample(level.looks, 1 if level.centred else 2))
    return Relation(placed[0], None if level.centred else placed[1]), Blueprint(placed, lambda look: look not in placed, relation=rng.choice(RELATIONS))


def _propose_color(rng: Random, level: Level) -> tuple[Query, Blueprint]:
    shape = rng.choice(level.shapes)
    return ColorOf(shape), Blueprint(((rng.choice(level.colors), shape),), lambda look: look[1] != shape)


def _propose_compare(rng: Random, level: Level) -> tuple[Query, Blueprint]:
    more, fewer = rng.sample(level.colors, 2)
    many = rng.randint(1, level.max_pair + 1)
    few = rng.randint(0, min(many - 1, level.max_objects - 1 - many))
    shapes = [(more, rng.choice(level.shapes)) for _ in range(many)] + [(fewer, rng.choice(level.shapes)) for _ in range(few)]
    query = Compare(more, fewer) if rng.random() < 0.5 else Compare(fewer, more)
    return query, Blueprint(tuple(shapes), lambda look: look[0] not in (more, fewer))


_PROPOSE: dict[str, Callable[[Random, Level], tuple[Query, Blueprint]]] = {
    "ocr": _propose_ocr,
    "count": _propose_count,
    "spatial": _propose_spatial,
    "color": _propose_color,
    "compare": _propose_compare,
}


def _relations(scene: Scene) -> Iterator[Query]:
    looks = [item.look for item in scene.shapes]
    unique = [look for look in looks if looks.count(look) == 1]
    if scene.level.centred:
        return (Relation(subject, None) for subject in unique)
    return (Relation(subject, anchor) for subject in unique for anchor in unique if subject != anchor)


_CANDIDATES: dict[str, Callable[[Scene], Iterator[Query]]] = {
    "ocr": lambda scene: iter((ReadDigits(),)),
    "count": lambda scene: (Count(target) for target in scene.level.shapes + scene.level.colors),
    "spatial": _relations,
    "color": lambda scene: (ColorOf(shape) for shape in scene.level.shapes),
    "compare": lambda scene: (Compare(first, second) for first in scene.level.colors for second in scene.level.colors if first != second),
}
