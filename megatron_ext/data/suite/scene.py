"""Scenes: a grid of cells, each empty or holding one colored shape or one white digit. And how a scene is built from what it must show.

    Blueprint (what must and what may be there)  ->  build  ->  Scene  ->  split_of: the split that owns it

A scene belongs to the split that the hash of its content names, whatever seed drew it; so no scene occurs in two splits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from megatron_ext.data.digits import Split, digit_files
from megatron_ext.data.suite.levels import DIGIT_COLOR, DIGITS, Level
from megatron_ext.data.suite.sprites import NUM_POSES, drawn_sprite, handwritten_sprite, is_handwritten

Look = tuple[str, str]  # (color, shape)


@dataclass(frozen=True, slots=True)
class Item:
    """One object: `kind` is a shape or a digit "0".."9"; `sprite` is the row of the sprite table that draws it (pose or handwriting)."""

    row: int
    column: int
    kind: str
    color: str
    sprite: int

    @property
    def is_digit(self) -> bool:
        return self.color == DIGIT_COLOR

    @property
    def look(self) -> Look:
        return (self.color, self.kind)


@dataclass(frozen=True, slots=True)
class Scene:
    """Objects in raster order, at most one a cell. `texture` seeds background, brightness and noise. The picture is a pure function of the scene."""

    level: Level
    items: tuple[Item, ...]
    texture: int

    @property
    def shapes(self) -> list[Item]:
        return [item for item in self.items if item.color != DIGIT_COLOR]

    @property
    def digits(self) -> list[Item]:
        return [item for item in self.items if item.color == DIGIT_COLOR]

    @property
    def is_handwritten(self) -> bool:
        """Whether the digits are real handwriting."""
        return any(is_handwritten(item.sprite) for item in self.items)

    def content(self) -> str:
        """The canonical text of what is to be seen: cells, kinds and colors, but neither pose nor handwriting nor noise."""
        return f"{self.level.number}|" + ";".join([f"{item.row},{item.column},{item.kind},{item.color}" for item in self.items])


def split_of_text(content: str) -> Split:
    """The split that owns a content: 90 % train, 5 % val, 5 % test by SHA-1."""
    bucket = int.from_bytes(hashlib.sha1(content.encode(), usedforsecurity=False).digest()[:4], "big") % 1000
    return "train" if bucket < 900 else "val" if bucket < 950 else "test"


def split_of(scene: Scene) -> Split:
    """The split that owns the scene, whatever seed drew it."""
    return split_of_text(scene.content())


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What makes an answer true: shapes that must stand in the scene, shapes that may fill it, its digits in raster order
    (None: any) and, when `relation` is given, how the first shape stands to the second, or to the centre of the picture."""

    shapes: tuple[Look, ...]
    may_fill: Callable[[Look], bool]
    digits: tuple[str, ...] | None = None
    relation: str | None = None


def relation_of(row: float, column: float, other_row: float, other_column: float) -> str | None:
    """Where the first place lies as seen from the other: the longer of the two distances decides; None where they are equal."""
    down, right = row - other_row, column - other_column
    if abs(down) == abs(right):
        return None
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "below" if down > 0 else "above"


@lru_cache(maxsize=16)
def _related_cells(level: Level, relation: str) -> tuple[tuple[int, ...], ...]:
    """Every cell that stands in the relation to the centre, or every ordered pair of cells in it."""
    cells = range(level.grid**2)
    if level.centred:
        return tuple((a,) for a in cells if relation_of(*divmod(a, level.grid), *level.centre) == relation)
    pairs = ((a, b) for a in cells for b in cells)
    return tuple((a, b) for a, b in pairs if relation_of(*divmod(a, level.grid), *divmod(b, level.grid)) == relation)


def build(blueprint: Blueprint, rng: Random, level: Level, handwritten: dict[str, tuple[int, ...]] | None) -> Scene:
    """A random scene that satisfies the blueprint. `handwritten` maps digits to the digit files to draw them from; None draws printed ones."""
    digits = blueprint.digits
    if digits is None:
        room = level.max_objects - len(blueprint.shapes)
        digits = tuple(rng.choices(DIGITS, k=min(room, 1 + int(rng.random() * level.max_digits))))
    required = len(blueprint.shapes) + len(digits)
    looks = list(blueprint.shapes)
    fillers = [look for look in level.looks if blueprint.may_fill(look)]
    looks += rng.choices(fillers, k=rng.randint(max(level.min_objects, required), level.max_objects) - required)
    cells = _draw_cells(len(looks) + len(digits), rng, level, blueprint.relation)

    items = []
    for cell, (color, shape) in zip(cells, looks, strict=False):
        items.append(Item(*divmod(cell, level.grid), shape, color, drawn_sprite(shape, int(rng.random() * NUM_POSES))))
    for cell, digit in zip(sorted(cells[len(looks) :]), digits, strict=True):
        sprite = handwritten_sprite(rng.choice(handwritten[digit])) if handwritten else drawn_sprite(digit, int(rng.random() * NUM_POSES))
        items.append(Item(*divmod(cell, level.grid), digit, DIGIT_COLOR, sprite))
    items.sort(key=lambda item: (item.row, item.column))
    return Scene(level, tuple(items), rng.getrandbits(32))


def _draw_cells(count: int, rng: Random, level: Level, relation: str | None) -> list[int]:
    """Distinct cells; the first, or the first two, stand in the relation when there is one."""
    cells = level.grid**2
    if relation is None:
        return rng.sample(range(cells), count)
    placed = rng.choice(_related_cells(level, relation))
    rest = [cell for cell in range(cells) if cell not in placed]
    return [*placed, *rng.sample(rest, count - len(placed))]


def build_in_split(blueprint: Blueprint, rng: Random, level: Level, split: Split, real_digits: float) -> Scene:
    """Builds until the scene belongs to the split: foreign scenes are rejected, the blueprint (and so the answer) stays."""
    handwritten = digit_files(split) if rng.random() < real_digits else None
    while True:
        scene = build(blueprint, rng, level, handwritten)
        if split_of(scene) == split:
            return scene
