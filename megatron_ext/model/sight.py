"""What positions may look at, and the attention of CLVR's taps over it.

    a_t = softmax_n(q_t . k_n / sqrt(D))      over the vision tokens from_t <= n < until_t of the row
    r_t = sum_n a_tn v_n                      zero where nothing is visible or nothing is injected

`look` is what the model runs, fused; `attention_weights` makes the same a_t visible, for pictures and measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_ext.model.seats import Seats


@dataclass(frozen=True)
class Sight:
    """What the positions of a forward pass may look at. `from_BS`, `until_BS`: vision tokens [from, until) of the row are visible; `inject_BS`: where
    refinement is added. `seats`, in decode: rows stand on the first axis of the hidden states, one token each; B counts prompts, S is 1, and all answers to a
    prompt see the same."""

    from_BS: torch.Tensor
    until_BS: torch.Tensor
    inject_BS: torch.Tensor
    seats: Seats | None = None


@dataclass(frozen=True)
class VisionMemory:
    """Keys and values [B, N_kv, V, D] of each tap for the rows of a batch (in decode, for its prompts), V counting all tiles of a row."""

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]


def look(query_BNSD: torch.Tensor, keys_BNVD: torch.Tensor, values_BNVD: torch.Tensor, sight: Sight) -> torch.Tensor:
    """Attention over the visible vision tokens; rows that see nothing or inject nothing give zero AFTER the softmax (a softmax over nothing is not a
    number)."""
    groups = query_BNSD.shape[1] // keys_BNVD.shape[1]
    keys, values = keys_BNVD.repeat_interleave(groups, dim=1), values_BNVD.repeat_interleave(groups, dim=1)
    seen_BSV = _visible(sight.from_BS, sight.until_BS, keys.shape[2]) | (sight.until_BS <= sight.from_BS)[..., None]
    refined = F.scaled_dot_product_attention(query_BNSD, keys, values, attn_mask=seen_BSV[:, None])
    active_BS = sight.inject_BS & (sight.until_BS > sight.from_BS)
    return refined * active_BS[:, None, :, None].to(refined.dtype)


def attention_weights(query_SBND: torch.Tensor, keys_BNVD: torch.Tensor, sight: Sight) -> torch.Tensor:
    """a_t, float32 [B, N, S, V]: every position's weights sum to 1 over the vision tokens that it may look at, whether its refinement is injected or not, and
    are exactly 0 elsewhere, everywhere where it may look at nothing. `query_SBND` as `ClvrTap.query` makes it; in decode the answers' rows stand in the
    place of B, S is 1, and `keys_BNVD` are those of their prompts."""
    from_BS, until_BS = sight.from_BS, sight.until_BS
    if sight.seats is not None:
        query_SBND = query_SBND[: len(sight.seats.seat_R)].transpose(0, 1)
        prompt_R = sight.seats.seat_R // sight.seats.rows_PG.shape[1]
        keys_BNVD, from_BS, until_BS = keys_BNVD[prompt_R], from_BS[prompt_R], until_BS[prompt_R]
    query_BNSD, groups = query_SBND.permute(1, 2, 0, 3).float(), query_SBND.shape[2] // keys_BNVD.shape[1]
    scores_BNSV = query_BNSD @ keys_BNVD.float().repeat_interleave(groups, dim=1).transpose(2, 3) / math.sqrt(query_SBND.shape[3])
    seen_B1SV = _visible(from_BS, until_BS, keys_BNVD.shape[2])[:, None]
    return scores_BNSV.masked_fill(~seen_B1SV, -math.inf).softmax(dim=-1).masked_fill(~seen_B1SV, 0.0)


def _visible(from_BS: torch.Tensor, until_BS: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Bool [B, S, V]."""
    token_V = torch.arange(num_tokens, device=until_BS.device)
    return (token_V >= from_BS[..., None]) & (token_V < until_BS[..., None])
