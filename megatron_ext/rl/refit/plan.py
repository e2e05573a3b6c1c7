"""Which learner rank sends which slice of which tensor to which rollout rank: worked out once, from what every rank holds. Without torch.

    parts held by the learner's ranks --+
                                        +--> pieces (one slice, one sender) --> buckets, in an order that all ranks follow
    parts wanted by the rollouts' ranks +

Nobody gathers a full tensor: of what a rollout rank wants, each slice comes straight from a rank that holds it. Of several that do (data-parallel ranks), the
one with the least to send is taken. Rollout ranks that want the same, those of like replicas, share buckets: packed once, sent to each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from megatron_ext.errors import WeightSyncError

BUCKET_BYTES = 8 << 20
PIECE_BYTES = 2 << 20
"""Longer slices are cut, so that several threads share the work on a bucket, and each piece is still in a core's cache when its digest is taken."""
ALIGNMENT = 64
DIGEST_BYTES = 16
VERSION_BYTES = 8
Interval = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """What one rank holds, or wants, of the tensor `name` of the whole model: the given intervals along `dim`, in the order in which the rank's own tensor
    holds them. `dim` is None, and there are no intervals, where it is the whole tensor. `shape` is the full tensor's, never empty; `stage` the pipeline stage.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    item_bytes: int
    dim: int | None
    intervals: tuple[Interval, ...]
    stage: int = 0

    def along(self, axis: int) -> tuple[Interval, ...]:
        return ((0, self.shape[axis]),) if self.dim is None else self.intervals


@dataclass(frozen=True)
class Piece:
    """A slice of the full tensor, `length` long along `axis` from `start`: at `source` of the sender's tensor, at `target` of the receiver's."""

    name: str
    dtype: str
    num_bytes: int
    axis: int
    start: int
    length: int
    source: int
    target: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Bucket:
    """One message: the version, a digest for each piece, and the pieces. `number` is its place in the order of all; ranks are those of the meeting."""

    number: int
    sender: int
    receivers: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each piece begins, and, last, how long the message is: every piece is aligned to any dtype."""
        found = [_aligned(VERSION_BYTES + DIGEST_BYTES * len(self.pieces))]
        for piece in self.pieces:
            found.append(_aligned(found[-1] + piece.num_bytes))
        return tuple(found)

    @property
    def num_bytes(self) -> int:
        return self.offsets[-1]


def plan_refit(held: Sequence[Sequence[Part]], wanted: Sequence[Sequence[Part]], bucket_bytes: int = BUCKET_BYTES) -> list[Bucket]:
    """All buckets in order. Ranks of the meeting: first those that hold, in the order given, then those that want.

    A bucket's pieces take `bucket_bytes` at most, unless a single row of a tensor is longer. Raises WeightSyncError, naming the tensor, where the two sides are
    not of the same model.
    """
    owners = _owners(held)
    _check_names(owners, wanted)
    alike: dict[tuple[Part, ...], list[int]] = defaultdict(list)
    for number, parts in enumerate(wanted):
        alike[tuple(parts)].append(len(held) + number)
    load = [0] * len(held)
    streams: dict[tuple[int, int], list[Piece]] = defaultdict(list)
    for group, (group_parts, receivers) in enumerate(alike.items()):
        for part in group_parts:
            for sender, piece in _pieces(part, owners[part.name], load, min(PIECE_BYTES, bucket_bytes)):
                load[sender] += piece.num_bytes * len(receivers)
                streams[sender, group].append(piece)
    return _in_order(streams, [tuple(receivers) for receivers in alike.values()], bucket_bytes)


def of_rank(buckets: Sequence[Bucket], rank: int) -> list[Bucket]:
    """Those that this rank of the meeting sends or receives."""
    return [bucket for bucket in buckets if rank == bucket.sender or rank in bucket.receivers]


def _owners(held: Sequence[Sequence[Part]]) -> dict[str, list[tuple[int, Part]]]:
    """Who holds what of each tensor. Of a tensor on several stages (a frozen encoder, a tied embedding) the first stage's counts, as in a checkpoint."""
    owners: dict[str, list[tuple[int, Part]]] = defaultdict(list)
    for rank, parts in enumerate(held):
        for part in parts:
            owners[part.name].append((rank, part))
    first = {name: min(part.stage for _, part in found) for name, found in owners.items()}
    return {name: [(rank, part) for rank, part in found if part.stage == first[name]] for name, found in owners.items()}


def _check_names(owners: dict[str, list[tuple[int, Part]]], wanted: Sequence[Sequence[Part]]) -> None:
    names = {part.name for parts in wanted for part in parts}
    for name in owners:
        if name not in names:
            raise WeightSyncError(f"tensor {name} of the learner is not a weight of the rollouts' model")
    for part in (part for parts in wanted for part in parts):
        if part.name not in owners:
            raise WeightSyncError(f"tensor {part.name} of the rollouts' model is not a weight of the learner")
        if (shape := owners[part.name][0][1].shape) != part.shape:
            raise WeightSyncError(f"tensor {part.name} has shape {shape} at the learner, the rollouts' model wants {part.shape}")


def _pieces(part: Part, owners: Sequence[tuple[int, Part]], load: Sequence[int], piece_bytes: int) -> Iterator[tuple[int, Piece]]:
    """(sender, slice) of all that `part` wants, from end to end."""
    axis = next((found.dim for found in (part, *(owner for _, owner in owners)) if found.dim is not None), 0)
    sources = [(rank, interval, offset) for rank, owner in owners for interval, offset in zip(owner.along(axis), _starts(owner.along(axis)), strict=True)]
    sent = owners[0][1]
    row_bytes = sent.item_bytes * prod(part.shape) // max(1, part.shape[axis])
    longest = max(1, piece_bytes // max(1, row_bytes))
    for (position, end), target in zip(part.along(axis), _starts(part.along(axis)), strict=True):
        start = position
        while position < end:
            able = [source for source in sources if source[1][0] <= position < source[1][1]]
            if not able:
                raise WeightSyncError(f"rows {position} to {end} of tensor {part.name} are on no rank of the learner")
            sender, (begin, stop), offset = min(able, key=lambda source: load[source[0]])
            length = min(end, stop, position + longest) - position
            shape = tuple(length if dim == axis else size for dim, size in enumerate(part.shape))
            piece = Piece(part.name, sent.dtype, length * row_bytes, axis, position, length, offset + position - begin, target + position - start, shape)
            yield sender, piece
            position += length


def _starts(intervals: Sequence[Interval]) -> list[int]:
    """Where each interval begins in the tensor that holds them one after the other."""
    found = [0]
    for start, end in intervals:
        found.append(found[-1] + end - start)
    return found[:-1]


def _in_order(streams: dict[tuple[int, int], list[Piece]], receivers: Sequence[tuple[int, ...]], bucket_bytes: int) -> list[Bucket]:
    """One order for all ranks: each works on its own buckets in this order, which is why none waits for one that waits for it. Senders begin with different
    receivers and take turns, so that all are busy."""
    turns = []
    for (sender, group), pieces in streams.items():
        for round_number, filled in enumerate(_filled(pieces, bucket_bytes)):
            turns.append(((round_number, (group - sender) % len(receivers), sender), sender, receivers[group], filled))
    turns.sort(key=lambda turn: turn[0])
    return [Bucket(number, sender, group, filled) for number, (_, sender, group, filled) in enumerate(turns)]


def _filled(pieces: Sequence[Piece], bucket_bytes: int) -> Iterator[tuple[Piece, ...]]:
    filled, size = list[Piece](), 0
    for piece in pieces:
        if filled and size + piece.num_bytes > bucket_bytes:
            yield tuple(filled)
            filled, size = [], 0
        filled.append(piece)
        size += piece.num_bytes
    if filled:
        yield tuple(filled)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
