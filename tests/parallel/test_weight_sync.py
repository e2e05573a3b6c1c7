"""Weights from a tensor-parallel learner to rollout replicas of other layouts: exact, checked, all or nothing."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.config.schema import ParallelConfig, RunConfig
from megatron_ext.errors import RankFailed, WeightSyncError
from megatron_ext.rl import weight_sync
from megatron_ext.rl.fleet import Deadlines, MegatronFleet, Weights
from megatron_ext.rl.local_fleet import local_host
from megatron_ext.rl.ranks import LOOPBACK, Call, Place, Rank, Switchboard
from megatron_ext.rl.weight_sync import Manifest, Parcel, pack, unpack
from tests.support.rl_run import prepare, rl_config
from tests.support.roles import OpenLearner, OpenRollout, flip_one_byte

DEADLINES = Deadlines(open_s=120, sync_s=10)


@dataclass
class Party:
    """A learner of two tensor-parallel ranks and two replicas of one rank, with the fleet that publishes."""

    board: Switchboard
    learners: list[Rank]
    rollouts: list[Rank]
    fleet: MegatronFleet
    port: int

    def publish(self, version: int = 0) -> dict[str, float]:
        return self.fleet.publish(Weights(version, tuple(self.learners), LOOPBACK, self.port))

    def learner_weights(self) -> dict[str, str]:
        return self.board.ask([Call(rank, "weights") for rank in self.learners], 60)[0]

    def rollout_weights(self) -> list[dict[str, str]]:
        return self.board.ask([Call(rank, "weights") for rank in self.rollouts], 60)

    def damage(self, *generations: int) -> None:
        self.board.ask([Call(rank, "damage", generations) for rank in self.learners], 60)


def start(host: object, config: RunConfig, checkpoint: object, learner: ParallelConfig, replicas: int) -> Party:
    board = Switchboard(host)
    learners = host.start(OpenLearner, [f"learner rank {rank}" for rank in range(learner.num_ranks)])
    rollouts = host.start(OpenRollout, [f"rollout replica {replica} rank 0" for replica in range(replicas)])

    def place(world: str, rank: int, size: int) -> Place:
        return Place(rank, size, f"file://{host.folder}/{world}", LOOPBACK)

    calls = [Call(rank, "open", (config, config.run_dir / "rl", checkpoint, place("learner", n, len(learners)))) for n, rank in enumerate(learners)]
    calls += [Call(rank, "open", (config, place(f"replica-{n}", 0, 1))) for n, rank in enumerate(rollouts)]
    opened = board.ask(calls, 120)
    (port,) = board.ask([Call(learners[0], "open_store", (LOOPBACK,))], 60)
    return Party(board, learners, rollouts, MegatronFleet(board, config, DEADLINES, rollouts, opened[len(learners) :]), port)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = rl_config(tmp_path_factory.mktemp("runs"), parallel=ParallelConfig(num_ranks=2, tp=2))
    return config, prepare(config)


@pytest.fixture
def party(run):
    config, checkpoint = run
    with local_host() as host:
        yield start(host, config, checkpoint, config.parallel, 2)


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
    party.publish()
    before = party.rollout_weights()
    party.damage(2, 3, 4)
    with pytest.raises(WeightSyncError, match=r"tensor [\w.]+ of version 0 arrived damaged"):
        party.publish()
    assert party.rollout_weights() == before


def test_weights_of_another_version_than_announced_are_refused(party):
    with pytest.raises(WeightSyncError, match="version 0 arrived where version 7 was announced"):
        party.publish(version=7)


def test_a_rollout_that_dies_is_named_at_once(party):
    os.kill(party.rollouts[1].process[0].pid, signal.SIGKILL)
    with pytest.raises(RankFailed, match="rollout replica 1 rank 0"):
        party.publish()


TENSORS = st.dictionaries(
    st.sampled_from(["a", "b.weight", "c.bias", "d"]),
    st.tuples(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8]), st.lists(st.integers(0, 3), max_size=3)),
    min_size=1,
)


@settings(max_examples=60, deadline=None)
@given(TENSORS, st.integers(1, 64))
def test_packing_and_unpacking_is_the_identity_whatever_the_types_shapes_and_bucket_size(kinds, bucket_bytes):
    tensors = {name: torch.randint(0, 100, shape).to(dtype) for name, (dtype, shape) in kinds.items()}
    parcel = pack(tensors.items(), version=3)
    again = Parcel(Manifest.from_json(parcel.manifest.to_json()), torch.cat(list(parcel.buckets)).split(bucket_bytes))
    arrived = unpack(again, 3)
    assert arrived.keys() == tensors.keys()
    assert all(arrived[name].dtype == tensors[name].dtype and torch.equal(arrived[name], tensors[name]) for name in tensors)


def test_the_tensor_that_was_damaged_is_named():
    parcel = pack([("first", torch.zeros(4)), ("second", torch.ones(40)), ("third", torch.zeros(4))], version=1)
    with pytest.raises(WeightSyncError, match="tensor second of version 1"):
        unpack(flip_one_byte(parcel), 1)


def test_a_large_model_travels_in_buckets(monkeypatch):
    monkeypatch.setattr(weight_sync, "BUCKET_BYTES", 100)
    parcel = pack([("weight", torch.arange(64, dtype=torch.float32))], version=0)
    assert [len(bucket) for bucket in parcel.buckets] == [100, 100, 56]
    assert torch.equal(unpack(parcel, 0)["weight"], torch.arange(64, dtype=torch.float32))
