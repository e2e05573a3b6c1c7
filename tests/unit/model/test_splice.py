"""Image embeddings land in image positions, in order; what a position may look at grows with the images before it."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.batch import Markers
from megatron_ext.model.splice import inject_at, splice, visible_until

IMAGE = 9


def test_tiles_fill_their_placeholders_in_order_and_rows_may_share_a_tile() -> None:
    tokens = torch.tensor([[1, IMAGE, IMAGE, 2, IMAGE, IMAGE], [IMAGE, IMAGE, 3, 4, 5, 6]])
    text = torch.zeros(2, 6, 1)
    images = torch.tensor([[[10.0], [11.0]], [[20.0], [21.0]]])
    rows = torch.tensor([[1, 0], [0, -1]])
    out = splice(text, images, rows, tokens == IMAGE)[..., 0]
    assert out.tolist() == [[0, 20, 21, 0, 10, 11], [10, 11, 0, 0, 0, 0]]


def test_placeholders_and_tiles_that_disagree_are_named() -> None:
    tokens = torch.tensor([[1, 2], [IMAGE, 3]])
    with pytest.raises(ValueError, match="row 1 has 1 image-context tokens for 2 image embeddings"):
        splice(torch.zeros(2, 2, 1), torch.zeros(1, 2, 1), torch.tensor([[-1], [0]]), tokens == IMAGE)


def test_a_position_sees_a_tile_from_its_last_placeholder_on() -> None:
    """Two placeholders per tile, eight vision tokens per tile."""
    is_image = torch.tensor([[False, True, True, False, True, True, False]])
    assert visible_until(is_image, tokens_per_tile=2, vision_tokens=8).tolist() == [[0, 0, 8, 8, 8, 16, 16]]


def test_memory_tokens_alone_are_refined_where_those_are_asked_for() -> None:
    """Two questions with two memory tokens each, padded, and packed one after another."""
    rows = torch.tensor([[IMAGE, IMAGE, 3, 7, 8, 4, 7, 8, 0, 0], [1, 2, 7, 8, 4, 5, 6, 1, 7, 8]])
    markers, packed = Markers(turn=1, slots=(7, 8)), rows.reshape(1, -1)
    found = inject_at("slots", rows, rows == IMAGE, (), markers)
    assert found.tolist() == [[place in (3, 4, 6, 7) for place in range(10)], [place in (2, 3, 8, 9) for place in range(10)]]
    assert torch.equal(inject_at("slots", packed, packed == IMAGE, (0, 10, 20), markers), found.reshape(1, -1))
