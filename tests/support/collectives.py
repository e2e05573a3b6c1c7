"""How often a rank meets others in a training step, counted by torch's profiler."""

from __future__ import annotations

from torch.profiler import ProfilerActivity, profile

from megatron_ext.config.schema import OptimizerConfig
from megatron_ext.model.assembly import build_chunks
from megatron_ext.parallel.groups import open_parallel
from megatron_ext.training.losses import NextToken
from megatron_ext.training.megatron_engine import build_engine
from megatron_ext.training.microbatches import microbatches
from megatron_ext.training.step import optimizer_step
from tests.support.layouts import MICRO, TAPS, Case, batch_of
from tests.support.models import IMAGE, small_config
from tests.support.training import PAD, part


def collectives_by_rank(rank: int, world_size: int, init_method: str, cases: list[Case], counts: list[int]) -> list[list[int]]:
    """Of every case, the collectives, sends and receives of a step of each number of micro-batches."""
    return [
        [_collectives(rank, world_size, f"{init_method}-{number}-{count}", case, count) for count in counts] for number, case in enumerate(cases)
    ]  # fmt: skip


def _collectives(rank: int, world_size: int, init_method: str, case: Case, count: int) -> int:
    with open_parallel(case.parallel, rank, world_size, init_method, seed=rank) as context:
        model = small_config(**{"num_layers": 4, "clvr": TAPS, **case.changes})
        engine = build_engine(build_chunks(model, IMAGE, context), OptimizerConfig(), 10, context)
        rows = part(batch_of(0, model.vision.enabled), 0, MICRO * count)
        batches = microbatches(rows, MICRO, PAD, context.device, multiple=context.layout.length_multiple)
        assert len(batches) == count
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            optimizer_step(engine, batches, NextToken(), context)
        return sum(event.count for event in profiled.key_averages() if event.key.startswith("c10d::"))
