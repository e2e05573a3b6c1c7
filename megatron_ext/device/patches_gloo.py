"""Gathers of unequal parts, which gloo does not have. Experts that are split over tensor-parallel ranks and spread over expert-parallel ranks need them: each
tensor-parallel rank brings another number of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.device.patching import Patch


def _gather_unequal(equal: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Pads every part to the largest, gathers, drops the padding."""

    def gather(input_: torch.Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return equal(input_, group, output_split_sizes, use_global_buffer)
        sizes = [int(size) for size in output_split_sizes]
        padded = input_.new_zeros(max(sizes), *input_.shape[1:])
        padded[: len(input_)] = input_
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])

    return gather


GLOO_PATCHES = (Patch("megatron.core.tensor_parallel.mappings", "_gather_along_first_dim", "gloo gathers equal parts only", _gather_unequal),)
