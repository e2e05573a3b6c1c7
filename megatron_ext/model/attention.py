"""Causal self-attention of the decoder: Megatron's projections and tensor parallelism, torch's SDPA as the core, and a key-value cache for generation.

    training, prefill   hidden_SBH -> linear_qkv -> q/k norm -> rope -> SDPA over the frame's spans -> linear_proj
    decode              hidden_B1H -> the same                      -> append to cache, SDPA (mask) -> linear_proj

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
from megatron_ext.model.recompute import recomputed
from megatron_ext.model.rope import rotate


class KVCache:
    """Keys and values of every decoder layer for B rows, grown by prefill and then one token per row and step.

    `lengths_B` counts the valid positions of each row; whatever lies behind them is padding that decode overwrites and the mask hides.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.decoding = False
        self.lengths_B = torch.empty(0, dtype=torch.int64)
        self._mask_BS: torch.Tensor | None = None
        self._keys: dict[int, torch.Tensor] = {}  # by layer
        self._values: dict[int, torch.Tensor] = {}

    def append(self, layer: int, key_SBND: torch.Tensor, value_SBND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores what one layer computed and returns all keys and values [B, N_kv, length, D] that its queries may look at."""
        if not self.decoding:
            self._keys[layer], self._values[layer] = (self._reserve(x) for x in (key_SBND, value_SBND))
            return key_SBND.permute(1, 2, 0, 3), value_SBND.permute(1, 2, 0, 3)
        keys, values = self._keys[layer], self._values[layer]
        rows = torch.arange(len(self.lengths_B), device=keys.device)
        keys[rows, :, self.lengths_B] = key_SBND[: len(rows), 0]
        values[rows, :, self.lengths_B] = value_SBND[: len(rows), 0]
        longest = int(self._visible().shape[1])
        return keys[:, :, :longest], values[:, :, :longest]

    def _reserve(self, x_SBND: torch.Tensor) -> torch.Tensor:
        length, rows, heads, dim = x_SBND.shape
        store = x_SBND.new_zeros(rows, heads, self.capacity, dim)
        store[:, :, :length] = x_SBND.permute(1, 2, 0, 3)
        return store

    def _visible(self) -> torch.Tensor:
        """Bool [B, longest]: the positions each row's new token may look at. Computed once per step."""
        if self._mask_BS is None:
            longest = int(self.lengths_B.max()) + 1
            self._mask_BS = torch.arange(longest, device=self.lengths_B.device)[None, :] <= self.lengths_B[:, None]
        return self._mask_BS

    def decode_mask(self) -> torch.Tensor:
        return self._visible()[:, None, None, :]

    def start_decode(self, lengths_B: torch.Tensor) -> None:
        """Ends the prefill: row b holds `lengths_B[b]` valid positions."""
        self.decoding, self.lengths_B, self._mask_BS = True, lengths_B, None

    def advance(self) -> None:
        """One token per row has been written."""
        self.lengths_B, self._mask_BS = self.lengths_B + 1, None

    def select(self, rows: torch.Tensor) -> None:
        """Keeps (or repeats) the given rows, in the given order: groups share one prefill, finished rows leave."""
        self.lengths_B, self._mask_BS = self.lengths_B[rows], None
        self._keys = {layer: x[rows] for layer, x in self._keys.items()}
        self._values = {layer: x[rows] for layer, x in self._values.items()}


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
        inference_context: KVCache | None = None,
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
        self, hidden_SBH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, frame: Frame | None, cache: KVCache | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = self.get_query_key_value_tensors(hidden_SBH)
        query, key = (rotate(x, cos, sin) for x in (query, key))
        if cache is not None and cache.decoding:
            return self.linear_proj(self._decode(query, key, value, cache))
        if cache is not None:
            keys, values = cache.append(self.layer_number - 1, key, value)
        else:
            keys, values = (x if frame is None else frame.whole(x) for x in (key, value))
            keys, values = keys.permute(1, 2, 0, 3), values.permute(1, 2, 0, 3)
        attended = self._over_spans(query.permute(1, 2, 0, 3), keys, values, frame)
        return self.linear_proj(attended.permute(2, 0, 1, 3).flatten(2))

    def _over_spans(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, frame: Frame | None) -> torch.Tensor:
        if frame is None or frame.is_plain:
            return self.core_attention(query, keys, values, None)
        if frame.order_S is None and kernels.uses_varlen(query.is_cuda, query.dtype.itemsize == 2):
            return over_samples(query, keys, values, [span.q_stop for span in frame.spans])
        parts = []
        for span in frame.spans:
            k_run = slice(span.k_start, span.k_stop)
            parts.append(self.core_attention(query[:, :, span.q_start : span.q_stop], keys[:, :, k_run], values[:, :, k_run], None))
        return torch.cat(parts, dim=2)

    def _decode(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """One new token per row: [rows, 1, N, D] -> [rows, 1, N * D]. Rows beyond the cache's are padding for sequence parallelism and give zeros."""
        rows = len(cache.lengths_B)
        keys, values = cache.append(self.layer_number - 1, key, value)
        attended = self.core_attention(query[:rows].transpose(1, 2), keys, values, cache.decode_mask())
        attended = attended.transpose(1, 2).flatten(2)
        return F.pad(attended, (0, 0, 0, 0, 0, query.shape[0] - rows))
