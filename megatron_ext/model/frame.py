"""Which positions of a batch a rank computes, and which keys each of them may attend to.

    one rank, padded rows      every position; one causal span
    packed samples             every position; a causal span a sample, so that none sees another
    context parallelism (cp)   every sample is cut into 2 cp parts, and rank r takes the r-th and the r-th last: as much work on every rank

Keys and values are gathered over the context-parallel ranks and put back into their order (`whole`); a span then says that some of this rank's queries are the
last positions of a run of keys. Sequence parallelism cuts what a rank holds once more, evenly, and is undone before attention; it plays no part here.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region


@dataclass(frozen=True)
class Span:
    """Queries [q_start, q_stop) of this rank are the last positions of the keys [k_start, k_stop) of the whole row, and attend causally to these."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int


@dataclass(frozen=True)
class Frame:
    """`local_S` int64: the positions of the row that this rank holds, in its order (None: all). `positions_S` int64: their places within their samples.
    `order_S`: where position s of the row stands in the parts of all ranks laid end to end (None: in place).
    `hidden_BS` bool: positions of the whole row that no other one attends to (None: there are none)."""

    local_S: torch.Tensor | None
    positions_S: torch.Tensor
    order_S: torch.Tensor | None
    spans: tuple[Span, ...]
    cp_group: Any
    hidden_BS: torch.Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """One causal run over everything."""
        return len(self.spans) == 1 and self.hidden_BS is None

    def take(self, x_BS: torch.Tensor) -> torch.Tensor:
        """This rank's positions of a tensor whose second axis is the row."""
        return x_BS if self.local_S is None else x_BS[:, self.local_S]

    def whole(self, x_S: torch.Tensor) -> torch.Tensor:
        """The first axis of all ranks' parts in the order of the row; the gradient is summed over the ranks. Collective under context parallelism."""
        if self.order_S is None:
            return x_S
        return gather_from_sequence_parallel_region(x_S, tensor_parallel_output_grad=True, group=self.cp_group)[self.order_S]


def frame_of(length: int, bounds: tuple[int, ...], cp_group: Any, device: torch.device, hidden_BS: torch.Tensor | None = None) -> Frame:
    """The frame of rows of `length` positions. Raises ValueError where a sample does not divide by 2 cp."""
    samples = list(pairwise(bounds or (0, length)))
    places_S = torch.cat([torch.arange(stop - start) for start, stop in samples])
    if cp_group.size() == 1:
        spans = tuple(Span(start, stop, start, stop) for start, stop in samples)
        return Frame(None, places_S.to(device), None, spans, cp_group, hidden_BS)
    ranks = cp_group.size()
    parts = [_positions(samples, rank, ranks) for rank in range(ranks)]
    local_S = parts[cp_group.rank()]
    order_S = torch.argsort(torch.cat(parts))
    spans = _spans(samples, cp_group.rank(), ranks)
    return Frame(local_S.to(device), places_S[local_S].to(device), order_S.to(device), spans, cp_group, hidden_BS)


def _positions(samples: list[tuple[int, int]], rank: int, ranks: int) -> torch.Tensor:
    return torch.cat([torch.arange(start, stop) for sample in samples for start, stop in _cuts(sample, rank, ranks)])


def _spans(samples: list[tuple[int, int]], rank: int, ranks: int) -> tuple[Span, ...]:
    spans, held = [], 0
    for sample in samples:
        for start, stop in _cuts(sample, rank, ranks):
            spans.append(Span(held, held + stop - start, sample[0], stop))
            held += stop - start
    return tuple(spans)


def _cuts(sample: tuple[int, int], rank: int, ranks: int) -> list[tuple[int, int]]:
    """The two parts of a sample that a rank takes."""
    start, stop = sample
    size, rest = divmod(stop - start, 2 * ranks)
    if rest:
        raise ValueError(f"a sample of {stop - start} positions does not divide into {2 * ranks} parts for {ranks} context-parallel ranks")
    return [(start + part * size, start + (part + 1) * size) for part in (rank, 2 * ranks - 1 - rank)]
