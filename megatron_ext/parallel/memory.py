"""What a learner rank holds that does not depend on the data: weights, gradients, optimizer state, to the byte. Without torch.

    stage_runs (tensors.py) -> buffers of dense and of expert parameters (buffers.py) -> bytes of this rank

`activations.py` adds what the data brings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.config.schema import ModelConfig, ParallelConfig
from megatron_ext.parallel.buffers import bucket_numel_of, buffer
from megatron_ext.parallel.plan import Layout
from megatron_ext.parallel.stages import Stage, pipeline_stages
from megatron_ext.parallel.tensors import Run, Training, stage_runs


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


@dataclass(frozen=True)
class ChunkState:
    """Of one model chunk, with the elements of its two buffers."""

    state: State
    dense_numel: int
    expert_numel: int


def learner_state(model: ModelConfig, parallel: ParallelConfig, rank: Rank, training: Training, overlaps: bool) -> State:
    """Of engine megatron. `overlaps`: gradients are reduced in buckets while the backward pass runs (the default on GPUs)."""
    layout = Layout.of(parallel)
    stages = pipeline_stages(model, layout.pp, layout.vpp, training.vision)[rank.pp :: layout.pp]
    bf16 = model.dtype == "bf16"
    return total([chunk_state(stage_runs(model, layout, stage, training), layout, rank, bf16, bucket_of(stage, layout, overlaps)).state for stage in stages])


def bucket_of(stage: Stage, layout: Layout, overlaps: bool) -> int | None:
    """Only the first chunk of the first pipeline rank has more than one bucket: what others reduce is ready too late to overlap."""
    return bucket_numel_of(layout.dp) if overlaps and stage.number == 0 else None


def chunk_state(runs: Sequence[Run], layout: Layout, rank: Rank, bf16: bool, bucket: int | None) -> ChunkState:
    trained = [run for run in runs if run.trains]
    dense = buffer([run for run in trained if not run.sharded_by_experts], layout.dp * layout.cp, bucket)
    experts = buffer([run for run in trained if run.sharded_by_experts], layout.edp, bucket)
    held = dense.held(rank.dense) + experts.held(rank.expert)
    numel = dense.numel + experts.numel
    frozen = sum(run.numel for run in runs if not run.trains)
    return ChunkState(State((2 if bf16 else 4) * (numel + frozen), 4 * numel, held.optimizer_bytes(bf16)), dense.numel, experts.numel)


def total(states: Sequence[State]) -> State:
    weights, gradients, optimizer = (sum(getattr(state, name) for state in states) for name in ("weights_bytes", "gradients_bytes", "optimizer_bytes"))
    return State(weights, gradients, optimizer)
