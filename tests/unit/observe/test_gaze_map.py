"""Attention over tiles as maps over pictures: places by hand, and no weight lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.batch.tiles import WHOLE, grid_places
from megatron_ext.observe.gaze_map import MOST_SIDE, entropy, grids_of, inside, on_pictures

ONE = np.array([WHOLE], np.float32)


def test_a_patch_of_a_whole_picture_is_its_own_cell() -> None:
    """Patch 5 of 4 x 4 lies in row 2, column 2."""
    map_C = on_pictures(np.eye(16)[5], grids_of(ONE, 4), 4)
    assert map_C.reshape(4, 4).tolist() == np.eye(16)[5].reshape(4, 4).tolist()


def test_tiles_lie_side_by_side_and_the_thumbnail_s_patches_cover_what_they_show() -> None:
    """Two tiles of 2 x 2 patches make 2 x 4 cells. Patch 1 of the right tile is the last cell above; patch 0 of the thumbnail covers two cells."""
    grids = grids_of(grid_places(1, 2), 2)
    assert [(grid.rows, grid.columns) for grid in grids] == [(2, 4)]
    weights_V = np.zeros(12)
    weights_V[[5, 8]] = 0.6, 0.4
    assert on_pictures(weights_V, grids, 2).reshape(2, 4).tolist() == [[0.2, 0.2, 0, 0.6], [0, 0, 0, 0]]


def test_pictures_of_one_prompt_are_told_apart() -> None:
    grids = grids_of(np.concatenate([ONE, grid_places(2, 1), ONE, grid_places(1, 3)]), 4)
    assert [(grid.tiles, grid.rows, grid.columns) for grid in grids] == [
        (range(1), 4, 4),
        (range(1, 4), 8, 4),
        (range(4, 5), 4, 4),
        (range(5, 9), 4, 12),
    ]


@given(rows=st.integers(1, 3), columns=st.integers(1, 3), side=st.integers(1, 13), seed=st.integers(0, 99))
def test_a_map_sums_to_what_the_weights_sum_to_and_an_even_gaze_over_a_grid_is_an_even_map(rows: int, columns: int, side: int, seed: int) -> None:
    """Where tiles make more cells than are shown, too."""
    places = grid_places(rows, columns)
    grids = grids_of(places, side)
    assert len(grids) == 1 and max(grids[0].rows, grids[0].columns) <= MOST_SIDE
    weights_V = np.random.default_rng(seed).dirichlet(np.ones(len(places) * side * side))
    assert on_pictures(weights_V, grids, side).sum() == pytest.approx(1.0)
    even_C = on_pictures(np.full(len(places) * side * side, 1.0), grids, side)
    np.testing.assert_allclose(even_C, even_C.mean(), rtol=1e-5)


@given(seed=st.integers(0, 99))
def test_the_gaze_within_boxes_is_their_area_when_it_is_even_and_all_of_it_when_they_cover_it(seed: int) -> None:
    top, left, *size = np.random.default_rng(seed).uniform(0, 0.5, 4)
    box = (top, left, top + size[0], left + size[1])
    (grid,) = grids_of(ONE, 8)
    assert inside(np.full(64, 1 / 64), grid, 8, [box]) == pytest.approx(size[0] * size[1])
    assert inside(np.eye(64)[63], grid, 8, [(0.0, 0.0, 1.0, 1.0)]) == pytest.approx(1.0)


def test_half_a_patch_in_a_box_counts_half() -> None:
    assert inside(np.eye(4)[0], grids_of(ONE, 2)[0], 2, [(0.0, 0.0, 0.5, 0.25)]) == pytest.approx(0.5)


def test_entropy_is_one_for_an_even_gaze_and_nought_for_a_single_patch() -> None:
    assert entropy(np.stack([np.full(16, 1 / 16), np.eye(16)[3]])).tolist() == pytest.approx([1.0, 0.0])
