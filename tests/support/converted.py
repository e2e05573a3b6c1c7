"""What a rank does in the tests of converted checkpoints: loads one in its layout and reports its part of the logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

from megatron_ext.checkpoint.dist import load_checkpoint
from megatron_ext.config.schema import ModelConfig, ParallelConfig
from megatron_ext.model.assembly import build_chunks
from megatron_ext.model.inputs import ModelInputs
from megatron_ext.parallel.groups import open_parallel
from megatron_ext.training.step import run_schedule


class Logits:
    """An objective that keeps the logits [B, S, V] of the last stage."""

    found: torch.Tensor | None = None

    def forward(self, model: Any, inputs: ModelInputs) -> torch.Tensor:
        return model(inputs)

    def loss(self, model: Any, inputs: ModelInputs, logits_SBV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        self.found = gather_from_tensor_model_parallel_region(logits_SBV.contiguous(), group=model.tp_group).transpose(0, 1)
        return logits_SBV.sum(), torch.ones((), dtype=torch.int32), {}


def logits_of(
    rank: int, world_size: int, init_method: str, parallel: ParallelConfig, checkpoint: Path, model: ModelConfig, image_token: int, inputs: ModelInputs
) -> torch.Tensor | None:
    """On the last stage the logits, elsewhere None."""
    with open_parallel(parallel, rank, world_size, init_method, 0) as context, torch.no_grad():
        chunks = build_chunks(model, image_token, context, seed=9, vision_trains=False)
        load_checkpoint(checkpoint, chunks, context=context, model_config=model)
        objective = Logits()
        run_schedule([chunk.eval() for chunk in chunks], [inputs] * parallel.pp, objective, context, forward_only=True)
        return objective.found
