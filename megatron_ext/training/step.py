"""One optimizer step over microbatches, for any loss function.

    for each microbatch:  loss_fn -> (loss sum, tokens, metrics) -> backward          (Megatron's schedule)
    sum gradients over ranks, divide by the tokens of all microbatches and ranks      (finalize_model_grads)
    reduce metrics; refuse what is not finite; norm, clip, schedule, Adam             (nothing is updated before the checks)

The loss is a mean over all tokens of the step: eight rows in one microbatch, in four microbatches or on two ranks give the same gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import megatron.core.transformer.multi_token_prediction  # noqa: F401  the schedule imports it in its first step, and compiles as it does: too late inside a device session
import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_ext.batch.metric import Metric, merge_metrics
from megatron_ext.errors import UserError
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.training.moe_metrics import router_metrics
from megatron_ext.training.optimizer import TrainState
from megatron_ext.training.reduce import reduce_metrics

LossParts = tuple[torch.Tensor, torch.Tensor, Mapping[str, Metric]]


class LossFunction(Protocol):
    """(model, microbatch) -> (sum of losses, their divisor on this rank as an integer tensor: usually the number of tokens, metrics)."""

    def __call__(self, model: Any, microbatch: Any, /) -> LossParts: ...


def optimizer_step(state: TrainState, microbatches: Sequence[Any], loss_fn: LossFunction, context: ParallelContext) -> dict[str, float]:
    """Updates the weights once. Every rank passes equally many microbatches, and `loss_fn` gives the same metric names on each.

    Returns, equal on all ranks: `loss` (token mean), `loss_fn`'s metrics over all microbatches and ranks, `num_tokens`, `grad_norm` (before clipping),
    `lr`, `moe/*` and `clvr/*`.
    Raises UserError naming the step, with weights and optimizer untouched, when the loss or the gradient norm is not finite.
    """
    state.model.zero_grad_buffer()
    state.optimizer.zero_grad()
    state.load.reset()
    state.refinement.reset()
    metrics = _reduce(state, _forward_backward(state, microbatches, loss_fn, context), context)
    _require_finite(state, "loss", metrics["loss"])
    metrics["grad_norm"] = _update(state)
    metrics["lr"] = state.lr
    return metrics


def _forward_backward(state: TrainState, microbatches: Sequence[Any], loss_fn: LossFunction, context: ParallelContext) -> list[LossParts]:
    """Accumulates gradients; returns what each microbatch measured on this rank."""

    def forward(batches: Iterator[Any], model: Any) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
        loss_sum, num_tokens, metrics = loss_fn(model, next(batches))
        return loss_sum, partial(_scaled_loss, state, num_tokens, metrics)

    MoEAuxLossAutoScaler.main_loss_backward_scale = None  # one per process: whatever another backward pass left there is not of this step
    run = get_forward_backward_func(pp_size=1, vp_size=None)
    results: list[LossParts] = run(
        forward_step_func=forward,
        data_iterator=iter(microbatches),
        model=[state.model],
        num_microbatches=len(microbatches),
        seq_length=1,
        micro_batch_size=1,
        pg_collection=context.pgs,
    )
    return results


def _scaled_loss(
    state: TrainState, num_tokens: torch.Tensor, metrics: Mapping[str, Metric], loss_sum: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, LossParts]:
    """Megatron's loss contract: (loss, tokens, record). The microbatch's mean goes in; `TokenScale` makes sums of it and of the auxiliary loss."""
    state.scale.num_tokens = num_tokens
    return loss_sum / num_tokens.clamp(min=1), num_tokens, (loss_sum.detach(), num_tokens, metrics)


def _reduce(state: TrainState, parts: list[LossParts], context: ParallelContext) -> dict[str, float]:
    """Values over all microbatches and ranks."""
    losses = ({"loss": Metric(float(loss_sum), float(num_tokens))} for loss_sum, num_tokens, _ in parts)
    local = merge_metrics([*losses, *(metrics for _, _, metrics in parts)])
    reduced = reduce_metrics(local, context.pgs.dp_cp, context.device)
    values = {name: metric.value for name, metric in reduced.items()}
    return {**values, "num_tokens": reduced["loss"].count, **router_metrics(state.load, len(parts), context), **state.refinement.metrics(context)}


@torch.no_grad()
def _update(state: TrainState) -> float:
    """Norm, clip, schedule, Adam, and the all-gather of the new weights. Returns the norm of the global gradient before clipping."""
    optimizer = state.optimizer
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    _require_finite(state, "gradient norm", norm)
    if state.clip_grad > 0 and norm > state.clip_grad:
        torch._foreach_mul_(_gradients(optimizer), state.clip_grad / (norm + 1e-6))
    state.scheduler.step(1)
    optimizer.step_with_ready_grads()
    return norm


def _gradients(optimizer: MegatronOptimizer) -> list[torch.Tensor]:
    parameters = [parameter for part in optimizer.chained_optimizers for parameter in part.get_parameters()]
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _require_finite(state: TrainState, what: str, value: float) -> None:
    if not math.isfinite(value):
        raise UserError(
            f"step {state.step + 1}",
            f"the {what} is {value}",
            "the weights were left as they were before this step; lower optimizer.lr or look at this step's data",
        )
