"""Megatron's data-parallel buffers and the shards of its distributed optimizer, to the byte: pure arithmetic, without torch.

    parameters, last to first, each starting at a multiple of 64 elements -> buckets, each padded to a multiple of lcm(ranks, 128) -> one shard a rank

Source: megatron-core 0.16.1, `distributed/param_and_grad_buffer.py` (`_ParamAndGradBuffer.__init__`) and `optimizer/distrib_optimizer.py`
(`_build_model_gbuf_range`). Weights live in a buffer in the model's dtype, gradients in one in float32; Adam's two moments, a step counter per parameter and,
in bf16, a float32 copy of the weights exist for a rank's shard alone, without the padding.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from megatron_ext.parallel.planner.tensors import Run
from megatron_ext.shapes import round_up

ALIGN = 64
BUCKET_ALIGN = 128
_STEP_BYTES = 4


@dataclass(frozen=True)
class Held:
    """Of one rank's shards: real elements, and how many parameters they belong to (whole or in part)."""

    numel: int
    tensors: int

    def __add__(self, other: Held) -> Held:
        return Held(self.numel + other.numel, self.tensors + other.tensors)

    def optimizer_bytes(self, bf16: bool) -> int:
        """Adam's moments in float32, the step counters, and the float32 weights where the model's are not."""
        return self.numel * (12 if bf16 else 8) + self.tensors * _STEP_BYTES


@dataclass(frozen=True)
class Buffer:
    """One buffer of one model chunk. `edges`: where buckets begin and end, padding included."""

    blocks: tuple[_Block, ...]
    edges: tuple[int, ...]
    ranks: int

    @property
    def numel(self) -> int:
        return self.edges[-1]

    @cached_property
    def starts(self) -> list[int]:
        """Of the blocks."""
        return [block.start for block in self.blocks]

    def held(self, rank: int) -> Held:
        """What the optimizer of data-parallel rank `rank` keeps: the `rank`-th part of every bucket."""
        found = Held(0, 0)
        for start, stop in pairwise(self.edges):
            share = (stop - start) // self.ranks
            first, last = start + rank * share, start + (rank + 1) * share
            for block in self.blocks[max(0, bisect_right(self.starts, first) - 1) : bisect_left(self.starts, last)]:
                found += block.between(first, last)
        return found


def buffer(runs: Sequence[Run], ranks: int, bucket_numel: int | None = None) -> Buffer:
    """The buffer of `runs` (in the order of the model; what does not train is left out) over `ranks` data-parallel ranks. `bucket_numel`: a bucket is closed
    by the parameter that makes it this long; None: a single bucket."""
    writer = _Writer(math.lcm(ranks, BUCKET_ALIGN), bucket_numel)
    for run in reversed(runs):
        if run.own_bucket:
            writer.close()
        writer.add(tuple(reversed(run.numels)), run.count)
        if run.own_bucket:
            writer.close()
    writer.close()
    return Buffer(tuple(writer.blocks), tuple(writer.edges), ranks)


def bucket_numel_of(dp: int) -> int:
    """Megatron's bucket where gradients are reduced while the backward pass runs; `dp` without context parallelism."""
    return max(40_000_000, 1_000_000 * dp)


class _Block:
    """`count` repetitions of a pattern of parameters, each of which starts at a multiple of ALIGN. The padding behind the last one is not counted in `end`."""

    def __init__(self, start: int, pattern: tuple[int, ...], count: int) -> None:
        self.start, self.pattern, self.count = start, pattern, count
        self.period = sum(round_up(numel, ALIGN) for numel in pattern)
        self.end = start + count * self.period - (-pattern[-1] % ALIGN)

    def between(self, first: int, last: int) -> Held:
        """The real elements in [first, last), and the parameters that have one there."""
        before, until = self._before(first - self.start), self._before(last - self.start)
        cut = self._cuts(first - self.start)
        return Held(until.numel - before.numel, until.tensors - before.tensors + cut)

    def _before(self, place: int) -> Held:
        """Real elements, and parameters with any of them, in front of an offset from the block's start."""
        place = min(max(place, 0), self.count * self.period)
        periods, rest = divmod(place, self.period)
        numel, tensors = periods * sum(self.pattern), periods * len(self.pattern)
        for size in self.pattern:
            if rest <= 0:
                break
            numel, tensors, rest = numel + min(rest, size), tensors + 1, rest - round_up(size, ALIGN)
        return Held(numel, tensors)

    def _cuts(self, place: int) -> bool:
        """Whether a parameter goes on beyond this offset, so that both sides hold some of it."""
        if not 0 < place < self.count * self.period:
            return False
        rest = place % self.period
        for size in self.pattern:
            if rest < size:
                return rest > 0
            rest -= round_up(size, ALIGN)
            if rest <= 0:
                return False
        return False


class _Writer:
    """Lays parameters out from the start of a buffer on."""

    def __init__(self, multiple: int, bucket_numel: int | None) -> None:
        self.blocks: list[_Block] = []
        self.edges = [0]
        self._multiple, self._bucket_numel, self._at = multiple, bucket_numel, 0

    def add(self, pattern: tuple[int, ...], count: int) -> None:
        while count:
            whole = min(count, self._periods_that_fit(pattern))
            if whole:
                self._put(_Block(round_up(self._at, ALIGN), pattern, whole))
                count -= whole
            if count:  # the next repetition closes a bucket somewhere inside
                for numel in pattern:
                    self._put(_Block(round_up(self._at, ALIGN), (numel,), 1))
                    if self._bucket_numel is not None and self._at - self.edges[-1] >= self._bucket_numel:
                        self.close()
                count -= 1

    def close(self) -> None:
        """Ends the bucket, unless nothing is in it."""
        if self._at > self.edges[-1]:
            self._at = round_up(self._at, self._multiple)
            self.edges.append(self._at)

    def _put(self, block: _Block) -> None:
        self.blocks.append(block)
        self._at = block.end

    def _periods_that_fit(self, pattern: tuple[int, ...]) -> int:
        """Repetitions after which the bucket is still open."""
        if self._bucket_numel is None:
            return sys.maxsize
        room = self.edges[-1] + self._bucket_numel - 1 - round_up(self._at, ALIGN)
        padding = -pattern[-1] % ALIGN
        return max(0, (room + padding) // sum(round_up(numel, ALIGN) for numel in pattern))
