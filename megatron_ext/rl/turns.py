"""Colocated ranks leave the device to each other in turn (`rl.offload`): which memory a rank gives up while it is not its turn, and who leads the change.

    learner's turn     update, send_weights, probe, save     rollouts: no weights (their host copy is what the latest publication staged), no keys and values
    rollouts' turn     load_weights, probe, generate         learner: no gradients; on a GPU its weights and its optimizer's state are in host memory

On a CPU host and device memory are the same: what would only move stays, and what can be made again or is there twice is still given up: gradient buffers, and
rollout weights, of which the staged copy remains.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from megatron_ext.device.lending import Lent
from megatron_ext.model.assembly import VisionLanguageModel
from megatron_ext.rl.hosts.ranks import Call, Rank, Switchboard
from megatron_ext.training.engine import Engine
from megatron_ext.training.megatron_engine import MegatronEngine


class LearnerMemory:
    """What a learner rank gives up. `moves`: whether what must not be lost goes to host memory, which is somewhere else on a GPU only."""

    def __init__(self, engine: Engine, reference: Sequence[VisionLanguageModel], moves: bool) -> None:
        assert isinstance(engine, MegatronEngine), "the rules refuse the other one"
        self._gradients = Lent(_gradients(engine), keep=False)
        self._states = Lent(_states(engine, reference) if moves else (), keep=True)

    @property
    def num_bytes(self) -> int:
        return self._gradients.num_bytes + self._states.num_bytes

    @property
    def given(self) -> bool:
        return self._gradients.given

    def give(self) -> None:
        self._gradients.give()
        self._states.give()

    def take_back(self) -> None:
        """Gradients are anything until the next step zeroes them."""
        self._states.take_back()
        self._gradients.take_back()


def _gradients(engine: MegatronEngine) -> Iterator[torch.Tensor]:
    for chunk in engine.wrapped:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            yield buffer.grad_data


def _states(engine: MegatronEngine, reference: Sequence[VisionLanguageModel]) -> Iterator[torch.Tensor]:
    """Weights, those of the reference model, main weights and Adam's moments."""
    for chunk in (*engine.chunks, *reference):
        yield from chunk.parameters()
        yield from chunk.buffers()
    for part in engine.optimizer.chained_optimizers:
        if part.is_stub_optimizer:
            continue
        yield from part.get_parameters()
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


class Turns:
    """The driver's side: whose turn it is. The learner begins. Where nothing is offloaded, everybody has the device all the time."""

    def __init__(self, board: Switchboard, learners: Sequence[Rank], rollouts: Sequence[Rank], timeout_s: float, offload: bool) -> None:
        self._board, self._learners, self._rollouts = board, tuple(learners), tuple(rollouts)
        self._timeout_s, self._offload = timeout_s, offload
        self._learner_has, self._rollouts_have = True, not offload

    def learner(self) -> None:
        """The learner has the device. Its ranks wait for all rollouts to have left it."""
        if not self._offload:
            return
        if self._rollouts_have:
            self._ask(self._rollouts, "rest")
            self._rollouts_have = False
        if not self._learner_has:
            self._ask(self._learners, "onload")
            self._learner_has = True

    def nobody(self) -> None:
        """The learner has left the device; rollouts may take it as they load new weights, and call `loaded` then."""
        if self._offload and self._learner_has:
            self._ask(self._learners, "offload")
            self._learner_has = False

    def loaded(self) -> None:
        """Every rollout rank has new weights, and so the device."""
        self._rollouts_have = True

    def rollouts(self) -> None:
        """The rollouts have the device, with the weights that they had when they left it."""
        self.nobody()
        if not self._rollouts_have:
            self._ask(self._rollouts, "wake")
            self._rollouts_have = True

    def _ask(self, ranks: Sequence[Rank], verb: str) -> None:
        self._board.ask([Call(rank, verb) for rank in ranks], self._timeout_s)
