"""CLVR's keys stand where their patches are in the whole picture, and its values know a thumbnail."""

from __future__ import annotations

import math

import numpy as np
import torch

from megatron_ext.batch.tiles import WHOLE, grid_places
from megatron_ext.model.assembly import build_model
from megatron_ext.model.clvr import patch_positions
from megatron_ext.parallel.groups import ParallelContext
from tests.support.models import IMAGE, small_config

PLACES = torch.from_numpy(np.concatenate([[WHOLE], grid_places(2, 2)]).astype(np.float32))
SIDE, WIDTH = 4, 32


def test_a_position_is_the_waves_of_the_patchs_centre_in_the_picture() -> None:
    """The last patch of the tile at the bottom right has its centre at 1 - 1/16 of the picture, by hand."""
    found = patch_positions(SIDE**2, WIDTH, PLACES)
    assert found.shape == (6, SIDE**2, WIDTH)
    angles = torch.tensor([2 * math.pi * (15 / 16) * 2.0 ** (number * math.log2(SIDE) / (WIDTH // 4 - 1)) for number in range(WIDTH // 4)])
    expected = torch.cat([angles.sin(), angles.cos()]).repeat(2)
    torch.testing.assert_close(found[4, -1], expected, atol=1e-5, rtol=0)


def test_a_thumbnail_stands_where_its_picture_stands_and_tiles_where_they_were_cut() -> None:
    found = patch_positions(SIDE**2, WIDTH, PLACES)
    assert torch.equal(found[5], found[0])
    rows = found[1].unflatten(0, (SIDE, SIDE))[:, 0, : WIDTH // 2], found[3].unflatten(0, (SIDE, SIDE))[:, 0, : WIDTH // 2]
    assert not torch.allclose(*rows)  # the tile below
    columns = (found[number].unflatten(0, (SIDE, SIDE))[0, :, WIDTH // 2 :] for number in (1, 3))
    assert torch.equal(*columns)


def test_only_the_values_of_a_thumbnail_are_told_what_it_is(context: ParallelContext) -> None:
    tap = build_model(small_config(), IMAGE, context).decoder.taps[0]
    features = torch.randn(1, 16, 32).expand(6, -1, -1)
    with torch.no_grad():
        before = tap.memory(features, PLACES)
        tap.thumbnail.fill_(0.5)
        keys, values = tap.memory(features, PLACES)
    assert torch.equal(keys, before[0])
    assert torch.equal(values[:5], before[1][:5]) and not torch.allclose(values[5], before[1][5])
