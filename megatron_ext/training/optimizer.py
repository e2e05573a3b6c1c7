"""From a bare model to something that can be trained: Megatron's data parallelism, distributed Adam and learning-rate schedule in one `TrainState`.

    model -> freeze -> DistributedDataParallel (gradients in float32 buffers) -> DistributedOptimizer (states split over data-parallel ranks) -> schedule

Supervised training and the reinforcement-learning learner both start here; `training/step.py` does the updates.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.optimizer import MegatronOptimizer, ParamGroupOverride, ParamKey, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.router import TopKRouter

from megatron_ext.config.schema import OptimizerConfig
from megatron_ext.device import backend
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.training.clvr_metrics import RefinementSize
from megatron_ext.training.moe_metrics import ExpertLoad


class TokenScale:
    """Turns a microbatch's token mean back into its token sum, for the loss and for the router's auxiliary loss alike.

    Gradients are summed over microbatches and ranks and divided once by the global number of tokens. The schedule hands both losses of a microbatch to this
    function, so with n tokens in the microbatch and N in the step both weigh n / N, whatever the split. (Left alone, Megatron weighs the auxiliary loss with
    the number of positions, padding and prompt included, which inflates it by positions / targets.)
    """

    def __init__(self) -> None:
        self.num_tokens: torch.Tensor | int = 0

    def __call__(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * self.num_tokens


@dataclass(frozen=True)
class TrainState:
    """A model that is being trained. `scheduler.num_steps` counts the updates made so far."""

    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    clip_grad: float
    scale: TokenScale = field(repr=False)
    load: ExpertLoad = field(repr=False)
    refinement: RefinementSize = field(repr=False)

    @property
    def step(self) -> int:
        return int(self.scheduler.num_steps)

    @property
    def lr(self) -> float:
        """The learning rate of the latest update, without per-group scales."""
        return float(self.scheduler.get_lr({}))


def build_optimizer(
    model: MegatronModule,
    config: OptimizerConfig,
    num_steps: int,
    context: ParallelContext,
    *,
    router_lr_scale: float = 1.0,
    frozen: tuple[str, ...] = (),
) -> TrainState:
    """Wraps `model` for `num_steps` updates.

    Matrices decay, vectors (norms, biases, gates) do not. Routers learn `router_lr_scale` times slower, or not at all at 0. Parameters whose name starts with
    one of `frozen` are not trained; a prefix that matches nothing raises ValueError.
    """
    freeze(model, frozen)
    if router_lr_scale == 0:
        for router in _routers(model):
            router.requires_grad_(False)
    scale = TokenScale()
    ddp = _wrap(model, scale, context)
    optimizer = _adam(ddp, config, context, router_lr_scale)
    return TrainState(ddp, optimizer, build_schedule(optimizer, config, num_steps), config.clip_grad, scale, ExpertLoad(_routers(model)), RefinementSize(model))


def freeze(model: torch.nn.Module, prefixes: tuple[str, ...]) -> None:
    for prefix in prefixes:
        matched = [parameter for name, parameter in model.named_parameters() if name.startswith(prefix)]
        if not matched:
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


def _routers(model: torch.nn.Module) -> list[TopKRouter]:
    return [module for module in model.modules() if isinstance(module, TopKRouter)]


def _wrap(model: MegatronModule, scale: TokenScale, context: ParallelContext) -> DistributedDataParallel:
    """Data parallelism, and the hooks through which Megatron's schedule reaches it."""
    for router in _routers(model):
        router.calculate_per_token_loss = False  # TokenScale weighs the auxiliary loss; the router must not do it a second time
    settings = model.config
    settings.calculate_per_token_loss = True  # gradients are summed over ranks and divided by the step's tokens
    settings.grad_scale_func = scale
    settings.finalize_model_grads_func = finalize_model_grads
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=backend() == "nccl")
    wrapped = DistributedDataParallel(settings, ddp, model, pg_collection=context.pgs)
    settings.no_sync_func = wrapped.no_sync
    wrapped.model_type = ModelType.encoder_or_decoder  # Megatron's schedules ask for it
    return wrapped


def _adam(ddp: DistributedDataParallel, config: OptimizerConfig, context: ParallelContext, router_lr_scale: float) -> MegatronOptimizer:
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        bf16=ddp.config.bf16,
        params_dtype=ddp.config.params_dtype,
        use_distributed_optimizer=True,
    )
    overrides = get_standard_config_overrides(settings)
    if router_lr_scale != 1:
        slower = ParamGroupOverride(max_lr=config.lr * router_lr_scale, min_lr=config.min_lr * router_lr_scale)
        overrides[ParamKey(name="*.router.*")] = slower
    optimizer = get_megatron_optimizer(settings, [ddp], overrides, use_gloo_process_groups=False, pg_collection=context.pgs)
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
