"""Training of a small real model on fixed batches, in this process or as a rank function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_ext.batch import Tiles
from megatron_ext.batch.metric import Metric
from megatron_ext.batch.tiles import WHOLE, grid_places
from megatron_ext.checkpoint.dist import load_checkpoint, save_checkpoint
from megatron_ext.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_ext.data.collate import TokenBatch
from megatron_ext.model.assembly import build_model
from megatron_ext.parallel.groups import ParallelContext, open_parallel
from megatron_ext.training.losses import Microbatch, NextToken
from megatron_ext.training.megatron_engine import MegatronEngine, build_engine
from megatron_ext.training.microbatches import microbatches
from megatron_ext.training.reduce import reduce_metrics
from megatron_ext.training.step import optimizer_step
from tests.support.models import IMAGE, TOKENS_PER_TILE, USABLE, small_config

PAD = 0
ROWS, LENGTH = 8, 24
ADAM = OptimizerConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2, weight_decay=0.1, clip_grad=0.5)


def token_batch(step: int = 0, rows: int = ROWS) -> TokenBatch:
    """Rows of different lengths, each with one tile: a whole picture, a part of one, or a thumbnail; the masked tokens differ in number from row to row."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(8, USABLE, size=(rows, LENGTH)).astype(np.int32)
    tokens[:, 2 : 2 + TOKENS_PER_TILE] = IMAGE
    mask = np.zeros((rows, LENGTH), np.uint8)
    for row in range(rows):
        stop = LENGTH - int(rng.integers(0, 8))
        tokens[row, stop:] = PAD
        mask[row, int(rng.integers(8, stop - 2)) : stop] = 1
    places = np.resize([WHOLE, *grid_places(2, 2)], (rows, 5)).astype(np.float32)
    tiles = Tiles(rng.integers(0, 256, size=(rows, 16, 16, 3), dtype=np.uint8), places)
    return TokenBatch(tokens, mask, tiles, np.arange(rows, dtype=np.int32)[:, None])


def part(batch: TokenBatch, start: int, stop: int) -> TokenBatch:
    return TokenBatch(batch.tokens_BS[start:stop], batch.loss_mask_BS[start:stop], batch.tiles, batch.row_tiles_BM[start:stop])


def own_microbatches(step: int, rows: int, context: ParallelContext) -> list[Microbatch]:
    """This data-parallel rank's share of step's batch, `rows` at a time."""
    share = ROWS // context.layout.dp
    start = context.dp_rank * share
    return microbatches(part(token_batch(step), start, start + share), rows, PAD, context.device)


def start(context: ParallelContext, model: ModelConfig | None = None, **options: Any) -> MegatronEngine:
    return build_engine([build_model(model or small_config(), IMAGE, context)], options.pop("optimizer", ADAM), 10, context, **options)


def run_steps(state: MegatronEngine, first: int, last: int, rows: int, context: ParallelContext) -> list[dict[str, float]]:
    return [optimizer_step(state, own_microbatches(step, rows, context), NextToken(), context) for step in range(first, last)]


def weights(state: MegatronEngine) -> dict[str, torch.Tensor]:
    """This rank's parameters: all of the model's, in layouts that split none."""
    return {name: parameter.detach().clone() for name, parameter in state.chunks[0].named_parameters()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def train_rank(rank: int, world_size: int, init_method: str, parallel: ParallelConfig, model: ModelConfig, steps: int, rows: int) -> Any:
    """Metrics of every step and the full weights after the last."""
    with open_parallel(parallel, rank, world_size, init_method, 0) as context:
        state = start(context, model)
        return run_steps(state, 0, steps, rows, context), weights(state)


def save_rank(rank: int, world_size: int, init_method: str, parallel: ParallelConfig, folder: Path, saved_at: int, last: int) -> Any:
    """Saves after `saved_at` steps, then goes on: metrics of the steps after the save, and the weights."""
    with open_parallel(parallel, rank, world_size, init_method, 0) as context:
        state = start(context)
        run_steps(state, 0, saved_at, 4, context)
        save_checkpoint(folder, saved_at, state.chunks, state.optimizer_state, {"note": "here"}, context, small_config(), keep=2)
        metrics = run_steps(state, saved_at, last, 4, context)
        return metrics, weights(state)


def load_rank(rank: int, world_size: int, init_method: str, parallel: ParallelConfig, folder: Path, last: int) -> Any:
    """Starts from other weights, loads, goes on to `last`."""
    with open_parallel(parallel, rank, world_size, init_method, 1) as context:
        state = build_engine([build_model(small_config(), IMAGE, context, seed=5)], ADAM, 10, context)
        loaded = load_checkpoint(folder, state.chunks, state.optimizer_state, context=context, model_config=small_config())
        metrics = run_steps(state, int(loaded["step"]), last, 4, context)
        return metrics, weights(state)


def reduce_rank(rank: int, world_size: int, init_method: str, parallel: ParallelConfig, parts: list[dict[str, Metric]]) -> dict[str, Metric]:
    """`parts[rank]` merged with those of the other ranks."""
    with open_parallel(parallel, rank, world_size, init_method, 0) as context:
        return reduce_metrics(parts[rank], context.pgs.dp_cp, context.device)
