"""Which parameters one pipeline stage of one rank holds, in the order in which the model names them: pure arithmetic, without torch.

Written from the model's own modules (`model/assembly.py` and below), not from totals, because Megatron pads its buffers parameter by parameter
(`buffers.py`): what a total hides is what a rank allocates. `tests/parallel/test_plan_memory.py` holds it against built models in every tested layout, and
`tests/unit/parallel/test_tensors.py` against `config.sizes.count_parameters`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_ext.config.clvr_sizes import tap_numels
from megatron_ext.config.schema import ModelConfig, VisionConfig
from megatron_ext.config.sizes import vision_tokens
from megatron_ext.parallel.plan import Layout
from megatron_ext.parallel.planner.layers import Kind, layer_kinds, rows_of
from megatron_ext.parallel.stages import Stage

PARTS = ("vision", "projector", "embeddings", "attention", "router", "experts", "dense", "norms", "clvr")
"""As in `config.sizes.Parameters`."""


@dataclass(frozen=True)
class Run:
    """`count` repetitions of parameters of `numels` elements, one after another. `sharded_by_experts`: other data-parallel ranks hold other experts in their
    place, so that they have a buffer of their own. `own_bucket`: Megatron gives the parameter a bucket to itself."""

    part: str
    numels: tuple[int, ...]
    count: int = 1
    sharded_by_experts: bool = False
    own_bucket: bool = False
    trains: bool = True

    @property
    def numel(self) -> int:
        return sum(self.numels) * self.count


@dataclass(frozen=True)
class Training:
    """What of the model does not train."""

    vision: bool = True
    routers: bool = True


@dataclass(frozen=True)
class Layers:
    """`count` decoder layers of one kind, one after another."""

    layer: tuple[Run, ...]
    count: int


@dataclass(frozen=True)
class ChunkRuns:
    """The parameters of one model chunk on one rank."""

    before: tuple[Run, ...]
    layers: tuple[Layers, ...]
    after: tuple[Run, ...]

    def all(self) -> list[Run]:
        """In the order of `named_parameters()`."""
        return [*self.before, *(run for alike in self.layers for run in alike.layer * alike.count), *self.after]

    def trained(self, sharded_by_experts: bool) -> list[Run]:
        """Those of one of the two kinds of buffers, in the same order, in as few runs as say the same."""

        def chosen(runs: tuple[Run, ...]) -> list[Run]:
            return [run for run in runs if run.trains and run.sharded_by_experts == sharded_by_experts]

        layers = [run for alike in self.layers for run in _repeated(chosen(alike.layer), alike.count)]
        return [*chosen(self.before), *layers, *chosen(self.after)]


def _repeated(layer: list[Run], count: int) -> list[Run]:
    """`count` times the same parameters, as one run where that is possible."""
    if len(layer) == 1:
        return [replace(layer[0], count=layer[0].count * count)]
    if layer and all(run.count == 1 for run in layer):
        return [Run("layers", tuple(numel for run in layer for numel in run.numels), count)]
    return layer * count


def chunk_runs(model: ModelConfig, layout: Layout, stage: Stage, training: Training = Training()) -> ChunkRuns:
    """What a rank of this layout holds of one stage."""
    before: list[Run] = []
    if stage.runs_vision:
        before += _vision(model.vision, training.vision)
    if stage.first and model.vision.enabled:
        before.append(_projector(model.vision, model.hidden_size))
    if stage.first:
        before.append(Run("embeddings", (model.vocab_size // layout.tp * model.hidden_size,)))
    kinds = rows_of(layer_kinds(model)[stage.layers.start : stage.layers.stop])
    layers = tuple(Layers(tuple(_layer(model, layout, kind, training.routers)), count) for kind, count in kinds)
    after = [Run("clvr", tap_numels(model, layout.tp)) for _ in stage.asks]
    if stage.last:
        after += [Run("norms", (model.hidden_size,)), *_output(model, layout.tp, stage.first)]
    return ChunkRuns(tuple(before), layers, tuple(after))


def _layer(model: ModelConfig, layout: Layout, kind: Kind, routers_train: bool) -> list[Run]:
    """Megatron's TransformerLayer: norm, attention (projection before qkv), q and k norms, norm, and what its kind has."""
    hidden, tp = model.hidden_size, layout.tp
    query, key_value = model.num_attention_heads * model.head_dim // tp, model.num_query_groups * model.head_dim // tp
    attention = [
        Run("norms", (hidden,)),
        Run("attention", (query * hidden, (query + 2 * key_value) * hidden)),
        Run("norms", (model.head_dim, model.head_dim, hidden)),
    ]
    return attention + (_experts(model, layout, routers_train) if kind == "experts" else [_dense(model, tp)])


def _experts(model: ModelConfig, layout: Layout, routers_train: bool) -> list[Run]:
    """Router, then experts in turn: fc1 [2 F / etp, H], fc2."""
    hidden, ffn = model.hidden_size, model.expert_ffn_hidden_size // layout.etp
    return [
        Run("router", (model.num_experts * hidden,), trains=routers_train),
        Run("experts", (2 * ffn * hidden, hidden * ffn), model.num_experts // layout.ep, sharded_by_experts=layout.ep > 1),
    ]


def _dense(model: ModelConfig, tp: int) -> Run:
    hidden, ffn = model.hidden_size, model.ffn_hidden_size // tp
    return Run("dense", (2 * ffn * hidden, hidden * ffn))


def _vision(vision: VisionConfig, trains: bool) -> Iterator[Run]:
    """Whole on every rank that has it. A module's own parameters come before those of its children."""
    width, ffn = vision.hidden_size, vision.ffn_hidden_size
    norm = (width, width) if vision.norm == "layernorm" else (width,)
    qkv = (3 * width**2, 3 * width) if vision.qkv_bias else (3 * width**2,)
    qk_norm = (width, width) if vision.qk_norm else ()
    yield Run("vision", (width, (vision_tokens(vision) + 1) * width, 3 * vision.patch_size**2 * width, width), trains=trains)
    layer = (width, width, *norm, *norm, *qkv, width**2, width, *qk_norm, ffn * width, ffn, width * ffn, width)
    yield Run("vision", layer, vision.num_layers, trains=trains)


def _projector(vision: VisionConfig, hidden: int) -> Run:
    width = vision.hidden_size * vision.downsample**2
    return Run("projector", (width, width, width * hidden, hidden, hidden**2, hidden))


def _output(model: ModelConfig, tp: int, with_embedding: bool) -> list[Run]:
    """Tied to an embedding on the same stage it has no weight; tied to one on another stage it has a copy."""
    if model.tie_embeddings and with_embedding:
        return []
    return [Run("embeddings", (model.vocab_size // tp * model.hidden_size,), own_bucket=model.tie_embeddings)]
