"""The arithmetic and the traffic of one micro-batch on one rank, by formula. Without torch.

A product of [m, k] and [k, n] is 2 m k n operations (FLOPs); the backward pass of a layer costs two forward passes. Attention counts the half of the scores
that a causal mask leaves. T, s, Te as in `activations.py`. Traffic of a decoder layer in its forward pass, H and K as there, b bytes a number:

    tensor parallel    gather T H b in front of the attention, scatter T H b behind it           backward: both again, and the gather for the weights' gradient
                       the same around a dense SwiGLU
    expert parallel    an all-to-all of s K H b to the experts, one of their gates, one back     backward: all again
    expert tensor      gather and scatter Te H b of the experts' tokens, gather their gates      backward: all again
    context parallel   gather keys, and values, T cp kv b each                                   backward: scatter their gradients
    signals            what next to nothing is sent for, but every rank waits: how many tokens   backward: nothing
                       each expert gets, the balancing loss; maxima and sums of the loss

Where ranks are slow to meet, how often they do decides, not how much they send. `tests/parallel/test_collectives.py` holds how often against what torch counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_ext.config.clvr_sizes import LORA_RANK, kv_shape
from megatron_ext.config.sizes import tokens_per_tile, vision_tokens
from megatron_ext.parallel.planner.activations import Activations
from megatron_ext.parallel.planner.hardware import Cluster
from megatron_ext.parallel.planner.layers import KINDS, Kind, Rows
from megatron_ext.parallel.stages import Stage

DENSE, VIT_LAYER, TAP = 0.15, 0.25, 0.5
"""How many decoder layers' worth of kernels a dense SwiGLU, a ViT layer and a tap launch: 7, 12 and 25 of about 50, counted in the modules."""
_GATE_BYTES = 4


@dataclass(frozen=True)
class Costs:
    """Of a part of the model: operations, and the seconds of communication by kind, of a forward pass; `passes`: decoder layers' worth of launches."""

    flops: float = 0.0
    tp_s: float = 0.0
    ep_s: float = 0.0
    cp_s: float = 0.0
    signals_s: float = 0.0
    passes: float = 0.0

    def __add__(self, other: Costs) -> Costs:
        return Costs(
            self.flops + other.flops,
            self.tp_s + other.tp_s,
            self.ep_s + other.ep_s,
            self.cp_s + other.cp_s,
            self.signals_s + other.signals_s,
            self.passes + other.passes,
        )

    def times(self, factor: float) -> Costs:
        """`factor` times as much."""
        return Costs(self.flops * factor, self.tp_s * factor, self.ep_s * factor, self.cp_s * factor, self.signals_s * factor, self.passes * factor)

    def backward(self, tp: float = 1.0) -> Costs:
        """Twice the arithmetic, the same communication but for `tp` times the tensor-parallel one, and no signals."""
        return Costs(2 * self.flops, tp * self.tp_s, self.ep_s, self.cp_s, 0.0, self.passes)


@dataclass(frozen=True)
class Work:
    """Forward costs of the parts of one micro-batch."""

    shapes: Activations
    cluster: Cluster

    def attention(self) -> Costs:
        model, layout, T = self.shapes.model, self.shapes.layout, self.shapes.positions
        query, keys = model.num_attention_heads * model.head_dim / layout.tp, model.num_query_groups * model.head_dim / layout.tp
        hidden, b = model.hidden_size, self.shapes.width
        linear = 2 * T * hidden * (2 * query + 2 * keys)
        scores = 4 * T * self.shapes.batch.row_tokens / 2 * query
        tp_s = 2 * self.cluster.collective_s(T * hidden * b, layout.tp, 1)
        cp_s = 2 * self.cluster.collective_s(T * layout.cp * keys * b, layout.cp, layout.tp)
        return Costs(linear + scores, tp_s=tp_s, cp_s=cp_s, passes=0.4)

    def experts(self) -> Costs:
        model, layout, s = self.shapes.model, self.shapes.layout, self.shapes.slice
        hidden, b, top = model.hidden_size, self.shapes.width, model.experts_per_token
        here = s * top * layout.etp
        flops = 2 * s * hidden * model.num_experts + 6 * here * hidden * model.expert_ffn_hidden_size / layout.etp
        cluster = self.cluster
        exchange = 2 * cluster.all_to_all_s(s * top * hidden * b, layout.ep, layout.etp) + cluster.all_to_all_s(s * top * _GATE_BYTES, layout.ep, layout.etp)
        gather = 2 * cluster.collective_s(here * hidden * b, layout.etp, 1) + cluster.collective_s(here * _GATE_BYTES, layout.etp, 1)
        balance_s = cluster.signal_s(layout.tp * layout.cp, 1) if model.moe_balancing != "none" else 0.0
        return Costs(flops, tp_s=gather, ep_s=exchange, signals_s=cluster.signal_s(layout.etp * layout.ep, 1) + balance_s, passes=0.6)

    def dense(self) -> Costs:
        model, layout, T = self.shapes.model, self.shapes.layout, self.shapes.positions
        tp_s = 2 * self.cluster.collective_s(T * model.hidden_size * self.shapes.width, layout.tp, 1)
        return Costs(6 * T * model.hidden_size * model.ffn_hidden_size / layout.tp, tp_s=tp_s, passes=DENSE)

    def tap(self) -> Costs:
        clvr, layout, T = self.shapes.model.clvr, self.shapes.layout, self.shapes.positions
        hidden, (seen, width) = self.shapes.model.hidden_size, kv_shape(self.shapes.model)
        tiles, looks = self.shapes.batch.tiles, clvr.inner_iterations
        if clvr.fusion == "addition":
            return Costs(2 * tiles * seen * width * hidden, passes=DENSE)
        heads, keys = clvr.num_heads * clvr.head_dim / layout.tp, clvr.num_kv_heads * clvr.head_dim / layout.tp
        mixed = 4 * tiles * vision_tokens(self.shapes.model.vision) * self.shapes.model.vision.hidden_size * LORA_RANK * len(clvr.kv_layers)
        image = 4 * tiles * seen * width * keys + mixed
        query = 4 * T * hidden * heads + 4 * T * self.shapes.batch.visible[1] * seen * heads + 4 * T * hidden * clvr.ffn_hidden / layout.tp
        exchanges = 2 * looks * (2 if clvr.ffn_hidden else 1)
        return Costs(image + looks * query, tp_s=exchanges * self.cluster.collective_s(T * hidden * self.shapes.width, layout.tp, 1), passes=looks * TAP)

    def tap_images(self) -> Costs:
        """In the backward pass of a tap: gradients of what its keys and its values see, summed over tensor parallelism."""
        if self.shapes.model.clvr.fusion == "addition":
            return Costs()
        tokens, width = kv_shape(self.shapes.model)
        summed = self.shapes.batch.tiles * tokens * width * self.shapes.width
        return Costs(tp_s=2 * self.cluster.all_reduce_s(summed, self.shapes.layout.tp, 1))

    def embedding(self, gradients: bool) -> Costs:
        """Of the tokens: every tensor-parallel rank has a part of the vocabulary, and then a slice of the sequence, whose gradients are gathered."""
        moved, tp = self.shapes.positions * self.shapes.model.hidden_size * self.shapes.width, self.shapes.layout.tp
        return Costs(tp_s=self.cluster.all_reduce_s(moved, tp, 1) + (self.cluster.collective_s(moved, tp, 1) if gradients else 0.0))

    def vision(self) -> Costs:
        """The whole encoder over this micro-batch's tiles, on every tensor- and context-parallel rank alike."""
        vision = self.shapes.model.vision
        tokens, wide = vision_tokens(vision) + 1, vision.hidden_size
        layer = 2 * tokens * (4 * wide**2 + 2 * wide * vision.ffn_hidden_size) + 4 * tokens**2 * wide
        patches = 2 * tokens * 3 * vision.patch_size**2 * wide
        pictures = 2 if self.shapes.model.clvr.active_taps and self.shapes.model.clvr.memory == "shuffled" else 1
        return Costs(pictures * self.shapes.batch.tiles * (vision.num_layers * layer + patches), passes=VIT_LAYER * vision.num_layers)

    def projector(self) -> Costs:
        vision, hidden = self.shapes.model.vision, self.shapes.model.hidden_size
        small = tokens_per_tile(vision)
        return Costs(2 * self.shapes.batch.tiles * small * (vision.hidden_size * vision.downsample**2 * hidden + hidden**2))

    def head(self) -> Costs:
        model, layout, T = self.shapes.model, self.shapes.layout, self.shapes.positions
        gather = self.cluster.collective_s(T * model.hidden_size * self.shapes.width, layout.tp, 1)
        return Costs(2 * T * model.hidden_size * model.vocab_size / layout.tp, tp_s=gather, signals_s=2 * self.cluster.signal_s(layout.tp, 1))


@dataclass(frozen=True)
class Parts:
    """Of one micro-batch: a decoder layer of each kind, a tap, the encoder, the projector with the embedding, the output layer."""

    layers: Mapping[Kind, Costs]
    tap: Costs
    vision: Costs
    projector: Costs
    head: Costs

    def of(self, held: Held) -> Costs:
        """Of what a pipeline rank holds."""
        layers = ((self.layers[kind], count) for kind, count in held.layers)
        total = Costs()
        for cost, count in (*layers, (self.tap, held.taps), (self.vision, held.encoders), (self.projector, held.first), (self.head, held.last)):
            if count:
                total += cost.times(count)
        return total


@dataclass(frozen=True)
class Held:
    """What a pipeline rank holds of the model, and what it sends: `messages` a micro-batch, with `streams` hidden states and `features` sets of ViT
    features."""

    layers: Rows
    taps: int
    encoders: int
    first: int
    last: int
    messages: int
    streams: int
    features: int


def held_by(stages: Sequence[Stage], layers: Rows) -> Held:
    """Of one rank's chunks, which have `layers` together."""
    sending = [stage for stage in stages if not stage.last]
    return Held(
        layers,
        sum(len(stage.asks) for stage in stages),
        sum(stage.runs_vision for stage in stages),
        sum(stage.first for stage in stages),
        sum(stage.last for stage in stages),
        len(sending),
        sum(1 + len(stage.sends) for stage in sending),
        sum(stage.sends_features for stage in sending),
    )


def parts(work: Work, recompute: str, vision_trains: bool, has_taps: bool, gradients: bool, alike: Parts | None = None) -> Parts:
    """Forward costs; with `gradients` those of the backward pass, of everything that trains and of what is computed again, are added. `alike`: of a layout
    that differs in how it splits experts alone; then only the layers are counted."""
    layers = _layers(work, recompute, gradients)
    if alike is not None:
        return replace(alike, layers=layers)
    tap, vision, head = work.tap() if has_taps else Costs(), work.vision(), work.head()
    projector, embedding = work.projector(), work.embedding(gradients)
    if not gradients:
        return Parts(layers, tap, vision, projector + embedding, head)
    return Parts(
        layers,
        tap.times(1 + (recompute == "full")) + tap.backward(tp=1.5) + (work.tap_images() if has_taps else Costs()),
        vision + vision.backward() if vision_trains else vision,
        projector + projector.backward() + embedding,
        head + head.backward(tp=2),
    )


def _layers(work: Work, recompute: str, gradients: bool) -> dict[Kind, Costs]:
    attention, feed_forward = work.attention(), {"experts": work.experts(), "dense": work.dense()}
    forward = {kind: attention + feed_forward[kind] for kind in KINDS}
    if not gradients:
        return forward
    behind = {"experts": feed_forward["experts"].backward(), "dense": feed_forward["dense"].backward(tp=1.5)}
    again = {kind: {"none": Costs(), "selective": attention, "full": forward[kind]}[recompute] for kind in KINDS}
    return {kind: forward[kind] + attention.backward(tp=1.5) + behind[kind] + again[kind] for kind in KINDS}
