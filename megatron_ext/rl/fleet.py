"""The loop's Fleet and Learner, made of ranks: who is asked what, which prompts go where, and how weights get from one to the other.

    MegatronFleet    replicas of rollout ranks      generate: prompts to lanes by cost, answers back in the order of the prompts
    MegatronLearner  ranks of one grid              update: a parcel to each data-parallel rank
    publish          learner's -> rollouts' ranks   all stage and verify, then all load; repeated in a new group when one of them fails

The driver moves prompts, rollouts and verdicts; weights go from rank to rank. A rank that dies ends the run with an error that names it; the latest
checkpoint is where to resume. Where ranks are and meet, on one machine or on several, is for their host to say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ext.batch import FailedRollout, Prompt, Rollout, ScoredRollout
from megatron_ext.batch.bins import split_by_cost
from megatron_ext.config.schema import RunConfig
from megatron_ext.errors import WeightSyncError
from megatron_ext.observe.metrics_file import MFU, STEP_S
from megatron_ext.observe.profiler import profiled_ranks
from megatron_ext.observe.stopwatch import TIMING, Stopwatch
from megatron_ext.parallel.plan import Layout
from megatron_ext.parallel.planner.model_flops import yardstick_of
from megatron_ext.rl.hosts.ranks import Call, Place, Rank, Switchboard
from megatron_ext.rl.learner import LearnerPlace, LearnerRank
from megatron_ext.rl.parcels import Parcel, plan_parcels, row_key
from megatron_ext.rl.refit.plan import Bucket, of_rank, plan_refit
from megatron_ext.rl.refit.weight_sync import Meeting
from megatron_ext.rl.roles import Metrics
from megatron_ext.rl.rollout_worker import Lane, RolloutRank
from megatron_ext.training.rank_work import rank_metrics

SYNC_ATTEMPTS = 3


@dataclass(frozen=True)
class Deadlines:
    """The longest that each verb may take."""

    open_s: float = 600.0
    generate_s: float = 3600.0
    update_s: float = 3600.0
    save_s: float = 1800.0
    sync_s: float = 120.0


DEADLINES = Deadlines()


def num_ranks(config: RunConfig) -> int:
    """Processes of the learner and of all replicas."""
    return config.parallel.num_ranks + config.rollout.replicas * config.rollout.parallel.num_ranks


def start(board: Switchboard, config: RunConfig, stage_dir: Path, init_from: Path, pad_id: int, deadlines: Deadlines) -> tuple[MegatronFleet, MegatronLearner]:
    """Starts every rank and waits until all are open: they start side by side."""
    learners = board.host.start(LearnerRank, [f"learner rank {rank}" for rank in range(config.parallel.num_ranks)])
    per_replica = config.rollout.parallel.num_ranks
    names = [f"rollout replica {replica} rank {rank}" for replica in range(config.rollout.replicas) for rank in range(per_replica)]
    workers = board.host.start(RolloutRank, names)

    def places(world: str, ranks: Sequence[Rank]) -> list[Place]:
        point = board.host.meeting_point(world, ranks[0])
        return [Place(number, len(ranks), point, board.host.address(rank)) for number, rank in enumerate(ranks)]

    calls = [Call(rank, "open", (config, stage_dir, init_from, place)) for rank, place in zip(learners, places("learner", learners), strict=True)]
    for replica in range(config.rollout.replicas):
        ranks = workers[replica * per_replica : (replica + 1) * per_replica]
        calls += [Call(rank, "open", (config, place)) for rank, place in zip(ranks, places(f"replica-{replica}", ranks), strict=True)]
    opened = board.ask(calls, deadlines.open_s)
    if config.observe.profile:
        left = config.rl.steps - opened[0].finished_steps
        profiled = [*(learners[rank] for rank in profiled_ranks(len(learners), config.parallel.pp)), workers[0]]
        board.ask([Call(rank, "profile", (stage_dir, rank.name, left)) for rank in profiled], deadlines.open_s)
    host = board.host.address(learners[0])
    port = board.ask([Call(learners[0], "open_store", (host,))], deadlines.open_s)[0]
    learner = MegatronLearner(board, config, deadlines, learners, opened[: len(learners)], pad_id, host, port)
    return MegatronFleet(board, config, deadlines, workers, opened[len(learners) :]), learner


@dataclass(frozen=True)
class Weights:
    """A version of the learner's weights, which stay where they are until they are published."""

    version: int
    senders: tuple[Rank, ...]
    host: str
    port: int


class MegatronLearner:
    """See `roles.Learner`."""

    def __init__(
        self,
        board: Switchboard,
        config: RunConfig,
        deadlines: Deadlines,
        ranks: Sequence[Rank],
        places: Sequence[LearnerPlace],
        pad_id: int,
        host: str,
        port: int,
    ) -> None:
        self._board, self._config, self._deadlines, self._ranks, self._places = board, config, deadlines, tuple(ranks), places
        self._pad_id, self._host, self._port = pad_id, host, port
        self.finished_steps = places[0].finished_steps
        self._yardstick = yardstick_of(config.model, config.rl.train_vision, places[0].device_name, config.parallel.threads_per_rank)
        self._save_s = 0.0

    def update(self, scored: Sequence[ScoredRollout], advantages_R: np.ndarray, step: int) -> Metrics:
        parcels = self._parcels(scored, advantages_R, self._config.rl.minibatches)
        calls = [Call(rank, "update", (parcels[place.dp_rank],)) for rank, place in zip(self._ranks, self._places, strict=True)]
        answers = self._board.ask(calls, self._deadlines.update_s)
        self.finished_steps = step + 1
        save_s, self._save_s = self._save_s, 0.0
        metrics = answers[0].metrics
        return {**metrics, **rank_metrics([answer.work for answer in answers]), **self._mfu(scored, metrics), TIMING + "save": save_s}

    def reference_kl(self, scored: Sequence[ScoredRollout]) -> np.ndarray:
        """float64 [R]: how far each answer is from the reference, the estimate of the KL summed over its tokens."""
        parcels = self._parcels(scored, np.zeros(len(scored)), 1)
        calls = [Call(rank, "reference_kl", (parcels[place.dp_rank][0],)) for rank, place in zip(self._ranks, self._places, strict=True)]
        found = {key: kl for answer in self._board.ask(calls, self._deadlines.update_s) for key, kl in answer.items()}
        return np.array([found[row_key(answer.rollout)] for answer in scored])

    def _parcels(self, scored: Sequence[ScoredRollout], advantages_R: np.ndarray, minibatches: int) -> list[list[Parcel]]:
        multiple = Layout.of(self._config.parallel).length_multiple
        dp_size = self._places[0].dp_size
        return plan_parcels(scored, advantages_R, minibatches=minibatches, dp_size=dp_size, multiple=multiple, pad_id=self._pad_id)

    def _mfu(self, scored: Sequence[ScoredRollout], metrics: Metrics) -> Metrics:
        """Of the learner's ranks while they learn: passes before the first update, and waiting for rollouts, are no part of the seconds."""
        if self._yardstick is None:
            return {}
        tokens = sum(len(answer.rollout.prompt.tokens_S) + len(answer.rollout.response_T) for answer in scored)
        tiles = sum(len(answer.rollout.prompt.tiles) + len(answer.rollout.further) for answer in scored)
        seconds = metrics[TIMING + "forward_backward"] + metrics[TIMING + "optimizer"]
        return {MFU: self._yardstick.mfu(len(scored), tokens / len(scored), tiles / len(scored), seconds * len(self._ranks))}

    def weights(self) -> Weights:
        return Weights(self.finished_steps, self._ranks, self._host, self._port)

    def save(self, step: int) -> None:
        """`timing_s/save` of the next update is how long this takes."""
        clock = Stopwatch()
        self._board.ask([Call(rank, "save", (step,)) for rank in self._ranks], self._deadlines.save_s)
        clock.lap("save")
        self._save_s += clock.seconds()[STEP_S]

    def finish_saving(self, at_most_s: float = math.inf) -> None:
        """Returns once the latest checkpoint is written."""
        self._board.ask([Call(rank, "finish_saving") for rank in self._ranks], min(at_most_s, self._deadlines.save_s))


class MegatronFleet:
    """See `roles.Fleet`."""

    def __init__(self, board: Switchboard, config: RunConfig, deadlines: Deadlines, ranks: Sequence[Rank], lanes: Sequence[Lane]) -> None:
        self._board, self._config, self._deadlines, self._ranks, self._lanes = board, config, deadlines, tuple(ranks), lanes
        self._generation = 0
        self._buckets: list[Bucket] | None = None

    def generate(self, prompts: Sequence[Prompt], samples: int, step: int, greedy: bool = False) -> list[Rollout | FailedRollout]:
        dp_size = self._lanes[0].dp_size
        costs = [len(prompt.tokens_S) + samples * self._config.rollout.max_new_tokens for prompt in prompts]
        shares = split_by_cost(costs, self._config.rollout.replicas * dp_size)
        calls, per_replica = [], self._config.rollout.parallel.num_ranks
        for number, (rank, lane) in enumerate(zip(self._ranks, self._lanes, strict=True)):
            share = shares[number // per_replica * dp_size + lane.dp_rank]
            calls.append(Call(rank, "generate", ([prompts[index] for index in share], samples, step, greedy)))
        answers = self._board.ask(calls, self._deadlines.generate_s)
        order = {prompt.key: index for index, prompt in enumerate(prompts)}
        return sorted((rollout for answer in answers for rollout in answer), key=lambda rollout: (order[rollout.prompt.key], rollout.sample))

    def publish(self, weights: Weights) -> Metrics:
        """Raises WeightSyncError when some rank could not be given the weights in several attempts; then no rank has loaded them."""
        if self._buckets is None:
            self._buckets = self._plan(weights)
        num_senders = len(weights.senders)
        for attempt in range(1, SYNC_ATTEMPTS + 1):
            self._generation += 1
            meeting = Meeting(weights.host, weights.port, self._generation, num_senders + len(self._ranks), self._deadlines.sync_s)
            sends = [Call(rank, "send_weights", (meeting, of_rank(self._buckets, place))) for place, rank in enumerate(weights.senders)]
            receives = [
                Call(rank, "receive_weights", (meeting, place, weights.version, of_rank(self._buckets, place)))
                for place, rank in enumerate(self._ranks, start=num_senders)
            ]
            answers = self._board.ask([*sends, *receives], 2 * self._deadlines.sync_s, settle=(WeightSyncError,))
            errors = [answer for answer in answers if isinstance(answer, WeightSyncError)]
            if not errors:
                break
            if attempt == SYNC_ATTEMPTS:
                raise errors[0]
        self._board.ask([Call(rank, "load_weights", (weights.version,)) for rank in self._ranks], self._deadlines.sync_s)
        return {"sync/bytes": float(sum(answers[:num_senders])), "sync/digest_ok": 1.0, "sync/attempts": float(attempt)}

    def _plan(self, weights: Weights) -> list[Bucket]:
        """Layouts do not change during a run: worked out at the first publication."""
        ranks = [*weights.senders, *self._ranks]
        parts = self._board.ask([Call(rank, "weight_parts") for rank in ranks], self._deadlines.sync_s)
        return plan_refit(parts[: len(weights.senders)], parts[len(weights.senders) :])
