"""The loop's Learner, made of the ranks of one grid: a parcel of rollouts to each data-parallel rank.

When a rank is lost its world is of no use: `LearnerLost` says so, and `restart` starts all of it again from the latest checkpoint. The steps since then are
repeated with the answers of the bank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.batch import ScoredRollout
from megatron_ext.config.schema import RunConfig
from megatron_ext.errors import LearnerLost, RankFailed
from megatron_ext.observe.metrics_file import MFU, STEP_S
from megatron_ext.observe.profiler import profiled_ranks
from megatron_ext.observe.stopwatch import TIMING, Stopwatch
from megatron_ext.parallel.plan import Layout
from megatron_ext.parallel.planner.model_flops import yardstick_of
from megatron_ext.rl.deadlines import Deadlines
from megatron_ext.rl.goals import Goals, GoalsOf
from megatron_ext.rl.hosts.ranks import Rank
from megatron_ext.rl.hosts.switchboard import POLL_S, Call, Pending, Switchboard
from megatron_ext.rl.hosts.worlds import begin_world
from megatron_ext.rl.learner import LearnerPlace, LearnerRank
from megatron_ext.rl.parcels import Parcel, plan_parcels, row_key
from megatron_ext.rl.roles import Metrics
from megatron_ext.rl.turns import Turns
from megatron_ext.training.rank_work import rank_metrics


@dataclass(frozen=True)
class Weights:
    """A version of the learner's weights, which stay where they are until they are published."""

    version: int
    senders: tuple[Rank, ...]
    host: str
    port: int


class MegatronLearner:
    """See `roles.Learner`. Made with its ranks on the way; `wait_open` returns when they are there."""

    def __init__(self, board: Switchboard, config: RunConfig, stage_dir: Path, init_from: Path, pad_id: int, deadlines: Deadlines, turns: Turns) -> None:
        self._board, self._config, self._stage_dir, self._init_from = board, config, stage_dir, init_from
        self._pad_id, self._deadlines, self._turns = pad_id, deadlines, turns
        turns.learners = lambda: self.ranks
        self.meanwhile: Callable[[], None] | None = None
        """Done again and again while an update is under way."""
        self.goals: GoalsOf | None = None
        """What the routers of a step are taught beside; None: nothing."""
        self._save_s = 0.0
        self._start()

    def _start(self) -> None:
        names = [f"learner rank {rank}" for rank in range(self._config.parallel.num_ranks)]
        arguments = (self._config, self._stage_dir, self._init_from)
        self.ranks, self._opening = begin_world(self._board, LearnerRank, "learner", names, arguments, self._deadlines.open_s)

    def wait_open(self) -> None:
        """Raises RankFailed when it cannot be opened."""
        self._places: list[LearnerPlace] = self._finished(self._opening)
        self._board.census(self.ranks)
        self.finished_steps = self._places[0].finished_steps
        self._yardstick = yardstick_of(self._config.model, self._config.rl.train_vision, self._places[0].device_name, self._config.parallel.threads_per_rank)
        self._host = self._board.host.address(self.ranks[0])
        self._port: int = self._board.ask([Call(self.ranks[0], "open_store", (self._host,))], self._deadlines.open_s)[0]

    def restart(self) -> None:
        """From the latest checkpoint, with new processes. Raises LearnerLost when these are lost in their turn."""
        for rank in self.ranks:
            self._board.host.end(rank)
        self._start()
        try:
            self.wait_open()
        except RankFailed as failure:
            raise LearnerLost.of(failure) from None
        self._turns.begin_anew()

    def profile(self) -> None:
        """From now on, where `observe.profile` says how many steps."""
        left = self._config.rl.steps - self.finished_steps
        profiled = [self.ranks[rank] for rank in profiled_ranks(len(self.ranks), self._config.parallel.pp)]
        self._ask([Call(rank, "profile", (self._stage_dir, rank.name, left)) for rank in profiled], self._deadlines.open_s)

    def update(self, scored: Sequence[ScoredRollout], advantages_R: np.ndarray, step: int) -> Metrics:
        self._turns.learner()
        parcels = self._parcels(scored, advantages_R, self._config.rl.minibatches, None if self.goals is None else self.goals(scored))
        calls = [Call(rank, "update", (parcels[place.dp_rank],)) for rank, place in zip(self.ranks, self._places, strict=True)]
        answers = self._ask(calls, self._deadlines.update_s, self.meanwhile)
        self.finished_steps = step + 1
        save_s, self._save_s = self._save_s, 0.0
        metrics = answers[0].metrics
        return {**metrics, **rank_metrics([answer.work for answer in answers]), **self._mfu(scored, metrics), TIMING + "save": save_s}

    def reference_kl(self, scored: Sequence[ScoredRollout]) -> np.ndarray:
        """float64 [R]: how far each answer is from the reference, the estimate of the KL summed over its tokens."""
        self._turns.learner()
        parcels = self._parcels(scored, np.zeros(len(scored)), 1)
        calls = [Call(rank, "reference_kl", (parcels[place.dp_rank][0],)) for rank, place in zip(self.ranks, self._places, strict=True)]
        found = {key: kl for answer in self._ask(calls, self._deadlines.update_s, self.meanwhile) for key, kl in answer.items()}
        return np.array([found[row_key(answer.rollout)] for answer in scored])

    def weights(self) -> Weights:
        return Weights(self.finished_steps, self.ranks, self._host, self._port)

    def save(self, step: int) -> None:
        """`timing_s/save` of the next update is how long this takes."""
        clock = Stopwatch()
        self._turns.learner()
        self._ask([Call(rank, "save", (step,)) for rank in self.ranks], self._deadlines.save_s)
        clock.lap("save")
        self._save_s += clock.seconds()[STEP_S]

    def finish_saving(self, at_most_s: float = math.inf) -> None:
        """Returns once the latest checkpoint is written."""
        self._ask([Call(rank, "finish_saving") for rank in self.ranks], min(at_most_s, self._deadlines.save_s))

    def _ask(self, calls: Sequence[Call], timeout_s: float, meanwhile: Callable[[], None] | None = None) -> list[Any]:
        """Raises LearnerLost when a rank has gone."""
        try:
            return self._finished(self._board.post(calls, timeout_s), meanwhile)
        except RankFailed as failure:
            raise LearnerLost.of(failure) from None

    def _finished(self, pending: Pending, meanwhile: Callable[[], None] | None = None) -> list[Any]:
        while not self._board.wait([pending], POLL_S if meanwhile is None else 0.0):
            if meanwhile is not None:
                meanwhile()
        return pending.collect()

    def _parcels(self, scored: Sequence[ScoredRollout], advantages_R: np.ndarray, minibatches: int, goals: Goals | None = None) -> list[list[Parcel]]:
        multiple = Layout.of(self._config.parallel).length_multiple
        dp_size = self._places[0].dp_size
        return plan_parcels(scored, advantages_R, minibatches=minibatches, dp_size=dp_size, multiple=multiple, pad_id=self._pad_id, goals=goals)

    def _mfu(self, scored: Sequence[ScoredRollout], metrics: Metrics) -> Metrics:
        """Of the learner's ranks while they learn: passes before the first update, and waiting for rollouts, are no part of the seconds."""
        if self._yardstick is None:
            return {}
        tokens = sum(len(answer.rollout.prompt.tokens_S) + len(answer.rollout.response_T) for answer in scored)
        tiles = sum(len(answer.rollout.prompt.tiles) + len(answer.rollout.further) for answer in scored)
        seconds = metrics[TIMING + "forward_backward"] + metrics[TIMING + "optimizer"]
        return {MFU: self._yardstick.mfu(len(scored), tokens / len(scored), tiles / len(scored), seconds * len(self.ranks))}
