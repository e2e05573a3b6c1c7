"""The second engine: DeepSpeed's ZeRO around the same model, driven by the same schedule, for few GPUs with little memory. One pipeline stage.

    chunk -> freeze -> sum gradients of sequence slices (hooks) -> ZeRO 1, 2 or 3, optimizer on the device or on the CPU -> Megatron's learning-rate schedule

Gradients are the same sums as with engine megatron. DeepSpeed divides each by the number of data-parallel ranks, those of experts by the same number, and
the rest of the division by the step's targets is what it knows as a loss scale: it is set once the last backward pass is done (`_reduce`), and the norm and
the update divide by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from megatron_ext.checkpoint.deepspeed_state import DeepSpeedOptimizerState, gather_weights, release_weights
from megatron_ext.config.deepspeed import fill_deepspeed, read_deepspeed
from megatron_ext.config.schema import OptimizerConfig
from megatron_ext.model.assembly import VisionLanguageModel
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.training.clvr_metrics import RefinementSize
from megatron_ext.training.engine import Scheduled
from megatron_ext.training.megatron_engine import build_schedule, freeze
from megatron_ext.training.moe_metrics import ExpertLoad
from megatron_ext.training.zero import expert_group, is_expert, open_zero


class ZeroChunk:
    """The model as the schedule calls it: calls go through DeepSpeed, everything else to the bare model, whose `config` is Megatron's."""

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self.module: VisionLanguageModel = zero.module

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._zero(*args, **kwargs)


@dataclass(frozen=True)
class DeepSpeedEngine(Scheduled):
    """See `engine.Engine`."""

    wrapped: list[ZeroChunk]
    zero: Any

    @property
    def optimizer_state(self) -> DeepSpeedOptimizerState:
        return DeepSpeedOptimizerState(self.zero, self.scheduler)

    def begin(self) -> None:
        release_weights(self.zero)
        self.zero.clear()

    @torch.no_grad()
    def gradient_norm(self) -> float:
        return float(self.zero.norm())

    @torch.no_grad()
    def update(self, norm: float) -> None:
        """DeepSpeed clips by itself, to the same norm."""
        self.scheduler.step(1)
        self.zero.apply()

    def settle(self) -> None:
        gather_weights(self.zero)


def build_deepspeed_engine(
    chunks: Sequence[VisionLanguageModel],
    config: OptimizerConfig,
    num_steps: int,
    context: ParallelContext,
    *,
    router_lr_scale: float = 1.0,
    frozen: tuple[str, ...] = (),
) -> DeepSpeedEngine:
    """As `megatron_engine.build_engine`. Under ZeRO-3 the weights are split when this returns: `settle` makes them whole."""
    (model,) = chunks
    assert context.parallel.deepspeed is not None, "the rules ask for the file"
    settings = fill_deepspeed(read_deepspeed(context.parallel.deepspeed), config, model.model_config.dtype)
    routers = model.decoder.routers()
    freeze([model], frozen, context, () if router_lr_scale else routers)
    _sum_over_sequence_slices(model, context)
    zero = open_zero(model, _parameter_groups(model, config, context, router_lr_scale), settings, context)
    model.config.calculate_per_token_loss = True
    model.config.finalize_model_grads_func = partial(_reduce, zero, context)
    schedule = build_schedule(zero.optimizer, config, num_steps)
    return DeepSpeedEngine([model], schedule, ExpertLoad(routers, model.model_config), RefinementSize([model]), [ZeroChunk(zero)], zero)


def _reduce(zero: Any, context: ParallelContext, _model: Any, num_tokens: torch.Tensor, **_: Any) -> None:
    """What the schedule calls after the last backward pass, with this rank's number of targets."""
    total = num_tokens.clone()
    torch.distributed.all_reduce(total, group=context.pgs.dp_cp)
    zero.reduce(max(float(total), 1.0) / context.pgs.dp_cp.size())


def _sum_over_sequence_slices(model: VisionLanguageModel, context: ParallelContext) -> None:
    """Under sequence parallelism a norm, a router or a gate sees one slice of the sequence, and its gradient is the sum over slices. Megatron sums after the
    reduction over data-parallel ranks; ZeRO has split the gradients by then, so they are summed as they arise: one small all-reduce for each parameter and
    micro-batch."""
    if context.pgs.tp.size() == 1:
        return

    def summed(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        torch.distributed.all_reduce(gradient, group=context.pgs.tp)
        return gradient

    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (getattr(parameter, "sequence_parallel", False) or "q_layernorm" in name or "k_layernorm" in name):
            parameter.register_hook(summed)


def _parameter_groups(model: VisionLanguageModel, config: OptimizerConfig, context: ParallelContext, router_lr_scale: float) -> list[dict[str, Any]]:
    """Matrices decay, vectors do not; routers have their own rate; experts are marked for DeepSpeed. The fields are those that Megatron's schedule reads."""
    found: dict[tuple[bool, bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() > 1 and not name.endswith(".bias")
            found.setdefault((is_expert(parameter), ".router." in name, decays), []).append(parameter)
    groups = []
    for (expert, router, decays), parameters in found.items():
        scale = router_lr_scale if router else 1.0
        group = {"params": parameters, "wd_mult": float(decays), "max_lr": config.lr * scale, "min_lr": config.min_lr * scale}
        groups.append({**group, "moe": True, "name": expert_group(context)} if expert else group)
    return groups
