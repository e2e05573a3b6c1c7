"""What a built model and its engine really hold on a rank, in bytes."""

from __future__ import annotations

from typing import Any

import torch

from megatron_ext.config.schema import OptimizerConfig, ParallelConfig
from megatron_ext.model.assembly import build_chunks
from megatron_ext.parallel.groups import open_parallel
from megatron_ext.parallel.planner.memory import Rank
from megatron_ext.training.megatron_engine import MegatronEngine, build_engine
from tests.support.layouts import MARKERS, Case, model_of
from tests.support.models import IMAGE


def held_by_rank(rank: int, world_size: int, init_method: str, cases: list[Case]) -> list[dict[str, Any]]:
    """Of every case in turn: this rank's place, and the bytes of its weights, gradient buffers and optimizer states."""
    return [_held(rank, case.parallel, f"{init_method}-{number}", case, world_size) for number, case in enumerate(cases)]


def _held(rank: int, parallel: ParallelConfig, init_method: str, case: Case, world_size: int) -> dict[str, Any]:
    with open_parallel(parallel, rank, world_size, init_method, seed=0) as context:
        model = model_of(case.changes)
        chunks = build_chunks(model, IMAGE, context, vision_trains=case.train_vision, markers=MARKERS)
        engine = build_engine(chunks, OptimizerConfig(), 10, context)
        groups = context.pgs
        return {
            "place": Rank(groups.pp.rank(), groups.dp_cp.rank(), groups.expt_dp.rank()),
            "weights": sum(storages(parameter.data for chunk in chunks for parameter in chunk.parameters()).values()),
            "parameters": sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters()),
            "gradients": sum(_bytes(buffer.grad_data) for chunk in engine.wrapped for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]),
            "optimizer": optimizer_bytes(engine),
        }


def storages(tensors: Any) -> dict[int, int]:
    """Bytes of the distinct storages behind tensors."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def optimizer_bytes(engine: MegatronEngine) -> int:
    """Adam's states, and the float32 weights that are copies of others in a shorter type."""
    total = 0
    for part in engine.optimizer.chained_optimizers:
        total += sum(_bytes(state) for states in part.optimizer.state.values() for state in states.values() if isinstance(state, torch.Tensor))
        total += sum(_bytes(shard) for group in part.shard_fp32_from_float16_groups for shard in group if shard is not None)
    return total


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
