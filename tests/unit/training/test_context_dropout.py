"""Hidden image tokens: the same in every layout and after a resume, and out of every other position's sight."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from megatron_ext.batch import Tiles
from megatron_ext.data.collate import TokenBatch
from megatron_ext.model.assembly import build_model
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.training.context_dropout import with_hidden
from megatron_ext.training.microbatches import microbatches
from tests.support.models import IMAGE, TOKENS_PER_TILE, open_gates, small_batch, small_config

PAD = 0


def rows_with_images(rows: int, seed: int = 0) -> TokenBatch:
    batch = small_batch(rows, seed=seed)
    tokens = batch.tokens_BS.numpy().astype(np.int32)
    tokens[1, 20:] = PAD
    pixels = np.random.default_rng(seed).integers(0, 256, size=(len(batch.tiles_ICHW), 16, 16, 3), dtype=np.uint8)
    return TokenBatch(tokens, (tokens > 30).astype(np.uint8), Tiles.whole(pixels), batch.row_tiles_BM.numpy().astype(np.int32))


def test_a_share_of_the_image_tokens_is_hidden_and_no_other() -> None:
    tokens = np.full((500, 6), IMAGE, np.int32)
    tokens[:, 0] = 9
    batch = TokenBatch(tokens, np.zeros_like(tokens, np.uint8), rows_with_images(3).tiles, np.zeros((500, 1), np.int32))
    hidden = with_hidden(batch, 0.3, IMAGE, seed=1, step=2, first_row=0).hidden_BS
    assert hidden is not None and not hidden[:, 0].any()
    assert abs(hidden[:, 1:].mean() - 0.3) < 0.03
    assert with_hidden(batch, 0.0, IMAGE, seed=1, step=2, first_row=0) is batch


def test_every_layout_and_a_resumed_run_hide_the_same_and_another_step_or_seed_others() -> None:
    batch = rows_with_images(6)

    def hidden(rows: slice, seed: int = 1, step: int = 2) -> np.ndarray:
        part = TokenBatch(batch.tokens_BS[rows], batch.loss_mask_BS[rows], batch.tiles, batch.row_tiles_BM[rows])
        found = with_hidden(part, 0.5, IMAGE, seed, step, rows.start).hidden_BS
        assert found is not None
        return found

    whole = hidden(slice(0, 6))
    assert np.array_equal(np.concatenate([hidden(slice(0, 2)), hidden(slice(2, 6))]), whole)
    assert not np.array_equal(hidden(slice(0, 6), step=3), whole) and not np.array_equal(hidden(slice(0, 6), seed=2), whole)


def test_what_is_hidden_changes_no_other_position_unless_a_tap_looks(context: ParallelContext) -> None:
    """With CLVR switched off and the tokens of a row's image all hidden, another image changes nothing behind them; with it on, it does."""
    batch = small_batch()
    hidden = batch.tokens_BS == IMAGE
    first = 2 + TOKENS_PER_TILE
    for clvr in (small_config().clvr, small_config().clvr.model_copy(update={"enabled": False})):
        model = build_model(small_config(clvr=clvr), IMAGE, context, seed=1)
        open_gates(model)
        with torch.no_grad():
            one, other = (model(replace(batch, hidden_BS=hidden, tiles_ICHW=sign * batch.tiles_ICHW)) for sign in (1, -1))
        assert torch.allclose(one[first:], other[first:], atol=1e-6) == (not clvr.enabled)
        assert not torch.allclose(one[2:first], other[2:first], atol=1e-3)


def test_packed_rows_hide_what_padded_ones_hide(context: ParallelContext) -> None:
    model = build_model(small_config(), IMAGE, context, seed=1)
    open_gates(model)
    batch = with_hidden(rows_with_images(3), 0.5, IMAGE, seed=0, step=0, first_row=0)
    with torch.no_grad():
        (padded,) = microbatches(batch, 3, PAD, context.device)
        (packed,) = microbatches(batch, 3, PAD, context.device, packed=True)
        rows, row = model(padded.inputs), model(packed.inputs)
        plain = model(replace(padded.inputs, hidden_BS=None))
    torch.testing.assert_close(row[24:44, 0], rows[:20, 1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain, rows, atol=1e-3)
