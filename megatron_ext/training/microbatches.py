"""A rank's rows of one step become microbatches: slices of rows with the images that they use, as tensors on the device.

padded    the rows as they are, as long as the longest of the batch
packed    the rows' conversations one after another in a single row, each cut to its length (rounded up to what the layout divides)
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import torch

from megatron_ext.data.collate import TokenBatch
from megatron_ext.model.inputs import model_inputs
from megatron_ext.shapes import round_up
from megatron_ext.training.losses import Microbatch


def microbatches(batch: TokenBatch, rows: int, pad_id: int, device: torch.device, *, packed: bool = False, multiple: int = 1) -> list[Microbatch]:
    """`batch` in order, `rows` conversations at a time; the last microbatch may be smaller. Packed samples have lengths that divide by `multiple`."""
    slices = [_slice(batch, start, start + rows) for start in range(0, len(batch.tokens_BS), rows)]
    return [_packed(part, pad_id, multiple, device) if packed else _padded(part, pad_id, device) for part in slices]


def _slice(batch: TokenBatch, start: int, stop: int) -> TokenBatch:
    """Some of the rows, with only the images they show."""
    row_tiles_BM = batch.row_tiles_BM[start:stop]
    used, renumbered = np.unique(row_tiles_BM[row_tiles_BM >= 0], return_inverse=True)
    own_BM = np.full_like(row_tiles_BM, -1)
    own_BM[row_tiles_BM >= 0] = renumbered
    return TokenBatch(batch.tokens_BS[start:stop], batch.loss_mask_BS[start:stop], batch.tiles[used], own_BM)


def _padded(part: TokenBatch, pad_id: int, device: torch.device, bounds: tuple[int, ...] = (), samples: int | None = None) -> Microbatch:
    padding_BS = torch.from_numpy(part.tokens_BS == pad_id).to(device)
    targets = float(part.loss_mask_BS[:, 1:].sum())
    inputs = model_inputs(part.tokens_BS, part.tiles, part.row_tiles_BM, device, bounds=bounds, padding_BS=padding_BS, aux_weight=targets)
    mask_BS = torch.from_numpy(part.loss_mask_BS.astype(np.float32)).to(device)
    return Microbatch(inputs, mask_BS, int((part.tokens_BS != pad_id).sum()), len(part.tokens_BS) if samples is None else samples)


def _packed(part: TokenBatch, pad_id: int, multiple: int, device: torch.device) -> Microbatch:
    lengths = [round_up(int(np.flatnonzero(row != pad_id)[-1]) + 1, multiple) for row in part.tokens_BS]
    bounds = (0, *accumulate(lengths))
    tokens_1S = np.full((1, bounds[-1]), pad_id, part.tokens_BS.dtype)
    mask_1S = np.zeros((1, bounds[-1]), part.loss_mask_BS.dtype)
    for row, (start, length) in enumerate(zip(bounds, lengths, strict=False)):
        real = min(length, part.tokens_BS.shape[1])
        tokens_1S[0, start : start + real] = part.tokens_BS[row, :real]
        mask_1S[0, start + 1 : start + real] = part.loss_mask_BS[row, 1:real]  # its first token is no target: the token before it is another sample's
    in_order = part.row_tiles_BM[part.row_tiles_BM >= 0]
    tiles_1M = in_order[None] if len(in_order) else np.full((1, 1), -1, part.row_tiles_BM.dtype)
    return _padded(TokenBatch(tokens_1S, mask_1S, part.tiles, tiles_1M), pad_id, device, bounds, len(lengths))
