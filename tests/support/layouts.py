"""What a rank does in the tests that compare layouts: trains a small real model on its share of the same batches and reports weights and gradients by
their full names."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads

from megatron_ext.checkpoint.full_tensors import digest, full_tensors, load_full_tensors
from megatron_ext.config.schema import OptimizerConfig, ParallelConfig
from megatron_ext.model.assembly import build_model
from megatron_ext.model.heads import token_logprobs
from megatron_ext.parallel.groups import ParallelContext, open_parallel
from megatron_ext.training.optimizer import build_optimizer
from megatron_ext.training.step import optimizer_step
from tests.support.models import IMAGE, open_gates, small_batch, small_batch_of_text, small_config


def train(
    rank: int, world_size: int, init_method: str, parallel: ParallelConfig, changes: dict[str, Any], weights: dict[str, torch.Tensor] | None
) -> dict[str, Any]:
    """Two updates on two batches, the second without images, each rank taking its data-parallel share. `changes` are made to the small model, `weights` replace
    the drawn ones. Tensors are reported by rank 0 alone."""
    with open_parallel(parallel, rank, world_size, init_method, seed=rank) as context:
        model = build_model(small_config(**changes), IMAGE, context, seed=3)
        drawn = digest(full_tensors(model, context))
        open_gates(model)
        if weights is not None:
            load_full_tensors(model, weights, context)
        report: dict[str, Any] = {"drawn": drawn, "start": _copies(full_tensors(model, context))}
        state = build_optimizer(model, OptimizerConfig(lr=1e-3, warmup_steps=0, schedule="constant", clip_grad=0.0), 10, context)
        model.config.finalize_model_grads_func = _finalize_everywhere
        batches = [small_batch(), small_batch_of_text()][context.dp_rank :: context.layout.dp]
        report["first"] = optimizer_step(state, batches, partial(language_loss, context), context)
        report["gradients"] = _copies(full_tensors(model, context, of=lambda parameter: parameter.main_grad))
        report["weights"] = _copies(full_tensors(model, context))
        report["second"] = optimizer_step(state, batches, partial(language_loss, context), context)
        return report if rank == 0 else {"first": report["first"], "second": report["second"]}


def _finalize_everywhere(model: list[Any], num_tokens: Any = None, **settings: Any) -> None:
    """The distributed optimizer needs the sum of its own share of the gradients only; a comparison needs them all."""
    finalize_model_grads(model, num_tokens, **{**settings, "force_all_reduce": True})


def _copies(tensors: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors}


def language_loss(context: ParallelContext, model: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Next-token loss at every position, image tokens included: a test wants many targets, not a curriculum."""
    logprobs_BS = token_logprobs(model(batch), batch.tokens_BS.roll(-1, dims=1), context.pgs.tp)
    return -logprobs_BS.sum(), torch.tensor(logprobs_BS.numel()), {}
