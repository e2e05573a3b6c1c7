"""Where the scored rollouts of a step come from: prompts are drawn and asked, answers rewarded and banked, as far ahead of the learner as staleness allows.

    draw n -> fleet.ask -> (fleet.turn -> a group is complete -> scorer.score -> bank.put)* -> take(step n)

Step n trains on draw n, whole, so that every prompt is accounted for. Draw n is asked once the fleet has weights of version n - `ahead`: with 0 the run is
synchronous; with 1 the next draw is answered while the learner learns from this one; with more, slow answers have so many steps' time. Nothing that is in the
bank is asked again: a run that was killed, in whatever step, goes on with the answers it had.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_ext.batch import FailedRollout, Prompt, Rollout, ScoredRollout
from megatron_ext.errors import UserError
from megatron_ext.observe.stopwatch import Stopwatch
from megatron_ext.rl.roles import Ask, Fleet, Metrics, Scorer, Store, Taken, Versioned
from megatron_ext.rl.sampling import Choice, keep_all

Outcome = ScoredRollout | FailedRollout


@dataclass(frozen=True)
class Questions:
    """What is asked: which prompts a draw has, how many answers of each, and which groups a step trains on. Where `choose` has not enough, the step draws
    again, `draws` times at most: its later draws are those of the numbers from `steps` on."""

    steps: int
    samples: int
    draw: Callable[[int], Sequence[Prompt]]
    choose: Callable[[Sequence[ScoredRollout]], Choice] = keep_all
    draws: int = 1

    def numbers(self, step: int) -> list[int]:
        """The draws that a step may take, in order."""
        return [step + further * self.steps for further in range(self.draws)]


class Stream:
    """See `roles.Source`. `whole_draws`: a draw is banked when all of it is answered, rather than group by group: where the bits of an answer depend on its
    company, a part of it could not be completed to the same bits."""

    def __init__(self, questions: Questions, fleet: Fleet, scorer: Scorer, store: Store, ahead: int = 0, whole_draws: bool = False) -> None:
        self._questions, self._fleet, self._scorer, self._store = questions, fleet, scorer, store
        self._ahead, self._whole_draws = ahead, whole_draws
        self._open: dict[int, _Draw] = {}
        self._prompts: dict[str, _Draw] = {}
        self._clock: Stopwatch | None = None
        """Of the step that waits; beside an update nobody counts the seconds."""

    def take(self, step: int, clock: Stopwatch) -> Taken:
        """Raises UserError where every rollout of the step failed."""
        scored, failed, taken = list[ScoredRollout](), list[FailedRollout](), list[int]()
        for number in self._questions.numbers(step):
            draw = self._begun(number)
            self._await(draw, clock)
            taken.append(number)
            scored += [outcome for outcome in draw.outcomes if isinstance(outcome, ScoredRollout)]
            failed += [outcome for outcome in draw.outcomes if isinstance(outcome, FailedRollout)]
            if (choice := self._questions.choose(scored)).enough:
                break
        if not scored:
            raise UserError(f"step {step}", f"all {len(failed)} rollouts failed; the first: {failed[0].reason}: {failed[0].detail}")
        self._store.train(step, self._groups(choice.kept))
        self._store.drop(self._groups(choice.set_aside), "set aside")
        for number in taken:
            self._forget(self._open.pop(number))
        return Taken(choice.kept, choice.set_aside, failed)

    def publish(self, weights: Versioned) -> Metrics:
        """And asks what may be asked with them."""
        metrics = self._fleet.publish(weights)
        if self._ahead:
            for number in range(weights.version, min(weights.version + self._ahead + 1, self._questions.steps)):
                self._begun(number)
        return metrics

    def turn(self, beside_update: bool = False) -> None:
        """Hears of the fleet, once: what is complete is rewarded and banked."""
        touched: dict[int, _Draw] = {}
        for outcome in self._fleet.turn(beside_update):
            draw = self._prompts[outcome.prompt.key]
            draw.add(outcome)
            touched[draw.number] = draw
        for draw in touched.values():
            if not self._whole_draws or not draw.missing:
                self._score(draw)

    def _await(self, draw: _Draw, clock: Stopwatch) -> None:
        self._clock = clock
        while not draw.complete:
            self.turn()
        self._clock = None
        clock.lap("generate")

    def _begun(self, number: int) -> _Draw:
        """The draw of this number; asked now, as far as it is not in the bank, if it has not been."""
        if number in self._open:
            return self._open[number]
        draw = _Draw(number, tuple(self._questions.draw(number)), self._questions.samples)
        self._open[number] = draw
        self._prompts |= {prompt.key: draw for prompt in draw.prompts}
        stored = self._store.drawn(number)
        draw.settle([*stored.scored, *stored.failed])
        self._fleet.ask([Ask(prompt, samples, number) for prompt, samples in draw.unanswered()])
        return draw

    def _score(self, draw: _Draw) -> None:
        answered = draw.take_complete_groups()
        if not answered:
            return
        self._lap("generate")
        rollouts = [outcome for outcome in answered if isinstance(outcome, Rollout)]
        outcomes: list[Outcome] = [*self._scorer.score(rollouts), *(outcome for outcome in answered if isinstance(outcome, FailedRollout))]
        self._lap("reward")
        self._store.put(
            draw.number,
            [outcome for outcome in outcomes if isinstance(outcome, ScoredRollout)],
            [outcome for outcome in outcomes if isinstance(outcome, FailedRollout)],
        )
        self._lap("bank")
        draw.settle(outcomes)

    def _lap(self, phase: str) -> None:
        if self._clock is not None:
            self._clock.lap(phase)

    def _groups(self, scored: Sequence[ScoredRollout]) -> list[tuple[int, str]]:
        return [(self._prompts[key].number, key) for key in dict.fromkeys(answer.rollout.prompt.key for answer in scored)]

    def _forget(self, draw: _Draw) -> None:
        for prompt in draw.prompts:
            self._prompts.pop(prompt.key, None)


@dataclass
class _Draw:
    """A draw and what has become of each of its samples: asked, answered, settled (scored or failed, and banked)."""

    number: int
    prompts: tuple[Prompt, ...]
    samples: int
    _answered: dict[tuple[str, int], Rollout | FailedRollout] = field(default_factory=dict)
    _settled: dict[tuple[str, int], Outcome] = field(default_factory=dict)

    @property
    def missing(self) -> int:
        """Samples that have not been answered."""
        return len(self.prompts) * self.samples - len(self._answered) - len(self._settled)

    @property
    def complete(self) -> bool:
        return len(self._settled) == len(self.prompts) * self.samples

    @property
    def outcomes(self) -> list[Outcome]:
        """Settled ones, in the order of the prompts."""
        return [self._settled[place] for place in self._places() if place in self._settled]

    def add(self, outcome: Rollout | FailedRollout) -> None:
        self._answered[outcome.prompt.key, outcome.sample] = outcome

    def unanswered(self) -> list[tuple[Prompt, tuple[int, ...]]]:
        """By prompt, the samples that are still to be asked."""
        open_ = [(prompt, tuple(n for n in range(self.samples) if (prompt.key, n) not in self._settled)) for prompt in self.prompts]
        return [(prompt, samples) for prompt, samples in open_ if samples]

    def take_complete_groups(self) -> list[Rollout | FailedRollout]:
        """The answers of prompts of which no answer is missing, in the order of the prompts."""
        done = [
            prompt.key for prompt in self.prompts if all((prompt.key, n) in self._answered or (prompt.key, n) in self._settled for n in range(self.samples))
        ]
        return [self._answered.pop((key, n)) for key in done for n in range(self.samples) if (key, n) in self._answered]

    def settle(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            source = outcome.rollout if isinstance(outcome, ScoredRollout) else outcome
            self._settled[source.prompt.key, source.sample] = outcome

    def _places(self) -> list[tuple[str, int]]:
        return [(prompt.key, sample) for prompt in self.prompts for sample in range(self.samples)]
