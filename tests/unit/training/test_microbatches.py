"""A rank's rows cut into microbatches: nothing lost, nothing shared that is not used."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_ext.batch import Tiles
from megatron_ext.data.collate import TokenBatch
from megatron_ext.training.microbatches import microbatches

CPU = torch.device("cpu")


def batch() -> TokenBatch:
    """Four rows; tiles 3, 3, none and 1 + 0."""
    tokens = np.array([[9, 8, 7, 0], [9, 8, 0, 0], [9, 0, 0, 0], [9, 8, 7, 6]], np.int32)
    row_tiles = np.array([[3, -1], [3, -1], [-1, -1], [1, 0]], np.int32)
    tiles = np.stack([np.full((4, 4, 3), 60 * tile, np.uint8) for tile in range(4)])
    return TokenBatch(tokens, (tokens > 7).astype(np.uint8), Tiles.whole(tiles), row_tiles)


def test_each_microbatch_has_its_rows_and_only_the_tiles_they_use() -> None:
    first, second = microbatches(batch(), 2, 0, CPU)
    assert first.inputs.tokens_BS.tolist() == [[9, 8, 7, 0], [9, 8, 0, 0]]
    assert first.inputs.row_tiles_BM.tolist() == [[0, -1], [0, -1]]
    assert len(first.inputs.tiles_ICHW) == 1
    assert second.inputs.row_tiles_BM.tolist() == [[-1, -1], [1, 0]]
    assert len(second.inputs.tiles_ICHW) == 2
    assert (first.num_tokens, second.num_tokens) == (5, 5)
    assert second.mask_BS.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 9])
def test_every_row_sees_the_pixels_it_saw_in_the_whole_batch(rows: int) -> None:
    (whole,) = microbatches(batch(), 4, 0, CPU)

    def pixels(inputs: list) -> list:
        return [[None if tile < 0 else x.tiles_ICHW[tile].mean().item() for tile in row] for x in inputs for row in x.row_tiles_BM.tolist()]

    parts = microbatches(batch(), rows, 0, CPU)
    assert pixels([part.inputs for part in parts]) == pixels([whole.inputs])
    assert torch.equal(torch.cat([part.inputs.tokens_BS for part in parts]), whole.inputs.tokens_BS)


def test_rows_without_images_make_a_microbatch_without_tiles() -> None:
    parts = microbatches(batch(), 1, 0, CPU)
    assert len(parts[2].inputs.tiles_ICHW) == 0


def test_packed_conversations_stand_one_after_another_without_padding() -> None:
    """Lengths 3, 2, 1 and 4; the tiles of the rows that show some, in order."""
    (packed,) = microbatches(batch(), 4, 0, CPU, packed=True)
    assert packed.inputs.tokens_BS.tolist() == [[9, 8, 7, 9, 8, 9, 9, 8, 7, 6]]
    assert packed.inputs.bounds == (0, 3, 5, 6, 10)
    assert packed.mask_BS.tolist() == [[0, 1, 0, 0, 1, 0, 0, 1, 0, 0]], "a sample's first token is no target"
    (whole,) = microbatches(batch(), 4, 0, CPU)
    shown = [tile for row in whole.inputs.row_tiles_BM.tolist() for tile in row if tile >= 0]
    assert packed.inputs.row_tiles_BM.tolist() == [shown]
    assert (packed.num_tokens, packed.num_samples) == (whole.num_tokens, whole.num_samples) == (10, 4)


def test_packed_conversations_are_rounded_up_to_what_the_layout_divides() -> None:
    (packed,) = microbatches(batch(), 4, 0, CPU, packed=True, multiple=4)
    assert packed.inputs.bounds == (0, 4, 8, 12, 16)
    assert packed.inputs.tokens_BS.tolist() == [[9, 8, 7, 0, 9, 8, 0, 0, 9, 0, 0, 0, 9, 8, 7, 6]]
    assert packed.inputs.padding_BS is not None and packed.inputs.padding_BS.sum() == 6


def test_balancing_losses_weigh_as_many_targets_as_the_main_loss_has() -> None:
    """A row's first token is no target: nothing predicts it."""
    (whole,) = microbatches(batch(), 4, 0, CPU)
    assert whole.inputs.aux_weight == float(whole.mask_BS[:, 1:].sum())
