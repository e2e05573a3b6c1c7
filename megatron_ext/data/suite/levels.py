"""The knobs of the suite: what a scene of each level may hold. Two levels; both keep one cell of the grid on one image token of the tiny model.

| level | image   | grid  | shapes | colors | objects | digits | counts | relations of an object                      |
|-------|---------|-------|--------|--------|---------|--------|--------|---------------------------------------------|
| 0     | 32 x 32 | 4 x 4 | 4      | 4      | 3-8     | 1-2    | 0-5    | to the centre of the picture                |
| 1     | 48 x 48 | 6 x 6 | 6      | 6      | 4-12    | 1-3    | 0-8    | to another object                           |
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron_ext.config.schema import DataConfig
from megatron_ext.errors import DataError

CELL = 8  # pixels: two patches of four, which pixel unshuffle turns into one image token

DIGITS = tuple("0123456789")
SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses", "ring": "rings", "bar": "bars"}
RELATIONS = ("left", "right", "above", "below")

DIGIT_COLOR = "white"
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (226, 52, 52),
    "green": (46, 190, 72),
    "blue": (64, 96, 240),
    "yellow": (236, 216, 56),
    "purple": (168, 64, 204),
    "orange": (242, 138, 36),
    DIGIT_COLOR: (238, 238, 238),
}


@dataclass(frozen=True)
class Level:
    """What scenes of one difficulty hold. `max_pair` bounds each of two counts asked about the same scene, so that both always fit."""

    number: int
    grid: int
    shapes: tuple[str, ...]
    colors: tuple[str, ...]
    min_objects: int
    max_objects: int
    max_digits: int
    max_count: int
    max_pair: int
    centred: bool  # relations are to the centre of the picture, not to another object

    @property
    def image_size(self) -> int:
        """Pixels of a side before magnification."""
        return self.grid * CELL

    @property
    def centre(self) -> tuple[float, float]:
        """Row and column of the middle of the picture, in cells."""
        return (self.grid - 1) / 2, (self.grid - 1) / 2

    @cached_property
    def looks(self) -> tuple[tuple[str, str], ...]:
        """Every (color, shape) a shape of this level can have."""
        return tuple((color, shape) for color in self.colors for shape in self.shapes)


_COLOR_WORDS = tuple(COLORS)
LEVELS = (
    Level(0, 4, SHAPES[:4], _COLOR_WORDS[:4], 3, 8, 2, 5, 3, centred=True),
    Level(1, 6, SHAPES, _COLOR_WORDS[:6], 4, 12, 3, 8, 4, centred=False),
)


def level_of(config: DataConfig) -> Level:
    """The level the configuration asks for. Raises DataError for a level that does not exist or an image size it cannot be drawn at.

    >>> level_of(DataConfig(level=0)).image_size
    32
    """
    if config.level >= len(LEVELS):
        raise DataError("data.level", f"there is no level {config.level}", f"use one of 0 to {len(LEVELS) - 1}")
    level = LEVELS[config.level]
    if config.image_size % level.image_size:
        size = level.image_size
        raise DataError(
            "data.image_size", f"{config.image_size} is not a multiple of {size}, the side of a level {level.number} scene", f"use {size} or {2 * size}"
        )
    return level
