"""A publication of weights, as the driver leads it: all stage and verify, then all load; repeated in a new group when one of them fails.

    learner ranks: send_weights --> rollout ranks: receive_weights -> [all have every byte] -> load_weights -> version
                   probe                                                                       -> probe: the same log-probs

Weights go from rank to rank. A replica that is lost on the way leaves the others nothing to wait for: they go on without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from megatron_ext.config.schema import RunConfig
from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.errors import LearnerLost, RankFailed, WeightSyncError
from megatron_ext.rl.deadlines import Deadlines
from megatron_ext.rl.hosts.switchboard import Call, Switchboard
from megatron_ext.rl.learners import Weights
from megatron_ext.rl.probe import Probe, Probed, check_probes, draw_probe
from megatron_ext.rl.refit.plan import Bucket, Part, of_rank, plan_refit
from megatron_ext.rl.refit.weight_sync import Meeting
from megatron_ext.rl.replicas import Replica
from megatron_ext.rl.roles import Metrics
from megatron_ext.rl.turns import Turns

SYNC_ATTEMPTS = 3
Lost = list[tuple[Replica, RankFailed]]


class Publisher:
    """Leads the publications of a run; numbers them."""

    def __init__(self, board: Switchboard, config: RunConfig, deadlines: Deadlines, turns: Turns) -> None:
        self._board, self._config, self._deadlines, self._turns = board, config, deadlines, turns
        self._generation = 0
        self._held: Sequence[tuple[Part, ...]] = ()
        self._wanted: Sequence[tuple[Part, ...]] = ()
        self._plans: dict[int, list[Bucket]] = {}

    def publish(self, weights: Weights, replicas: Sequence[Replica]) -> tuple[Metrics, Lost]:
        """Raises WeightSyncError when some rank could not be given the weights in several attempts (then no rank has loaded them), ProbeMismatch where one
        computes something else with them than the learner, and LearnerLost. Returns the replicas that were lost, with what happened to them; all others hold
        the weights."""
        self._turns.learner()
        lost = self._gone(replicas)
        attempts = 0
        while left := [replica for replica in replicas if replica not in [one for one, _ in lost]]:
            answers, failures = self._exchange(weights, left)
            lost += failures
            errors = [answer for answer in answers if isinstance(answer, WeightSyncError)]
            if not errors and not failures:
                sent = float(sum(answers[: len(weights.senders)]))
                metrics, failures = self._load(weights, left)
                return {"sync/bytes": sent, "sync/digest_ok": 1.0, "sync/attempts": float(attempts + 1), **metrics}, lost + failures
            attempts += not failures
            if attempts == SYNC_ATTEMPTS:
                raise errors[0]
        return {}, lost

    def _gone(self, replicas: Sequence[Replica]) -> Lost:
        """Those that are lost already: in the meeting, the others would wait for them until it is late."""
        verb = "here" if self._wanted else "weight_parts"
        answers = self._ask([Call(rank, verb) for replica in replicas for rank in replica.ranks], self._deadlines.sync_s)
        lost = _lost(replicas, answers)
        if not self._wanted and len(lost) < len(replicas):
            size = len(replicas[0].ranks)
            whole = next(n for n, replica in enumerate(replicas) if replica not in [one for one, _ in lost])
            self._wanted = answers[whole * size : (whole + 1) * size]
        return lost

    def _exchange(self, weights: Weights, replicas: Sequence[Replica]) -> tuple[list[Any], Lost]:
        """The answers of senders and receivers, and the replicas that were lost."""
        ranks = [rank for replica in replicas for rank in replica.ranks]
        num_senders = len(weights.senders)
        buckets = self._plan(weights, replicas)
        self._generation += 1
        meeting = Meeting(weights.host, weights.port, self._generation, num_senders + len(ranks), self._deadlines.sync_s)
        sends = [Call(rank, "send_weights", (meeting, of_rank(buckets, place))) for place, rank in enumerate(weights.senders)]
        receives = [
            Call(rank, "receive_weights", (meeting, place, weights.version, of_rank(buckets, place))) for place, rank in enumerate(ranks, start=num_senders)
        ]
        answers = self._ask([*sends, *receives], 2 * self._deadlines.sync_s)
        self._require_learner(answers[:num_senders])
        return answers, _lost(replicas, answers[num_senders:])

    def _load(self, weights: Weights, replicas: Sequence[Replica]) -> tuple[Metrics, Lost]:
        learner = self._learner_probed(weights) if self._config.rl.probe else None
        self._turns.nobody()
        ranks = [rank for replica in replicas for rank in replica.ranks]
        lost = _lost(replicas, self._ask([Call(rank, "load_weights", (weights.version,)) for rank in ranks], self._deadlines.sync_s))
        for replica in replicas:
            replica.version = weights.version
        if learner is None or lost:  # a probe beside a lost rank would wait for it; the others are probed again with the next weights
            return {}, lost
        return self._compared(learner, replicas)

    def _learner_probed(self, weights: Weights) -> Probed:
        """What the learner computes with the weights that it publishes."""
        answers = self._ask([Call(rank, "probe", (self._probe,)) for rank in weights.senders], self._deadlines.sync_s)
        self._require_learner(answers)
        return next(answer for answer in answers if answer is not None)

    def _compared(self, learner: Probed, replicas: Sequence[Replica]) -> tuple[Metrics, Lost]:
        """Raises ProbeMismatch where the weights do not compute what they compute at the learner."""
        exact = self._config.rollout.deterministic
        routes = None if exact else learner.experts_SLK
        ranks = [rank for replica in replicas for rank in replica.ranks]
        answers = self._ask([Call(rank, "probe", (self._probe, routes)) for rank in ranks], self._deadlines.sync_s)
        found = {rank.name: answer for rank, answer in zip(ranks, answers, strict=True) if isinstance(answer, Probed)}
        return {"sync/probe_diff": check_probes(learner, found, self._config.rl.max_logprob_diff, exact)}, _lost(replicas, answers)

    @cached_property
    def _probe(self) -> Probe:
        return draw_probe(self._config, load_tokenizer(self._config.tokenizer_dir))

    def _plan(self, weights: Weights, replicas: Sequence[Replica]) -> list[Bucket]:
        """Layouts do not change during a run, and all replicas are alike: who holds and wants what is asked once, and a plan made for every number of them."""
        if not self._held:
            held = self._ask([Call(rank, "weight_parts") for rank in weights.senders], self._deadlines.sync_s)
            self._require_learner(held)
            self._held = held
        if len(replicas) not in self._plans:
            self._plans[len(replicas)] = plan_refit(self._held, [*self._wanted] * len(replicas))
        return self._plans[len(replicas)]

    def _ask(self, calls: Sequence[Call], timeout_s: float) -> list[Any]:
        return self._board.ask(calls, timeout_s, settle=(WeightSyncError, RankFailed))

    @staticmethod
    def _require_learner(answers: Sequence[Any]) -> None:
        for answer in answers:
            if isinstance(answer, RankFailed):
                raise LearnerLost.of(answer)


def _lost(replicas: Sequence[Replica], answers: Sequence[Any]) -> Lost:
    """The replicas of which a rank failed, each with the first failure. `answers`: of their ranks, in order."""
    found, rest = list[tuple[Replica, RankFailed]](), list(answers)
    for replica in replicas:
        own, rest = rest[: len(replica.ranks)], rest[len(replica.ranks) :]
        failures = [answer for answer in own if isinstance(answer, RankFailed)]
        if failures:
            found.append((replica, failures[0]))
    return found
