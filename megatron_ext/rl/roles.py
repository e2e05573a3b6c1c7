"""The three roles of reinforcement learning, as the loop sees them. Implemented by `fleet.py` and `scoring/pool.py`, and in a unit test by ten-line fakes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from megatron_ext.batch import FailedRollout, Prompt, Rollout, ScoredRollout

Metrics = dict[str, float]


@dataclass(frozen=True)
class Ask:
    """Answers that are wanted of a prompt: their sample numbers, and the step that drew the prompt, of which their seeds are made. `greedy`: the most likely
    token each time."""

    prompt: Prompt
    samples: tuple[int, ...]
    step: int
    greedy: bool = False


class Fleet(Protocol):
    """Answers prompts with the weights it was last given."""

    def generate(self, prompts: Sequence[Prompt], samples: int, step: int) -> list[Rollout | FailedRollout]: ...
    def publish(self, weights: Any) -> Metrics: ...


class Scorer(Protocol):
    """Rewards rollouts; one that cannot be rewarded comes back as a FailedRollout."""

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout | FailedRollout]: ...


class Learner(Protocol):
    """Owns the weights. `weights` is whatever its fleet's `publish` understands; `save` writes a checkpoint of `step` finished steps."""

    def update(self, scored: Sequence[ScoredRollout], advantages_R: np.ndarray, step: int) -> Metrics: ...
    def weights(self) -> Any: ...
    def save(self, step: int) -> None: ...
