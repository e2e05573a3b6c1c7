"""Weights of one layout in another, for tests that compare the two."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megatron_ext.checkpoint.full_tensors import Model, own_weights
from megatron_ext.parallel.groups import ParallelContext


@torch.no_grad()
def load_full_tensors(model: Model, tensors: Mapping[str, torch.Tensor], context: ParallelContext) -> None:
    """Copies this rank's part of every full tensor into the model."""
    for _, weight, shard in own_weights(model, context):
        weight.copy_(shard.take(tensors[shard.name]))
