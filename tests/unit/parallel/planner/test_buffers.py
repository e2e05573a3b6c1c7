"""Buffers and shards by arithmetic against megatron-core's own, whose classes need no ranks for it but to be told how many there are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_ext.config.schema import ParallelConfig
from megatron_ext.parallel.groups import open_parallel
from megatron_ext.parallel.planner.buffers import Held, buffer
from megatron_ext.parallel.planner.tensors import Run

RUNS = st.lists(
    st.builds(Run, st.just("norms"), st.lists(st.integers(1, 300), min_size=1, max_size=3).map(tuple), st.integers(1, 5), own_bucket=st.just(False)),
    min_size=1,
    max_size=5,
)


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Megatron wants one to log into."""
    with open_parallel(ParallelConfig(), 0, 1, f"file://{tmp_path_factory.mktemp('world')}/store", seed=0):
        yield


@dataclass(frozen=True)
class Group:
    """A data-parallel group as the buffer asks for it."""

    number: int
    count: int

    def size(self) -> int:
        return self.count

    def rank(self) -> int:
        return self.number


def megatron_s(runs: list[Run], rank: int, ranks: int, bucket_numel: int | None) -> _ParamAndGradBuffer:
    params = []
    for run in runs:
        for _ in range(run.count):
            for numel in run.numels:
                param = torch.nn.Parameter(torch.zeros(numel))
                if run.own_bucket:
                    param.shared_embedding = True  # type: ignore[attr-defined]
                params.append(param)
    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    names: dict[Any, str] = {param: str(number) for number, param in enumerate(params)}
    groups: Any = SimpleNamespace(tp=Group(1, 2), dp_cp=Group(1, 2))  # not the first of either: it does not log
    return _ParamAndGradBuffer(
        config, torch.float32, torch.float32, params, Group(rank, ranks), bucket_numel, names, 1.0, list(range(len(params))), False, groups
    )


def held_of_megatron_s(theirs: _ParamAndGradBuffer) -> Held:
    ranges = [DistributedOptimizer._build_model_gbuf_range(theirs, number)["param_map"] for number in range(len(theirs.buckets))]
    parts = [part["param"] for bucket in ranges for part in bucket.values()]
    return Held(sum(part.size for part in parts), len(parts))


@settings(max_examples=150, deadline=None)
@given(RUNS, st.integers(1, 5), st.none() | st.integers(1, 1500), st.booleans())
def test_buckets_and_shards_are_megatron_s(runs: list[Run], ranks: int, bucket_numel: int | None, tied: bool) -> None:
    if tied:
        runs = [*runs, Run("embeddings", (200,), own_bucket=True)]
    ours = buffer(runs, ranks, bucket_numel)
    for rank in range(ranks):
        theirs = megatron_s(runs, rank, ranks, bucket_numel)
        assert ours.edges == (0, *(stop for _, stop in theirs.bucket_indices))
        assert ours.held(rank) == held_of_megatron_s(theirs)


def test_three_parameters_by_hand() -> None:
    """Last to first, each at a multiple of 64: 10 at 0, 100 at 64, 70 at 192 to 262; padded to a multiple of 128 and 3 it ends at 384, 128 a rank."""
    found = buffer([Run("norms", (70, 100, 10))], 3)
    assert found.edges == (0, 384)
    assert [found.held(rank) for rank in range(3)] == [Held(74, 2), Held(36 + 64, 2), Held(6, 1)]
    assert Held(74, 2).optimizer_bytes(bf16=True) == 74 * 12 + 2 * 4


def test_a_buffer_of_nothing_is_empty() -> None:
    assert buffer([], 4).numel == 0
    assert buffer([], 4).held(3) == Held(0, 0)
