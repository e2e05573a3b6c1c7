"""Initial weights that do not depend on the layout: every tensor is drawn whole from (seed, its name), and each rank keeps its part.

So a run on one rank and a run on 2 x 2 ranks start from the same weights, and expert 5 is the same expert wherever it lives.
"""

from __future__ import annotations

import math
import zlib

import torch
from megatron.core.transformer.module import MegatronModule

from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.parallel.shards import shard_of

_RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight", "attn.proj.weight", "mlp.fc2.weight", "linear_out.weight")
_ZEROS = ("ffn.linear_down.weight", "lora_out")
_EMBEDDINGS = ("class_embedding", "position_embedding")


@torch.no_grad()
def initialise(model: MegatronModule, context: ParallelContext, seed: int) -> None:
    """Draws every matrix N(0, init_std), those that end a residual branch scaled by 1 / sqrt(2 layers) (GPT-2); biases, and what must have no
    effect at first, are 0, other vectors keep what their module gave them."""
    settings = model.model_config
    zeros = (*_ZEROS, "linear_out.weight") if settings.clvr.gate == "zero_out" else _ZEROS
    experts_per_rank = settings.num_experts // context.layout.ep
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        if parameter.dim() < 2 or name.endswith(zeros):
            continue
        shard = shard_of(name, parameter, experts_per_rank, context)
        depth = settings.vision.num_layers if name.startswith("vision.") else settings.num_layers
        std = settings.init_std / math.sqrt(2 * depth) if name.endswith(_RESIDUAL_OUTPUTS) else settings.init_std
        if name.endswith(_EMBEDDINGS):
            std = 0.02
        generator = torch.Generator().manual_seed((seed * 1_000_003 + zlib.crc32(shard.name.encode())) % 2**63)
        full = torch.randn(shard.full_shape(parameter.shape), generator=generator) * std
        parameter.copy_(shard.take(full).to(parameter))
