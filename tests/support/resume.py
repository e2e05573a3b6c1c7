"""What a rank does in the tests of stopping and resuming: trains a small real model, saves it beside its training, goes on from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.dist import load_checkpoint
from megatron_ext.checkpoint.full_tensors import digest, full_tensors
from megatron_ext.checkpoint.saver import open_saver
from megatron_ext.config.schema import OptimizerConfig
from megatron_ext.model.assembly import build_chunks
from megatron_ext.parallel.groups import ParallelContext, open_parallel
from megatron_ext.training.losses import NextToken
from megatron_ext.training.megatron_engine import MegatronEngine, build_engine
from megatron_ext.training.microbatches import microbatches
from megatron_ext.training.step import optimizer_step
from tests.support.layouts import MICRO, ROWS, Case, batch_of, model_of
from tests.support.models import IMAGE
from tests.support.training import PAD, part

ADAM = OptimizerConfig(lr=1e-3, min_lr=1e-4, warmup_steps=2, weight_decay=0.1, clip_grad=0.5)
TOTAL = 12
"""The schedule's length."""


def built(case: Case, context: ParallelContext, seed: int) -> MegatronEngine:
    return build_engine(build_chunks(model_of(case.changes), IMAGE, context, seed=seed, vision_trains=case.train_vision), ADAM, TOTAL, context)


def run(engine: MegatronEngine, case: Case, last: int, context: ParallelContext) -> list[dict[str, float]]:
    """Metrics of the steps up to `last`, from wherever the engine stands. The data of a step depend on its number alone."""
    share, curve = ROWS // context.layout.dp, []
    while (step := engine.step) < last:
        rows = part(batch_of(step), context.dp_rank * share, (context.dp_rank + 1) * share)
        batches = microbatches(rows, MICRO, PAD, context.device, packed=case.packed, multiple=context.layout.length_multiple)
        curve.append(optimizer_step(engine, batches, NextToken(), context))
    engine.settle()
    return curve


def restored(case: Case, folder: Path, context: ParallelContext) -> MegatronEngine:
    """From the latest checkpoint, where there is one; loaded into other weights than those that were saved."""
    engine = built(case, context, seed=9)
    load_checkpoint(folder, engine.chunks, engine.optimizer_state, context=context, model_config=model_of(case.changes))
    return engine


def weights(engine: MegatronEngine, context: ParallelContext) -> dict[str, str]:
    return digest(full_tensors(engine.chunks, context))


def stop_and_resume(rank: int, world_size: int, init_method: str, case: Case, folder: Path) -> dict[str, Any]:
    """A step, a save beside the next; then that one again, from the checkpoint."""
    with open_parallel(case.parallel, rank, world_size, init_method, seed=0) as context:
        straight = built(case, context, seed=3)
        run(straight, case, 1, context)
        with open_saver(folder, 1, context, model_of(case.changes), asynchronous=True) as saver:
            saver.save(1, straight.chunks, straight.optimizer_state, {})
            expected = run(straight, case, 2, context)
        resumed = restored(case, folder, context)
        return {
            "expected": expected,
            "resumed": run(resumed, case, 2, context),
            "weights": (weights(straight, context), weights(resumed, context)),
        }


def go_on(rank: int, world_size: int, init_method: str, case: Case, folder: Path, last: int) -> list[dict[str, float]]:
    """Starts, or resumes what is in `folder`; trains to `last`, saves there. Metrics of the steps it made."""
    with open_parallel(case.parallel, rank, world_size, init_method, seed=0) as context:
        engine = restored(case, folder, context) if folder.exists() else built(case, context, seed=3)
        curve = run(engine, case, last, context)
        with open_saver(folder, 1, context, model_of(case.changes), asynchronous=True) as saver:
            saver.save(last, engine.chunks, engine.optimizer_state, {})
        return curve
