"""Attention in which what a query gets depends on the query and the keys that it sees: not on padding, on other queries, or on where keys were kept.

    blocks of BLOCK keys from the first one on, tiles of TILE queries, both filled up with zeros
    peak = max over all blocks           exact in any order
    w_b  = exp(q . k_b / sqrt(D) - peak)
    out  = (w_1 v_1 + w_2 v_2 + ...) / (sum w_1 + sum w_2 + ...)         block after block

A block that a query does not see adds exact zeros, so that it makes no difference whether it is there. Reading prompts, writing answers over prompt and
answer as one row (`model/whole_memory.py`) and training over whole rows therefore meet in every bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_ext.device.batch_invariant.products import TILE, filled, tile_products

BLOCK = 64
"""Keys of one product."""


def attention(
    query_BNQD: torch.Tensor, key_BNTD: torch.Tensor, value_BNTD: torch.Tensor, mask: torch.Tensor | None, causal: bool = False, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """([B, N, Q, D], logarithm of the softmax's denominator [B, N, Q]). `mask` broadcasts to [B, N, Q, T] and is added to the scores (or false where a query
    does not see a key). `causal`: query s sees the keys up to s. A query that sees nothing gets numbers that mean nothing."""
    heads, queries, length = query_BNQD.shape[:2], query_BNQD.shape[2], key_BNTD.shape[2]
    query, keys, values = (filled(x.flatten(0, 1), 1, size) for x, size in ((query_BNQD, TILE), (key_BNTD, BLOCK), (value_BNTD, BLOCK)))
    bias = _bias(mask, query_BNQD, length, causal, query.shape[1], keys.shape[1])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out, partition = torch.empty_like(query), query.new_empty(query.shape[:2])
    for start in range(0, query.shape[1], TILE):
        tile = slice(start, start + TILE)
        seen = min(keys.shape[1], start + TILE + -(start + TILE) % BLOCK) if causal else keys.shape[1]
        blocks = [slice(first, first + BLOCK) for first in range(0, seen, BLOCK)]
        scores = [tile_products(query[:, tile], keys[:, block].transpose(1, 2)).mul_(scale) for block in blocks]
        for score, block in zip(scores, blocks, strict=True):
            score.unflatten(0, heads).add_(bias[:, :, tile if bias.shape[2] > 1 else slice(None), block])
        peak = torch.stack([score.amax(-1, keepdim=True) for score in scores]).amax(0)
        total, weighted = torch.zeros_like(peak), torch.zeros_like(query[:, tile])
        for score, block in zip(scores, blocks, strict=True):
            weights = torch.exp(score.sub_(peak), out=score)
            total += weights.sum(-1, keepdim=True)
            weighted += tile_products(weights, values[:, block])
        out[:, tile] = weighted / total
        partition[:, tile] = (peak + total.log())[..., 0]
    return out[:, :queries].unflatten(0, heads), partition[:, :queries].unflatten(0, heads)


def _bias(mask: torch.Tensor | None, query_BNQD: torch.Tensor, length: int, causal: bool, queries: int, keys: int) -> torch.Tensor:
    """What is added to the scores, [B or 1, N or 1, `queries` or 1, `keys`]: -inf where there is no key or it is hidden. Queries that only fill up see all."""
    bias = query_BNQD.new_zeros(1, 1, 1, length) if mask is None else mask
    if bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=query_BNQD.dtype).masked_fill_(~bias, -torch.inf)
    bias = bias[(None,) * (4 - bias.dim())]
    bias = F.pad(bias, (0, 0, 0, queries - bias.shape[2] if bias.shape[2] > 1 else 0))
    if causal:
        bias = bias + bias.new_full((queries, length), -torch.inf).triu_(1)
    return F.pad(bias, (0, keys - length), value=-torch.inf)
