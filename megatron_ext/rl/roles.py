"""The roles of reinforcement learning. The loop knows a source and a learner; the source (`stream.py`) knows a fleet, a scorer and a store. Implemented by
`fleet.py`, `learners.py`, `scoring/pool.py` and `bank/`, and in unit tests by ten-line fakes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from megatron_ext.batch import FailedRollout, Prompt, Rollout, ScoredRollout
from megatron_ext.observe.stopwatch import Stopwatch

Metrics = dict[str, float]


@dataclass(frozen=True)
class Taken:
    """The answers of a step: what it trains on, what it does not, and what failed."""

    kept: Sequence[ScoredRollout]
    set_aside: Sequence[ScoredRollout]
    failed: Sequence[FailedRollout]


class Versioned(Protocol):
    """Weights, as far as anyone but learner and fleet knows them. `version`: the steps that they have finished."""

    @property
    def version(self) -> int: ...


class Source(Protocol):
    """Where the scored rollouts of a step come from, and where new weights go."""

    def take(self, step: int, clock: Stopwatch) -> Taken: ...
    def publish(self, weights: Versioned) -> Metrics: ...


class Learner(Protocol):
    """Owns the weights. `save` writes a checkpoint of `step` finished steps."""

    def update(self, scored: Sequence[ScoredRollout], advantages_R: np.ndarray, step: int) -> Metrics: ...
    def weights(self) -> Versioned: ...
    def save(self, step: int) -> None: ...


@dataclass(frozen=True)
class Ask:
    """Answers that are wanted of a prompt: their sample numbers, and the number of the draw that it comes from, of which their seeds are made. `greedy`: the
    most likely token each time. `drawn_layers`: those whose routes are drawn, of the layers with experts (`earl.mode` router_pg)."""

    prompt: Prompt
    samples: tuple[int, ...]
    step: int
    greedy: bool = False
    drawn_layers: tuple[int, ...] = ()


class Fleet(Protocol):
    """Answers prompts with the weights it was last given, some at a time."""

    def ask(self, asks: Sequence[Ask]) -> None:
        """Returns at once; `turn` does the work."""

    def turn(self, beside_update: bool = False) -> list[Rollout | FailedRollout]:
        """Waits a moment for something to happen. Returns what has been answered, or has failed for good, since the last turn: every sample once."""

    def publish(self, weights: Any) -> Metrics: ...


class Scorer(Protocol):
    """Rewards rollouts; one that cannot be rewarded comes back as a FailedRollout."""

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout | FailedRollout]: ...


class Store(Protocol):
    """Keeps what was answered, so that it outlives this process; see `bank/`."""

    def put(self, draw: int, scored: Sequence[ScoredRollout], failed: Sequence[FailedRollout]) -> None: ...
    def drawn(self, draw: int) -> Any: ...
    def train(self, step: int, groups: Sequence[tuple[int, str]]) -> None: ...
    def drop(self, groups: Sequence[tuple[int, str]], reason: str) -> None: ...
