"""Whether a learner's layout fits the memory of a device: the bytes of its fullest rank by part, and what its host needs. Without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from megatron_ext.config.schema import ModelConfig
from megatron_ext.config.sizes import expert_layers
from megatron_ext.parallel.plan import Layout
from megatron_ext.parallel.planner.activations import CPU, GPU, Activations, Microbatch
from megatron_ext.parallel.planner.hardware import Gpu
from megatron_ext.parallel.planner.layers import KINDS, Kind, Rows, layer_kinds, rows_of, totals
from megatron_ext.parallel.planner.memory import PartState, State, bucket_of, frozen_state, part_state, total
from megatron_ext.parallel.planner.tensors import Run, chunk_runs
from megatron_ext.parallel.planner.workload import Workload
from megatron_ext.parallel.stages import Stage, pipeline_stages


@dataclass(frozen=True)
class Memory:
    """Bytes of pipeline rank `rank`. `workspace_bytes`: what one layer's backward pass needs for a moment; never while the logits are there. `host_bytes`: of
    this rank, beside the device: the copy of an asynchronous save, and the rows of a step."""

    rank: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    reference_bytes: int
    decoder_bytes: int
    vision_bytes: int
    clvr_bytes: int
    inputs_bytes: int
    logits_bytes: int
    workspace_bytes: int
    communication_bytes: int
    context_bytes: int
    allowance_bytes: int
    host_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.state_bytes + self.step_bytes + self.communication_bytes + self.context_bytes + self.allowance_bytes

    @property
    def state_bytes(self) -> int:
        """There from the start to the end."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.reference_bytes

    @property
    def step_bytes(self) -> int:
        """There at the peak of a step."""
        return self.decoder_bytes + self.vision_bytes + self.clvr_bytes + self.inputs_bytes + max(self.logits_bytes, self.workspace_bytes)


class Sizer:
    """Memory of one model and workload under many layouts; what layouts share is computed once."""

    def __init__(self, model: ModelConfig, work: Workload, gpu: Gpu, overlaps: bool, recompute_layers: int = 1) -> None:
        self.model, self.work, self.gpu, self.overlaps, self.recompute_layers = model, work, gpu, overlaps, recompute_layers
        self._allowance = gpu.allowance
        self._kinds, self._rows_of_stages = layer_kinds(model), dict[range, Rows]()
        self._layers: dict[tuple[int, int, int], Rows] = {}
        self._stages: dict[tuple[int, int], tuple[Stage, ...]] = {}
        self._runs: dict[tuple[object, ...], tuple[list[Run], list[Run], State]] = {}
        self._parts: dict[tuple[object, ...], PartState] = {}
        self._of_ranks: dict[tuple[object, ...], PartState] = {}
        self._states: dict[tuple[int, ...], tuple[State, tuple[int, int]]] = {}
        self._steps: dict[tuple[object, ...], tuple[int, int, int, int, tuple[Kind, ...], bool]] = {}
        self._kept: dict[tuple[object, ...], tuple[int, int, int]] = {}
        self._traits: dict[tuple[int, ...], list[tuple[object, ...]]] = {}
        self._workspaces: dict[tuple[object, ...], int] = {}
        self._activations: dict[tuple[int, ...], Activations] = {}
        self._telling: dict[tuple[int, int], list[int]] = {}

    def stages(self, layout: Layout) -> tuple[Stage, ...]:
        key = layout.pp, layout.vpp
        if key not in self._stages:
            self._stages[key] = pipeline_stages(self.model, layout.pp, layout.vpp, self.work.training.vision)
        return self._stages[key]

    def layers(self, layout: Layout, rank: int) -> Rows:
        """Of a pipeline rank, by kind."""
        key = layout.pp, layout.vpp, rank
        if key not in self._layers:
            self._layers[key] = totals(tuple(row for stage in self.stages(layout)[rank :: layout.pp] for row in self._rows(stage)))
        return self._layers[key]

    def _rows(self, stage: Stage) -> Rows:
        if stage.layers not in self._rows_of_stages:
            self._rows_of_stages[stage.layers] = rows_of(self._kinds[stage.layers.start : stage.layers.stop])
        return self._rows_of_stages[stage.layers]

    def _kind(self, stage: Stage) -> tuple[object, ...]:
        """What decides which parameters a stage has."""
        return self._rows(stage), len(stage.asks), stage.first, stage.last, stage.runs_vision

    def telling_ranks(self, layout: Layout) -> list[int]:
        """Pipeline ranks of which one is the fullest. An earlier rank has no fewer micro-batches in flight, so that one which holds no more than an earlier
        rank does, chunk by chunk, is none of them."""
        key = layout.pp, layout.vpp
        if key not in self._telling:
            stages, kept = self.stages(layout), list[tuple[int, list[int]]]()
            for rank in range(layout.pp):
                holds = [number for stage in stages[rank :: layout.pp] for number in self._amounts(stage)]
                if not any(all(more >= less for more, less in zip(earlier, holds, strict=True)) for _, earlier in kept):
                    kept.append((rank, holds))
            self._telling[key] = [rank for rank, _ in kept]
        return self._telling[key]

    def _amounts(self, stage: Stage) -> tuple[int, ...]:
        """Whoever holds no more of any of these needs no more memory."""
        of_kind = dict(totals(self._rows(stage)))
        layers = (of_kind.get(kind, 0) for kind in KINDS)
        return (*layers, len(stage.asks), stage.first, stage.last, stage.runs_vision, len(stage.sends), stage.sends_features)

    def numels(self, layout: Layout, rank: int) -> tuple[int, int]:
        """Elements of a pipeline rank's dense and expert buffers."""
        return self._held(layout, rank)[1]

    def state(self, layout: Layout, rank: int) -> State:
        """Of the first data-parallel rank, whose shards hold no padding from the end of a bucket."""
        return self._held(layout, rank)[0]

    def _held(self, layout: Layout, rank: int) -> tuple[State, tuple[int, int]]:
        key = layout.tp, layout.ep, layout.etp, layout.dp * layout.cp, layout.pp, layout.vpp, rank
        if key not in self._states:
            dense = self._of_rank(layout, rank, False, (layout.tp, layout.ep == 1, layout.dp * layout.cp))
            experts = self._of_rank(layout, rank, True, (layout.ep, layout.etp, layout.edp))
            frozen = (self._split(layout, stage)[2] for stage in self.stages(layout)[rank :: layout.pp])
            self._states[key] = total([dense.state, experts.state, *frozen]), (dense.numel, experts.numel)
        return self._states[key]

    def _of_rank(self, layout: Layout, rank: int, of_experts: bool, split: tuple[object, ...]) -> PartState:
        """All chunks' dense parameters, or experts, of a pipeline rank. `split`: what of the layout they depend on, beside its pipeline and its buckets."""
        key = of_experts, layout.pp, layout.vpp, rank, bucket_of(self.stages(layout)[rank], layout, self.overlaps), *split
        if key not in self._of_ranks:
            parts = [self._part(layout, stage, of_experts, split) for stage in self.stages(layout)[rank :: layout.pp]]
            self._of_ranks[key] = PartState(total([part.state for part in parts]), sum(part.numel for part in parts))
        return self._of_ranks[key]

    def memory(self, layout: Layout, recompute: str, micro_rows: int) -> Memory:
        """Of the fullest rank."""
        return self.of_rank(layout, self.fullest(layout, recompute, micro_rows)[0], recompute, micro_rows)

    def fullest(self, layout: Layout, recompute: str, micro_rows: int, limit: float = math.inf) -> tuple[int, float]:
        """The pipeline rank that needs the most, or the first that needs more than `limit`, and how many bytes that is."""
        shapes, fullest, most = self._shapes(layout, micro_rows), 0, -1.0
        shared = self._shared_bytes(layout, shapes)
        for rank in self.telling_ranks(layout):
            need = self._need_bytes(layout, rank, recompute, shapes) + shared
            if need > most:
                fullest, most = rank, need
            if most > limit:
                break
        return fullest, most

    def exceeds(self, layout: Layout, rank: int, recompute: str, micro_rows: int, limit: float) -> bool:
        """Whether this pipeline rank alone needs more."""
        shapes = self._shapes(layout, micro_rows)
        return self._need_bytes(layout, rank, recompute, shapes) + self._shared_bytes(layout, shapes) > limit

    def of_rank(self, layout: Layout, rank: int, recompute: str, micro_rows: int) -> Memory:
        return self._memory(layout, rank, recompute, self._shapes(layout, micro_rows))

    def _shapes(self, layout: Layout, micro_rows: int) -> Activations:
        key = layout.tp, layout.cp, layout.ep, layout.etp, micro_rows
        if key not in self._activations:
            batch = Microbatch(micro_rows, self.work.row_tokens, self.work.row_tiles, self.work.packed)
            kernels = GPU if self.gpu.fused_kernels else CPU
            self._activations[key] = Activations(self.model, layout, batch, self.work.training.vision, kernels)
        return self._activations[key]

    def _split(self, layout: Layout, stage: Stage) -> tuple[list[Run], list[Run], State]:
        """Of a chunk: dense parameters, experts, and what is frozen."""
        key = layout.tp, layout.ep, layout.etp, *self._kind(stage)
        if key not in self._runs:
            runs = chunk_runs(self.model, layout, stage, self.work.training)
            self._runs[key] = runs.trained(False), runs.trained(True), frozen_state(runs, self.model.dtype == "bf16")
        return self._runs[key]

    def _part(self, layout: Layout, stage: Stage, of_experts: bool, split: tuple[object, ...]) -> PartState:
        """Of a chunk: its buffer of one of the two."""
        bucket = bucket_of(stage, layout, self.overlaps)
        kind = (dict(totals(self._rows(stage))).get("experts", 0),) if of_experts else self._kind(stage)
        key = of_experts, bucket, *split, *kind
        if key not in self._parts:
            dense, experts, _ = self._split(layout, stage)
            runs, ranks = (experts, layout.edp) if of_experts else (dense, layout.dp * layout.cp)
            self._parts[key] = part_state(runs, ranks, 0, self.model.dtype == "bf16", bucket)
        return self._parts[key]

    def _traits_of(self, layout: Layout, rank: int) -> list[tuple[object, ...]]:
        """What decides what the chunks of a rank keep of a micro-batch."""
        key = layout.pp, layout.vpp, rank
        if key not in self._traits:
            stages = self.stages(layout)[rank :: layout.pp]
            self._traits[key] = [(*self._kind(stage), len(stage.sends), stage.sends_features, stage.receives_features) for stage in stages]
        return self._traits[key]

    def _keep(self, shapes: Activations, stage: Stage, traits: tuple[object, ...], recompute: str) -> tuple[int, int, int]:
        key = id(shapes), recompute, traits
        if key not in self._kept:
            self._kept[key] = _kept(shapes, stage, self._rows(stage), recompute, self.recompute_layers)
        return self._kept[key]

    def _workspace(self, shapes: Activations, kinds: tuple[Kind, ...], recompute: str, asks: bool) -> int:
        """The backward pass of the layer that needs the most, with what is computed again for it."""
        key = id(shapes), kinds, recompute, asks
        if key not in self._workspaces:
            again = {"none": dict.fromkeys(KINDS, 0), "selective": dict.fromkeys(KINDS, shapes.attention_bytes), "full": shapes.layer_bytes}[recompute]
            block = self.recompute_layers if recompute == "full" else 1
            taps = shapes.tap_query_bytes * (2 if recompute == "full" else 1) if asks else 0
            self._workspaces[key] = max(shapes.workspace_bytes[kind] + block * again[kind] for kind in kinds) + taps
        return self._workspaces[key]

    def _step_bytes(self, layout: Layout, rank: int, recompute: str, shapes: Activations) -> tuple[int, int, int, int, int]:
        """At the peak of a step: decoder, vision, CLVR, logits, workspace. Over how many ranks experts are split decides the workspace alone."""
        key = layout.tp, layout.cp, layout.etp, layout.dp, layout.pp, layout.vpp, rank, recompute, shapes.batch.rows
        if key not in self._steps:
            self._steps[key] = self._kept_bytes(layout, rank, recompute, shapes)
        decoder, vision, clvr, logits, kinds, asks = self._steps[key]
        return decoder, vision, clvr, logits, self._workspace(shapes, kinds, recompute, asks)

    def _kept_bytes(self, layout: Layout, rank: int, recompute: str, shapes: Activations) -> tuple[int, int, int, int, tuple[Kind, ...], bool]:
        """The same but for the workspace, which is decided by what layers there are, and whether a tap is among them."""
        stages = self.stages(layout)[rank :: layout.pp]
        flying = in_flight(layout, rank, -(-(self.work.per_update() // layout.dp) // shapes.batch.rows))
        decoder = vision = clvr = 0
        for count, stage, traits in zip(flying, stages, self._traits_of(layout, rank), strict=True):
            of_decoder, of_vision, of_clvr = self._keep(shapes, stage, traits, recompute)
            decoder, vision, clvr = decoder + count * of_decoder, vision + count * of_vision, clvr + count * of_clvr
        logits = shapes.logits_bytes if stages[-1].last else 0
        kinds = tuple(kind for kind, _ in self.layers(layout, rank))
        return decoder, vision, clvr, logits, kinds, any(stage.asks for stage in stages)

    def _need_bytes(self, layout: Layout, rank: int, recompute: str, shapes: Activations) -> float:
        """What differs between the ranks of a layout."""
        state, reference = self.state(layout, rank), self.work.has_reference
        decoder, vision, clvr, logits, workspace = self._step_bytes(layout, rank, recompute, shapes)
        step = decoder + vision + clvr + max(logits, workspace)
        return state.total_bytes + state.weights_bytes * reference + step * (1 + self._allowance)

    def _shared_bytes(self, layout: Layout, shapes: Activations) -> float:
        """What does not."""
        return self._communication_bytes(layout, shapes) + self.gpu.context_bytes + self._inputs_bytes(layout) * (1 + self._allowance)

    def _communication_bytes(self, layout: Layout, shapes: Activations) -> int:
        """A communicator for every kind of group, the gathered sequence of tensor parallelism, and the tokens that experts exchange."""
        moved = 2 * shapes.positions * self.model.hidden_size * shapes.width * (layout.tp > 1)
        moved += 2 * shapes.slice * self.model.experts_per_token * self.model.hidden_size * shapes.width * (layout.ep > 1)
        groups = (layout.tp > 1) + (layout.cp > 1) + (layout.dp * layout.cp > 1) + (layout.pp > 1)
        groups += (layout.ep > 1) + (layout.etp > 1) + (layout.edp > 1) + (layout.num_ranks > 1)
        return int(groups * self.gpu.communicator_bytes) + moved

    @cached_property
    def _routes(self) -> int:
        """Of a token of rl, over all layers."""
        return len(expert_layers(self.model)) * self.model.experts_per_token if self.work.stage == "rl" else 0

    def _inputs_bytes(self, layout: Layout) -> int:
        """The rows of a step on the device, which are there all at once: token ids and masks, pictures in float32, and for rl the recorded routes in int16."""
        routes = 2 * self._routes
        return self.work.rows // layout.dp * (self.work.row_tokens * (16 + routes) + self.work.row_tiles * 3 * self.model.vision.image_size**2 * 4)

    def _host_bytes(self, layout: Layout, state: State) -> int:
        """The same rows in host memory, pictures as bytes, routes as int16 and gates beside them in float16; and the copy of an asynchronous save."""
        routes = 4 * self._routes
        rows = self.work.rows // layout.dp * (self.work.row_tokens * (16 + routes) + self.work.row_tiles * 3 * self.model.vision.image_size**2)
        return rows + (state.weights_bytes + state.optimizer_bytes) * self.work.async_save

    def _memory(self, layout: Layout, rank: int, recompute: str, shapes: Activations) -> Memory:
        state, inputs = self.state(layout, rank), self._inputs_bytes(layout)
        decoder, vision, clvr, logits, workspace = self._step_bytes(layout, rank, recompute, shapes)
        return Memory(
            rank=rank,
            weights_bytes=state.weights_bytes,
            gradients_bytes=state.gradients_bytes,
            optimizer_bytes=state.optimizer_bytes,
            reference_bytes=state.weights_bytes if self.work.has_reference else 0,
            decoder_bytes=decoder,
            vision_bytes=vision,
            clvr_bytes=clvr,
            inputs_bytes=inputs,
            logits_bytes=logits,
            workspace_bytes=workspace,
            communication_bytes=self._communication_bytes(layout, shapes),
            context_bytes=int(self.gpu.context_bytes),
            allowance_bytes=int(self._allowance * (decoder + vision + clvr + max(logits, workspace) + inputs)),
            host_bytes=self._host_bytes(layout, state),
        )


def in_flight(layout: Layout, rank: int, count: int) -> list[int]:
    """Micro-batches whose activations a pipeline rank holds at once, by chunk, of `count`. 1F1B: as many as stages follow; interleaved: Megatron's warm-up of
    2 (pp - rank - 1) + (vpp - 1) pp passes and one more, taken in groups of pp by chunk.

    >>> layout = Layout(tp=1, sp=False, pp=4, vpp=1, cp=1, ep=1, etp=1, dp=1, num_ranks=4)
    >>> [in_flight(layout, rank, 8) for rank in range(4)]
    [[4], [3], [2], [1]]
    """
    if layout.vpp == 1:
        return [min(count, layout.pp - rank)]
    left = min(count * layout.vpp, 2 * (layout.pp - rank - 1) + (layout.vpp - 1) * layout.pp + 1)
    held, chunk = [0] * layout.vpp, 0
    while left:
        taken = min(left, layout.pp)
        held[chunk % layout.vpp] += taken
        left, chunk = left - taken, chunk + 1
    return held


def _kept(shapes: Activations, stage: Stage, layers: Rows, recompute: str, block: int) -> tuple[int, int, int]:
    """Bytes of one micro-batch in flight on one chunk: decoder with projector and output layer, vision, CLVR."""
    taps = len(stage.asks)
    if recompute == "full":
        blocks = -(-len(stage.layers) // block)
        decoder, clvr = blocks * shapes.stream_bytes, taps * (shapes.tap_image_bytes + shapes.stream_bytes)
    else:
        attention = shapes.attention_bytes if recompute == "selective" else 0
        decoder, clvr = sum(count * (shapes.layer_bytes[kind] - attention) for kind, count in layers), taps * shapes.tap_bytes
    decoder += shapes.payload_bytes(stage)
    if stage.first:
        decoder += shapes.projector_bytes
    if stage.last:
        decoder += shapes.head_bytes
    vision = shapes.vision_bytes(stage.runs_vision) if stage.runs_vision or stage.receives_features else 0
    return decoder, vision, clvr
