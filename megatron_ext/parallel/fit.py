"""Whether a learner's layout fits the memory of a device: the bytes of its fullest rank by part, and what its host needs. Without torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ext.config.schema import ModelConfig
from megatron_ext.parallel.activations import CPU, GPU, Activations, Microbatch
from megatron_ext.parallel.hardware import Gpu
from megatron_ext.parallel.memory import ChunkState, Rank, State, bucket_of, chunk_state, total
from megatron_ext.parallel.plan import Layout
from megatron_ext.parallel.stages import Stage, pipeline_stages
from megatron_ext.parallel.tensors import stage_runs
from megatron_ext.parallel.workload import Workload


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
        self._stages: dict[tuple[int, int], tuple[Stage, ...]] = {}
        self._chunks: dict[tuple[object, ...], ChunkState] = {}
        self._activations: dict[tuple[int, ...], Activations] = {}
        self._telling: dict[tuple[int, int], list[int]] = {}

    def stages(self, layout: Layout) -> tuple[Stage, ...]:
        key = layout.pp, layout.vpp
        if key not in self._stages:
            self._stages[key] = pipeline_stages(self.model, layout.pp, layout.vpp, self.work.training.vision)
        return self._stages[key]

    def telling_ranks(self, layout: Layout) -> list[int]:
        """Pipeline ranks of which one is the fullest: the first of every kind, because earlier ones have more micro-batches in flight."""
        key = layout.pp, layout.vpp
        if key not in self._telling:
            stages, seen = self.stages(layout), dict[tuple[object, ...], int]()
            for rank in range(layout.pp):
                seen.setdefault(tuple((*_kind(stage), len(stage.sends)) for stage in stages[rank :: layout.pp]), rank)
            self._telling[key] = list(seen.values())
        return self._telling[key]

    def chunks(self, layout: Layout, rank: int) -> list[ChunkState]:
        """Of the first data-parallel rank, whose shards hold no padding from the end of a bucket."""
        return [self._chunk(layout, stage, rank) for stage in self.stages(layout)[rank :: layout.pp]]

    def state(self, layout: Layout, rank: int) -> State:
        return total([chunk.state for chunk in self.chunks(layout, rank)])

    def memory(self, layout: Layout, recompute: str, micro_rows: int) -> Memory:
        """Of the fullest rank."""
        shapes = self._shapes(layout, micro_rows)
        ranks = [self._rank(layout, rank, recompute, shapes) for rank in self.telling_ranks(layout)]
        return max(ranks, key=lambda memory: memory.total_bytes)

    def _shapes(self, layout: Layout, micro_rows: int) -> Activations:
        key = layout.tp, layout.cp, layout.ep, layout.etp, micro_rows
        if key not in self._activations:
            batch = Microbatch(micro_rows, self.work.row_tokens, self.work.row_tiles, self.work.packed)
            kernels = GPU if self.gpu.fused_kernels else CPU
            self._activations[key] = Activations(self.model, layout, batch, self.work.training.vision, kernels)
        return self._activations[key]

    def _chunk(self, layout: Layout, stage: Stage, rank: int) -> ChunkState:
        bucket = bucket_of(stage, layout, self.overlaps)
        key = (layout.tp, layout.ep, layout.etp, layout.dp * layout.cp, layout.edp, bucket, *_kind(stage))
        if key not in self._chunks:
            runs = stage_runs(self.model, layout, stage, self.work.training)
            self._chunks[key] = chunk_state(runs, layout, Rank(rank), self.model.dtype == "bf16", bucket)
        return self._chunks[key]

    def _rank(self, layout: Layout, rank: int, recompute: str, shapes: Activations) -> Memory:
        stages, work = self.stages(layout)[rank :: layout.pp], self.work
        state = self.state(layout, rank)
        rows = work.per_update() // layout.dp
        flying = in_flight(layout, rank, -(-rows // shapes.batch.rows))
        kept = [_kept(shapes, stage, recompute, self.recompute_layers) for stage in stages]
        decoder, vision, clvr = (sum(count * part[index] for count, part in zip(flying, kept, strict=True)) for index in range(3))
        step = decoder + vision + clvr
        inputs = _inputs_bytes(self.model, work, work.rows // layout.dp)
        logits = shapes.logits_bytes(work.stage == "rl") if stages[-1].last else 0
        workspace = _workspace(shapes, stages, recompute, self.recompute_layers)
        groups = sum(size > 1 for size in (layout.tp, layout.cp, layout.dp * layout.cp, layout.pp, layout.ep, layout.etp, layout.edp, layout.num_ranks))
        moved = 2 * shapes.positions * self.model.hidden_size * shapes.width * (layout.tp > 1)
        moved += 2 * shapes.slice * self.model.experts_per_token * self.model.hidden_size * shapes.width * (layout.ep > 1)
        allowance = self.gpu.allowance * (step + inputs + max(logits, workspace) + moved)
        reference = state.weights_bytes if work.has_reference else 0
        host = (state.weights_bytes + state.optimizer_bytes) * work.async_save + _host_bytes(self.model, work, work.rows // layout.dp)
        return Memory(
            rank,
            state.weights_bytes,
            state.gradients_bytes,
            state.optimizer_bytes,
            reference,
            decoder,
            vision,
            clvr,
            inputs,
            logits,
            workspace,
            int(groups * self.gpu.communicator_bytes + moved),
            int(self.gpu.context_bytes),
            int(allowance),
            host,
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


def _kind(stage: Stage) -> tuple[object, ...]:
    """What decides which parameters a stage has."""
    return len(stage.layers), len(stage.asks), stage.first, stage.last, stage.runs_vision


def _kept(shapes: Activations, stage: Stage, recompute: str, block: int) -> tuple[int, int, int]:
    """Bytes of one micro-batch in flight on one chunk: decoder with projector and output layer, vision, CLVR."""
    layers, taps = len(stage.layers), len(stage.asks)
    if recompute == "full":
        blocks = -(-layers // block)
        decoder, clvr = blocks * shapes.stream_bytes, taps * (shapes.tap_image_bytes + shapes.stream_bytes)
    else:
        attention = shapes.attention_bytes if recompute == "selective" else 0
        decoder, clvr = layers * (shapes.layer_bytes - attention), taps * shapes.tap_bytes
    decoder += shapes.payload_bytes(stage)
    if stage.first:
        decoder += shapes.projector_bytes
    if stage.last:
        decoder += shapes.head_bytes
    vision = shapes.vision_bytes(stage.runs_vision) if stage.runs_vision or stage.receives_features else 0
    return decoder, vision, clvr


def _workspace(shapes: Activations, stages: tuple[Stage, ...], recompute: str, block: int) -> int:
    """The backward pass of a layer, with what is computed again for it."""
    again = {"none": 0, "selective": shapes.attention_bytes, "full": block * shapes.layer_bytes}[recompute]
    taps = shapes.tap_query_bytes if any(stage.asks for stage in stages) else 0
    return shapes.workspace_bytes + again + taps * (2 if recompute == "full" else 1)


def _inputs_bytes(model: ModelConfig, work: Workload, rows: int) -> int:
    """The rows of a step on the device, which are there all at once: token ids and masks, pictures in float32, and for rl the recorded routes in int16."""
    routes = 2 * model.num_layers * model.experts_per_token if work.stage == "rl" else 0
    return rows * (work.row_tokens * (16 + routes) + work.row_tiles * 3 * model.vision.image_size**2 * 4)


def _host_bytes(model: ModelConfig, work: Workload, rows: int) -> int:
    """The same rows in host memory: pictures as bytes; routes as int16, and the gates beside them in float16."""
    routes = 4 * model.num_layers * model.experts_per_token if work.stage == "rl" else 0
    return rows * (work.row_tokens * (16 + routes) + work.row_tiles * 3 * model.vision.image_size**2)
