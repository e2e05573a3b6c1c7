"""What a rank does in the tests that compare layouts: trains a small real model on its share of the same batches and reports weights and gradients by
their full names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import finalize_model_grads

from megatron_ext.batch import NO_TILES, Markers
from megatron_ext.checkpoint.full_tensors import digest, full_tensors
from megatron_ext.checkpoint.sharded import sharded_model
from megatron_ext.config.schema import ClvrConfig, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_ext.data.collate import TokenBatch
from megatron_ext.model.assembly import build_chunks
from megatron_ext.parallel.groups import ParallelContext, open_parallel
from megatron_ext.training.losses import NextToken
from megatron_ext.training.megatron_engine import build_engine
from megatron_ext.training.microbatches import microbatches
from megatron_ext.training.step import optimizer_step
from tests.support.models import IMAGE, open_gates, small_config
from tests.support.training import PAD, part, token_batch
from tests.support.weights import load_full_tensors

TAPS = ClvrConfig(taps=((0, 1), (1, 3), (2, 3)), num_heads=4, num_kv_heads=2, head_dim=8, gate="tanh_gate")
"""One tap inside a stage of PP2, one that crosses to the next, one whose adapter lives on the second stage, where the ViT's features have to come from
somewhere."""
STEPS, ROWS, MICRO = 2, 8, 2
MARKERS = Markers(slots=tuple(range(10, 26)))
"""Some of the words of random rows: enough of them that no gradient is all rounding."""


@dataclass(frozen=True)
class Case:
    """A layout and how it is used. `changes` are made to the small model of four layers."""

    parallel: ParallelConfig
    packed: bool = False
    train_vision: bool = True
    changes: dict[str, Any] = field(default_factory=dict)


def model_of(changes: dict[str, Any]) -> ModelConfig:
    """The small model of four layers and three taps that layouts are tried with, changed."""
    return small_config(**{"num_layers": 4, "clvr": TAPS, **changes})


def batch_of(step: int, images: bool = True) -> TokenBatch:
    """Eight rows of different lengths; the last two, and so the last microbatch, show no image, or none does."""
    batch = token_batch(step, ROWS)
    tokens, row_tiles = batch.tokens_BS.copy(), batch.row_tiles_BM.copy()
    blind = slice(-MICRO if images else 0, None)
    tokens[blind][tokens[blind] == IMAGE] = IMAGE + 4
    row_tiles[blind] = -1
    return TokenBatch(tokens, batch.loss_mask_BS, batch.tiles if images else NO_TILES, row_tiles)


def train(rank: int, world_size: int, init_method: str, case: Case, weights: dict[str, torch.Tensor] | None) -> dict[str, Any]:
    """Two updates, each rank taking its data-parallel share. `weights` replace the drawn ones. Tensors are reported by rank 0 alone."""
    with open_parallel(case.parallel, rank, world_size, init_method, seed=rank) as context:
        model = model_of(case.changes)
        chunks = build_chunks(model, IMAGE, context, seed=3, vision_trains=case.train_vision, markers=MARKERS)
        drawn = digest(full_tensors(chunks, context))
        for chunk in chunks:
            open_gates(chunk)
        if weights is not None:
            load_full_tensors(chunks, weights, context)
        report: dict[str, Any] = {"drawn": drawn, "start": copies(full_tensors(chunks, context))}
        engine = build_engine(chunks, OptimizerConfig(lr=1e-3, warmup_steps=0, schedule="constant", clip_grad=0.0), 10, context)
        chunks[0].config.finalize_model_grads_func = finalize_everywhere
        share, multiple = ROWS // context.layout.dp, context.layout.length_multiple
        curve = []
        for step in range(STEPS):
            rows = part(batch_of(step, model.vision.enabled), context.dp_rank * share, (context.dp_rank + 1) * share)
            batches = microbatches(rows, MICRO, PAD, context.device, packed=case.packed, multiple=multiple)
            curve.append(optimizer_step(engine, batches, NextToken(), context))
            engine.settle()
            if step == 0:
                report["gradients"] = copies(full_tensors(chunks, context, of=gradient))
                report["weights"] = copies(full_tensors(chunks, context))
        every = {"curve": curve, "saved": shapes_saved(chunks, context)}
        return {**report, **every} if rank == 0 else every


def shapes_saved(chunks: list[Any], context: ParallelContext) -> dict[str, tuple[int, ...]]:
    """By name, the shape of the whole tensor of which a checkpoint says that this rank's is a part. Experts, and what Megatron cuts again as it saves, have
    another shape there."""
    entries = sharded_model(chunks, context)
    return {name: tuple(entry.global_shape) for name, entry in entries.items() if isinstance(entry, ShardedTensor) and ".experts." not in name}


def gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Zero where there is none: the parameter is frozen."""
    found = getattr(parameter, "main_grad", None)
    return torch.zeros_like(parameter) if found is None else found


def finalize_everywhere(model: list[Any], num_tokens: Any = None, **settings: Any) -> None:
    """The distributed optimizer needs the sum of its own share of the gradients only; a comparison needs them all."""
    finalize_model_grads(model, num_tokens, **{**settings, "force_all_reduce": True})


def copies(tensors: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors}
