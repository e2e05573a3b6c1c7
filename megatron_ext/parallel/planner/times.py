"""How long a learner's step takes, by part. Nothing here was measured on a GPU: the constants are those of `gpus.yaml`, or fitted by `calibrate.py`.

t_r     = seconds of one micro-batch, forward and backward, on pipeline rank r
update  = m max_r t_r + (sum_r t_r - max_r t_r) / vpp       m micro-batches; the second term is the bubble (Narayanan et al. 2021, arXiv 2104.04473)
        + gradients summed and weights gathered over data-parallel ranks, less what hides behind the backward pass
        + Adam's own traffic to memory + what a step costs in any case, and the collectives by which ranks agree that it was sound
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter

from megatron_ext.config.clvr_sizes import source_shape
from megatron_ext.config.schema import ModelConfig
from megatron_ext.parallel.plan import Layout
from megatron_ext.parallel.planner.activations import CPU, GPU, Activations, Microbatch
from megatron_ext.parallel.planner.hardware import Cluster
from megatron_ext.parallel.planner.work import Held, Parts, Work, parts
from megatron_ext.parallel.planner.workload import Workload

_ADAM_BYTES = 44
"""Read and written for each parameter of a rank's shard: gradient (4), two moments (16), float32 weights (8), the weight (4), norm, clipping, division (12)."""


_SENDS = 2
"""Messages for each payload of a pipeline stage: how large it is, then what it holds."""
_AGREEING = 5
"""Collectives of a step beside gradients and weights: loss and metrics, loads of the experts, sizes of refinements, the gradient norm, the tokens."""


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one step on the slowest rank. `hidden_s` of data-parallel communication is not in the sum."""

    compute_s: float = 0.0
    tp_s: float = 0.0
    ep_s: float = 0.0
    cp_s: float = 0.0
    pp_s: float = 0.0
    signals_s: float = 0.0
    launches_s: float = 0.0
    bubble_s: float = 0.0
    dp_s: float = 0.0
    optimizer_s: float = 0.0
    fixed_s: float = 0.0
    hidden_s: float = 0.0

    @cached_property
    def total_s(self) -> float:
        return sum(_SPENT(self))


_SPENT: Callable[[StepTimes], tuple[float, ...]] = attrgetter(*(name for name in StepTimes.__dataclass_fields__ if name != "hidden_s"))
_PARTS: Callable[[StepTimes], tuple[float, ...]] = attrgetter(*StepTimes.__dataclass_fields__)


class Timer:
    """Steps of one model and workload under many layouts; what layouts share is computed once."""

    def __init__(self, model: ModelConfig, work: Workload, cluster: Cluster, overlaps: bool) -> None:
        self.model, self.work, self.cluster, self.overlaps = model, work, cluster, overlaps
        self._parts: dict[tuple[object, ...], tuple[Parts, Activations]] = {}
        self._alike: dict[tuple[object, ...], Parts] = {}

    def step(self, layout: Layout, ranks: Sequence[tuple[Held, int]], recompute: str, micro_rows: int, numels: tuple[int, int]) -> StepTimes:
        """All updates of a step, and its passes without gradients. `ranks`: what pipeline ranks hold, and how many of them hold it. `numels`: elements of
        the dense and the expert gradient buffers of the largest."""
        work = self.work
        count = -(-(work.per_update() // layout.dp) // micro_rows)
        steps = [self._pass(layout, ranks, recompute, micro_rows, count * work.updates, True), self._updates(layout, numels)]
        if work.extra_forwards:
            steps.append(self._pass(layout, ranks, recompute, micro_rows, count * work.updates * work.extra_forwards, False))
        return _sum(steps)

    def _of_parts(self, layout: Layout, recompute: str, micro_rows: int, gradients: bool) -> tuple[Parts, Activations]:
        key = layout.tp, layout.cp, layout.ep, layout.etp, recompute, micro_rows, gradients
        if key not in self._parts:
            work = self.work
            batch = Microbatch(micro_rows, round(work.mean_row_tokens), work.row_tiles, work.packed)
            shapes = Activations(self.model, layout, batch, work.training.vision, GPU if self.cluster.gpu.fused_kernels else CPU)
            others = layout.tp, layout.cp, recompute, micro_rows, gradients
            found = parts(Work(shapes, self.cluster), recompute, work.training.vision, self.model.clvr.enabled, gradients, self._alike.get(others))
            self._parts[key], self._alike[others] = (found, shapes), found
        return self._parts[key]

    def _pass(self, layout: Layout, ranks: Sequence[tuple[Held, int]], recompute: str, micro_rows: int, count: int, gradients: bool) -> StepTimes:
        """`count` micro-batches through the pipeline, which fills and empties once an update."""
        gpu = self.cluster.gpu
        of_parts, shapes = self._of_parts(layout, recompute, micro_rows, gradients)
        rate, both = gpu.flops(self.model.dtype) * gpu.mfu, 2 if gradients else 1
        found = []
        for held, number in ranks:
            cost, sends_s = of_parts.of(held), both * self._sends_s(layout, shapes, held)
            waits_s = cost.tp_s + cost.ep_s + cost.cp_s + cost.signals_s + sends_s
            found.append((cost.flops / rate + cost.passes * gpu.layer_overhead_s + waits_s, number, cost, sends_s))
        slowest_s, _, cost, sends_s = max(found, key=lambda rank: rank[0])
        bubble_s = self.work.updates * (sum(seconds * number for seconds, number, _, _ in found) - slowest_s) / layout.vpp
        return StepTimes(
            compute_s=count * cost.flops / rate,
            tp_s=count * cost.tp_s,
            ep_s=count * cost.ep_s,
            cp_s=count * cost.cp_s,
            pp_s=count * sends_s,
            signals_s=count * cost.signals_s,
            launches_s=count * cost.passes * gpu.layer_overhead_s,
            bubble_s=bubble_s,
        )

    def _sends_s(self, layout: Layout, shapes: Activations, held: Held) -> float:
        if not held.messages:
            return 0.0
        tokens, width = source_shape(self.model)
        features = held.features * shapes.batch.tiles * tokens * width * shapes.width
        stride = layout.num_ranks // layout.pp
        first = self.cluster.send_s(held.streams * shapes.stream_bytes + features, stride)
        return first + (_SENDS * held.messages - 1) * self.cluster.send_s(0, stride)

    def _updates(self, layout: Layout, numels: tuple[int, int]) -> StepTimes:
        """What every update of a step adds to its passes."""
        cluster, gpu, updates = self.cluster, self.cluster.gpu, self.work.updates
        dense, experts = numels
        moved = 4 + (2 if self.model.dtype == "bf16" else 4)
        replicas = (dense, layout.dp * layout.cp, layout.tp), (experts, layout.edp, layout.etp * layout.ep)
        dp_s = sum(cluster.collective_s(width * numel, ranks, stride) for numel, ranks, stride in replicas for width in (4, moved - 4))
        hidden_s = gpu.overlap * dp_s if self.overlaps else 0.0
        owned = dense / (layout.dp * layout.cp) + experts / layout.edp
        adam_s = (owned * _ADAM_BYTES + 8 * (dense + experts)) / (gpu.memory_bytes_per_s * gpu.memory_efficiency)
        agree_s = _AGREEING * cluster.signal_s(layout.num_ranks, 1)
        return StepTimes(
            signals_s=updates * agree_s,
            dp_s=updates * (dp_s - hidden_s),
            optimizer_s=updates * adam_s,
            fixed_s=updates * gpu.step_overhead_s,
            hidden_s=updates * hidden_s,
        )


def _sum(steps: Sequence[StepTimes]) -> StepTimes:
    return StepTimes(*map(sum, zip(*map(_PARTS, steps), strict=True)))
