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

from megatron_ext.model.clvr import Sight, VisionMemory
from megatron_ext.model.clvr_block import ClvrBlock
from megatron_ext.model.experts import few_experts
from megatron_ext.model.memory import Memory
from megatron_ext.model.rope import rotate
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

    return block.final_layernorm(block.walk(block.stage.layers, hidden_R1H, {}, vision, sight, layer)[0])


def _layer(layer: Any, hidden_RH: torch.Tensor, rope: Rope, memory: Memory) -> torch.Tensor:
    attention, feed_forward = layer.self_attention, layer.mlp
    hidden_RH = hidden_RH + _attention(attention, layer.input_layernorm(hidden_RH), rope, memory)
    x_RH = layer.pre_mlp_layernorm(hidden_RH)
    return hidden_RH + (_experts(feed_forward, x_RH) if isinstance(feed_forward, MoELayer) else _dense(feed_forward, x_RH))


def _attention(attention: Any, x_RH: torch.Tensor, rope: Rope, memory: Memory) -> torch.Tensor:
    """Megatron lays out queries, keys and values head group by head group."""
    groups, size = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
    mixed = F.linear(x_RH, attention.linear_qkv.weight).view(len(x_RH), groups, -1, size)
    query_RND, key_RND, value_RND = mixed[:, :, :-2].reshape(len(x_RH), -1, size), mixed[:, :, -2], mixed[:, :, -1]
    query_RND, key_RND = rotate(attention.q_layernorm(query_RND), *rope), rotate(attention.k_layernorm(key_RND), *rope)
    return F.linear(memory.attend(attention.layer_number - 1, query_RND, key_RND, value_RND).flatten(1), attention.linear_proj.weight)


def _experts(block: Any, x_RH: torch.Tensor) -> torch.Tensor:
    router = block.router
    gates_RE, map_RE = router.routing(F.linear(x_RH.float(), router.weight.float())[:, None])
    row_T, expert_T = map_RE.t().nonzero(as_tuple=True)[::-1]
    made_TH = few_experts(x_RH[row_T], gates_RE[row_T, expert_T], map_RE.sum(0).tolist(), block.experts.local_experts)
    return torch.zeros_like(x_RH).index_add_(0, row_T, made_TH)


def _dense(block: Any, x_RH: torch.Tensor) -> torch.Tensor:
    gate, up = F.linear(x_RH, block.linear_fc1.weight).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, block.linear_fc2.weight)
