"""The roles of a fleet, opened for tests. In a module of its own, because ranks import it."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch

from megatron_ext.checkpoint.full_tensors import digest, full_tensors
from megatron_ext.rl.learner import LearnerRank
from megatron_ext.rl.refit import weight_sync
from megatron_ext.rl.refit.plan import Bucket
from megatron_ext.rl.refit.staging import Staging, own_tensors, pack
from megatron_ext.rl.refit.weight_sync import Meeting
from megatron_ext.rl.rollout_worker import RolloutRank


class OpenLearner(LearnerRank):
    """Shows its weights; damages those of the generations in `damaged` on their way."""

    damaged: tuple[int, ...] = ()

    def weights(self) -> dict[str, str]:
        return digest(full_tensors(self._engine.chunks, self._context))

    def held_bytes(self) -> int:
        """Gradients that are in memory."""
        return sum(storage.nbytes() for storage in self._memory._gradients._storages) if self._memory else -1

    def damage(self, *generations: int) -> None:
        self.damaged = generations

    def send_weights(self, meeting: Meeting, buckets: Sequence[Bucket]) -> int:
        if meeting.generation not in self.damaged:
            return super().send_weights(meeting, buckets)
        with patch.object(weight_sync, "pack", pack_and_damage):
            return super().send_weights(meeting, buckets)


class OpenRollout(RolloutRank):
    """Shows its weights; may die with a publication half received, and damage one tensor of the weights once they are checked and loaded."""

    dies = False
    damaged = ""

    def held_bytes(self) -> int:
        """Weights that are in memory, those of experts that share a piece once each."""
        return sum(tensor.untyped_storage().nbytes() for tensor in own_tensors(self._model, self._context).values())

    def damage(self, name: str) -> None:
        self.damaged = name

    def load_weights(self, version: int) -> None:
        super().load_weights(version)
        if self.damaged:
            add_noise(own_tensors(self._model, self._context)[self.damaged])

    def weights(self) -> dict[str, str]:
        return digest(full_tensors(self._model, self._context))

    def die_in_the_middle(self) -> None:
        self.dies = True

    def receive_weights(self, meeting: Meeting, place: int, version: int, buckets: Sequence[Bucket]) -> None:
        with patch.object(Staging, "stage", stage_and_die) if self.dies else nullcontext():
            super().receive_weights(meeting, place, version, buckets)


class NoisyRollout(OpenRollout):
    """Its output layer is damaged with every publication; it answers nothing."""

    damaged = "output_layer.weight"

    def generate(self, *_: Any) -> Any:
        raise AssertionError("asked for rollouts of damaged weights")


@torch.no_grad()
def add_noise(tensor: torch.Tensor) -> None:
    """As large as the values are."""
    size = tensor.square().mean().sqrt() + 0.01
    tensor.add_(size * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)))


def stage_and_die(*bucket: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def pack_and_damage(bucket: Bucket, tensors: Any, version: int, message: torch.Tensor, workers: Any) -> None:
    pack(bucket, tensors, version, message, workers)
    flip_one_byte(bucket, message)


def flip_one_byte(bucket: Bucket, message: torch.Tensor) -> None:
    """Changes the lowest bit of one byte in the middle of the bucket's middle piece: the smallest damage there is."""
    number = len(bucket.pieces) // 2
    message[bucket.offsets[number] + bucket.pieces[number].num_bytes // 2] ^= 1
