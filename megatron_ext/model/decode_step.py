"""A step of generation on one rank: one token of every row through the decoder, straight from the weights of its layers.

Megatron's layers are made to be differentiated, split over ranks and called with thousands of tokens; for one token a row their bookkeeping costs more than the
arithmetic. Where nothing is split this computes the same, and the tests hold it to that; elsewhere `ClvrBlock` runs as in training.

    hidden_RH -> attention over `memory` -> experts, each only for its rows          between the taps, which `ClvrBlock.walk` serves as in training
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_ext.model.clvr_block import ClvrBlock
from megatron_ext.model.experts import chosen_experts
from megatron_ext.model.memory import Memory
from megatron_ext.model.norm import RMSNorm
from megatron_ext.model.rope import rotate
from megatron_ext.model.sight import Sight, VisionMemory
from megatron_ext.parallel.plan import Layout

Rope = tuple[torch.Tensor, torch.Tensor]


def decodes_whole(layout: Layout) -> bool:
    """Whether every layer is whole on its rank."""
    return layout.tp == layout.ep == layout.etp == 1


def decode_step(block: ClvrBlock, hidden_R1H: torch.Tensor, rope: Rope, memory: Memory, vision: VisionMemory | None, sight: Sight | None) -> torch.Tensor:
    """[R, 1, H]. `rope`: angles of the rows' positions, [R, 1, D]."""
    assert block.final_layernorm is not None

    def layer(number: int, hidden_R1H: torch.Tensor) -> torch.Tensor:
        return _layer(block.layers[number], hidden_R1H[:, 0], rope, memory)[:, None]

    rope = rope[0][:, :, None], rope[1][:, :, None]  # for heads in groups
    return _norm(block.final_layernorm, block.walk(block.stage.layers, hidden_R1H, {}, vision, sight, layer)[0])


def _layer(layer: Any, hidden_RH: torch.Tensor, rope: Rope, memory: Memory) -> torch.Tensor:
    attention, feed_forward = layer.self_attention, layer.mlp
    hidden_RH = hidden_RH + _attention(attention, _norm(layer.input_layernorm, hidden_RH), rope, memory)
    x_RH = _norm(layer.pre_mlp_layernorm, hidden_RH)
    return hidden_RH + (_experts(feed_forward, x_RH) if isinstance(feed_forward, MoELayer) else _dense(feed_forward, x_RH))


def _attention(attention: Any, x_RH: torch.Tensor, rope: Rope, memory: Memory) -> torch.Tensor:
    """Megatron lays out queries, keys and values head group by head group, [R, K, Q + 2, D]; a group's queries and its key are normed and turned together."""
    groups, size = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
    mixed = F.linear(x_RH, attention.linear_qkv.weight).view(len(x_RH), groups, -1, size)
    query_norm, key_norm = attention.q_layernorm, attention.k_layernorm
    scale_QD = torch.cat([query_norm.weight.expand(mixed.shape[2] - 2, -1), key_norm.weight[None]])
    turned = rotate(F.rms_norm(mixed[:, :, :-1], (size,), eps=query_norm.eps) * scale_QD, *rope)
    attended = memory.attend(attention.layer_number - 1, turned[:, :, :-1], turned[:, :, -1], mixed[:, :, -1])
    return F.linear(attended.flatten(1), attention.linear_proj.weight)


def _experts(block: Any, x_RH: torch.Tensor) -> torch.Tensor:
    return chosen_experts(block.experts, x_RH, *block.router.choose(F.linear(x_RH.float(), block.router.weight.float())))


def _norm(norm: RMSNorm, x: torch.Tensor) -> torch.Tensor:
    """Without what calling a module costs."""
    return F.rms_norm(x, norm.normalized_shape, norm.weight, norm.eps)


def _dense(block: Any, x_RH: torch.Tensor) -> torch.Tensor:
    gate, up = F.linear(x_RH, block.linear_fc1.weight).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, block.linear_fc2.weight)
