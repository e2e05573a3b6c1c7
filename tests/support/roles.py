"""The roles of a fleet, opened for tests. In a module of its own, because ranks import it."""

from __future__ import annotations

import os
import signal

from megatron_ext.checkpoint.full_tensors import digest, full_tensors
from megatron_ext.rl.learner import LearnerRank
from megatron_ext.rl.rollout_worker import RolloutRank
from megatron_ext.rl.weight_sync import Meeting, Parcel, join_meeting, pack, send


class OpenLearner(LearnerRank):
    """Shows its weights; damages those of the generations in `damaged` on their way."""

    damaged: tuple[int, ...] = ()

    def weights(self) -> dict[str, str]:
        return digest(full_tensors(self._engine.chunks, self._context))

    def damage(self, *generations: int) -> None:
        self.damaged = generations

    def send_weights(self, meeting: Meeting) -> int:
        if meeting.generation not in self.damaged:
            return super().send_weights(meeting)
        parcel = pack(full_tensors(self._engine.chunks, self._context), self._finished)
        if self._context.rank == 0:
            send(join_meeting(meeting, 0, self._store), flip_one_byte(parcel))
        return 0


class OpenRollout(RolloutRank):
    """Shows its weights."""

    def weights(self) -> dict[str, str]:
        return digest(full_tensors(self._model, self._context))

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def flip_one_byte(parcel: Parcel) -> Parcel:
    """The parcel with the lowest bit of one byte in the middle changed: the smallest damage there is."""
    bucket = parcel.buckets[0].clone()
    bucket[len(bucket) // 2] ^= 1
    return Parcel(parcel.manifest, (bucket, *parcel.buckets[1:]))
