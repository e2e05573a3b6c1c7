"""Weights from a learner of one layout to rollout replicas of another: exact, checked, all or nothing."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from functools import partial

import pytest

from megatron_ext.config.schema import ParallelConfig, RunConfig
from megatron_ext.errors import LearnerLost, ProbeMismatch, WeightSyncError
from megatron_ext.rl import publication
from megatron_ext.rl.deadlines import Deadlines
from megatron_ext.rl.hosts.local_host import local_host
from megatron_ext.rl.hosts.ranks import LOOPBACK, Place, Rank
from megatron_ext.rl.hosts.switchboard import Call, Switchboard
from megatron_ext.rl.learners import Weights
from megatron_ext.rl.publication import Publisher
from megatron_ext.rl.refit.plan import plan_refit
from megatron_ext.rl.replicas import Replica
from megatron_ext.rl.turns import Turns
from tests.support.rl_run import prepare, rl_config
from tests.support.roles import OpenLearner, OpenRollout

DEADLINES = Deadlines(open_s=120, sync_s=10)


@dataclass
class Party:
    """A learner's and the rollouts' ranks, with who leads publications."""

    board: Switchboard
    learners: list[Rank]
    rollouts: list[Rank]
    replicas: list[Replica]
    publisher: Publisher
    turns: Turns
    port: int

    def publish(self, version: int = 0) -> dict[str, float]:
        metrics, lost = self.lead(version)
        assert not lost
        return metrics

    def lead(self, version: int = 0):
        return self.publisher.publish(Weights(version, tuple(self.learners), LOOPBACK, self.port), self.replicas)

    def learner_weights(self) -> dict[str, str]:
        return self.board.ask([Call(rank, "weights") for rank in self.learners], 60)[0]

    def rollout_weights(self) -> list[dict[str, str]]:
        return self.board.ask([Call(rank, "weights") for rank in self.rollouts], 60)

    def damage(self, *generations: int) -> None:
        self.board.ask([Call(rank, "damage", generations) for rank in self.learners], 60)


def start(host: object, config: RunConfig, checkpoint: object) -> Party:
    board = Switchboard(host)
    replicas, size = config.rollout.replicas, config.rollout.parallel.num_ranks
    learners = host.start(OpenLearner, [f"learner rank {rank}" for rank in range(config.parallel.num_ranks)], "learner")
    worlds = [host.start(OpenRollout, [f"rollout replica {number} rank {rank}" for rank in range(size)], f"replica-{number}") for number in range(replicas)]
    rollouts = [rank for world in worlds for rank in world]

    def place(world: str, rank: int, size: int) -> Place:
        return Place(rank, size, f"file://{host.folder}/{world}", LOOPBACK)

    calls = [Call(rank, "open", (config, config.run_dir / "rl", checkpoint, place("learner", n, len(learners)))) for n, rank in enumerate(learners)]
    calls += [Call(rank, "open", (config, place(f"replica-{n // size}", n % size, size))) for n, rank in enumerate(rollouts)]
    opened = board.ask(calls, 120)
    (port,) = board.ask([Call(learners[0], "open_store", (LOOPBACK,))], 60)
    lanes = opened[len(learners) :]
    opened_replicas = [Replica(number, tuple(world), tuple(lanes[number * size : (number + 1) * size])) for number, world in enumerate(worlds)]
    turns = Turns(board, 60, config.rl.offload)
    turns.learners, turns.rollouts = (lambda: learners), (lambda: rollouts)
    return Party(board, learners, rollouts, opened_replicas, Publisher(board, config, DEADLINES, turns), turns, port)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = rl_config(tmp_path_factory.mktemp("runs"), parallel=ParallelConfig(num_ranks=2, tp=2))
    return config, prepare(config)


@pytest.fixture
def party(run):
    """A learner of two tensor-parallel ranks and two replicas of one rank."""
    config, checkpoint = run
    with local_host() as host:
        yield start(host, config, checkpoint)


def test_rollouts_of_another_layout_hold_the_learners_very_weights_after_a_publication(party):
    assert party.rollout_weights()[0] != party.learner_weights()
    metrics = party.publish()
    assert party.rollout_weights() == [party.learner_weights()] * 2
    assert metrics["sync/digest_ok"] == 1 and metrics["sync/attempts"] == 1
    assert metrics["sync/bytes"] > 10_000


def test_a_byte_damaged_on_the_way_is_noticed_and_the_weights_are_sent_again(party):
    party.damage(1)
    assert party.publish()["sync/attempts"] == 2
    assert party.rollout_weights() == [party.learner_weights()] * 2


def test_weights_that_never_arrive_whole_are_never_loaded(party):
    before = party.rollout_weights()
    party.damage(1, 2, 3)
    with pytest.raises(WeightSyncError, match=r"tensor [\w.]+ of version 0 arrived damaged"):
        party.publish()
    assert party.rollout_weights() == before


def test_weights_of_another_version_than_announced_are_refused(party):
    with pytest.raises(WeightSyncError, match="version 0 arrived where version 7 was announced"):
        party.publish(version=7)


DAMAGED = (
    "vision.embeddings.patch_embedding.weight",
    "projector.linear_1.weight",
    "embedding.word_embeddings.weight",
    "decoder.layers.0.self_attention.k_layernorm.weight",
    "decoder.layers.0.mlp.router.weight",
    "decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight",
    "output_layer.weight",
)


def test_weights_damaged_after_they_were_checked_are_noticed_by_the_probe_in_whatever_tensor_it_reads(party):
    def damage(name: str) -> None:
        party.board.ask([Call(party.rollouts[1], "damage", (name,))], 60)

    for name in DAMAGED:
        damage(name)
        with pytest.raises(ProbeMismatch, match=r"version 0, which arrived whole, rollout replica 1 rank 0 gives token \d+ of the probe"):
            party.publish()
    damage("decoder.taps.0.linear_q.weight")  # behind a gate that is closed: no log-prob depends on it
    assert party.publish()["sync/probe_diff"] < 1e-5


def test_a_rollout_that_died_is_named_and_its_neighbour_gets_the_weights(party):
    os.kill(party.rollouts[1].process[0].pid, signal.SIGKILL)
    metrics, [(replica, failure)] = party.lead()
    assert replica is party.replicas[1] and failure.rank == "rollout replica 1 rank 0"
    assert metrics["sync/digest_ok"] == 1
    assert party.board.ask([Call(party.rollouts[0], "weights")], 60) == [party.learner_weights()]


def test_a_rollout_that_dies_in_the_middle_is_named_and_its_neighbour_gets_the_weights_without_it(party, monkeypatch):
    monkeypatch.setattr(publication, "plan_refit", partial(plan_refit, bucket_bytes=2000))
    neighbour, dying = party.rollouts
    party.board.ask([Call(dying, "die_in_the_middle")], 60)
    _, [(replica, failure)] = party.lead()
    assert replica is party.replicas[1] and failure.kind == "died"
    assert party.replicas[0].version == 0
    assert party.board.ask([Call(neighbour, "weights")], 60) == [party.learner_weights()]


def test_a_learner_rank_that_died_is_the_learners_loss(party):
    os.kill(party.learners[1].process[0].pid, signal.SIGKILL)
    with pytest.raises(LearnerLost, match="learner rank 1"):
        party.publish()


ONE, TP2, EP2, PP2, DP2 = (ParallelConfig(num_ranks=1), *(ParallelConfig(num_ranks=2, **{kind: 2}) for kind in ("tp", "ep", "pp")), ParallelConfig(num_ranks=2))
LAYOUTS = {
    "TP2 to 1": (TP2, ONE),
    "EP2 to 1": (EP2, ONE),
    "PP2 to 1": (PP2, ONE),
    "1 to TP2": (ONE, TP2),
    "1 to EP2": (ONE, EP2),
    "EP2 to TP2": (EP2, TP2),
    "TP2 to EP2": (TP2, EP2),
    "PP2 to TP2": (PP2, TP2),
    "DP2 to TP2 EP2": (DP2, ParallelConfig(num_ranks=2, tp=2, ep=2)),
    "TP2 EP2 DP2 to TP2": (ParallelConfig(num_ranks=4, tp=2, ep=2), TP2),
    "TP2 PP2 to EP2": (ParallelConfig(num_ranks=4, tp=2, pp=2), EP2),
}


SHORT = ("TP2 to 1", "EP2 to TP2", "PP2 to TP2", "TP2 EP2 DP2 to TP2")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in SHORT else [pytest.mark.journey]) for name in LAYOUTS])
def test_rollouts_hold_the_learners_very_weights_whatever_the_two_layouts(run, name, tmp_path):
    learner, rollout = LAYOUTS[name]
    config, checkpoint = run
    update = {"parallel": learner, "rollout": config.rollout.model_copy(update={"parallel": rollout, "replicas": 1})}
    with local_host() as host:
        party = start(host, config.model_copy(update=update), checkpoint)
        metrics = party.publish()
        assert party.rollout_weights() == [party.learner_weights()] * rollout.num_ranks
    assert metrics["sync/attempts"] == 1 and metrics["sync/probe_diff"] < 1e-5


def test_in_each_turn_the_others_hold_no_memory_that_can_be_made_again_and_get_back_what_they_had(run, tmp_path):
    config, checkpoint = run
    rl = config.rl.model_copy(update={"offload": True})
    with local_host() as host:
        party = start(host, config.model_copy(update={"rl": rl, "parallel": ONE, "rollout": config.rollout.model_copy(update={"replicas": 1})}), checkpoint)
        turns = party.turns

        def held() -> list[int]:
            return party.board.ask([Call(rank, "held_bytes") for rank in (*party.learners, *party.rollouts)], 60)

        assert held() == [-1, 0]  # the learner begins
        assert party.publish()["sync/probe_diff"] < 1e-5
        gradients, weights = held()
        assert gradients == 0 and weights > 90_000
        turns.learner()
        gradients, none = held()
        assert gradients > 90_000 and none == 0
        learner_weights = party.learner_weights()
        with pytest.raises(WeightSyncError, match="while the weights have left the device"):
            party.board.ask([Call(party.rollouts[0], "advance", ([], 1))], 60)
        turns.rollout(party.rollouts)
        assert held() == [0, weights] and party.rollout_weights() == [learner_weights]
