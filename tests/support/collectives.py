"""How often a rank meets others in a training step, counted at torch's process groups."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from torch.distributed import ProcessGroup

from megatron_ext.config.schema import OptimizerConfig
from megatron_ext.model.assembly import build_chunks
from megatron_ext.parallel.groups import open_parallel
from megatron_ext.training.losses import NextToken
from megatron_ext.training.megatron_engine import build_engine
from megatron_ext.training.microbatches import microbatches
from megatron_ext.training.step import optimizer_step
from tests.support.layouts import MICRO, Case, batch_of, model_of
from tests.support.models import IMAGE
from tests.support.training import PAD, part


def collectives_by_rank(rank: int, world_size: int, init_method: str, cases: list[Case], counts: list[int]) -> list[list[int]]:
    """Of every case, the collectives, sends and receives of a step of each number of micro-batches."""
    return [_collectives(rank, world_size, f"{init_method}-{number}", case, counts) for number, case in enumerate(cases)]


def _collectives(rank: int, world_size: int, init_method: str, case: Case, counts: list[int]) -> list[int]:
    with open_parallel(case.parallel, rank, world_size, init_method, seed=rank) as context:
        model = model_of(case.changes)
        engine = build_engine(build_chunks(model, IMAGE, context), OptimizerConfig(), 10, context)
        found = []
        for count in counts:
            rows = part(batch_of(0, model.vision.enabled), 0, MICRO * count)
            batches = microbatches(rows, MICRO, PAD, context.device, multiple=context.layout.length_multiple)
            assert len(batches) == count
            with counted() as calls:
                optimizer_step(engine, batches, NextToken(), context)
            found.append(len(calls))
        return found


VERBS = (
    "allreduce", "allgather", "all_gather_single", "all_gather_single_coalesced", "reduce_scatter", "reduce_scatter_single", "reduce_scatter_single_coalesced",
    "all_to_all_single", "broadcast", "send", "recv",
)  # fmt: skip
"""What `torch.distributed` calls of a group, for the functions that Megatron uses."""


@contextmanager
def counted() -> Iterator[list[str]]:
    """Every call to another rank, by what torch's process groups call it."""
    calls: list[str] = []

    def noted(verb: str) -> Any:
        original = getattr(ProcessGroup, verb)

        def call(group: Any, *args: Any, **kwargs: Any) -> Any:
            if group.size() > 1:
                calls.append(verb)
            return original(group, *args, **kwargs)

        return call

    with ExitStack() as stack:
        for verb in VERBS:
            stack.enter_context(patch.object(ProcessGroup, verb, noted(verb)))
        yield calls
