"""The sprite table: every shape and printed digit in 16 poses, then every handwritten digit, as ink masks of one cell.

Shapes are drawn once at eight times the resolution and averaged down, so edges are smooth; drawing a scene is then a table look-up (`render`).
Row 0 is the empty cell, rows 1.. hold kind by kind the poses, and the handwritten digits follow.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from megatron_ext.data.digits import digit_masks
from megatron_ext.data.suite.levels import CELL, DIGITS, SHAPES

_FINE = 8  # fine pixels per pixel
_SHIFTS = (-6, -2, 2, 6)  # fine pixels: every pose of a shape lies less than one pixel off the centre
NUM_POSES = len(_SHIFTS) ** 2
KINDS = SHAPES + DIGITS
_FIRST_HANDWRITTEN = 1 + len(KINDS) * NUM_POSES
_KIND_ROWS = {kind: 1 + index * NUM_POSES for index, kind in enumerate(KINDS)}

# A printed digit is 5 x 7 pixels; each string is the seven rows from top to bottom.
_FONT = {
    "0": "01110 10001 10001 10001 10001 10001 01110",
    "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00110 01000 10000 11111",
    "3": "11110 00001 00001 01110 00001 00001 11110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "00110 01000 10000 11110 10001 10001 01110",
    "7": "11111 00001 00010 00100 01000 01000 01000",
    "8": "01110 10001 10001 01110 10001 10001 01110",
    "9": "01110 10001 10001 01111 00001 00010 01100",
}


def drawn_sprite(kind: str, pose: int) -> int:
    """The table row of a shape or printed digit in one of its poses."""
    return _KIND_ROWS[kind] + pose


def handwritten_sprite(index: int) -> int:
    """The table row of a handwritten digit file."""
    return _FIRST_HANDWRITTEN + index


def is_handwritten(sprite: int) -> bool:
    return sprite >= _FIRST_HANDWRITTEN


def _fine_shape(shape: str) -> np.ndarray:
    """Boolean mask [64, 64] of a shape about three pixels in radius, centred in the cell."""
    axis = (np.arange(CELL * _FINE) + 0.5) / _FINE - CELL / 2
    y, x = axis[:, None], axis[None, :]
    radius = np.hypot(y, x)
    match shape:
        case "circle":
            return radius <= 3.0
        case "square":
            return np.maximum(np.abs(y), np.abs(x)) <= 2.75
        case "triangle":
            return (np.abs(x) <= (y + 3.0) / 1.9) & (y <= 2.75)
        case "cross":
            return (np.minimum(np.abs(y), np.abs(x)) <= 0.9) & (np.maximum(np.abs(y), np.abs(x)) <= 3.0)
        case "ring":
            return (radius <= 3.1) & (radius >= 1.7)
        case "bar":
            return (np.abs(y) <= 1.1) & (np.abs(x) <= 3.1)
    raise ValueError(f"no drawing for shape {shape!r}")


def _shape_poses(shape: str) -> list[np.ndarray]:
    """The shape at every sub-pixel shift, averaged down to the cell."""
    fine = _fine_shape(shape)
    shifted = (np.roll(fine, (down, right), axis=(0, 1)) for down in _SHIFTS for right in _SHIFTS)
    return [mask.reshape(CELL, _FINE, CELL, _FINE).mean(axis=(1, 3)) for mask in shifted]


def _digit_poses(digit: str) -> list[np.ndarray]:
    """The digit at whole-pixel shifts, since strokes one pixel wide would fade between pixels: four places across, two down (each twice)."""
    bitmap = np.array([[float(pixel) for pixel in row] for row in _FONT[digit].split()])
    places = [(down, right) for down in (0, 1, 0, 1) for right in range(4)]
    return [np.pad(bitmap, ((down, 1 - down), (right, 3 - right))) for down, right in places]


@lru_cache(maxsize=1)
def _drawn_masks() -> np.ndarray:
    rows = [np.zeros((CELL, CELL))]
    for kind in KINDS:
        rows += _digit_poses(kind) if kind in DIGITS else _shape_poses(kind)
    return np.stack(rows).astype(np.float32)


@lru_cache(maxsize=2)
def sprite_masks(handwritten: bool) -> np.ndarray:
    """Ink in [0, 1], float32 [sprites, 8, 8]; the handwritten rows only when asked for, since they need scikit-learn's data file."""
    return np.concatenate([_drawn_masks(), digit_masks()]) if handwritten else _drawn_masks()


@lru_cache(maxsize=4096)
def sprite_box(sprite: int) -> tuple[int, int, int, int]:
    """The tightest (top, left, bottom, right) around the ink, in pixels of the cell, bottom and right exclusive."""
    inked = sprite_masks(is_handwritten(sprite))[sprite] > 0
    rows, columns = np.flatnonzero(inked.any(1)), np.flatnonzero(inked.any(0))
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1
