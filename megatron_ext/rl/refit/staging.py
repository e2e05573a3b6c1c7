"""New weights for a rollout rank while its old ones stay in use: packed piece by piece by who holds them, checked and staged by who wants them.

    sender's tensors --pack--> message (version, digests, pieces) --stage--> the receiver's own part of the new version --load--> live weights

Nothing here touches live weights but `load`, which copies in place. A rank may go on generating while it stages.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
import xxhash

from megatron_ext.checkpoint.full_tensors import Model, own_weights
from megatron_ext.errors import WeightSyncError
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.parallel.shards import Shard
from megatron_ext.rl.refit.plan import DIGEST_BYTES, VERSION_BYTES, Bucket, Part, Piece

DIGEST_THREADS = min(4, os.cpu_count() or 1)
"""They copy and hash at once: both leave Python's lock."""
Tensors = Mapping[str, torch.Tensor]


def own_tensors(model: Model, context: ParallelContext) -> dict[str, torch.Tensor]:
    """This rank's weights by their names in the whole model; not copies."""
    return {part.name: tensor for part, tensor in _own(model, context)}


def own_parts(model: Model, context: ParallelContext) -> tuple[Part, ...]:
    """What this rank holds of the whole model."""
    return tuple(part for part, _ in _own(model, context))


def part_of(tensor: torch.Tensor, shard: Shard, stage: int = 0) -> Part:
    """What a rank whose own tensor this is, not a scalar, holds of the whole model."""
    shape = shard.full_shape(tensor.shape)
    intervals = () if shard.dim is None else shard.intervals(shape[shard.dim])
    return Part(shard.name, shape, str(tensor.dtype).removeprefix("torch."), tensor.element_size(), shard.dim, intervals, stage)


def _own(model: Model, context: ParallelContext) -> Iterable[tuple[Part, torch.Tensor]]:
    """Of a tensor in several chunks the first counts. A scalar is a vector of one here."""
    found: dict[str, tuple[Part, torch.Tensor]] = {}
    for _, weight, shard in own_weights(model, context):
        tensor = weight.detach() if weight.dim() else weight.detach().view(1)
        found.setdefault(shard.name, (part_of(tensor, shard, context.pp_rank), tensor))
    return found.values()


class Workers:
    """Threads that do one thing to every piece of a bucket. A context manager."""

    def __init__(self, threads: int = DIGEST_THREADS) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="refit") if threads > 1 else None

    def each(self, work: Callable[[Piece, int], None], bucket: Bucket) -> None:
        """Calls `work` with each piece and its number in the bucket."""
        for _ in (self._pool.map if self._pool else map)(work, bucket.pieces, range(len(bucket.pieces))):
            pass

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool:
            self._pool.shutdown()


def pack(bucket: Bucket, tensors: Tensors, version: int, message: torch.Tensor, workers: Workers) -> None:
    """Fills `message`, uint8 [bucket.num_bytes] in host memory, with copies of the pieces and their digests."""
    message[:VERSION_BYTES].view(torch.int64).fill_(version)

    def copy(piece: Piece, number: int) -> None:
        room = _room(bucket, number, message)
        _shaped(room, piece).copy_(tensors[piece.name].narrow(piece.axis, piece.source, piece.length))
        _digest_room(number, message).copy_(torch.frombuffer(_digest(piece, room), dtype=torch.uint8))

    workers.each(copy, bucket)


class Staging:
    """Room in host memory for a rank's own part of a version that arrives, kept from one to the next: memory that is touched for the first time costs more than
    all else here. `like` says what the rank's tensors are.
    """

    def __init__(self, like: Tensors) -> None:
        self._staged = {name: torch.empty_like(tensor, device="cpu") for name, tensor in like.items()}
        self.begin(-1)

    def begin(self, version: int) -> None:
        """Forgets what was there: `version` is expected now."""
        self.version, self._problems = version, list[str]()

    def stage(self, bucket: Bucket, message: torch.Tensor, workers: Workers) -> None:
        """Checks every piece and copies it to its place. What is wrong is kept for `check`: the senders need someone to send to."""
        arrived = int(message[:VERSION_BYTES].view(torch.int64))
        if arrived != self.version:
            self._problems.append(f"weights of version {arrived} arrived where version {self.version} was announced")
            return

        def place(piece: Piece, number: int) -> None:
            room = _room(bucket, number, message)
            if bytes(_digest_room(number, message).numpy()) != bytes(_digest(piece, room)):
                self._problems.append(f"tensor {piece.name} of version {self.version} arrived damaged: its digest differs from the learner's")
                return
            self._staged[piece.name].narrow(piece.axis, piece.target, piece.length).copy_(_shaped(room, piece))

        workers.each(place, bucket)

    def check(self) -> None:
        """Raises WeightSyncError, naming what is wrong, unless the version and every digest agreed."""
        if self._problems:
            raise WeightSyncError(self._problems[0])

    @torch.no_grad()
    def load(self, live: Tensors) -> None:
        """Copies what was staged over the live weights, in place. Raises as `check`, with nothing changed."""
        self.check()
        torch._foreach_copy_(list(live.values()), [self._staged[name] for name in live])


def _room(bucket: Bucket, number: int, message: torch.Tensor) -> torch.Tensor:
    start = bucket.offsets[number]
    return message[start : start + bucket.pieces[number].num_bytes]


def _digest_room(number: int, message: torch.Tensor) -> torch.Tensor:
    start = VERSION_BYTES + DIGEST_BYTES * number
    return message[start : start + DIGEST_BYTES]


def _shaped(room: torch.Tensor, piece: Piece) -> torch.Tensor:
    return room.view(getattr(torch, piece.dtype)).view(piece.shape)


def _digest(piece: Piece, room: torch.Tensor) -> bytearray:
    """XXH3 of the piece's bytes and of what they are said to be. It is there against accidents; whoever can change what travels could change digests too."""
    hashed = xxhash.xxh3_128(f"{piece.name} {piece.axis} {piece.start} {piece.dtype} {piece.shape}".encode())
    hashed.update(room.numpy().data)
    return bytearray(hashed.digest())
