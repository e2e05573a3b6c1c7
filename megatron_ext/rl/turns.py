"""Colocated ranks leave the device to each other in turn (`rl.offload`): which memory a rank gives up while it is not its turn, and who leads the change.

    learner's turn     update, send_weights, probe, save     rollouts: no weights (their host copy is what the latest publication staged), no keys and values
    rollouts' turn     load_weights, probe, generate         learner: no gradients; on a GPU its weights and its optimizer's state are in host memory

On a CPU host and device memory are the same: what would only move stays, and what can be made again or is there twice is still given up: gradient buffers, and
rollout weights, of which the staged copy remains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from megatron_ext.device.lending import Lent
from megatron_ext.errors import LearnerLost, RankFailed
from megatron_ext.model.assembly import VisionLanguageModel
from megatron_ext.rl.hosts.ranks import Rank
from megatron_ext.rl.hosts.switchboard import Call, Switchboard
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
    """The driver's side: whose turn it is. The learner begins. Where nothing is offloaded, everybody has the device all the time. `learners` and `rollouts`
    say which ranks there are now; a rollout rank that is lost at its turn is missed at its next verb."""

    def __init__(self, board: Switchboard, timeout_s: float, offload: bool) -> None:
        self._board, self._timeout_s, self._offload = board, timeout_s, offload
        self.learners: Callable[[], Sequence[Rank]] = list
        self.rollouts: Callable[[], Sequence[Rank]] = list
        self.begin_anew()

    def begin_anew(self) -> None:
        """The learner has just been opened, and has the device."""
        self._learner_has, self._rollouts_have = True, False

    def learner(self) -> None:
        """The learner has the device. Its ranks wait for all rollouts to have left it."""
        if not self._offload or self._learner_has:
            return
        self._ask(self.rollouts(), "rest", settle=(RankFailed,))
        self._rollouts_have = False
        self._ask_learner("onload")
        self._learner_has = True

    def nobody(self) -> None:
        """The learner has left the device; rollouts may take it as they load new weights."""
        if self._offload and self._learner_has:
            self._ask_learner("offload")
            self._learner_has = False

    def rollout(self, ready: Sequence[Rank]) -> None:
        """The rollouts have the device, with the weights that they had when they left it. `ready`: those that have any."""
        self.nobody()
        if self._offload and not self._rollouts_have:
            self._ask(ready, "wake", settle=(RankFailed,))
            self._rollouts_have = True

    def _ask_learner(self, verb: str) -> None:
        try:
            self._ask(self.learners(), verb)
        except RankFailed as failure:
            raise LearnerLost.of(failure) from None

    def _ask(self, ranks: Sequence[Rank], verb: str, settle: tuple[type[Exception], ...] = ()) -> None:
        self._board.ask([Call(rank, verb) for rank in ranks], self._timeout_s, settle)
