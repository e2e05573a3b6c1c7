"""A fleet whose answers are conversations: what it has answered goes to an environment, and what that shows goes back as the next question.

ask -> fleet -> a turn is finished -> environment -> over: one rollout of all turns
         ^                               |
         +----- all so far, and this ----+ an observation
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.batch import FailedRollout, Prompt, Rollout
from megatron_ext.rl.conversations import Act, Conversation, Rules
from megatron_ext.rl.environments import Observation
from megatron_ext.rl.roles import Ask, Fleet, Metrics, Versioned
from megatron_ext.rl.scoring.pool import Failure

Outcome = Rollout | FailedRollout


@dataclass(frozen=True)
class _Continued:
    """A conversation that waits for its next turn."""

    talk: Conversation
    seen: Observation


class ConversingFleet:
    """See `roles.Fleet`. Conversations go on beside each other, each as soon as its turn is finished."""

    def __init__(self, fleet: Fleet, act: Act, rules: Rules) -> None:
        self._fleet, self._act, self._rules = fleet, act, rules
        self._steps: dict[str, int] = {}
        self._waiting: dict[str, _Continued] = {}

    def ask(self, asks: Sequence[Ask]) -> None:
        self._steps |= {ask.prompt.key: ask.step for ask in asks}
        self._fleet.ask(asks)

    def publish(self, weights: Versioned) -> Metrics:
        return self._fleet.publish(weights)

    def turn(self, beside_update: bool = False) -> list[Outcome]:
        ended, going = list[Outcome](), list[Conversation]()
        for outcome in self._fleet.turn(beside_update):
            before = self._waiting.pop(outcome.prompt.key, None)
            if isinstance(outcome, FailedRollout):
                ended.append(outcome if before is None else FailedRollout(before.talk.prompt, before.talk.sample, outcome.reason, outcome.detail))
                continue
            talk = Conversation.of(outcome) if before is None else before.talk.after(before.seen, outcome)
            if talk.open(self._rules):
                going.append(talk)
            else:
                ended.append(talk.rollout())
        return ended + self._go_on(going)

    def _go_on(self, going: Sequence[Conversation]) -> list[Outcome]:
        """Asks the next turns of those that go on. Returns those that have ended."""
        ended, asks = list[Outcome](), list[Ask]()
        for talk, seen in zip(going, self._act([(talk.prompt, talk.turns) for talk in going]) if going else (), strict=True):
            prompt = self._next(talk, seen)
            if isinstance(prompt, Prompt):
                assert isinstance(seen, Observation)
                self._waiting[prompt.key] = _Continued(talk, seen)
                asks.append(Ask(prompt, (0,), self._steps[talk.prompt.key]))
            else:
                ended.append(prompt)
        if asks:
            self._fleet.ask(asks)
        return ended

    def _next(self, talk: Conversation, seen: Observation | Failure | None) -> Prompt | Outcome:
        """The next question; or what the conversation is, now that it is over."""
        if isinstance(seen, Failure):
            return FailedRollout(talk.prompt, talk.sample, *seen)
        if seen is None:
            return talk.rollout()
        return talk.next_prompt(seen, self._rules) or talk.rollout(cut=True)
