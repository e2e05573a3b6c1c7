"""From the learner's ranks to the rollouts', whatever the two layouts are: slices straight from who holds them to who wants them, checked to the last byte
before any is loaded.

    learner ranks: send (pack a bucket while the one before is on the wire) --+
                                                                              |  gloo, point to point
    rollout ranks: load <- [when all have it] <- staged, checked  <- receive <+

The learner and every rollout replica have process groups of their own, so that a lost rollout never breaks the learner. They meet in a bare gloo group over a
TCPStore of learner rank 0. Sending can succeed at some receivers and fail at others: receivers therefore stage what they got and load it only when the driver
has heard from all of them, and what failed is repeated in a new group, under the next generation.

A sender holds `IN_FLIGHT` buckets beside its weights; a receiver as many, and its own part of the new version, all in host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from traceback import clear_frames
from typing import Any, TypeVar

import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, TCPStore

from megatron_ext.errors import WeightSyncError
from megatron_ext.parallel.store import join_store
from megatron_ext.rl.refit.plan import Bucket
from megatron_ext.rl.refit.staging import Staging, Tensors, Workers, pack

IN_FLIGHT = 2
T = TypeVar("T")


@dataclass(frozen=True)
class Meeting:
    """Where and under which number the ranks of one publication meet: first the learner's, then the rollouts'."""

    host: str
    port: int
    generation: int
    num_ranks: int
    timeout_s: float


def send(meeting: Meeting, rank: int, buckets: Sequence[Bucket], tensors: Tensors, version: int, store: TCPStore | None = None) -> int:
    """Sends this rank's buckets, in order. Returns how many bytes of weights went out. Learner rank 0 brings the store that it opened.

    Raises WeightSyncError when a peer is lost or late.
    """
    return _meet(meeting, rank, store, lambda group: send_over(group, buckets, tensors, version))


def receive(meeting: Meeting, rank: int, buckets: Sequence[Bucket], staging: Staging, version: int) -> None:
    """Stages this rank's buckets; live weights stay as they are.

    Raises WeightSyncError when a peer is lost or late, and, after all has arrived, unless the version and every digest agree.
    """
    _meet(meeting, rank, None, lambda group: receive_over(group, buckets, staging, version))


def _meet(meeting: Meeting, rank: int, store: TCPStore | None, act: Callable[[ProcessGroupGloo], T]) -> T:
    try:
        store = store or join_store(meeting.host, meeting.port, meeting.timeout_s)
        group: Any = ProcessGroupGloo(PrefixStore(f"sync/{meeting.generation}", store), rank, meeting.num_ranks, timedelta(seconds=meeting.timeout_s))
        group.barrier().wait()  # who is done early hangs up, and must not on one that is still connecting
        return act(group)
    except WeightSyncError:
        raise
    except RuntimeError as error:
        group = None
        clear_frames(error.__traceback__)  # the group lives as long as they do, and peers that wait for this rank as long as the group
        raise WeightSyncError(f"the publication of generation {meeting.generation} failed: {error}") from None


def send_over(group: ProcessGroupGloo, buckets: Sequence[Bucket], tensors: Tensors, version: int) -> int:
    """See `send`. Raises RuntimeError when a receiver is lost or late."""
    messages = _messages(buckets)
    works: list[list[Any]] = [[] for _ in messages]
    with Workers() as workers:
        for turn, bucket in enumerate(buckets):
            lane = turn % IN_FLIGHT
            _wait(works[lane])
            message = messages[lane][: bucket.num_bytes]
            pack(bucket, tensors, version, message, workers)
            works[lane] = [_send(group, message, receiver, bucket.number) for receiver in bucket.receivers]
        for lane_works in works:
            _wait(lane_works)
    return sum(piece.num_bytes * len(bucket.receivers) for bucket in buckets for piece in bucket.pieces)


def receive_over(group: ProcessGroupGloo, buckets: Sequence[Bucket], staging: Staging, version: int) -> None:
    """See `receive`. Raises RuntimeError when a sender is lost or late."""
    messages = _messages(buckets)

    def await_(turn: int) -> Any:
        return _receive(group, messages[turn % IN_FLIGHT][: buckets[turn].num_bytes], buckets[turn].sender, buckets[turn].number)

    works = [await_(turn) for turn in range(min(IN_FLIGHT, len(buckets)))]
    staging.begin(version)
    with Workers() as workers:
        for turn, bucket in enumerate(buckets):
            _wait([works[turn]])
            staging.stage(bucket, messages[turn % IN_FLIGHT][: bucket.num_bytes], workers)
            if turn + IN_FLIGHT < len(buckets):
                works.append(await_(turn + IN_FLIGHT))
    staging.check()


def _messages(buckets: Sequence[Bucket]) -> list[torch.Tensor]:
    size = max((bucket.num_bytes for bucket in buckets), default=0)
    return [torch.empty(size, dtype=torch.uint8) for _ in range(IN_FLIGHT)]


def _send(group: Any, message: torch.Tensor, receiver: int, tag: int) -> Any:
    return group.send([message], receiver, tag)


def _receive(group: Any, message: torch.Tensor, sender: int, tag: int) -> Any:
    return group.recv([message], sender, tag)


def _wait(works: Sequence[Any]) -> None:
    for work in works:
        work.wait()
