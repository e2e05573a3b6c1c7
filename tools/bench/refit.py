"""New weights from learner ranks to rollout ranks, bytes a second: `python tools/bench/refit.py [--rounds 7]`, results in docs/benchmarks/refit.md.

The weights are those of a real model of this package, float32, cut as the two layouts would. Sides take turns; medians.

    in one process      pack, check, stage and load, without a network, against one copy of the same bytes (memcpy)     CPU time of the process
    between processes   the publication itself, over loopback, against gloo's broadcast of the whole model               elapsed time of the slowest rank

Both again without digests, which tells what they cost. Receivers hold the learner's very bytes after every round, or the benchmark fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from interleave import machine, medians
from torch._C._distributed_c10d import FileStore, ProcessGroupGloo

from megatron_ext.checkpoint.full_tensors import own_weights
from megatron_ext.config.schema import ClvrConfig, ModelConfig, ParallelConfig, VisionConfig
from megatron_ext.model.assembly import build_model
from megatron_ext.parallel.groups import open_parallel
from megatron_ext.parallel.local import run_ranks
from megatron_ext.parallel.shards import Shard, expert_of
from megatron_ext.rl.refit import staging as refit
from megatron_ext.rl.refit.plan import BUCKET_BYTES, DIGEST_BYTES, Bucket, Part, of_rank, plan_refit
from megatron_ext.rl.refit.weight_sync import receive_over, send_over

EXPERTS = 16
MODEL = ModelConfig(
    vocab_size=4096,
    num_layers=4,
    hidden_size=512,
    num_attention_heads=8,
    num_query_groups=2,
    head_dim=64,
    num_experts=EXPERTS,
    expert_ffn_hidden_size=512,
    vision=VisionConfig(enabled=False),
    clvr=ClvrConfig(enabled=False, taps=()),
)
TIMEOUT_S = 600


@dataclass(frozen=True)
class Layout:
    tp: int = 1
    ep: int = 1

    @property
    def num_ranks(self) -> int:
        return max(self.tp, self.ep)


ONE, TP2, EP2 = Layout(), Layout(tp=2), Layout(ep=2)
CASES = {"1 to 1": (ONE, ONE), "TP2 to 1": (TP2, ONE), "1 to TP2": (ONE, TP2), "EP2 to TP2": (EP2, TP2)}
REPLICAS = {"1 to 1": 1, "1 to 2 replicas of 1": 2, "TP2 to 1": 1, "1 to TP2": 1}
"""Between processes: learner and rollouts, at most three ranks together."""


@dataclass(frozen=True)
class Rank:
    parts: tuple[Part, ...]
    tensors: dict[str, torch.Tensor]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def ranks(weights: dict[str, torch.Tensor], marks: dict[str, int], layout: Layout) -> list[Rank]:
    """The model cut for each rank of a layout."""
    found = []
    for rank in range(layout.num_ranks):
        parts, tensors = [], {}
        for name, full in weights.items():
            expert = expert_of(name)
            if expert and layout.ep > 1 and expert[1] // (EXPERTS // layout.ep) != rank:
                continue
            split = name in marks and layout.tp > 1
            shard = Shard(name, marks[name] if split else None, rank, layout.tp if split else 1, 2 if name.endswith("linear_fc1.weight") else 1, bool(expert))
            tensors[name] = shard.take(full).clone()
            parts.append(refit.part_of(tensors[name], shard))
        found.append(Rank(tuple(parts), tensors))
    return found


def model_weights(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """The model's weights, and along which dimension Megatron splits those that it splits."""
    with open_parallel(ParallelConfig(), 0, 1, f"file://{folder / 'store'}", 0) as context:
        model = build_model(MODEL, -1, context, seed=1)
        found = {name: weight.detach() for name, weight, _ in own_weights(model, context)}
        marks = {name: weight.partition_dim for name, weight, _ in own_weights(model, context) if getattr(weight, "tensor_model_parallel", False)}
        return found, marks


@contextmanager
def without_digests() -> Iterator[None]:
    with patch.object(refit, "_digest", lambda piece, room: bytearray(DIGEST_BYTES)):
        yield


def in_one_process(case: str, folder: Path, rounds: int) -> dict[str, float]:
    """Bytes a CPU second of each side."""
    weights, marks = model_weights(folder)
    learners, rollouts = (ranks(weights, marks, layout) for layout in CASES[case])
    buckets = plan_refit([rank.parts for rank in learners], [rank.parts for rank in rollouts])
    copies = [{name: torch.empty_like(tensor) for name, tensor in rank.tensors.items()} for rank in rollouts]
    message = torch.empty(max(bucket.num_bytes for bucket in buckets), dtype=torch.uint8)

    staged = [refit.Staging(rank.tensors) for rank in rollouts]

    def publish() -> None:
        for staging in staged:
            staging.begin(0)
        with refit.Workers() as workers:
            for bucket in buckets:
                refit.pack(bucket, learners[bucket.sender].tensors, 0, message[: bucket.num_bytes], workers)
                for receiver in bucket.receivers:
                    staged[receiver - len(learners)].stage(bucket, message[: bucket.num_bytes], workers)
        for staging, rank in zip(staged, rollouts, strict=True):
            staging.load(rank.tensors)

    def bare() -> None:
        with without_digests():
            publish()

    def copy() -> None:
        for rank, target in zip(rollouts, copies, strict=True):
            torch._foreach_copy_(list(target.values()), list(rank.tensors.values()))

    expected = [{name: tensor.clone() for name, tensor in rank.tensors.items()} for rank in rollouts]
    for rank in rollouts:
        for tensor in rank.tensors.values():
            tensor.zero_()
    publish()
    assert all(torch.equal(rank.tensors[name], wanted[name]) for rank, wanted in zip(rollouts, expected, strict=True) for name in wanted)
    size = sum(rank.num_bytes for rank in rollouts)
    return {name: size / seconds for name, seconds in medians({"memcpy": copy, "refit": publish, "without digests": bare}, rounds).items()}


def between_processes(case: str, folder: Path, rounds: int) -> dict[str, float]:
    """Bytes a second of each side: those that the learner's model has, once for each replica."""
    learner, rollout = CASES[case if case in CASES else "1 to 1"]
    num_ranks = learner.num_ranks + REPLICAS[case] * rollout.num_ranks
    reports = run_ranks(measure_rank, num_ranks, learner, rollout, REPLICAS[case], folder, rounds + 1, timeout_s=TIMEOUT_S)
    slowest = {name: [max(report[name][number] for report in reports) for number in range(1, rounds + 1)] for name in reports[0]}
    size = REPLICAS[case] * sum(weight.nbytes for weight in model_weights(folder)[0].values())
    return {name: size / statistics.median(seconds) for name, seconds in slowest.items()}


def measure_rank(
    rank: int, num_ranks: int, init_method: str, learner: Layout, rollout: Layout, replicas: int, folder: Path, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each side in each round."""
    own_folder = folder / f"rank{rank}"
    own_folder.mkdir()
    weights, marks = model_weights(own_folder)
    learners, rollouts = ranks(weights, marks, learner), ranks(weights, marks, rollout) * replicas
    buckets = of_rank(plan_refit([each.parts for each in learners], [each.parts for each in rollouts]), rank)
    own = [*learners, *rollouts][rank]
    group: Any = ProcessGroupGloo(FileStore(str(folder / "meeting"), num_ranks), rank, num_ranks, timedelta(seconds=TIMEOUT_S))
    staging = refit.Staging(own.tensors)
    flat = torch.cat([tensor.flatten() for tensor in weights.values()]).view(torch.uint8).split(BUCKET_BYTES)
    expected = {name: tensor.clone() for name, tensor in own.tensors.items()}
    sides: dict[str, Callable[[], None]] = {
        "gloo": lambda: [group.broadcast(part, 0).wait() for part in flat],
        "refit": lambda: publish(group, buckets, own.tensors, None if rank < len(learners) else staging, digests=True),
        "without digests": lambda: publish(group, buckets, own.tensors, None if rank < len(learners) else staging, digests=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            if name != "gloo" and rank >= len(learners):
                for tensor in own.tensors.values():
                    tensor.zero_()
            group.barrier().wait()
            began = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - began)
            assert all(torch.equal(own.tensors[name], wanted) for name, wanted in expected.items())
    return seconds


def publish(group: Any, buckets: list[Bucket], tensors: dict[str, torch.Tensor], staging: refit.Staging | None, *, digests: bool) -> None:
    with nullcontext() if digests else without_digests():
        if staging is None:
            send_over(group, buckets, tensors, 0)
        else:
            receive_over(group, buckets, staging, 0)
            staging.load(tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="measured after the first (default 7)")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=Path, help="where to write the numbers, bytes a second")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}
    for where, peer, cases, run in (
        ("in one process", "memcpy", CASES, in_one_process),
        ("between processes", "gloo", REPLICAS, between_processes),
    ):
        print(f"\n| {where} | {peer}, GB/s | refit | without digests | refit / {peer} | without digests / {peer} |\n|---|---|---|---|---|---|")
        for case in cases:
            name = f"{where}, {case}"
            if options.only not in name:
                continue
            with tempfile.TemporaryDirectory() as folder:
                found[name] = rates = run(case, Path(folder), options.rounds)
            base, ours, bare = rates.values()
            print(f"| {case} | {base / 1e9:.2f} | {ours / 1e9:.2f} | {bare / 1e9:.2f} | {ours / base:.2f} | {bare / base:.2f} |", flush=True)
    print(f"\n{machine()}, float32, medians of {options.rounds}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[2]))
    from tools.bench.refit import main as run  # ranks import their function from a module that has a name

    run()
