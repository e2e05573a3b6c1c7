"""Which engine trains: the one key `parallel.engine` decides. See decision 0008."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_ext.config.schema import OptimizerConfig
from megatron_ext.model.assembly import VisionLanguageModel
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.training.deepspeed_engine import build_deepspeed_engine
from megatron_ext.training.engine import Engine
from megatron_ext.training.megatron_engine import build_engine


def start_engine(
    chunks: Sequence[VisionLanguageModel], config: OptimizerConfig, num_steps: int, context: ParallelContext, *, router_lr_scale: float = 1.0
) -> Engine:
    """Wraps a model for `num_steps` updates with the engine of the layout. Weights are whole when it returns, so that a checkpoint can be loaded."""
    build: Callable[..., Engine] = build_deepspeed_engine if context.parallel.engine == "deepspeed" else build_engine
    engine = build(chunks, config, num_steps, context, router_lr_scale=router_lr_scale)
    engine.settle()
    return engine
