"""Causal self-attention of the decoder: Megatron's projections and tensor parallelism, torch's SDPA as the core, and a key-value cache for generation.

    training, prefill   hidden_SBH -> linear_qkv -> q/k norm -> rope -> SDPA (causal)               -> linear_proj
    decode              hidden_B1H -> the same                      -> append to cache, SDPA (mask) -> linear_proj

In decode the rows stand on the first axis, the one that sequence parallelism splits: a step of one token per row has no sequence to split.
Rows are right-padded, so the causal mask alone keeps padding out of every real token's sight.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention

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
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)


class CausalSelfAttention(SelfAttention):
    """Takes [S, B, H] (sequence-parallel slices under TP) and the rope angles; returns the same shape and a None bias, as Megatron's layers expect."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        inference_context: KVCache | None = None,
        rotary_pos_cos: torch.Tensor | None = None,
        rotary_pos_sin: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        if rotary_pos_cos is None or rotary_pos_sin is None:
            raise ValueError("this attention needs the rotary angles of its positions")
        query, key = (rotate(x, rotary_pos_cos, rotary_pos_sin) for x in (query, key))
        if inference_context is not None and inference_context.decoding:
            return self.linear_proj(self._decode(query, key, value, inference_context))
        if inference_context is not None:
            keys, values = inference_context.append(self.layer_number - 1, key, value)
        else:
            keys, values = key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
        attended = self.core_attention(query.permute(1, 2, 0, 3), keys, values, None)
        return self.linear_proj(attended.permute(2, 0, 1, 3).flatten(2))

    def _decode(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """One new token per row: [rows, 1, N, D] -> [rows, 1, N * D]. Rows beyond the cache's are padding for sequence parallelism and give zeros."""
        rows = len(cache.lengths_B)
        keys, values = cache.append(self.layer_number - 1, key, value)
        attended = self.core_attention(query[:rows].transpose(1, 2), keys, values, cache.decode_mask())
        attended = attended.transpose(1, 2).flatten(2)
        return F.pad(attended, (0, 0, 0, 0, 0, query.shape[0] - rows))
