"""A rank's rows of one step become microbatches: slices of rows with the images that they use, as tensors on the device."""

from __future__ import annotations

import numpy as np
import torch

from megatron_ext.data.collate import TokenBatch
from megatron_ext.model.inputs import model_inputs
from megatron_ext.training.losses import Microbatch


def microbatches(batch: TokenBatch, rows: int, pad_id: int, device: torch.device) -> list[Microbatch]:
    """`batch` in order, `rows` at a time; the last one may be smaller."""
    return [_slice(batch, start, start + rows, pad_id, device) for start in range(0, len(batch.tokens_BS), rows)]


def _slice(batch: TokenBatch, start: int, stop: int, pad_id: int, device: torch.device) -> Microbatch:
    tokens_BS, row_tiles_BM = batch.tokens_BS[start:stop], batch.row_tiles_BM[start:stop]
    used, renumbered = np.unique(row_tiles_BM[row_tiles_BM >= 0], return_inverse=True)
    own_BM = np.full_like(row_tiles_BM, -1)
    own_BM[row_tiles_BM >= 0] = renumbered
    inputs = model_inputs(tokens_BS, batch.tiles_IHWC[used], own_BM, device)
    mask_BS = torch.from_numpy(batch.loss_mask_BS[start:stop].astype(np.float32)).to(device)
    return Microbatch(inputs, mask_BS, int((tokens_BS != pad_id).sum()))
