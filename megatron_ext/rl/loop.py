"""One step of reinforcement learning, and the loop around it. Start reading here.

    prompts -> fleet.generate -> scorer.score -> credit -> learner.update -> fleet.publish(learner.weights()) -> next step
                 rollouts          rewards       advantages                     new weights, new version

The loop knows three roles and nothing of how they are made: the same lines run over Ray and Megatron and over ten-line fakes in a unit test. It is
synchronous: every rollout of a step is sampled under the weights that the step then updates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from megatron_ext.batch import FailedRollout, Prompt, Rollout, ScoredRollout
from megatron_ext.errors import StoppedForRequeue, UserError
from megatron_ext.rl.stopwatch import Stopwatch

Metrics = dict[str, float]


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


@dataclass(frozen=True)
class StepReport:
    """What one step did; `metrics` joins the numbers of every role with the seconds each took."""

    step: int
    scored: Sequence[ScoredRollout]
    failed: Sequence[FailedRollout]
    advantages_R: np.ndarray
    metrics: Metrics


@dataclass(frozen=True)
class Recipe:
    """What the loop repeats: which prompts a step draws, how rewards become advantages, when to save and when to stop."""

    steps: int
    samples: int
    draw: Callable[[int], Sequence[Prompt]]
    credit: Callable[[Sequence[ScoredRollout], int], tuple[np.ndarray, Metrics]]
    save_every: int = 0
    after_step: Callable[[StepReport], None] = lambda report: None
    stop_requested: Callable[[], bool] = lambda: False


def run_loop(recipe: Recipe, fleet: Fleet, scorer: Scorer, learner: Learner, first_step: int = 0) -> None:
    """Steps `first_step` .. `recipe.steps`, then a checkpoint. Raises StoppedForRequeue, with a checkpoint written, when asked to stop in between."""
    fleet.publish(learner.weights())
    for finished in range(first_step + 1, recipe.steps + 1):
        recipe.after_step(run_step(recipe, fleet, scorer, learner, finished - 1))
        stopping = recipe.stop_requested() and finished < recipe.steps
        if stopping or (recipe.save_every and finished % recipe.save_every == 0 and finished < recipe.steps):
            learner.save(finished)
        if stopping:
            raise StoppedForRequeue(f"stopped after step {finished} of {recipe.steps}: run again to resume")
    learner.save(recipe.steps)


def run_step(recipe: Recipe, fleet: Fleet, scorer: Scorer, learner: Learner, step: int) -> StepReport:
    """Generates, scores, credits, updates, publishes. Failed rollouts are counted and reported; they are never trained on."""
    clock = Stopwatch()
    rollouts = fleet.generate(recipe.draw(step), recipe.samples, step)
    clock.lap("generate")
    answers = scorer.score([rollout for rollout in rollouts if isinstance(rollout, Rollout)])
    clock.lap("reward")
    scored = [answer for answer in answers if isinstance(answer, ScoredRollout)]
    failed = [failure for failure in [*rollouts, *answers] if isinstance(failure, FailedRollout)]
    if not scored:
        raise UserError(f"step {step}", f"all {len(failed)} rollouts failed; the first: {failed[0].reason}: {failed[0].detail}")
    advantages_R, metrics = recipe.credit(scored, step)
    metrics |= learner.update(scored, advantages_R, step)
    clock.lap("update")
    metrics |= fleet.publish(learner.weights())
    clock.lap("sync")
    return StepReport(step, scored, failed, advantages_R, metrics | clock.seconds())
