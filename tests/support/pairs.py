"""Pairs of answers for the small real model: batches, the update on them, and what a rank does in the tests that compare layouts."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_ext.batch import Tiles
from megatron_ext.checkpoint.full_tensors import full_tensors
from megatron_ext.config.schema import MpoConfig, OptimizerConfig, ParallelConfig
from megatron_ext.data.collate import TokenBatch
from megatron_ext.model.assembly import build_chunks
from megatron_ext.parallel.groups import ParallelContext, open_parallel
from megatron_ext.training.losses import Microbatch
from megatron_ext.training.megatron_engine import build_engine
from megatron_ext.training.microbatches import microbatches
from megatron_ext.training.mpo import MixedPreference
from megatron_ext.training.preference import RunningMean
from tests.support.models import IMAGE, TOKENS_PER_TILE, USABLE, open_gates, small_config
from tests.support.training import PAD

PAIRS, LENGTH, PROMPT = 4, 24, 10
STEEP = OptimizerConfig(lr=3e-3, warmup_steps=0, schedule="constant", weight_decay=0.0)
MPO = MpoConfig(steps=9, global_batch=PAIRS, micro_batch=PAIRS, optimizer=STEEP)
MODEL = {"num_layers": 4, "moe_aux_loss_coeff": 0.0}


def pair_batch(step: int, pairs: int = PAIRS) -> TokenBatch:
    """Each pair has a question of its own, one tile that both rows show, and two answers of different lengths."""
    rng = np.random.default_rng([7, step])
    tokens, mask = np.zeros((2 * pairs, LENGTH), np.int32), np.zeros((2 * pairs, LENGTH), np.uint8)
    for pair in range(pairs):
        question = rng.integers(8, USABLE, PROMPT)
        question[2 : 2 + TOKENS_PER_TILE] = IMAGE
        for row in (2 * pair, 2 * pair + 1):
            stop = PROMPT + int(rng.integers(2, LENGTH - PROMPT))
            tokens[row, :PROMPT], tokens[row, PROMPT:stop], mask[row, PROMPT:stop] = question, rng.integers(8, USABLE, stop - PROMPT), 1
    tiles = Tiles.whole(rng.integers(0, 256, size=(pairs, 16, 16, 3), dtype=np.uint8))
    return TokenBatch(tokens, mask, tiles, np.repeat(np.arange(pairs, dtype=np.int32), 2)[:, None])


def own_pairs(step: int, context: ParallelContext, micro: int = PAIRS, packed: bool = False) -> list[Microbatch]:
    """This data-parallel rank's share, `micro` pairs at a time."""
    batch, share = pair_batch(step), 2 * PAIRS // context.layout.dp
    rows = slice(context.dp_rank * share, (context.dp_rank + 1) * share)
    part = TokenBatch(batch.tokens_BS[rows], batch.loss_mask_BS[rows], batch.tiles, batch.row_tiles_BM[rows])
    return microbatches(part, 2 * micro, PAD, context.device, packed=packed, multiple=context.layout.length_multiple)


def preference(context: ParallelContext, rewards: RunningMean = RunningMean(), settings: MpoConfig = MPO) -> MixedPreference:  # noqa: B008  frozen
    """The small model against itself as it was drawn."""
    policy, reference = (build_chunks(small_config(**MODEL), IMAGE, context, seed=3, vision_trains=trains) for trains in (True, False))
    for chunk in (*policy, *reference):
        open_gates(chunk)
    engine = build_engine(policy, settings.optimizer, settings.steps, context)
    return MixedPreference(engine, [chunk.requires_grad_(False).eval() for chunk in reference], settings, context, rewards)


def learn(rank: int, world_size: int, init_method: str, parallel: ParallelConfig, steps: int, micro: int, packed: bool) -> Any:
    """Metrics of every step, and the weights after the last (of rank 0)."""
    with open_parallel(parallel, rank, world_size, init_method, 0) as context:
        update = preference(context)
        curve = [update.update(own_pairs(step, context, micro, packed)) for step in range(steps)]
        update._engine.settle()
        weights = {name: tensor.clone() for name, tensor in full_tensors(update._engine.chunks, context)}
        return curve, weights if rank == 0 else {}
