"""Learners and rollouts that are nothing but slices of the same tensors, and what ranks do with them in tests of publications. Ranks import it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch._C._distributed_c10d import FileStore, ProcessGroupGloo

from megatron_ext.parallel.shards import Shard
from megatron_ext.rl.refit.plan import Bucket, Part, of_rank, plan_refit
from megatron_ext.rl.refit.staging import Staging, Workers, pack, part_of
from megatron_ext.rl.refit.weight_sync import receive_over, send_over


@dataclass(frozen=True)
class Split:
    """How one tensor is spread over a group of ranks: not at all (`dim` None), or along `dim`, each of its `halves` by itself."""

    dim: int | None = None
    halves: int = 1


@dataclass(frozen=True)
class Slices:
    """A rank: what it holds, and its tensors."""

    parts: tuple[Part, ...]
    tensors: dict[str, torch.Tensor]


def slices(full: dict[str, torch.Tensor], splits: dict[str, Split], num_ranks: int) -> list[Slices]:
    """The ranks of one tensor-parallel group."""
    found = []
    for rank in range(num_ranks):
        shards = {name: shard(name, splits[name], rank, num_ranks) for name in full}
        tensors = {name: shards[name].take(tensor).clone() for name, tensor in full.items()}
        found.append(Slices(tuple(part_of(tensors[name], shards[name]) for name in full), tensors))
    return found


def shard(name: str, split: Split, rank: int, num_ranks: int) -> Shard:
    whole = split.dim is None or num_ranks == 1
    return Shard(name, None if whole else split.dim, rank, 1 if whole else num_ranks, split.halves, False)


def plan(learners: list[Slices], rollouts: list[Slices], bucket_bytes: int) -> list[Bucket]:
    return plan_refit([rank.parts for rank in learners], [rank.parts for rank in rollouts], bucket_bytes)


def deliver(buckets: list[Bucket], learners: list[Slices], rollouts: list[Slices], version: int = 0) -> list[Staging]:
    """What a publication does, without a network."""
    staged = [Staging(rank.tensors) for rank in rollouts]
    for staging in staged:
        staging.begin(version)
    with Workers() as workers:
        for bucket in buckets:
            message = torch.empty(bucket.num_bytes, dtype=torch.uint8)
            pack(bucket, learners[bucket.sender].tensors, version, message, workers)
            for receiver in bucket.receivers:
                staged[receiver - len(learners)].stage(bucket, message, workers)
    return staged


def publish(rank: int, num_ranks: int, store: Path, buckets: list[Bucket], own: Slices, num_learners: int) -> None:
    """A rank's part in a publication of version 0, to the end."""
    group = ProcessGroupGloo(FileStore(str(store), num_ranks), rank, num_ranks)
    if rank < num_learners:
        send_over(group, of_rank(buckets, rank), own.tensors, 0)
    else:
        staging = Staging(own.tensors)
        receive_over(group, of_rank(buckets, rank), staging, 0)
        staging.load(own.tensors)


def extra_memory(rank: int, world_size: int, init_method: str, store: Path, rows: int, bucket_bytes: int) -> tuple[int, bool]:
    """One learner rank, which holds `rows` x 1 MiB, publishes to two that hold half each: the most memory in use meanwhile, beside what was there before, and
    whether the weights arrived.
    """
    full = {"weight": torch.arange(rows * 2**18, dtype=torch.float32).view(rows, 2**18)}
    learners, rollouts = slices(full, {"weight": Split(0)}, 1), slices(full, {"weight": Split(0)}, 2)
    buckets = plan(learners, rollouts, bucket_bytes)
    own = [*learners, *rollouts][rank]
    expected = own.tensors["weight"].clone() if rank else full["weight"]
    if rank:
        own.tensors["weight"].zero_()
    before = _peak(reset=True)
    publish(rank, world_size, store, buckets, own, 1)
    return _peak() - before, torch.equal(own.tensors["weight"], expected)


def _peak(reset: bool = False) -> int:
    """Bytes of memory that this process had at most since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024
