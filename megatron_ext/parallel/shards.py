"""Which part of a full tensor a rank holds: one rule, used to initialise, to save, to publish and to compare weights in every layout.

What makes a rank's parameter differ from the full tensor:
- tensor parallelism splits it along `partition_dim` (over the expert tensor-parallel group for experts);
- a gated `linear_fc1` is [gate; up] on every rank, so each half is split by itself;
- expert parallelism gives a rank a range of experts: its local expert n is global expert `ep_rank * experts_per_rank + n`;
- embeddings tied over pipeline stages have a copy at the output layer, which is the embedding under another name.

Pipeline stages need no rule: a layer has the same name on whatever stage it lives.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from megatron_ext.parallel.groups import ParallelContext

EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Shard:
    """Where a rank's parameter stands in the full tensor `name`. `dim` is None when every rank holds the whole tensor."""

    name: str
    dim: int | None
    rank: int
    ranks: int
    halves: int
    is_expert: bool

    def full_shape(self, local: torch.Size) -> tuple[int, ...]:
        return tuple(size * self.ranks if axis == self.dim else size for axis, size in enumerate(local))

    def take(self, full: torch.Tensor) -> torch.Tensor:
        """This rank's part of the full tensor."""
        if self.dim is None:
            return full
        return torch.cat([half.chunk(self.ranks, self.dim)[self.rank] for half in full.chunk(self.halves, self.dim)], self.dim)

    def intervals(self, full_size: int) -> tuple[tuple[int, int], ...]:
        """[start, end) along `dim` of the full tensor, `full_size` long there: one for each half, in the order in which this rank's part holds them.

        >>> Shard("linear_fc1.weight", 0, 1, 2, 2, False).intervals(8)
        ((2, 4), (6, 8))
        """
        half, part = full_size // self.halves, full_size // self.halves // self.ranks
        return tuple((number * half + self.rank * part, number * half + (self.rank + 1) * part) for number in range(self.halves))

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The full tensor from the parts of all ranks, in rank order: the inverse of `take`."""
        if self.dim is None:
            return parts[0]
        split = [part.chunk(self.halves, self.dim) for part in parts]
        return torch.cat([split[rank][half] for half in range(self.halves) for rank in range(self.ranks)], self.dim)


def expert_of(name: str) -> tuple[str, int, str] | None:
    """("...local_experts.", number, ".linear_fc1.weight") of an expert's parameter; None of any other."""
    match = re.fullmatch(r"(.*\.local_experts\.)(\d+)(\..*)", name)
    return None if match is None else (match[1], int(match[2]), match[3])


def names_over_ranks(name: str, experts_per_rank: int, context: ParallelContext) -> list[str]:
    """The full model's tensors that the parameter called `name` is on each expert-parallel rank, in rank order; just `name` unless it is an expert's."""
    found = expert_of(name)
    if found is None:
        return [name]
    head, expert, tail = found
    return [f"{head}{expert + rank * experts_per_rank}{tail}" for rank in range(context.pgs.ep.size())]


def shard_of(name: str, parameter: Any, experts_per_rank: int, context: ParallelContext) -> Shard:
    """The shard that `parameter`, with Megatron's marks, called `name` in this rank's model, is of the full model's tensor."""
    is_expert = expert_of(name) is not None
    if getattr(parameter, "shared_embedding", False):
        name = EMBEDDING
    if is_expert:
        name = names_over_ranks(name, experts_per_rank, context)[context.pgs.ep.rank()]
    group = context.pgs.expt_tp if is_expert else context.pgs.tp
    split = bool(getattr(parameter, "tensor_model_parallel", False)) and group.size() > 1
    halves = 2 if name.endswith("linear_fc1.weight") else 1
    return Shard(name, int(parameter.partition_dim) if split else None, group.rank(), group.size() if split else 1, halves, is_expert)
