"""CLVR, cross-layer vision refinement: an intermediate hidden state looks again at the ORIGINAL ViT features.

One tap (i -> j), i < j: the output h^i of decoder layer i asks, and the answer is added to the residual stream before layer j runs.

    z_V   = LayerNorm(vit_V)                               raw ViT features, last layer, class token dropped, before pixel unshuffle
    k_n   = RMSNorm_D((z_n + E(p_n)) W_k)                  E: 2-D sin/cos of the patch centre in the whole picture, which all its tiles share
    v_n   = (z_n + t_n b) W_v                              t_n in {0, 1}: whether the tile is a thumbnail;  b: learned, 0 at first
    q_t   = RMSNorm_D(RMSNorm_H(h^i_t) W_q)
    a_t   = softmax_n(q_t . k_n / sqrt(D))                 over the vision tokens that position t may look at
    o_t   = (sum_n a_tn v_n) W_o                           the refined visual embedding
    x^j_t = h^{j-1}_t + m_t g o_t                          m_t in {0, 1}: where to inject;  g: the gate

A query uses only its own token's state, so the model stays strictly causal and a cached decode equals the full forward. Keys and values depend on the image
alone: they are computed once per image and shared by every rollout of a prompt.

Tensor parallel: W_q, W_k, W_v by columns (heads), W_o by rows; under sequence parallelism W_q gathers the sequence and W_o scatters it.
Where to read on: `sight.py` (the attention), `clvr_block.py` (how taps meet the layers), `splice.py` (what a position may look at).
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import nn

from megatron_ext.config.schema import ClvrConfig
from megatron_ext.model.norm import RMSNorm
from megatron_ext.model.sight import Sight, look


def patch_positions(num_tokens: int, width: int, places_I5: torch.Tensor) -> torch.Tensor:
    """2-D sin/cos embedding float32 [I, V, width] of the centres of square tiles' patches, in the unit square of their pictures; width divides by 4."""
    side = int(num_tokens**0.5)
    device = places_I5.device
    centres_V = (torch.arange(side, device=device, dtype=torch.float32) + 0.5) / side
    frequencies = 2 * math.pi * 2.0 ** torch.linspace(0, math.log2(side), width // 4, device=device)

    def waves(start_I: torch.Tensor, stop_I: torch.Tensor) -> torch.Tensor:
        angles = (start_I[:, None] + centres_V * (stop_I - start_I)[:, None])[..., None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    top, left, bottom, right, _ = places_I5.float().unbind(1)
    rows, columns = waves(top, bottom)[:, :, None, :].expand(-1, -1, side, -1), waves(left, right)[:, None, :, :].expand(-1, side, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(1, 2)


class ClvrTap(MegatronModule):
    """The adapter of one tap. `memory` makes keys and values once per image; `forward` refines queries with them."""

    def __init__(self, config: TransformerConfig, clvr: ClvrConfig, vision_hidden: int, pgs: ProcessGroupCollection) -> None:
        super().__init__(config)
        self.tp_group = pgs.tp
        self.head_dim = clvr.head_dim
        replicated = copy.copy(config)
        replicated.sequence_parallel = False  # vision features are whole on every rank, never sequence slices

        def columns(inputs: int, heads: int, cfg: TransformerConfig) -> ColumnParallelLinear:
            width = heads * clvr.head_dim
            return ColumnParallelLinear(inputs, width, config=cfg, init_method=config.init_method, bias=False, gather_output=False, tp_group=pgs.tp)

        self.vision_norm = nn.LayerNorm(vision_hidden, eps=1e-6)
        self.thumbnail = nn.Parameter(torch.zeros(vision_hidden))
        self.query_norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.linear_q = columns(config.hidden_size, clvr.num_heads, config)
        self.linear_k = columns(vision_hidden, clvr.num_kv_heads, replicated)
        self.linear_v = columns(vision_hidden, clvr.num_kv_heads, replicated)
        self.q_layernorm = RMSNorm(config, clvr.head_dim, config.layernorm_epsilon)
        self.k_layernorm = RMSNorm(config, clvr.head_dim, config.layernorm_epsilon)
        zero_out = clvr.gate == "zero_out"
        self.linear_out = RowParallelLinear(
            clvr.num_heads * clvr.head_dim,
            config.hidden_size,
            config=config,
            init_method=nn.init.zeros_ if zero_out else config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=pgs.tp,
        )
        self.gate = None if zero_out else nn.Parameter(torch.zeros(()))
        if self.gate is not None:
            self.gate.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def memory(self, features_IVH: torch.Tensor, positions_IVH: torch.Tensor, is_thumbnail_I: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [I, V, N_kv, D] of every image tile. Positions and flags may be of one tile, for all."""
        z = self.vision_norm(features_IVH)
        placed = z + positions_IVH.to(z.dtype)
        told = z + is_thumbnail_I[:, None, None].to(z.dtype) * self.thumbnail
        keys, values = (linear(x)[0].unflatten(-1, (-1, self.head_dim)) for linear, x in ((self.linear_k, placed), (self.linear_v, told)))
        return self.k_layernorm(keys), values

    def forward(self, hidden_SBH: torch.Tensor, keys_BNVD: torch.Tensor, values_BNVD: torch.Tensor, sight: Sight) -> torch.Tensor:
        """The gated refinement, shaped like `hidden_SBH` (a sequence slice under sequence parallelism); exactly zero where nothing is injected.

        In decode, `hidden` is [R, 1, H], with rows beyond the memory's as padding for sequence parallelism.
        """
        query_SBND = self.query(hidden_SBH)
        if sight.seats is None:
            flat = look(query_SBND.permute(1, 2, 0, 3), keys_BNVD, values_BNVD, sight).permute(2, 0, 1, 3).flatten(2)
        else:
            rows = len(sight.seats.seat_R)
            refined_PNGD = look(sight.seats.by_prompt(query_SBND[:rows, 0]).transpose(1, 2), keys_BNVD, values_BNVD, sight)
            flat = F.pad(sight.seats.by_row(refined_PNGD.transpose(1, 2)).flatten(1)[:, None], (0, 0, 0, 0, 0, len(query_SBND) - rows))
        out, _ = self.linear_out(flat)
        return out if self.gate is None else torch.tanh(self.gate) * out

    def query(self, hidden_SBH: torch.Tensor) -> torch.Tensor:
        """[S, B, N, D] of the whole sequence, with this rank's heads."""
        query: torch.Tensor = self.q_layernorm(self.linear_q(self.query_norm(hidden_SBH))[0].unflatten(-1, (-1, self.head_dim)))
        return query
