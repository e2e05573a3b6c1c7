"""Causal self-attention of the decoder: Megatron's projections and tensor parallelism, torch's SDPA as the core, and the memory of generation.

    training, prefill   hidden_SBH -> linear_qkv -> q/k norm -> rope -> SDPA over the frame's spans                  -> linear_proj
    decode              hidden_R1H -> the same                      -> attention over prompt and answer (`memory.py`) -> linear_proj

In decode the rows stand on the first axis, the one that sequence parallelism splits: a step of one token per row has no sequence to split.
Rows are right-padded, so the causal mask alone keeps padding out of every real token's sight.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention
from torch.nn.attention.bias import causal_lower_right

from megatron_ext.device import kernels
from megatron_ext.model.frame import Frame
from megatron_ext.model.memory import Memory, PromptKeys
from megatron_ext.model.recompute import recomputed
from megatron_ext.model.rope import rotate


class SdpaCore(torch.nn.Module):
    """Scaled dot-product attention over [B, heads, length, D], grouped queries included. Takes the place of Megatron's unfused core."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Without a mask the queries are the last positions of the keys and attend causally."""
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        if mask is None and query.shape[2] != key.shape[2]:
            mask = causal_lower_right(query.shape[2], key.shape[2])
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)


def unhidden(hidden_BK: torch.Tensor, queries: int) -> torch.Tensor:
    """Bool [B, 1, Q, K]: each of the last Q positions attends to itself, and to those before it that are not hidden."""
    place_K = torch.arange(hidden_BK.shape[1], device=hidden_BK.device)
    place_Q1 = place_K[-queries:, None]
    return ((place_K < place_Q1) & ~hidden_BK[:, None, None]) | (place_K == place_Q1)


def over_samples(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, stops: list[int]) -> torch.Tensor:
    """Causal attention inside each of the samples of one row [1, heads, S, D] in a single call; sample n ends at `stops[n]`. On GPUs, for 16-bit numbers."""
    from torch.nn.attention.varlen import varlen_attn

    bounds = torch.tensor([0, *stops], dtype=torch.int32, device=query.device)
    longest = max(stop - start for start, stop in pairwise([0, *stops]))
    query_SND, key_SND, value_SND = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    attended: Any = varlen_attn(query_SND, key_SND, value_SND, bounds, bounds, longest, longest, window_size=(-1, 0), enable_gqa=True)
    return attended.transpose(0, 1)[None]


class CausalSelfAttention(SelfAttention):
    """Takes [S, B, H] (sequence-parallel slices under TP) and the rope angles; returns the same shape and a None bias, as Megatron's layers expect.

    `recompute`: drop the activations of this module in training and compute them again in the backward pass.
    """

    recompute = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        inference_context: Memory | PromptKeys | None = None,
        rotary_pos_cos: torch.Tensor | None = None,
        rotary_pos_sin: torch.Tensor | None = None,
        packed_seq_params: Frame | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`packed_seq_params`, Megatron's way to hand a layer what it knows of packing, is our frame; absent in decode."""
        cos, sin, frame = rotary_pos_cos, rotary_pos_sin, packed_seq_params
        if cos is None or sin is None:
            raise ValueError("this attention needs the rotary angles of its positions")
        if self.recompute and torch.is_grad_enabled():
            return recomputed(lambda x, cos, sin: self._attend(x, cos, sin, frame, None), (), hidden_states, cos, sin)
        return self._attend(hidden_states, cos, sin, frame, inference_context)

    def _attend(
        self, hidden_SBH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, frame: Frame | None, cache: Memory | PromptKeys | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = self.get_query_key_value_tensors(hidden_SBH)
        query, key = (rotate(x, cos, sin) for x in (query, key))
        if isinstance(cache, Memory):
            return self.linear_proj(self._decode(query, key, value, cache))
        if cache is not None:
            keys, values = cache.keep(self.layer_number - 1, key, value)
        else:
            keys, values = (x if frame is None else frame.whole(x) for x in (key, value))
            keys, values = keys.permute(1, 2, 0, 3), values.permute(1, 2, 0, 3)
        attended = self._over_spans(query.permute(1, 2, 0, 3), keys, values, frame)
        return self.linear_proj(attended.permute(2, 0, 1, 3).flatten(2))

    def _over_spans(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, frame: Frame | None) -> torch.Tensor:
        if frame is None or frame.is_plain:
            return self.core_attention(query, keys, values, None)
        if frame.order_S is None and frame.hidden_BS is None and kernels.uses_varlen(query.is_cuda, query.dtype.itemsize == 2):
            return over_samples(query, keys, values, [span.q_stop for span in frame.spans])
        parts = []
        for span in frame.spans:
            k_run = slice(span.k_start, span.k_stop)
            mask = None if frame.hidden_BS is None else unhidden(frame.hidden_BS[:, k_run], span.q_stop - span.q_start)
            parts.append(self.core_attention(query[:, :, span.q_start : span.q_stop], keys[:, :, k_run], values[:, :, k_run], mask))
        return torch.cat(parts, dim=2)

    def _decode(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, memory: Memory) -> torch.Tensor:
        """One new token per row: [rows, 1, N, D] -> [rows, 1, N * D]. Rows beyond the memory's are padding for sequence parallelism and give zeros."""
        rows = memory.num_rows
        if rows == 0:
            return torch.zeros_like(query.flatten(2))
        query_RKQD = query[:rows, 0].unflatten(1, (key.shape[2], -1))
        attended = memory.attend(self.layer_number - 1, query_RKQD, key[:rows, 0], value[:rows, 0])
        return F.pad(attended.flatten(1)[:, None], (0, 0, 0, 0, 0, query.shape[0] - rows))
