"""From vision tokens to places in a picture: attention over tiles becomes a map over each whole picture, and no weight is lost on the way.

    tile i lies at top, left, bottom, right of its picture (sides of length 1); its side x side patches share it evenly
    map[r, c] = sum over patches of weight x (how much of the patch's area lies in cell r, c)

A picture cut into R x C tiles has R side x C side cells, at most MOST_SIDE either way; its thumbnail's patches, which are larger, are spread over the cells
that they cover.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MOST_SIDE = 32
Box = tuple[float, float, float, float]
"""Top, left, bottom, right in a picture whose sides have length 1."""


@dataclass(frozen=True)
class Grid:
    """The cells of one picture and the tiles that show it: those numbered in `tiles`, places float32 [n, 5] as in `batch/tiles.py`."""

    rows: int
    columns: int
    tiles: range
    places_I5: np.ndarray

    @property
    def cells(self) -> int:
        return self.rows * self.columns


def grids_of(places_I5: np.ndarray, side: int) -> list[Grid]:
    """The pictures that a prompt's tiles show, in order. A tile that is all of its picture is one; tiles that are parts are one with the thumbnail behind them.

    >>> whole, parts = [0, 0, 1, 1, 0], [[0, 0, 1, 0.5, 0], [0, 0.5, 1, 1, 0], [0, 0, 1, 1, 1]]
    >>> [(grid.rows, grid.columns, grid.tiles) for grid in grids_of(np.array([whole, *parts]), 8)]
    [(8, 8, range(0, 1)), (8, 16, range(1, 4))]
    """
    found, start = [], 0
    for index, (top, left, bottom, right, thumbnail) in enumerate(places_I5.tolist()):
        whole = (top, left, bottom, right) == (0, 0, 1, 1)
        last = index + 1 == len(places_I5) or (not thumbnail and (bottom, right) == (1, 1) and not places_I5[index + 1, 4])
        if thumbnail or whole or last:
            own = places_I5[start : index + 1]
            down, across = (round(1 / float(own[0, far] - own[0, near])) for near, far in ((0, 2), (1, 3)))
            found.append(Grid(min(down * side, MOST_SIDE), min(across * side, MOST_SIDE), range(start, index + 1), own))
            start = index + 1
    return found


def on_pictures(weights_XV: np.ndarray, grids: list[Grid], side: int) -> np.ndarray:
    """Float64 [..., cells]: attention [..., V] over all tiles of a prompt, as maps over its pictures, one behind the other. Sums are kept."""
    tiles = weights_XV.reshape(*weights_XV.shape[:-1], -1, side, side).astype(np.float64)
    maps = []
    for grid in grids:
        total = 0.0
        for tile, (top, left, bottom, right, _) in zip(grid.tiles, grid.places_I5.tolist(), strict=True):
            down, across = _shares(top, bottom, side, grid.rows), _shares(left, right, side, grid.columns)
            total = total + np.einsum("...ab,ar,bc->...rc", tiles[..., tile, :, :], down, across)
        maps.append(np.reshape(total, (*weights_XV.shape[:-1], grid.cells)))
    return np.concatenate(maps, axis=-1) if maps else np.zeros((*weights_XV.shape[:-1], 0))


def inside(weights_XV: np.ndarray, grid: Grid, side: int, boxes: list[Box]) -> np.ndarray:
    """How much of the attention [..., V] falls into the boxes of a prompt's only picture, float64 [...]: each patch counts with the share of its area that they
    cover. By chance it would be their area. Boxes do not overlap."""
    covered_V = []
    for top, left, bottom, right, _ in grid.places_I5.tolist():
        share = np.zeros((side, side))
        for box in boxes:
            down, across = (_covered(start, stop, side, *edges) for start, stop, edges in ((top, bottom, box[0::2]), (left, right, box[1::2])))
            share += down[:, None] * across
        covered_V.append(share.clip(max=1.0).ravel())
    return weights_XV.astype(np.float64) @ np.concatenate(covered_V)


def entropy(weights_XV: np.ndarray) -> np.ndarray:
    """-sum a log a / log V of attention [..., V], float64 [...]: 0 at a single patch, 1 where all patches have the same weight."""
    weights = weights_XV.astype(np.float64)
    return -(weights * np.log(np.where(weights > 0, weights, 1.0))).sum(-1) / max(float(np.log(weights.shape[-1])), 1e-12)


def _shares(start: float, stop: float, side: int, cells: int) -> np.ndarray:
    """[side, cells]: how much of each of `side` equal parts of [start, stop] lies in each of `cells` equal parts of [0, 1]. Rows sum to 1."""
    edges = start + (stop - start) * np.arange(side + 1) / side
    places = np.arange(cells + 1) / cells
    overlap = np.minimum(edges[1:, None], places[1:]) - np.maximum(edges[:-1, None], places[:-1])
    return overlap.clip(min=0) * side / (stop - start)


def _covered(start: float, stop: float, side: int, low: float, high: float) -> np.ndarray:
    """[side]: how much of each of `side` equal parts of [start, stop] lies in [low, high]."""
    edges = start + (stop - start) * np.arange(side + 1) / side
    return (np.minimum(edges[1:], high) - np.maximum(edges[:-1], low)).clip(min=0) * side / (stop - start)
