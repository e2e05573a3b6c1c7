"""Slices go from who holds them to who wants them: every layout to every other, nothing twice, checked, and live weights as they were until the load."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.config.schema import RolloutConfig
from megatron_ext.errors import WeightSyncError
from megatron_ext.inference.engine import Engine
from megatron_ext.model.assembly import build_model
from megatron_ext.model.weight_storage import store_for_generation
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.parallel.local import run_ranks
from megatron_ext.rl.refit.plan import DIGEST_BYTES, Part, of_rank, plan_refit
from megatron_ext.rl.refit.staging import Staging, Workers, own_parts, own_tensors, pack
from tests.support.models import IMAGE, Words, open_gates, small_config, small_prompts
from tests.support.refit import Slices, Split, deliver, extra_memory, plan, publish, slices
from tests.support.roles import flip_one_byte

SPLITS = st.sampled_from([Split(), Split(0), Split(0, halves=2), Split(1)])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8])
TENSORS = st.dictionaries(st.sampled_from(["a", "b.weight", "c.bias", "d"]), st.tuples(DTYPES, SPLITS, st.integers(1, 3), st.integers(1, 3)), min_size=1)


def draw(kinds: dict[str, tuple[torch.dtype, Split, int, int]]) -> tuple[dict[str, torch.Tensor], dict[str, Split]]:
    """Matrices whose sides divide by 12, so that all layouts of up to three ranks can have them."""
    full = {name: torch.randint(0, 100, (12 * rows, 12 * columns)).to(dtype) for name, (dtype, _, rows, columns) in kinds.items()}
    return full, {name: split for name, (_, split, _, _) in kinds.items()}


def emptied(ranks: list[Slices]) -> list[Slices]:
    return [Slices(rank.parts, {name: torch.zeros_like(tensor) for name, tensor in rank.tensors.items()}) for rank in ranks]


def same(left: Slices, right: Slices) -> bool:
    return all(left.tensors[name].dtype == tensor.dtype and torch.equal(left.tensors[name], tensor) for name, tensor in right.tensors.items())


@given(TENSORS, st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3000))
def test_every_rank_of_every_layout_gets_its_own_part_and_nothing_else(kinds, tp, dp, rollout_tp, replicas, bucket_bytes):
    full, splits = draw(kinds)
    learners, expected = slices(full, splits, tp) * dp, slices(full, splits, rollout_tp) * replicas
    buckets = plan(learners, expected, bucket_bytes)
    rollouts = emptied(expected)
    for staging, rank in zip(deliver(buckets, learners, rollouts), rollouts, strict=True):
        staging.load(rank.tensors)
    assert all(same(got, wanted) for got, wanted in zip(rollouts, expected, strict=True))
    for number, rank in enumerate(expected, start=len(learners)):
        arrived = sum(piece.num_bytes for bucket in of_rank(buckets, number) for piece in bucket.pieces)
        assert arrived == sum(tensor.nbytes for tensor in rank.tensors.values())


def test_a_gated_matrix_goes_from_two_ranks_to_one_half_by_half():
    """Eight rows, [gate; up]: rank 0 of two holds rows 0, 1 and 4, 5; rank 1 the others."""
    full, splits = {"linear_fc1.weight": torch.arange(8.0).view(8, 1)}, {"linear_fc1.weight": Split(0, halves=2)}
    learners, (rollout,) = slices(full, splits, 2), slices(full, splits, 1)
    assert learners[0].tensors["linear_fc1.weight"].flatten().tolist() == [0, 1, 4, 5]
    pieces = [(bucket.sender, piece.start, piece.length, piece.source, piece.target) for bucket in plan(learners, [rollout], 999) for piece in bucket.pieces]
    assert sorted(pieces, key=lambda piece: piece[1]) == [(0, 0, 2, 0, 0), (1, 2, 2, 0, 2), (0, 4, 2, 2, 4), (1, 6, 2, 2, 6)]


def test_ranks_that_hold_the_same_share_the_work_and_like_replicas_share_buckets():
    full = {f"layer{number}": torch.zeros(4, 4) for number in range(10)}
    splits = dict.fromkeys(full, Split())
    buckets = plan(slices(full, splits, 1) * 2, slices(full, splits, 1) * 3, 64)
    assert all(bucket.receivers == (2, 3, 4) for bucket in buckets)
    assert [sum(bucket.sender == rank for bucket in buckets) for rank in (0, 1)] == [5, 5]


def test_of_a_tensor_on_two_stages_the_first_stages_is_sent():
    held = [[Part("a", (4, 4), "float32", 4, None, (), stage)] for stage in (1, 0)]
    assert {bucket.sender for bucket in plan_refit(held, [held[0]])} == {1}


@pytest.mark.parametrize(
    ("learner", "rollout", "message"),
    [
        ({"a": (4, 4)}, {"a": (4, 4), "b": (4, 4)}, "tensor b of the rollouts' model is not a weight of the learner"),
        ({"a": (4, 4), "b": (4, 4)}, {"a": (4, 4)}, "tensor b of the learner is not a weight of the rollouts' model"),
        ({"a": (4, 4)}, {"a": (4, 6)}, r"tensor a has shape \(4, 4\) at the learner, the rollouts' model wants \(4, 6\)"),
    ],
)
def test_two_sides_of_different_models_are_refused_by_name(learner, rollout, message):
    ranks = [slices({name: torch.zeros(shape) for name, shape in side.items()}, dict.fromkeys(side, Split()), 1) for side in (learner, rollout)]
    with pytest.raises(WeightSyncError, match=message):
        plan(*ranks, 100)


def test_rows_that_no_rank_of_the_learner_holds_are_missed():
    held = [[Part("a", (4, 4), "float32", 4, 0, ((0, 2),))]]
    with pytest.raises(WeightSyncError, match="rows 2 to 4 of tensor a are on no rank of the learner"):
        plan_refit(held, [[Part("a", (4, 4), "float32", 4, None, ())]])


def three_tensors() -> tuple[Slices, Slices, list]:
    full = {"first": torch.zeros(4, 1), "second": torch.ones(40, 1), "third": torch.zeros(4, 1)}
    (learner,), (rollout,) = slices(full, dict.fromkeys(full, Split()), 1), emptied(slices(full, dict.fromkeys(full, Split()), 1))
    return learner, rollout, plan([learner], [rollout], 10_000)


def awaiting(rank: Slices, version: int) -> Staging:
    staging = Staging(rank.tensors)
    staging.begin(version)
    return staging


def test_the_tensor_that_was_damaged_is_named_and_nothing_can_be_loaded():
    learner, rollout, (bucket,) = three_tensors()
    message, staging = torch.empty(bucket.num_bytes, dtype=torch.uint8), awaiting(rollout, 1)
    with Workers() as workers:
        pack(bucket, learner.tensors, 1, message, workers)
        flip_one_byte(bucket, message)
        staging.stage(bucket, message, workers)
    for attempt in (staging.check, lambda: staging.load(rollout.tensors)):
        with pytest.raises(WeightSyncError, match="tensor second of version 1 arrived damaged"):
            attempt()
    assert not rollout.tensors["second"].any()


def test_every_single_byte_of_a_message_that_says_something_is_guarded():
    learner, rollout, (bucket,) = three_tensors()
    message = torch.zeros(bucket.num_bytes, dtype=torch.uint8)
    with Workers() as workers:
        pack(bucket, learner.tensors, 1, message, workers)
        says = [
            *range(8 + DIGEST_BYTES * 3),
            *(at for start, piece in zip(bucket.offsets, bucket.pieces, strict=False) for at in range(start, start + piece.num_bytes)),
        ]
        for at in says:
            damaged, staging = message.clone(), awaiting(rollout, 1)
            damaged[at] ^= 1
            staging.stage(bucket, damaged, workers)
            with pytest.raises(WeightSyncError):
                staging.check()


def test_weights_of_another_version_are_refused():
    learner, rollout, (bucket,) = three_tensors()
    staging = awaiting(rollout, 2)
    message = torch.empty(bucket.num_bytes, dtype=torch.uint8)
    with Workers() as workers:
        pack(bucket, learner.tensors, 1, message, workers)
        staging.stage(bucket, message, workers)
    with pytest.raises(WeightSyncError, match="weights of version 1 arrived where version 2 was announced"):
        staging.check()


def test_many_buckets_between_many_ranks_arrive_without_anyone_waiting_for_one_that_waits(tmp_path: Path):
    """Three learner ranks and four rollout ranks, as threads, with forty buckets to each rollout."""
    full = {f"layer{number}.{kind}": torch.randn(12, 24) for number in range(20) for kind in ("up", "down", "norm")}
    splits = {name: {"up": Split(0, halves=2), "down": Split(1), "norm": Split()}[name.rpartition(".")[2]] for name in full}
    learners, expected = slices(full, splits, 3), slices(full, splits, 2) * 2
    rollouts = emptied(expected)
    buckets = plan(learners, rollouts, 300)
    ranks = [*learners, *rollouts]
    threads = [threading.Thread(target=publish, args=(rank, 7, tmp_path / "store", buckets, own, 3), daemon=True) for rank, own in enumerate(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert all(same(got, wanted) for got, wanted in zip(rollouts, expected, strict=True))


def test_a_publication_takes_no_more_memory_than_its_buckets_and_a_ranks_own_part(tmp_path: Path):
    """64 MiB at the learner, 32 MiB at each of two rollouts, buckets of 2 MiB of which two are under way: beside them the learner needs nothing,
    a rollout its 32 MiB."""
    mib = 2**20
    sender, *receivers = run_ranks(extra_memory, 3, tmp_path / "store", 64, 2 * mib, timeout_s=100)
    assert sender[1] and sender[0] < 16 * mib
    assert all(right and 32 * mib <= extra < 32 * mib + 16 * mib for extra, right in receivers)


def test_a_rollout_generates_on_undisturbed_while_new_weights_are_staged_and_then_says_what_the_learner_would(context: ParallelContext):
    def model(seed: int) -> torch.nn.Module:
        made = build_model(small_config(init_std=0.3), IMAGE, context, seed=seed)
        open_gates(made)
        return made

    def answers(of: torch.nn.Module) -> list[list[int]]:
        engine = Engine(of, context, Words(), RolloutConfig(max_new_tokens=12, batch_size=32))
        return [rollout.response_T.tolist() for rollout in engine.generate(small_prompts(6), 4, seeds=lambda *at: hash(at), version=0)]

    learner, rollout = model(1), model(2)
    store_for_generation(rollout)
    before, after = answers(rollout), answers(learner)
    parts, tensors = own_parts(learner, context), own_tensors(learner, context)
    buckets = plan_refit([parts], [own_parts(rollout, context)], 4096)
    staging = Staging(own_tensors(rollout, context))
    staging.begin(1)
    staged, done = 0, threading.Event()

    def stage() -> None:
        nonlocal staged
        with Workers() as workers:
            while not done.is_set():
                for bucket in buckets:
                    message = torch.empty(bucket.num_bytes, dtype=torch.uint8)
                    pack(bucket, tensors, 1, message, workers)
                    staging.stage(bucket, message, workers)
                staged += 1

    thread = threading.Thread(target=stage)
    thread.start()
    meanwhile = answers(rollout)
    done.set()
    thread.join()
    staging.load(own_tensors(rollout, context))
    assert staged >= 1 and meanwhile == before != after
    assert answers(rollout) == after
