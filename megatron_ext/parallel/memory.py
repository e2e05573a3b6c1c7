"""What a learner rank holds that does not depend on the data: weights, gradients, optimizer state, to the byte. Without torch.

    stage_runs (tensors.py) -> buffers of dense and of expert parameters (buffers.py) -> bytes of this rank

`activations.py` adds what the data brings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.config.schema import ModelConfig, ParallelConfig
from megatron_ext.parallel.buffers import Buffer, bucket_numel_of, buffer
from megatron_ext.parallel.plan import Layout
from megatron_ext.parallel.stages import pipeline_stages
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


def learner_state(model: ModelConfig, parallel: ParallelConfig, rank: Rank, training: Training, overlaps: bool) -> State:
    """Of engine megatron. `overlaps`: gradients are reduced in buckets while the backward pass runs (the default on GPUs)."""
    layout = Layout.of(parallel)
    stages = pipeline_stages(model, layout.pp, layout.vpp, training.vision)[rank.pp :: layout.pp]
    return chunks_state([stage_runs(model, layout, stage, training) for stage in stages], layout, rank, model.dtype == "bf16", overlaps)


def chunks_state(chunks: Sequence[Sequence[Run]], layout: Layout, rank: Rank, bf16: bool, overlaps: bool) -> State:
    """Of the parameters of a rank's chunks. Only the first chunk of the first pipeline rank has more than one bucket."""
    weight = 2 if bf16 else 4
    weights = gradients = optimizer = 0
    for number, runs in enumerate(chunks):
        bucket = bucket_numel_of(layout.dp) if overlaps and rank.pp == 0 and number == 0 else None
        dense, experts = _buffers(runs, layout, bucket)
        held = dense.held(rank.dense) + experts.held(rank.expert)
        weights += weight * (dense.numel + experts.numel + sum(run.numel for run in runs if not run.trains))
        gradients += 4 * (dense.numel + experts.numel)
        optimizer += held.optimizer_bytes(bf16)
    return State(weights, gradients, optimizer)


def _buffers(runs: Sequence[Run], layout: Layout, bucket: int | None) -> tuple[Buffer, Buffer]:
    trained = [run for run in runs if run.trains]
    dense = [run for run in trained if not run.sharded_by_experts]
    experts = [run for run in trained if run.sharded_by_experts]
    return buffer(dense, layout.dp * layout.cp, bucket), buffer(experts, layout.edp, bucket)
