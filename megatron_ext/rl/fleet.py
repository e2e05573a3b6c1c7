"""The loop's Fleet, made of replicas: who is asked what, and what happens when one is lost.

    ask -> waiting -> handed out to the lanes of ready replicas, by cost -> (a slice of tokens -> what is finished)* -> turn

A replica of which a rank dies, hangs or raises is ended and started anew; what it owed is asked of the others, so often as `rollout.retries` allows. It is
stale until it holds the current weights, and is asked nothing so long. One that is lost `rollout.restarts` times without an answer is given up; the run goes
on with the rest, and ends when there is none. A question that was there at two losses may be why: it is asked by itself, so that it takes no other along.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_ext.batch import FailedRollout, Prompt, Rollout
from megatron_ext.batch.bins import split_by_cost
from megatron_ext.config.schema import RunConfig
from megatron_ext.errors import RankFailed
from megatron_ext.observe.stopwatch import TIMING
from megatron_ext.rl.deadlines import Deadlines
from megatron_ext.rl.hosts.switchboard import POLL_S, Call, Switchboard
from megatron_ext.rl.learners import Weights
from megatron_ext.rl.publication import Publisher
from megatron_ext.rl.replicas import Replica
from megatron_ext.rl.roles import Ask, Metrics
from megatron_ext.rl.turns import Turns

SUSPECT = 2
"""Losses after which a question is asked by itself."""
GLANCE_S = 0.02
"""The longest wait for replicas while the learner is waited for, too."""
Outcome = Rollout | FailedRollout


class MegatronFleet:
    """See `roles.Fleet`. Made with its replicas on the way; `wait_open` returns when they are there."""

    def __init__(self, board: Switchboard, config: RunConfig, deadlines: Deadlines, turns: Turns) -> None:
        self._board, self._config, self._deadlines, self._turns = board, config, deadlines, turns
        self._publisher = Publisher(board, config, deadlines, turns)
        turns.rollouts = lambda: [rank for replica in self.replicas if replica.open for rank in replica.ranks]
        self.drawn_layers: Mapping[str, tuple[int, ...]] = {}
        """By skill, of answers that are not greedy; see `roles.Ask`."""
        self._waiting, self._inbox = deque[Ask](), list[Outcome]()
        self._losses = Counter[tuple[int, str]]()
        self._events = Counter[str]()
        self._weights: Weights | None = None
        self._newest, self._counted_s = -1, 0.0
        self.replicas = [Replica(number) for number in range(config.rollout.replicas)]
        for replica in self.replicas:
            replica.start(board, config, deadlines.open_s)

    def wait_open(self) -> None:
        """Raises RankFailed when a replica cannot be opened: at the start that is no accident."""
        while opening := [replica for replica in self.replicas if not replica.open]:
            for replica in self._settled(opening):
                assert replica.pending is not None
                replica.pending.collect()
                self._heard(replica)

    def profile(self, stage_dir: Path, left: int) -> None:
        """One rank, from now on; `left` steps will follow."""
        rank = self.replicas[0].ranks[0]
        self._board.ask([Call(rank, "profile", (stage_dir, rank.name, left))], self._deadlines.open_s)

    def ask(self, asks: Sequence[Ask]) -> None:
        for ask in asks:
            layers = () if ask.greedy else self.drawn_layers.get(ask.prompt.skill, ())
            self._waiting.append(replace(ask, drawn_layers=layers) if layers else ask)

    def turn(self, beside_update: bool = False) -> list[Outcome]:
        """Raises RankFailed when no replica is left. Beside an update, the learner is not free to give its weights to replicas that have come back."""
        if not beside_update:
            self._refresh()
            self._turns.rollout([rank for replica in self._ready() for rank in replica.ranks])
        self._hand_out()
        for replica in self._ready():
            if replica.pending is None and replica.num_asked:
                replica.advance(self._board, self._deadlines.slice_s)
        for replica in self._settled(self.replicas, GLANCE_S if beside_update else POLL_S):
            self._heard(replica)
        found, self._inbox = self._inbox, []
        return found

    def generate(self, prompts: Sequence[Prompt], samples: int, step: int, greedy: bool = False) -> list[Outcome]:
        """All answers to prompts that nobody else asks, in their order; what is finished meanwhile of others, the next turn returns."""
        order = {prompt.key: index for index, prompt in enumerate(prompts)}
        self.ask([Ask(prompt, tuple(range(samples)), step, greedy) for prompt in prompts])
        found, others = list[Outcome](), list[Outcome]()
        while len(found) < len(prompts) * samples:
            for outcome in self.turn():
                (found if outcome.prompt.key in order else others).append(outcome)
        self._inbox += others
        self._counted_s = self._busy_s()  # what is asked besides is no part of a step
        return sorted(found, key=lambda outcome: (order[outcome.prompt.key], outcome.sample))

    def publish(self, weights: Weights) -> Metrics:
        """Between two slices where answers may go on under new weights, else when those that were begun are finished. Weights older than those that the fleet
        has had (of a learner that went back to its checkpoint) are not loaded: the same will come again."""
        if weights.version < self._newest:
            self._weights = None
            return {}
        self._stand_still(finish=not self._config.rl.partial_rollouts)
        self._weights, self._newest = weights, weights.version
        metrics = self._publish_to([replica for replica in self.replicas if replica.open])
        before, self._counted_s = self._counted_s, self._busy_s()
        return metrics | self._counts() | {TIMING + "rollouts_busy": max(0.0, self._counted_s - before)}

    def _busy_s(self) -> float:
        """Seconds that replicas have spent on answers so far, in the mean."""
        return sum(replica.busy_s for replica in self.replicas) / len(self.replicas)

    def _publish_to(self, replicas: Sequence[Replica]) -> Metrics:
        assert self._weights is not None
        metrics, lost = self._publisher.publish(self._weights, replicas)
        for replica, failure in lost:
            self._lose(replica, failure)
        return metrics

    def _refresh(self) -> None:
        stale = [replica for replica in self.replicas if replica.open and replica.version != self._newest]
        if stale and self._weights is not None:
            if self._config.rl.offload:  # the learner needs the device for it
                self._stand_still(finish=False)
            self._publish_to(stale)

    def _stand_still(self, finish: bool) -> None:
        """Returns when every replica stands still: after its slice, or with nothing left to finish."""
        while busy := [replica for replica in self._ready() if replica.pending is not None or (finish and replica.num_asked)]:
            for replica in busy:
                if replica.pending is None:
                    replica.advance(self._board, self._deadlines.slice_s)
            for replica in self._settled(busy):
                self._heard(replica)

    def _ready(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.open and replica.version == self._newest]

    def _settled(self, replicas: Sequence[Replica], at_most_s: float = POLL_S) -> list[Replica]:
        """Those whose verb is done; waits for the first of them."""
        pending = [replica.pending for replica in replicas if replica.pending is not None]
        if not pending:
            time.sleep(min(at_most_s, GLANCE_S))
            return []
        done = self._board.wait(pending, at_most_s)
        return [replica for replica in replicas if replica.pending in done]

    def _heard(self, replica: Replica) -> None:
        pending, replica.pending = replica.pending, None
        assert pending is not None
        try:
            answers = pending.collect()
        except RankFailed as failure:
            self._lose(replica, failure)
            return
        if replica.open:
            self._inbox += replica.heard(answers)
        else:
            replica.lanes = tuple(answers)
            self._board.census(replica.ranks)

    def _hand_out(self) -> None:
        """Synchronous runs give everything at once, shared out by cost, so that a step is answered in the same company whenever it is repeated; others as
        places become free."""
        ready = [replica for replica in self._ready() if not self._alone(replica)]
        normal = [ask for ask in self._waiting if self._losses[_name(ask)] < SUSPECT]
        suspects = [ask for ask in self._waiting if self._losses[_name(ask)] >= SUSPECT]
        for replica in [replica for replica in ready if not replica.num_asked and not normal][: len(suspects)]:
            replica.give(0, [suspects.pop(0)])
            ready.remove(replica)
        lanes = [(replica, lane) for replica in ready for lane in range(replica.lanes[0].dp_size)]
        if not lanes:
            self._waiting = deque([*normal, *suspects])
            return
        if self._config.rl.max_staleness == 0:
            for (replica, lane), share in zip(lanes, split_by_cost([self._cost(ask) for ask in normal], len(lanes)), strict=True):
                replica.give(lane, [normal[index] for index in share])
            normal = []
        else:
            normal = self._fill(lanes, normal)
        self._waiting = deque([*normal, *suspects])

    def _fill(self, lanes: Sequence[tuple[Replica, int]], asks: list[Ask]) -> list[Ask]:
        """The emptiest lane first, up to the answers that are written side by side. Returns what found no place."""
        taken = {lane: sum(len(ask.samples) for ask in lane[0].asked.get(lane[1], {}).values()) for lane in lanes}
        for position, ask in enumerate(asks):
            lane = min(lanes, key=lambda lane: taken[lane])
            if taken[lane] and taken[lane] + len(ask.samples) > self._config.rollout.batch_size:
                return asks[position:]
            lane[0].give(lane[1], [ask])
            taken[lane] += len(ask.samples)
        return []

    def _cost(self, ask: Ask) -> int:
        return len(ask.prompt.tokens_S) + len(ask.samples) * self._config.rollout.max_new_tokens

    def _alone(self, replica: Replica) -> bool:
        return any(self._losses[_name(ask)] >= SUSPECT for asks in replica.asked.values() for ask in asks.values())

    def _lose(self, replica: Replica, failure: RankFailed) -> None:
        """Ends what is left of it, has others do what it owed, and starts it anew if there is hope."""
        for rank in replica.ranks:
            self._board.host.end(rank)
        self._events["lost"] += 1
        for ask in replica.take_back():
            self._losses[_name(ask)] += 1
            if self._losses[_name(ask)] > self._config.rollout.retries:
                self._inbox += [FailedRollout(ask.prompt, sample, "replica_lost", str(failure)) for sample in ask.samples]
                replica.excuse(self._config.rollout.restarts)
            else:
                self._waiting.appendleft(ask)
        if replica.lives > self._config.rollout.restarts:
            self.replicas.remove(replica)
            self._events["given_up"] += 1
            if not self.replicas:
                raise failure
            print(f"rollout replica {replica.number} is given up; {len(self.replicas)} go on: {failure}", flush=True)
        else:
            print(f"rollout replica {replica.number} is started anew: {failure}", flush=True)
            replica.start(self._board, self._config, self._deadlines.open_s)

    def _counts(self) -> Metrics:
        stale = sum(replica.version != self._newest for replica in self.replicas)
        return {"fleet/replicas": float(len(self.replicas)), "fleet/stale": float(stale), **{f"fleet/{name}": float(n) for name, n in self._events.items()}}


def _name(ask: Ask) -> tuple[int, str]:
    return ask.step, ask.prompt.key
