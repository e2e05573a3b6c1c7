"""One optimizer step over microbatches, for any objective and engine.

    for each microbatch:  objective.forward on every pipeline stage; objective.loss on the last: (loss sum, tokens, metrics); backward     (Megatron's
    schedules)
    sum gradients over ranks, divide by the tokens of all microbatches and ranks                                                        (finalize_model_grads)
    reduce metrics; refuse what is not finite; norm, clip, schedule, Adam, expert bias                                    (nothing is updated before the checks)

The loss is a mean over all tokens of the step: eight rows in one microbatch, in four microbatches or on two ranks give the same gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import megatron.core.transformer.multi_token_prediction  # noqa: F401  the schedule imports it in its first step, and compiles as it does: too late inside a device session
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_ext.batch.metric import Metric, merge_metrics
from megatron_ext.errors import UserError
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.training.engine import Engine
from megatron_ext.training.reduce import reduce_metrics

LossParts = tuple[torch.Tensor, torch.Tensor, Mapping[str, Metric]]
"""(sum of losses, their divisor on this rank as an int32 tensor: usually the number of tokens, metrics)."""


class Objective(Protocol):
    """What is learnt from a microbatch."""

    def forward(self, model: Any, microbatch: Any, /) -> torch.Tensor:
        """Runs a model chunk; its output."""

    def loss(self, model: Any, microbatch: Any, output: torch.Tensor, /) -> LossParts:
        """What the last pipeline stage's output is worth. The same metric names for every microbatch."""


def optimizer_step(
    engine: Engine, microbatches: Sequence[Any], objective: Objective, context: ParallelContext, lap: Callable[[str], None] = lambda phase: None
) -> dict[str, float]:
    """Updates the weights once. Every rank passes equally many microbatches; the stages of a pipeline, and context-parallel ranks, the same ones.

    `lap` is told the end of `forward_backward`, when its metrics have arrived, and of `optimizer`, whose last kernels a GPU may still be running.

    Returns, equal on all ranks: `loss` (token mean), the objective's metrics over all microbatches and ranks, `num_tokens`, `grad_norm` (before clipping),
    `lr`, `moe/*` and `clvr/*`.
    Raises UserError naming the step, with weights and optimizer untouched, when the loss or the gradient norm is not finite.
    """
    engine.begin()
    engine.load.reset()
    engine.refinement.reset()
    parts = run_schedule(engine.wrapped, microbatches, objective, context)
    load, tokens_LE = engine.load.reduced(len(microbatches), context)
    metrics = {
        **_reduce(parts, context),
        **load,
        **engine.refinement.metrics(context),
    }
    lap("forward_backward")
    _require_finite(engine, "loss", metrics["loss"])
    norm = engine.gradient_norm()
    _require_finite(engine, "gradient norm", norm)
    engine.update(norm)
    engine.load.balance(tokens_LE)
    lap("optimizer")
    return {**metrics, "grad_norm": norm, "lr": engine.lr}


def run_schedule(
    wrapped: Sequence[Any], microbatches: Sequence[Any], objective: Objective, context: ParallelContext, forward_only: bool = False
) -> list[LossParts]:
    """Forward and backward of all microbatches, pipelined where there are stages. On the last stage what each microbatch gave, elsewhere an empty list."""

    def forward(batches: Iterator[Any], model: Any) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
        batch = next(batches)
        return objective.forward(model, batch), partial(_loss_parts, objective, model, batch)

    layout = context.layout
    run = get_forward_backward_func(pp_size=layout.pp, vp_size=layout.vpp if layout.vpp > 1 else None)
    MoEAuxLossAutoScaler.main_loss_backward_scale = None  # one per process: whatever another backward pass left there is not of this step
    results: list[LossParts] = run(
        forward_step_func=forward,
        data_iterator=[iter(microbatches) for _ in wrapped],
        model=list(wrapped),
        num_microbatches=len(microbatches),
        seq_length=layout.length_multiple,  # what is sent brings its own shape
        micro_batch_size=1,
        forward_only=forward_only,
        pg_collection=context.pgs,
        **({"p2p_communicator": P2PCommunicator(context.pgs.pp, wrapped[0].config)} if layout.pp > 1 else {}),
    )
    return results


def _loss_parts(objective: Objective, model: Any, batch: Any, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, LossParts]:
    """Megatron's loss contract: (loss, tokens, record)."""
    loss_sum, num_tokens, metrics = objective.loss(model, batch, output)
    return loss_sum, num_tokens, (loss_sum.detach(), num_tokens, metrics)


def _reduce(parts: list[LossParts], context: ParallelContext) -> dict[str, float]:
    """Values over all microbatches and ranks. The last stage knows them and tells the others."""
    told: list[Any] = [None]
    if context.is_last_stage:
        # Not merged: a rank that counts none of the items it shares with another has a part of their loss all the same.
        loss = Metric(sum(float(loss_sum) for loss_sum, _, _ in parts), sum(float(num_tokens) for _, num_tokens, _ in parts))
        reduced = reduce_metrics({"loss": loss, **merge_metrics(metrics for _, _, metrics in parts)}, context.pgs.dp_cp, context.device)
        told = [{**{name: metric.value for name, metric in reduced.items()}, "num_tokens": reduced["loss"].count}]
    if context.layout.pp > 1:
        last = torch.distributed.get_global_rank(context.pgs.pp, context.layout.pp - 1)
        torch.distributed.broadcast_object_list(told, src=last, group=context.pgs.pp, device=context.device)
    return dict(told[0])


def _require_finite(engine: Engine, what: str, value: float) -> None:
    if not math.isfinite(value):
        raise UserError(
            f"step {engine.step + 1}",
            f"the {what} is {value}",
            "the weights were left as they were before this step; lower optimizer.lr or look at this step's data",
        )
