"""The default engine: Megatron's data parallelism, distributed Adam and learning-rate schedule around the chunks of a model.

    chunks -> freeze -> DistributedDataParallel (gradients in float32 buffers) -> DistributedOptimizer (states split over data-parallel ranks) -> schedule

Supervised training and the reinforcement-learning learner both start here; `training/step.py` does the updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.optimizer import MegatronOptimizer, ParamGroupOverride, ParamKey, ParamPredicate, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ext.checkpoint.optimizer_state import MegatronOptimizerState
from megatron_ext.config.schema import OptimizerConfig
from megatron_ext.device import backend
from megatron_ext.model.assembly import VisionLanguageModel
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.training.clvr_metrics import RefinementSize
from megatron_ext.training.engine import Scheduled
from megatron_ext.training.moe_metrics import ExpertLoad
from megatron_ext.training.update import Shards, gradient_norm


@dataclass(frozen=True)
class MegatronEngine(Scheduled):
    """See `engine.Engine`."""

    wrapped: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    shards: list[Shards] = field(repr=False)
    clip_grad: float
    gathers_late: bool
    """Updated weights are gathered while the next forward pass runs."""

    @property
    def optimizer_state(self) -> MegatronOptimizerState:
        return MegatronOptimizerState(self.optimizer, self.scheduler)

    def begin(self) -> None:
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()

    @torch.no_grad()
    def gradient_norm(self) -> float:
        return gradient_norm(self.shards)

    @torch.no_grad()
    def update(self, norm: float) -> None:
        self.scheduler.step(1)
        divisor = (norm + 1e-6) / self.clip_grad if self.clip_grad > 0 and norm > self.clip_grad else 1.0
        for shards in self.shards:
            shards.step(divisor)
            shards.publish()
        if not self.gathers_late:
            for chunk in self.wrapped:
                chunk.start_param_sync()

    def settle(self) -> None:
        if self.gathers_late:
            for chunk in self.wrapped:
                chunk.start_param_sync(force_sync=True)


def build_engine(
    chunks: Sequence[VisionLanguageModel],
    config: OptimizerConfig,
    num_steps: int,
    context: ParallelContext,
    *,
    router_lr_scale: float = 1.0,
    frozen: tuple[str, ...] = (),
) -> MegatronEngine:
    """Wraps a model, all chunks of it that this rank holds, for `num_steps` updates.

    Matrices decay, vectors (norms, biases, gates) do not. Routers learn `router_lr_scale` times slower, or not at all at 0. Parameters whose name starts with
    one of `frozen` are not trained; see `freeze`.
    """
    chunks = list(chunks)
    routers = [router for chunk in chunks for router in chunk.decoder.routers()]
    freeze(chunks, frozen, context, () if router_lr_scale else routers)
    wrapped = _wrap(chunks, context)
    optimizer = _adam(wrapped, config, context, router_lr_scale)
    schedule = build_schedule(optimizer, config, num_steps)
    gathers_late = context.parallel.overlap_param_gather
    return MegatronEngine(
        chunks,
        schedule,
        ExpertLoad(routers, chunks[0].model_config),
        RefinementSize(chunks),
        wrapped,
        optimizer,
        [Shards(part) for part in optimizer.chained_optimizers],
        config.clip_grad,
        gathers_late,
    )


def freeze(chunks: Sequence[torch.nn.Module], prefixes: tuple[str, ...], context: ParallelContext, modules: Sequence[torch.nn.Module] = ()) -> None:
    """Parameters by the start of their names, and whole modules. Raises ValueError for a prefix that matches nothing; not under pipeline parallelism, where
    another stage may hold what it names."""
    for module in modules:
        module.requires_grad_(False)
    for prefix in prefixes:
        matched = [parameter for chunk in chunks for name, parameter in chunk.named_parameters() if name.startswith(prefix)]
        if not matched and context.layout.pp == 1:
            raise ValueError(f"no parameter's name starts with {prefix!r}")
        for parameter in matched:
            parameter.requires_grad_(False)


def build_schedule(optimizer: MegatronOptimizer, config: OptimizerConfig, num_steps: int) -> OptimizerParamScheduler:
    """Linear warm-up from 0 to `lr`, then constant, or down to `min_lr` at the last step along a cosine or a line.

    Update k (from 1) uses the rate of step k, so the first update already moves and the last one runs at `min_lr`. A run shorter than its warm-up stays in it.
    Building the schedule also applies the groups' weight-decay multipliers, which the optimizer alone ignores.
    """
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=max(num_steps, config.warmup_steps + 1),
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def _wrap(chunks: list[VisionLanguageModel], context: ParallelContext) -> list[DistributedDataParallel]:
    """Data parallelism, and the hooks through which Megatron's schedule reaches it. The chunks of a model share one configuration."""
    parallel, settings = context.parallel, chunks[0].config
    overlap = parallel.overlap_grad_reduce if parallel.overlap_grad_reduce is not None else (backend() == "nccl" or parallel.overlap_param_gather)
    settings.calculate_per_token_loss = True  # gradients are summed over ranks and divided by the step's tokens
    settings.finalize_model_grads_func = finalize_model_grads
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=overlap, overlap_param_gather=parallel.overlap_param_gather
    )
    wrapped = []
    for number, chunk in enumerate(chunks):
        chunk.config = settings
        # Gradients of all chunks but the first are ready late in the backward pass: bucketing them would overlap nothing.
        ddp_chunk = DistributedDataParallel(settings, ddp, chunk, disable_bucketing=number > 0, pg_collection=context.pgs)
        ddp_chunk.model_type = ModelType.encoder_or_decoder  # Megatron's schedules ask for it
        ddp_chunk.vp_stage = chunk.vp_stage
        for group in [*ddp_chunk.bucket_groups, *ddp_chunk.expert_parallel_bucket_groups]:
            if group.intra_distributed_optimizer_instance_size == 1:
                _keep_to_itself(group)
        wrapped.append(ddp_chunk)
    no_sync = [chunk.no_sync for chunk in wrapped]
    settings.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


def _keep_to_itself(group: Any) -> None:
    """For buckets that no other rank has a part of: a collective of one rank would copy all gradients, and all weights, onto themselves in every step."""

    def reduced(force_all_reduce: bool = False) -> None:
        group.param_gather_dispatched = False

    def gathered(force_sync: bool = False) -> None:
        group.param_gather_dispatched = True

    assert all(bucket.gradient_scaling_factor == 1.0 for bucket in group.buckets)  # gradients are sums (`calculate_per_token_loss`)
    group.start_grad_sync = group.finish_grad_sync = reduced
    group.start_param_sync = gathered


def _adam(wrapped: list[DistributedDataParallel], config: OptimizerConfig, context: ParallelContext, router_lr_scale: float) -> MegatronOptimizer:
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        bf16=wrapped[0].config.bf16,
        params_dtype=wrapped[0].config.params_dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=context.parallel.overlap_param_gather,
    )
    overrides = get_standard_config_overrides(settings)
    overrides[ParamKey(predicate=ParamPredicate(name="scalar", fn=lambda parameter: parameter.dim() == 0))] = ParamGroupOverride(wd_mult=0.0)  # gates
    if router_lr_scale != 1:
        slower = ParamGroupOverride(max_lr=config.lr * router_lr_scale, min_lr=config.min_lr * router_lr_scale)
        overrides[ParamKey(name="*.router.*")] = slower
    optimizer = get_megatron_optimizer(settings, wrapped, overrides, use_gloo_process_groups=False, pg_collection=context.pgs)
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            _start_adam(part.optimizer)
    return optimizer


def _start_adam(adam: torch.optim.AdamW) -> None:
    """Creates Adam's moments now, so that a checkpoint may be saved or loaded before the first update; and updates all tensors of a group in one kernel."""
    for group in adam.param_groups:
        group["fused"], group["foreach"] = True, False
        for parameter in group["params"]:
            adam.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
