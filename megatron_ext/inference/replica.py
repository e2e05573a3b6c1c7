"""From a checkpoint to an engine: what evaluation, discovery and single answers start with."""

from __future__ import annotations

from pathlib import Path

from megatron_ext.checkpoint.dist import load_checkpoint
from megatron_ext.config.schema import ParallelConfig, RunConfig
from megatron_ext.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ext.inference.engine import Engine
from megatron_ext.model.assembly import build_model
from megatron_ext.model.weight_storage import store_for_generation
from megatron_ext.parallel.groups import ParallelContext


def all_replicas(config: RunConfig) -> ParallelConfig:
    """Every rollout replica as one data-parallel grid: how work without a learner uses the machine."""
    one = config.rollout.parallel
    return one.model_copy(update={"num_ranks": one.num_ranks * config.rollout.replicas})


def load_engine(config: RunConfig, checkpoint: Path, context: ParallelContext) -> tuple[Engine, Tokenizer]:
    """The engine of this rank with the weights of `checkpoint`. Collective. Raises CheckpointError or DataError when something is missing or of
    another model."""
    tokenizer = load_tokenizer(config.tokenizer_dir)
    model = build_model(config.model, tokenizer.image_id, context, markers=tokenizer.markers)
    load_checkpoint(checkpoint, model, context=context, model_config=config.model)
    store_for_generation(model)
    return Engine(model, context, tokenizer, config.rollout), tokenizer
