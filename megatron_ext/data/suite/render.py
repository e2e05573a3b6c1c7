"""Draws scenes: one table look-up per cell, a whole batch at a time.

The picture of a scene is a pure function of the scene: its `texture` seeds background, brightness and noise.

    pixel = background + ink * (brightness * color - background) + noise        per cell, then clipped to 0..255
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_ext.data.suite.levels import CELL, COLORS
from megatron_ext.data.suite.scene import Item, Scene
from megatron_ext.data.suite.sprites import is_handwritten, sprite_box, sprite_masks

NOISE = 12  # noise is uniform within this many grey levels either way
_PALETTE = np.array(list(COLORS.values()), np.float32)
_COLOR_ROWS = {color: row for row, color in enumerate(COLORS)}

Box = tuple[int, int, int, int]


def render(scenes: Sequence[Scene], image_size: int) -> np.ndarray:
    """Pictures uint8 [I, image_size, image_size, 3] of scenes of one level; `image_size` is a multiple of the level's (pixels are repeated)."""
    level = scenes[0].level
    grid, size = level.grid, level.image_size
    sprites_IC = np.zeros((len(scenes), grid * grid), np.int64)
    colors_IC = np.zeros((len(scenes), grid * grid), np.int64)
    for index, scene in enumerate(scenes):
        for item in scene.items:
            cell = item.row * grid + item.column
            sprites_IC[index, cell] = item.sprite
            colors_IC[index, cell] = _COLOR_ROWS[item.color]
    ink = sprite_masks(is_handwritten(int(sprites_IC.max())))[sprites_IC]

    background_I3 = np.empty((len(scenes), 3), np.float32)
    brightness_I = np.empty(len(scenes), np.float32)
    noise_IHWC = np.empty((len(scenes), size, size, 3), np.int16)
    for index, scene in enumerate(scenes):
        rng = np.random.default_rng(scene.texture)
        background_I3[index] = 18 + 36 * rng.random(3)
        brightness_I[index] = 0.85 + 0.15 * rng.random()
        noise_IHWC[index] = rng.integers(-NOISE, NOISE + 1, (size, size, 3), np.int8)

    contrast = brightness_I[:, None, None] * _PALETTE[colors_IC] - background_I3[:, None]
    cells = background_I3[:, None, None, None] + ink[..., None] * contrast[:, :, None, None]
    tiles_IHWC = cells.reshape(-1, grid, grid, CELL, CELL, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, size, size, 3) + noise_IHWC
    tiles_IHWC = np.clip(tiles_IHWC, 0, 255).astype(np.uint8)
    scale = image_size // size
    return tiles_IHWC if scale == 1 else tiles_IHWC.repeat(scale, axis=1).repeat(scale, axis=2)


def item_box(item: Item, scene: Scene, image_size: int) -> Box:
    """(top, left, bottom, right) of the object's ink in pixels of the picture, bottom and right exclusive."""
    scale = image_size // scene.level.image_size
    top, left, bottom, right = sprite_box(item.sprite)
    down, across = item.row * CELL, item.column * CELL
    return (down + top) * scale, (across + left) * scale, (down + bottom) * scale, (across + right) * scale
