"""One step of reinforcement learning, and the loop around it. Start reading here.

    stream.take(step) -> credit -> learner.update -> stream.publish(learner.weights()) -> next step
      scored rollouts   advantages                     new weights, new version

The stream asks prompts, has answers rewarded and puts them into the bank (`stream.py`). How far ahead of the learner it may ask is the only difference between
a synchronous run, one step off and an asynchronous one: the loop is the same. It knows two roles (`roles.py`) and nothing of how they are made: the same lines
run over Ray and Megatron and over ten-line fakes in a unit test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ext.batch import FailedRollout, ScoredRollout
from megatron_ext.errors import StoppedForRequeue
from megatron_ext.observe.stopwatch import Lap, Stopwatch
from megatron_ext.rl.roles import Learner, Metrics, Source


@dataclass(frozen=True)
class StepReport:
    """What one step did and when (`laps`); `metrics` joins the numbers of every role with the seconds each took. Trained on was `scored`, not what was
    `set_aside`."""

    step: int
    scored: Sequence[ScoredRollout]
    set_aside: Sequence[ScoredRollout]
    failed: Sequence[FailedRollout]
    advantages_R: np.ndarray
    metrics: Metrics
    laps: Sequence[Lap] = ()


@dataclass(frozen=True)
class Recipe:
    """What the loop repeats: how rewards become advantages, when to save and when to stop."""

    steps: int
    credit: Callable[[Sequence[ScoredRollout], int], tuple[np.ndarray, Metrics]]
    save_every: int = 0
    after_step: Callable[[StepReport], None] = lambda report: None
    stop_requested: Callable[[], bool] = lambda: False


def run_loop(recipe: Recipe, source: Source, learner: Learner, first_step: int = 0) -> None:
    """Steps `first_step` .. `recipe.steps`, then a checkpoint. Raises StoppedForRequeue, with a checkpoint written, when asked to stop in between."""
    source.publish(learner.weights())
    for finished in range(first_step + 1, recipe.steps + 1):
        recipe.after_step(run_step(recipe, source, learner, finished - 1))
        stopping = recipe.stop_requested() and finished < recipe.steps
        if stopping or (recipe.save_every and finished % recipe.save_every == 0 and finished < recipe.steps):
            learner.save(finished)
        if stopping:
            raise StoppedForRequeue(f"stopped after step {finished} of {recipe.steps}: run again to resume")
    learner.save(recipe.steps)


def run_step(recipe: Recipe, source: Source, learner: Learner, step: int) -> StepReport:
    """Takes what was answered, credits, updates, publishes. Failed rollouts are counted and reported; they are never trained on."""
    clock = Stopwatch()
    taken = source.take(step, clock)
    advantages_R, metrics = recipe.credit(taken.kept, step)
    clock.lap("advantages")
    metrics |= learner.update(taken.kept, advantages_R, step)
    clock.lap("update")
    metrics |= source.publish(learner.weights())
    clock.lap("sync")
    return StepReport(step, taken.kept, taken.set_aside, taken.failed, advantages_R, metrics | clock.seconds(), clock.laps)
