"""Choosing the next token, reproducibly: a token depends on its row's seed and position and on nothing else in the batch.

One uniform number per (seed, position), from a counter-based hash (splitmix64), inverts the cumulative distribution. No generator has a state, so
neither the order
nor the company of a row changes what it samples.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
import torch.nn.functional as F

BLOCK = 128
"""Tokens whose probabilities are summed before any is looked at alone."""


def rollout_seed(*parts: object) -> int:
    """A 63-bit seed from (run seed, step, prompt key, sample): stable over processes and machines."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def uniforms(seeds_B: np.ndarray, positions: np.ndarray | int) -> np.ndarray:
    """Float64 [B] in [0, 1): the random number of each row at its response position (splitmix64 of seed + position * golden ratio)."""
    with np.errstate(over="ignore"):
        z = seeds_B.astype(np.uint64) + (np.asarray(positions).astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def truncate(probs_BV: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Probabilities with everything outside the top k, or outside the smallest set of mass >= top_p, set to zero (not renormalised). The most likely
    token always stays."""
    if top_k > 0:
        kth = probs_BV.topk(min(top_k, probs_BV.shape[-1]), dim=-1).values[:, -1:]
        probs_BV = probs_BV.masked_fill(probs_BV < kth, 0.0)
    if top_p < 1.0:
        ordered, order = probs_BV.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        outside = torch.zeros_like(probs_BV, dtype=torch.bool).scatter(-1, order, before >= top_p)
        probs_BV = probs_BV.masked_fill(outside, 0.0)
    return probs_BV


def sample(logits_BV: torch.Tensor, uniforms_B: np.ndarray, top_k: int, top_p: float, greedy_B: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Next tokens int64 [B] and their log-probabilities float32 [B] under softmax(logits), before truncation. `logits` are policy logits over the
    whole vocabulary; where `greedy_B` is true, the most likely token is taken."""
    logprobs_BV = torch.log_softmax(logits_BV, dim=-1)
    if greedy_B.all():
        tokens_B = logprobs_BV.max(-1).indices
    else:
        tokens_B = _invert(truncate(logprobs_BV.exp(), top_k, top_p), torch.from_numpy(uniforms_B).to(logits_BV.device))
        if greedy_B.any():
            tokens_B = torch.where(torch.from_numpy(greedy_B).to(tokens_B.device), logprobs_BV.max(-1).indices, tokens_B)
    return tokens_B, logprobs_BV.gather(-1, tokens_B[:, None]).squeeze(-1)


def _invert(mass_BV: torch.Tensor, shares_B: torch.Tensor) -> torch.Tensor:
    """Int64 [B]: the first token at which the cumulative mass, in float64, exceeds the given share of all mass. First its block of tokens is found, then the
    token in it: of the whole vocabulary only sums of blocks are made."""
    blocks_BNM = F.pad(mass_BV, (0, -mass_BV.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    ends_BN = blocks_BNM.sum(-1, dtype=torch.float64).cumsum(-1)
    draw_B1 = shares_B[:, None] * ends_BN[:, -1:]
    block_B1 = _first_beyond(ends_BN, draw_B1)
    before_B1 = F.pad(ends_BN, (1, 0)).gather(-1, block_B1)
    within_BM = blocks_BNM[torch.arange(len(mass_BV), device=mass_BV.device), block_B1[:, 0]].double().cumsum(-1)
    return (block_B1 * BLOCK + _first_beyond(within_BM, draw_B1 - before_B1)).squeeze(-1)


def _first_beyond(ends_BN: torch.Tensor, draw_B1: torch.Tensor) -> torch.Tensor:
    """Where cumulative sums first exceed the draw; rounding does not carry it beyond the last that adds something."""
    most_B1 = torch.nextafter(ends_BN[:, -1:], torch.zeros_like(draw_B1))
    return torch.searchsorted(ends_BN, torch.minimum(draw_B1, most_B1), right=True)
