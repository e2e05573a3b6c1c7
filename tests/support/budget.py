"""What a rank does in the tests of micro-batches by tokens: one update from the same start, cut in several ways."""

from __future__ import annotations

from typing import Any

from megatron_ext.checkpoint.full_tensors import full_tensors
from megatron_ext.config.schema import OptimizerConfig, ParallelConfig
from megatron_ext.data.collate import TokenBatch
from megatron_ext.model.assembly import build_chunks
from megatron_ext.parallel.groups import ParallelContext, open_parallel
from megatron_ext.training.losses import Microbatch, NextToken
from megatron_ext.training.megatron_engine import build_engine
from megatron_ext.training.microbatches import budgeted_microbatches, microbatches
from megatron_ext.training.step import optimizer_step
from tests.support.layouts import TAPS, copies, finalize_everywhere, gradient
from tests.support.models import IMAGE, open_gates, small_config
from tests.support.training import PAD, ROWS, part, token_batch

SHORT, MICRO = 13, 2
"""Positions of the rows of the second half, which a second data-parallel rank gets; rows of a fixed micro-batch."""


def unequal_rows() -> TokenBatch:
    """Four rows of 17 to 24 tokens, then four of 13."""
    batch = token_batch(0)
    tokens, mask = batch.tokens_BS.copy(), batch.loss_mask_BS.copy()
    tokens[ROWS // 2 :, SHORT:] = PAD
    mask[ROWS // 2 :, SHORT:] = 0
    mask[ROWS // 2 :, 10:SHORT] = 1
    return TokenBatch(tokens, mask, batch.tiles, batch.row_tiles_BM)


def train_by_tokens(rank: int, world_size: int, init_method: str, parallel: ParallelConfig, budgets: list[int]) -> list[dict[str, Any]]:
    """For each budget (0: `MICRO` rows a micro-batch) the numbers of one update, the lengths of its micro-batches, and on rank 0 every gradient by its name."""
    with open_parallel(parallel, rank, world_size, init_method, seed=0) as context:
        return [_update(budget, context) for budget in budgets]


def _update(budget: int, context: ParallelContext) -> dict[str, Any]:
    model = small_config(num_layers=4, clvr=TAPS, moe_aux_loss_coeff=0.0)
    chunks = build_chunks(model, IMAGE, context, seed=3, vision_trains=True)
    for chunk in chunks:
        open_gates(chunk)
    engine = build_engine(chunks, OptimizerConfig(lr=1e-3, warmup_steps=0, schedule="constant", clip_grad=0.0), 10, context)
    chunks[0].config.finalize_model_grads_func = finalize_everywhere
    batches = _cut(budget, context)
    metrics = optimizer_step(engine, batches, NextToken(), context)
    gradients = copies(full_tensors(chunks, context, of=gradient))
    return {"lengths": [batch.inputs.tokens_BS.numel() for batch in batches], "metrics": metrics, "gradients": gradients if context.rank == 0 else {}}


def _cut(budget: int, context: ParallelContext) -> list[Microbatch]:
    share = ROWS // context.layout.dp
    rows = part(unequal_rows(), context.dp_rank * share, (context.dp_rank + 1) * share)
    if budget:
        return budgeted_microbatches(rows, budget, PAD, context)
    return microbatches(rows, MICRO, PAD, context.device, packed=True, multiple=context.layout.length_multiple)
