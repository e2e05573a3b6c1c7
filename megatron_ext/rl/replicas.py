"""A rollout replica as the driver sees it: a world of ranks, what it has been asked, and which weights it holds.

    start -> (opening) -> stale -> [holds the current weights] -> ready <-> advancing
      ^                                                             |
      +------------------------- lost ------------------------------+

A replica that is stale is asked nothing: an answer under weights that nobody knows would be worse than none.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from megatron_ext.batch import FailedRollout, Rollout
from megatron_ext.config.schema import RunConfig
from megatron_ext.rl.hosts.ranks import Rank
from megatron_ext.rl.hosts.switchboard import Call, Pending, Switchboard
from megatron_ext.rl.hosts.worlds import begin_world
from megatron_ext.rl.roles import Ask
from megatron_ext.rl.rollout_worker import Lane, RolloutRank

UNKNOWN = -1
SLICE_STEPS = 64
"""Tokens of every answer between two looks at the driver: new questions, new weights."""


@dataclass(eq=False)
class Replica:
    """`asked`: by data-parallel lane and prompt, the samples that have not come back. `version`: of the weights it holds. `pending`: the verb its ranks are at.
    `lives`: how often it was started without answering anything since; `excused`: how often that was forgotten."""

    number: int
    ranks: tuple[Rank, ...] = ()
    lanes: tuple[Lane, ...] = ()
    version: int = UNKNOWN
    pending: Pending | None = None
    asked: dict[int, dict[str, Ask]] = field(default_factory=dict)
    new: dict[int, list[Ask]] = field(default_factory=dict)
    lives: int = 0
    excused: int = 0
    busy_s: float = 0.0
    _since: float = 0.0

    def start(self, board: Switchboard, config: RunConfig, timeout_s: float) -> None:
        """Its ranks begin to open, with random weights."""
        self.lives += 1
        self.lanes, self.version, self.asked, self.new = (), UNKNOWN, {}, {}
        names = [f"rollout replica {self.number} rank {rank}" for rank in range(config.rollout.parallel.num_ranks)]
        self.ranks, self.pending = begin_world(board, RolloutRank, f"replica-{self.number}", names, (config,), timeout_s)

    @property
    def open(self) -> bool:
        return bool(self.lanes)

    @property
    def num_asked(self) -> int:
        """Answers that it owes."""
        return sum(len(ask.samples) for asks in self.asked.values() for ask in asks.values())

    def give(self, lane: int, asks: Iterable[Ask]) -> None:
        """Takes them with its next slice."""
        for ask in asks:
            known = self.asked.setdefault(lane, {})
            before = known[ask.prompt.key].samples if ask.prompt.key in known else ()
            known[ask.prompt.key] = replace(ask, samples=(*before, *ask.samples))
            self.new.setdefault(lane, []).append(ask)

    def advance(self, board: Switchboard, timeout_s: float) -> None:
        """Every rank of the world runs a slice."""
        calls = [Call(rank, "advance", (self.new.get(lane.dp_rank, []), SLICE_STEPS)) for rank, lane in zip(self.ranks, self.lanes, strict=True)]
        self.new = {}
        self._since = time.perf_counter()
        self.pending = board.post(calls, timeout_s)

    def heard(self, answers: Sequence[Sequence[Rollout | FailedRollout]]) -> list[Rollout | FailedRollout]:
        """What a slice has brought: no longer owed."""
        self.busy_s += time.perf_counter() - self._since
        found = [outcome for answer in answers for outcome in answer]
        for outcome in found:
            self._settle(outcome)
        if found:
            self.lives, self.excused = 0, 0
        return found

    def take_back(self) -> list[Ask]:
        """What it owed, to be asked of another."""
        owed = [ask for asks in self.asked.values() for ask in asks.values()]
        self.asked, self.new = {}, {}
        return owed

    def excuse(self, most: int) -> None:
        """A question that has failed for good may be to blame for its losses; for those of one question after another, not."""
        self.excused += 1
        if self.excused <= most:
            self.lives = 0

    def _settle(self, outcome: Rollout | FailedRollout) -> None:
        for asks in self.asked.values():
            if outcome.prompt.key in asks and outcome.sample in asks[outcome.prompt.key].samples:
                left = tuple(sample for sample in asks[outcome.prompt.key].samples if sample != outcome.sample)
                if left:
                    asks[outcome.prompt.key] = replace(asks[outcome.prompt.key], samples=left)
                else:
                    del asks[outcome.prompt.key]
                return
        raise RuntimeError(f"replica {self.number} answered {outcome.prompt.key}#{outcome.sample}, which it does not owe")
