"""Pictures as the model sees them: square tiles of pixels, and where each of them lies in its picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ext.shapes import check_shape

WHOLE = (0.0, 0.0, 1.0, 1.0, 0.0)
"""The place of a tile that is all of its picture."""


@dataclass(frozen=True)
class Tiles:
    """`pixels_IHWC` uint8. `places_I5` float32: top, left, bottom and right of the tile in its picture, whose sides have length 1; then 1 for a thumbnail (the
    whole picture once more, beside its parts), else 0."""

    pixels_IHWC: np.ndarray
    places_I5: np.ndarray

    def __post_init__(self) -> None:
        check_shape("pixels_IHWC", self.pixels_IHWC, None, None, None, 3)
        check_shape("places_I5", self.places_I5, len(self.pixels_IHWC), 5)

    @classmethod
    def whole(cls, pixels_IHWC: np.ndarray) -> Tiles:
        """Every tile is a picture of its own."""
        return cls(pixels_IHWC, np.tile(np.array(WHOLE, np.float32), (len(pixels_IHWC), 1)))

    @classmethod
    def join(cls, parts: Sequence[Tiles]) -> Tiles:
        """All tiles of all parts, in order."""
        parts = [part.loaded() for part in parts if len(part)]
        if not parts:
            return NO_TILES
        return cls(np.concatenate([part.pixels_IHWC for part in parts]), np.concatenate([part.places_I5 for part in parts]))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the pixels: tiles, height, width, 3."""
        return self.pixels_IHWC.shape

    @property
    def nbytes(self) -> int:
        """Of the pixels."""
        return math.prod(self.shape)

    def loaded(self) -> Tiles:
        """The same tiles, with their pixels at hand."""
        return self

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, chosen: np.ndarray | slice) -> Tiles:
        found = self.loaded()
        return Tiles(found.pixels_IHWC[chosen], found.places_I5[chosen])


NO_TILES = Tiles.whole(np.zeros((0, 1, 1, 3), np.uint8))


def grid_places(rows: int, columns: int) -> np.ndarray:
    """Places float32 [n, 5] of a picture cut into a grid, row by row; after more than one tile its thumbnail.

    >>> grid_places(1, 2).tolist()
    [[0.0, 0.0, 1.0, 0.5, 0.0], [0.0, 0.5, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0, 1.0]]
    """
    places = [(row / rows, column / columns, (row + 1) / rows, (column + 1) / columns, 0.0) for row in range(rows) for column in range(columns)]
    if len(places) > 1:
        places.append((*WHOLE[:4], 1.0))
    return np.array(places, np.float32)
