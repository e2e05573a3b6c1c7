"""Whether ranks of this machine reach each other, and how fast: an all-reduce over the backend that training would use."""

from __future__ import annotations

import time

import torch
from torch import distributed as dist

from megatron_ext.config.schema import ParallelConfig
from megatron_ext.parallel.groups import open_parallel

BYTES = 16 << 20
REPEATS = 5


def all_reduce_s(rank: int, world_size: int, init_method: str) -> float:
    """Seconds of the fastest of a few all-reduces of 16 MiB. Raises RuntimeError where the sum is wrong."""
    with open_parallel(ParallelConfig(num_ranks=world_size), rank, world_size, init_method, seed=0) as context:
        found = []
        for _ in range(REPEATS):
            value = torch.full((BYTES // 4,), float(rank + 1), device=context.device)
            began = time.perf_counter()
            dist.all_reduce(value, group=context.pgs.dp)
            if float(value[-1]) != world_size * (world_size + 1) / 2:  # reading it waits for the device
                raise RuntimeError(f"the sum over {world_size} ranks is {float(value[-1])}")
            found.append(time.perf_counter() - began)
        return min(found)
