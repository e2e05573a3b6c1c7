"""How the weights of a model that only generates lie in memory: for products with few rows, and all experts of a layer in one piece.

    W [out, in] of a linear layer     stored as [in, out]: with up to a few tens of rows a product reads it up to twice as fast (docs/benchmarks/generation.md)
    fc1, fc2 of E experts             stored as [E, H, 2 F] and [E, F, H]: one grouped_mm for all of them, without a copy

Parameters keep their names, shapes and values: each becomes a view. Whatever reads or loads them does not notice. Training does not want this: Megatron's
optimizer keeps parameters in a buffer of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from megatron_ext.device import kernels
from megatron_ext.model.assembly import VisionLanguageModel
from megatron_ext.model.experts import GroupedExperts


@torch.no_grad()
def store_for_generation(model: VisionLanguageModel) -> None:
    """Moves the decoder's and the head's weights; tied embeddings stay, where rows are looked up. One layer at a time is held twice."""
    moved: set[torch.nn.Module] = set()
    for experts in model.decoder.modules():
        if isinstance(experts, GroupedExperts) and _can_group(experts):
            first, second = ([getattr(expert, name) for expert in experts.local_experts] for name in ("linear_fc1", "linear_fc2"))
            experts.piece = _in_one_piece(first), _in_one_piece(second)
            moved.update(first, second)
    for linear in (*model.decoder.modules(), model.output_layer):
        if isinstance(linear, (ColumnParallelLinear, RowParallelLinear)) and linear.weight is not None and linear not in moved:
            linear.weight.data = linear.weight.t().contiguous().t()


def _can_group(experts: GroupedExperts) -> bool:
    weight = experts.local_experts[0].linear_fc1.weight
    return kernels.can_group(weight.is_cuda, weight.dtype == torch.bfloat16, weight.shape[1], weight.shape[0] // 2)


def _in_one_piece(linears: list[Any]) -> torch.Tensor:
    """[E, in, out], which the weights [out, in] become views of."""
    piece = torch.stack([linear.weight.t() for linear in linears])
    for linear, weight in zip(linears, piece, strict=True):
        linear.weight.data = weight.t()
    return piece
