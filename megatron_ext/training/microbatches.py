"""A rank's rows of one step become microbatches: slices of rows with the images that they use, as tensors on the device.

padded    the rows as they are, as long as the longest of the batch
packed    the rows' conversations one after another in a single row, each cut to its length (rounded up to what the layout divides)
budgeted  packed, as many conversations in each microbatch as a number of tokens holds; every data-parallel rank makes equally many
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import torch

from megatron_ext.batch.bins import bins_needed, fill_bins
from megatron_ext.data.collate import TokenBatch
from megatron_ext.model.inputs import model_inputs
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.shapes import round_up
from megatron_ext.training.losses import Microbatch
from megatron_ext.training.reduce import largest


def microbatches(batch: TokenBatch, rows: int, pad_id: int, device: torch.device, *, packed: bool = False, multiple: int = 1) -> list[Microbatch]:
    """`batch` in order, `rows` conversations at a time; the last microbatch may be smaller. Packed samples have lengths that divide by `multiple`."""
    slices = [_slice(batch, slice(start, start + rows)) for start in range(0, len(batch.tokens_BS), rows)]
    return [_packed(part, pad_id, multiple, device) if packed else _padded(part, pad_id, device) for part in slices]


def budgeted_microbatches(batch: TokenBatch, tokens: int, pad_id: int, context: ParallelContext) -> list[Microbatch]:
    """`batch` packed into microbatches of at most `tokens` positions and nearly equal length, the longest first. Collective over the data-parallel ranks, which
    all make as many as the rank that needs the most, and under an interleaved schedule a multiple of pp: ranks that share experts meet in every one of them.

    Every rank has as many rows as the others, and pp divides them where that matters (`config/data_rules.py`), so that there is a row for every microbatch.
    """
    layout = context.layout
    lengths = _lengths(batch, pad_id, layout.length_multiple)
    needed = largest(bins_needed(lengths, tokens), context.pgs.dp, context.device)
    bins = fill_bins(lengths, tokens, round_up(needed, layout.pp if layout.vpp > 1 else 1))
    return [_packed(_slice(batch, rows), pad_id, layout.length_multiple, context.device) for rows in bins]


def _lengths(batch: TokenBatch, pad_id: int, multiple: int) -> list[int]:
    """Positions of each row once it is packed."""
    return [round_up(int(np.flatnonzero(row != pad_id)[-1]) + 1, multiple) for row in batch.tokens_BS]


def _slice(batch: TokenBatch, rows: slice | list[int]) -> TokenBatch:
    """Some of the rows, with only the images they show."""
    row_tiles_BM = batch.row_tiles_BM[rows]
    used, renumbered = np.unique(row_tiles_BM[row_tiles_BM >= 0], return_inverse=True)
    own_BM = np.full_like(row_tiles_BM, -1)
    own_BM[row_tiles_BM >= 0] = renumbered
    hidden_BS = None if batch.hidden_BS is None else batch.hidden_BS[rows]
    return TokenBatch(batch.tokens_BS[rows], batch.loss_mask_BS[rows], batch.tiles[used], own_BM, hidden_BS=hidden_BS)


def _padded(part: TokenBatch, pad_id: int, device: torch.device, bounds: tuple[int, ...] = (), samples: int | None = None) -> Microbatch:
    padding_BS = torch.from_numpy(part.tokens_BS == pad_id).to(device)
    targets = float(part.loss_mask_BS[:, 1:].sum())
    hidden_BS = None if part.hidden_BS is None else torch.from_numpy(part.hidden_BS).to(device)
    more = {"bounds": bounds, "padding_BS": padding_BS, "aux_weight": targets, "hidden_BS": hidden_BS}
    inputs = model_inputs(part.tokens_BS, part.tiles, part.row_tiles_BM, device, **more)
    mask_BS = torch.from_numpy(part.loss_mask_BS.astype(np.float32)).to(device)
    return Microbatch(inputs, mask_BS, int((part.tokens_BS != pad_id).sum()), len(part.tokens_BS) if samples is None else samples)


def _packed(part: TokenBatch, pad_id: int, multiple: int, device: torch.device) -> Microbatch:
    lengths = _lengths(part, pad_id, multiple)
    bounds = (0, *accumulate(lengths))
    tokens_1S = np.full((1, bounds[-1]), pad_id, part.tokens_BS.dtype)
    mask_1S = np.zeros((1, bounds[-1]), part.loss_mask_BS.dtype)
    hidden_1S = None if part.hidden_BS is None else np.zeros((1, bounds[-1]), bool)
    for row, (start, length) in enumerate(zip(bounds, lengths, strict=False)):
        real = min(length, part.tokens_BS.shape[1])
        tokens_1S[0, start : start + real] = part.tokens_BS[row, :real]
        mask_1S[0, start + 1 : start + real] = part.loss_mask_BS[row, 1:real]  # its first token is no target: the token before it is another sample's
        if hidden_1S is not None and part.hidden_BS is not None:
            hidden_1S[0, start : start + real] = part.hidden_BS[row, :real]
    in_order = part.row_tiles_BM[part.row_tiles_BM >= 0]
    tiles_1M = in_order[None] if len(in_order) else np.full((1, 1), -1, part.row_tiles_BM.dtype)
    return _padded(TokenBatch(tokens_1S, mask_1S, part.tiles, tiles_1M, hidden_BS=hidden_1S), pad_id, device, bounds, len(lengths))
