"""One step of reinforcement learning, and the loop around it. Start reading here.

    prompts -> fleet.generate -> scorer.score -> choose -> credit -> learner.update -> fleet.publish(learner.weights()) -> next step
       ^         rollouts          rewards         |     advantages                     new weights, new version
       +--- not enough groups to learn from -------+

The loop knows three roles (`roles.py`) and nothing of how they are made: the same lines run over Ray and Megatron and over ten-line fakes in a unit test. It is
synchronous: every rollout of a step is sampled under the weights that the step then updates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ext.batch import FailedRollout, Prompt, Rollout, ScoredRollout
from megatron_ext.errors import StoppedForRequeue, UserError
from megatron_ext.observe.stopwatch import Lap, Stopwatch
from megatron_ext.rl.roles import Fleet, Learner, Metrics, Scorer
from megatron_ext.rl.sampling import Choice, keep_all


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
    """What the loop repeats: which prompts a step draws, which groups it trains on, how rewards become advantages, when to save and when to stop.
    Where `choose` has not enough, the step draws again, `draws` times at most: its later draws are those of the numbers from `steps` on."""

    steps: int
    samples: int
    draw: Callable[[int], Sequence[Prompt]]
    credit: Callable[[Sequence[ScoredRollout], int], tuple[np.ndarray, Metrics]]
    choose: Callable[[Sequence[ScoredRollout]], Choice] = keep_all
    draws: int = 1
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
    """Generates, scores, chooses, credits, updates, publishes. Failed rollouts are counted and reported; they are never trained on."""
    clock, scored, failed = Stopwatch(), list[ScoredRollout](), list[FailedRollout]()
    for draw in range(recipe.draws):
        rollouts = fleet.generate(recipe.draw(step + draw * recipe.steps), recipe.samples, step)
        clock.lap("generate")
        answers = scorer.score([rollout for rollout in rollouts if isinstance(rollout, Rollout)])
        clock.lap("reward")
        scored += [answer for answer in answers if isinstance(answer, ScoredRollout)]
        failed += [failure for failure in [*rollouts, *answers] if isinstance(failure, FailedRollout)]
        if (choice := recipe.choose(scored)).enough:
            break
    if not scored:
        raise UserError(f"step {step}", f"all {len(failed)} rollouts failed; the first: {failed[0].reason}: {failed[0].detail}")
    advantages_R, metrics = recipe.credit(choice.kept, step)
    clock.lap("advantages")
    metrics |= learner.update(choice.kept, advantages_R, step)
    clock.lap("update")
    metrics |= fleet.publish(learner.weights())
    clock.lap("sync")
    return StepReport(step, choice.kept, choice.set_aside, failed, advantages_R, metrics | clock.seconds(), clock.laps)
