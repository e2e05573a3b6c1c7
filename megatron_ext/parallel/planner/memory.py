"""What a learner rank holds that does not depend on the data: weights, gradients, optimizer state, to the byte. Without torch.

    chunk_runs (tensors.py) -> buffers of dense and of expert parameters (buffers.py) -> bytes of this rank

`activations.py` adds what the data brings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.config.schema import ModelConfig, ParallelConfig
from megatron_ext.parallel.plan import Layout
from megatron_ext.parallel.planner.buffers import bucket_numel_of, buffer
from megatron_ext.parallel.planner.tensors import ChunkRuns, Run, Training, chunk_runs
from megatron_ext.parallel.stages import Stage, pipeline_stages


@dataclass(frozen=True)
class State:
    """Bytes of one rank: `weights_bytes` with what is frozen and the padding of buffers, `gradients_bytes` in float32, `optimizer_bytes` of its own shard."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes


@dataclass(frozen=True)
class Rank:
    """Where in the grid: pipeline rank, and its number among the replicas of its dense and of its expert parameters."""

    pp: int = 0
    dense: int = 0
    expert: int = 0


def learner_state(model: ModelConfig, parallel: ParallelConfig, rank: Rank, training: Training, overlaps: bool) -> State:
    """Of engine megatron. `overlaps`: gradients are reduced in buckets while the backward pass runs (the default on GPUs)."""
    layout, bf16 = Layout.of(parallel), model.dtype == "bf16"
    stages = pipeline_stages(model, layout.pp, layout.vpp, training.vision)[rank.pp :: layout.pp]
    states = []
    for stage in stages:
        runs, bucket = chunk_runs(model, layout, stage, training), bucket_of(stage, layout, overlaps)
        dense = part_state(runs.trained(False), layout.dp * layout.cp, rank.dense, bf16, bucket)
        experts = part_state(runs.trained(True), layout.edp, rank.expert, bf16, bucket)
        states += [dense.state, experts.state, frozen_state(runs, bf16)]
    return total(states)


def bucket_of(stage: Stage, layout: Layout, overlaps: bool) -> int | None:
    """Only the first chunk of the first pipeline rank has more than one bucket: what others reduce is ready too late to overlap."""
    return bucket_numel_of(layout.dp) if overlaps and stage.number == 0 else None


@dataclass(frozen=True)
class PartState:
    """Of one buffer, with its elements."""

    state: State
    numel: int


def part_state(runs: Sequence[Run], ranks: int, rank: int, bf16: bool, bucket: int | None) -> PartState:
    """Of the parameters that share a buffer, on data-parallel rank `rank` of `ranks`."""
    found = buffer(runs, ranks, bucket)
    return PartState(State((2 if bf16 else 4) * found.numel, 4 * found.numel, found.held(rank).optimizer_bytes(bf16)), found.numel)


def frozen_state(runs: ChunkRuns, bf16: bool) -> State:
    """What does not train lies in no buffer."""
    return State((2 if bf16 else 4) * sum(run.numel for run in runs.all() if not run.trains), 0, 0)


def total(states: Sequence[State]) -> State:
    weights, gradients, optimizer = (sum(getattr(state, name) for state in states) for name in ("weights_bytes", "gradients_bytes", "optimizer_bytes"))
    return State(weights, gradients, optimizer)
