"""Composite questions: two sub-tasks whose answers combine, so that every part must be right. Their gold answers carry the steps in tags.

    "what is the digit plus the number of circles"   ->   <ocr>3</ocr><count>4</count><ans>7</ans>

| kind          | steps                                              | final answer   |
|---------------|----------------------------------------------------|----------------|
| ocr+count     | the only digit; a count                            | their sum      |
| count+count   | two counts of disjoint groups                      | their sum      |
| color+count   | the color of a shape; how many shapes have it      | the count      |
| compare+count | the more frequent of two colors; how often it is   | the count      |
| spatial+color | a relation; the color of a third shape             | both           |

As with single skills, the answers of both steps are drawn first, uniformly and independently, and the scene follows. Steps that do not build on each other
(ocr+count, spatial+color) are taught in both orders, and both are right: correct answers to one prompt can differ, in words and in routes.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from megatron_ext.data.suite.levels import DIGITS, RELATIONS, Level
from megatron_ext.data.suite.queries import ColorOf, Compare, Count, Query, ReadDigits, Relation, describe_group
from megatron_ext.data.suite.scene import Blueprint, Item, Scene
from megatron_ext.data.suite.skills import looks_of, offer

INDEPENDENT = ("ocr+count", "spatial+color")
COMPOSITES = ("ocr+count", "count+count", "color+count", "compare+count", "spatial+color")
FINAL = "ans"

Step = tuple[str, str]  # (skill or "ans", gold answer): one tagged part of the response


@dataclass(frozen=True, slots=True)
class Composite:
    """Two steps. In `color+count` and `compare+count` the second counts what the first answers: its target is then the scene's, not the text's."""

    kind: str
    first: Query
    second: Query | None
    skill: ClassVar[str] = "composite"

    def wordings(self) -> tuple[str, ...]:
        match self.kind, self.first, self.second:
            case "ocr+count", _, Count(target):
                return (f"what is the digit plus the number of {describe_group(target)}",)
            case "count+count", Count(one), Count(other):
                return (f"what is the number of {describe_group(one)} plus the number of {describe_group(other)}",)
            case "color+count", ColorOf(shape), _:
                return (f"how many shapes have the color of the {shape}",)
            case "compare+count", Compare(one, other), _:
                return (f"how many shapes are there of the color there is more of, {one} or {other}",)
            case "spatial+color", Relation(), ColorOf(shape):
                return (f"{self.first.wordings()[0]} and what color is the {shape}",)
        raise ValueError(f"no wording for composite {self.kind!r}")

    def steps(self, scene: Scene) -> tuple[Step, ...] | None:
        """The tagged parts of the gold response, the final answer last; None where the scene leaves a step without one right answer."""
        first = self.first.answer(scene)
        if first is None or (self.kind == "ocr+count" and len(scene.digits) != 1):
            return None
        second_query = self.second or Count(first)
        second = second_query.answer(scene)
        if second is None:
            return None
        return (self.first.skill, first), (second_query.skill, second), (FINAL, conclusion(self.kind, first, second))

    def answer(self, scene: Scene) -> str | None:
        steps = self.steps(scene)
        return tagged(steps) if steps else None

    def answer_in_some_order(self, scene: Scene, rng: Random) -> str | None:
        """The gold response, its steps swapped half of the time where neither builds on the other."""
        steps = self.steps(scene)
        if steps and self.kind in INDEPENDENT and rng.random() < 0.5:
            first, second, final = steps
            steps = second, first, final
        return tagged(steps) if steps else None

    def witnesses(self, scene: Scene) -> list[Item]:
        second = self.second or Count(self.first.answer(scene) or "")
        return list(dict.fromkeys(self.first.witnesses(scene) + second.witnesses(scene)))


def conclusion(kind: str, first: str, second: str) -> str:
    """The final answer, from those of the steps."""
    if kind in ("ocr+count", "count+count"):
        return str(int(first) + int(second))
    return f"{first} {second}" if kind == "spatial+color" else second


def tagged(steps: tuple[Step, ...]) -> str:
    """The response that shows its steps.

    >>> tagged((("ocr", "3"), ("count", "4"), ("ans", "7")))
    '<ocr>3</ocr><count>4</count><ans>7</ans>'
    """
    return "".join([f"<{name}>{answer}</{name}>" for name, answer in steps])


def propose_composite(kind: str, rng: Random, level: Level) -> tuple[Composite, Blueprint]:
    """A composite question with uniformly drawn sub-answers, as the blueprint of the scenes in which they are true."""
    match kind:
        case "ocr+count":
            target = rng.choice(level.shapes + level.colors)
            shapes = rng.choices(looks_of(target, level), k=rng.randint(0, level.max_count))
            plan = Blueprint(tuple(shapes), lambda look: target not in look, digits=(rng.choice(DIGITS),))
            return Composite(kind, ReadDigits(), Count(target)), plan
        case "count+count":
            one, other = rng.sample(rng.choice((level.shapes, level.colors)), 2)
            shapes = [look for target in (one, other) for look in rng.choices(looks_of(target, level), k=rng.randint(0, level.max_pair))]
            return Composite(kind, Count(one), Count(other)), Blueprint(tuple(shapes), lambda look: one not in look and other not in look)
        case "color+count":
            shape, color = rng.choice(level.shapes), rng.choice(level.colors)
            others = [look for look in looks_of(color, level) if look[1] != shape]
            shapes = [(color, shape), *rng.choices(others, k=rng.randint(0, level.max_count - 2))]
            return Composite(kind, ColorOf(shape), None), Blueprint(tuple(shapes), lambda look: shape not in look and color not in look)
        case "compare+count":
            more, fewer = rng.sample(level.colors, 2)
            many = rng.randint(1, level.max_pair + 1)
            few = rng.randint(0, min(many - 1, level.max_objects - 1 - many))
            shapes = rng.choices(looks_of(more, level), k=many) + rng.choices(looks_of(fewer, level), k=few)
            query = Compare(more, fewer) if rng.random() < 0.5 else Compare(fewer, more)
            return Composite(kind, query, None), Blueprint(tuple(shapes), lambda look: more not in look and fewer not in look)
        case "spatial+color":
            placed = tuple(rng.sample(level.looks, 1 if level.centred else 2))
            shape = rng.choice([shape for shape in level.shapes if shape not in [named for _, named in placed]])
            plan = Blueprint((*placed, (rng.choice(level.colors), shape)), lambda look: look not in placed and look[1] != shape, relation=rng.choice(RELATIONS))
            return Composite(kind, Relation(placed[0], None if level.centred else placed[1]), ColorOf(shape)), plan
    raise ValueError(f"no composite {kind!r}")


def offer_composite(kind: str, rng: Random, scene: Scene) -> Composite | None:
    """A composite question that the scene answers, or None: its steps are offered like single questions."""
    first_skill, second_skill = kind.split("+")
    first = offer(first_skill, rng, scene)
    second = None if kind in ("color+count", "compare+count") else offer(second_skill, rng, scene)
    if first is None or (second is None and second_skill == "color"):
        return None
    if isinstance(first, Count) and isinstance(second, Count) and not _disjoint(first.target, second.target, scene.level):
        return None
    if isinstance(first, Relation) and isinstance(second, ColorOf) and second.shape in first.names_shapes():
        return None  # the text would name the color
    query = Composite(kind, first, second)
    return query if query.steps(scene) else None


def _disjoint(one: str, other: str, level: Level) -> bool:
    return one != other and (one in level.shapes) == (other in level.shapes)


def composite_chance(level: Level) -> float:
    """Share of composite questions that the best constant response, given the text, gets right in full."""
    by_kind = {
        "ocr+count": 1 / 10 / (level.max_count + 1),
        "count+count": 1 / (level.max_pair + 1) ** 2,
        "color+count": 1 / len(level.colors) / (level.max_count - 1),
        "compare+count": 1 / 2 / (level.max_pair + 1),
        "spatial+color": 1 / len(RELATIONS) / len(level.colors),
    }
    return sum(by_kind.values()) / len(COMPOSITES)
