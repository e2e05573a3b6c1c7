"""The process groups of one rank: the only module that touches torch.distributed's default world and Megatron's global `parallel_state`.

Everyone else is handed the `ParallelContext` and takes groups from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from torch._C._distributed_c10d import Store

from megatron_ext import device
from megatron_ext.config.schema import ParallelConfig
from megatron_ext.errors import UserError
from megatron_ext.parallel.plan import Layout


@dataclass(frozen=True)
class ParallelContext:
    """Where this rank stands in the grid, and the groups that are its slices."""

    layout: Layout
    parallel: ParallelConfig
    rank: int
    world_size: int
    pgs: ProcessGroupCollection
    device: torch.device

    @property
    def tp_rank(self) -> int:
        return int(self.pgs.tp.rank())

    @property
    def dp_rank(self) -> int:
        return int(self.pgs.dp.rank())

    @property
    def ep_rank(self) -> int:
        return int(self.pgs.ep.rank())

    @property
    def cp_rank(self) -> int:
        return int(self.pgs.cp.rank())

    @property
    def pp_rank(self) -> int:
        return int(self.pgs.pp.rank())

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the last layers, and so sees the loss."""
        return self.pp_rank == self.layout.pp - 1


MeetingPoint: TypeAlias = "str | Store"
"""Where the ranks of a world meet: a URL (file:// or tcp://), or a store that all of them have joined."""


@contextmanager
def open_parallel(parallel: ParallelConfig, rank: int, world_size: int, meeting: MeetingPoint, seed: int, timeout_s: float = 120) -> Iterator[ParallelContext]:
    """Joins the world at `meeting` and lays the grid over it. Everything is destroyed on the way out.

    `seed` starts the random numbers, and those that Megatron's tracker keeps apart: ranks of one tensor-parallel group differ where dropout must differ.
    """
    layout = Layout.of(parallel)
    if world_size != layout.num_ranks:
        raise UserError("parallel.num_ranks", f"{layout.num_ranks} ranks were asked for, {world_size} were started", f"set it to {world_size}")
    torch.set_num_threads(parallel.threads_per_rank)
    with device.session():
        if torch.cuda.is_available():
            torch.cuda.set_device(rank % torch.cuda.device_count())
        where = device.device()
        place: dict[str, Any] = {"init_method": meeting} if isinstance(meeting, str) else {"store": meeting}
        dist.init_process_group(device.backend(), **place, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s))
        try:
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=layout.tp,
                pipeline_model_parallel_size=layout.pp,
                virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
                context_parallel_size=layout.cp,
                expert_model_parallel_size=layout.ep,
                expert_tensor_parallel_size=layout.etp,
                distributed_timeout_minutes=max(1, round(timeout_s / 60)),
            )
            torch.manual_seed(seed)
            model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
            yield ParallelContext(layout, parallel, rank, world_size, ProcessGroupCollection.use_mpu_process_groups(), where)
        finally:
            parallel_state.destroy_model_parallel()
            get_cuda_rng_tracker().reset()
            dist.destroy_process_group()


Twin = Callable[[dist.ProcessGroup | None], dist.ProcessGroup]
"""For a group, or None for the whole world, the one with the same members."""


@contextmanager
def twin_groups(context: ParallelContext, timeout_s: float) -> Iterator[Twin]:
    """Gloo groups with the members of the world and of the data-parallel groups, for a thread that talks to its like on other ranks while training goes on:
    collectives of two threads in one group would be taken for each other's. Collective; destroyed on the way out.
    """
    own: list[Any] = [list(range(context.world_size)), *(dist.get_process_group_ranks(group) for group in (context.pgs.dp_cp, context.pgs.expt_dp))]
    listed: list[Any] = [None] * context.world_size
    dist.all_gather_object(listed, own)
    twins = {}
    for members in sorted({tuple(ranks) for wanted in listed for ranks in wanted}):
        group = dist.new_group(list(members), timeout=timedelta(seconds=timeout_s), backend="gloo")
        if context.rank in members:
            twins[members] = group
    try:
        yield lambda group: twins[tuple(own[0] if group is None else dist.get_process_group_ranks(group))]
    finally:
        for group in twins.values():
            dist.destroy_process_group(group)
