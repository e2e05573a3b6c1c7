"""What the backward pass keeps of the forward pass, and what both need for a moment: bytes a rank, by formula. Without torch.

Counted tensor by tensor from our own modules, as autograd keeps them (`tests/unit/parallel/test_activations.py` holds the sum against what torch really keeps).
Let T be the positions of a micro-batch on this rank before sequence parallelism, s = T / tp its slice, K experts a token, b bytes a number; q, kv the widths of
queries and keys on this rank; Te = s K etp the tokens of the rank's experts when they are even; F expert width / etp:

    layer       b (4 s H + T (q + 2 kv) + [T q, where groups share keys] + 2 T q + 2 Tk q) + 4 T N, and by its kind
                experts  s (9 E + 32 K) + Te (b (H + 2 F) + 4)
                dense    b 5 T F / tp        F: its own width; both halves of the gate, their copies and their product
                Tk: keys that this rank's queries read; cp > 1: whole rows, read twice and a bit
    ViT         b V (10 H_vit + 2 F_vit) a layer and tile, when it trains
    tap         keys and values of all tiles repeated for its heads, a mask [T, V], and about 4 T N' D
    recompute   selective: s H b in place of attention;  full: s H b for a block of layers, one block at a time in full

Experts are taken to be evenly loaded; `allowance` in `fit.py` covers the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from megatron_ext.config.clvr_sizes import kv_shape, source_shape
from megatron_ext.config.schema import ModelConfig
from megatron_ext.config.sizes import tokens_per_tile, vision_tokens
from megatron_ext.parallel.plan import Layout
from megatron_ext.parallel.planner.layers import KINDS, Kind
from megatron_ext.parallel.stages import Stage


@dataclass(frozen=True)
class Microbatch:
    """One forward pass of one rank. `rows` of `row_tokens` each, `packed` into one or padded side by side; `row_tiles` image tiles a row, none shared."""

    rows: int
    row_tokens: int
    row_tiles: int
    packed: bool

    @property
    def tokens(self) -> int:
        return self.rows * self.row_tokens

    @property
    def tiles(self) -> int:
        """What the encoder runs."""
        return self.rows * self.row_tiles

    @property
    def visible(self) -> tuple[int, int]:
        """(rows of the tensor, tiles each of them may look at)."""
        return (1, self.rows * self.row_tiles) if self.packed else (self.rows, self.row_tiles)


@dataclass(frozen=True)
class Kernels:
    """What depends on the device. `fused_norms`: a norm keeps its input and nothing else (GPUs); `varlen`: packed rows are one call that repeats no keys."""

    fused_norms: bool = True
    varlen: bool = True


GPU = Kernels()
CPU = Kernels(fused_norms=False, varlen=False)


@dataclass(frozen=True)
class Activations:
    """Formulas of one model, layout and micro-batch."""

    model: ModelConfig
    layout: Layout
    batch: Microbatch
    vision_trains: bool
    kernels: Kernels = GPU

    @cached_property
    def width(self) -> int:
        return 2 if self.model.dtype == "bf16" else 4

    @cached_property
    def positions(self) -> int:
        """T."""
        return -(-self.batch.tokens // self.layout.cp)

    @cached_property
    def slice(self) -> int:
        """s."""
        return -(-self.positions // self.layout.tp)

    @cached_property
    def stream_bytes(self) -> int:
        """One hidden state of the slice."""
        return self.slice * self.model.hidden_size * self.width

    @cached_property
    def attention_bytes(self) -> int:
        """From the normed input, not counted here, to the projection."""
        model, b, T = self.model, self.width, self.positions
        query = model.num_attention_heads * model.head_dim // self.layout.tp
        keys = model.num_query_groups * model.head_dim // self.layout.tp
        grouped = model.num_attention_heads > model.num_query_groups
        kept = T * (query + 2 * keys) * b + (T * query * b if grouped else 0) + self._normed(T * query + T * keys) + 2 * T * query * b
        if self.batch.packed and self.kernels.varlen and self.layout.cp == 1 and b == 2:
            kept += 2 * T * keys * b
        else:
            kept += int(2 * self._keys_read() * query * b)
        return kept + 4 * T * model.num_attention_heads // self.layout.tp

    @cached_property
    def feed_forward_bytes(self) -> Mapping[Kind, int]:
        """What stands behind the attention, from the normed input, not counted here."""
        return {"experts": self._experts_bytes(), "dense": 5 * self.positions * self.model.ffn_hidden_size // self.layout.tp * self.width}

    def _experts_bytes(self) -> int:
        """Router and experts."""
        model, b, s = self.model, self.width, self.slice
        top, experts = model.experts_per_token, model.num_experts
        routing = s * (9 * experts + 32 * top) if model.moe_balancing != "none" else s * (5 * experts + 24 * top)
        here = s * top * self.layout.etp
        return routing + here * ((model.hidden_size + 2 * model.expert_ffn_hidden_size // self.layout.etp) * b + 4)

    @cached_property
    def layer_bytes(self) -> Mapping[Kind, int]:
        """A decoder layer without recompute: two norms with input and output, attention, and what its kind has."""
        common = 4 * self.stream_bytes + 2 * self._normed(self.slice * self.model.hidden_size) + self.attention_bytes
        return {kind: common + self.feed_forward_bytes[kind] for kind in KINDS}

    @cached_property
    def tap_bytes(self) -> int:
        """A CLVR adapter."""
        return self.tap_image_bytes + self.tap_query_bytes

    @cached_property
    def tap_image_bytes(self) -> int:
        """Its keys and values, once a tile and gathered for the rows; kept whatever is recomputed. Of several ViT layers, those with their low-rank maps."""
        clvr, b, tiles, (seen, width) = self.model.clvr, self.width, self.batch.tiles, kv_shape(self.model)
        mixed = 3 * tiles * vision_tokens(self.model.vision) * self.model.vision.hidden_size * len(clvr.kv_layers) * b if clvr.fusion == "attention" else 0
        if clvr.fusion == "addition":
            return tiles * seen * (2 * width + 2 * self.model.hidden_size) * b
        keys = clvr.num_kv_heads * clvr.head_dim // self.layout.tp
        return mixed + tiles * seen * (2 * width + keys) * b + self._normed(tiles * seen * keys)

    @cached_property
    def tap_query_bytes(self) -> int:
        """Its query and mask for all positions, keys and values repeated for its heads; as often as it looks."""
        clvr, b, T, seen = self.model.clvr, self.width, self.positions, kv_shape(self.model)[0]
        gated = self.stream_bytes * (2 if clvr.gate_kind == "dynamic" else 1) if clvr.has_gate else 0
        if clvr.fusion == "addition":
            return T * self.model.hidden_size * b + gated
        heads = clvr.num_heads * clvr.head_dim // self.layout.tp
        rows, tiles = self.batch.visible
        memory = 2 * rows * tiles * seen * heads * b
        mask = T * tiles * seen * b
        query = self.stream_bytes + self._normed(self.slice * self.model.hidden_size) + 4 * T * heads * b + self._normed(T * heads)
        behind = self._normed(self.slice * self.model.hidden_size) + 2 * T * clvr.ffn_hidden // self.layout.tp * b + self.stream_bytes if clvr.ffn_hidden else 0
        look = memory + mask + query + gated + behind + 4 * T * clvr.num_heads // self.layout.tp
        return clvr.inner_iterations * look

    def vision_bytes(self, runs: bool) -> int:
        """The encoder and the pictures: a frozen one keeps its features alone."""
        vision, b, tiles = self.model.vision, self.width, self.batch.tiles
        tokens, wide = vision_tokens(vision) + 1, vision.hidden_size
        features = tiles * tokens * wide * b
        if not runs:
            return features
        if not self.vision_trains:
            return features
        pixels = tiles * 3 * vision.image_size**2 * b
        normed = 2 * wide if vision.qk_norm else 0
        norms = self._normed(tiles * tokens * (2 * wide + normed)) if vision.norm == "rmsnorm" else tiles * tokens * 16
        layer = tiles * tokens * (10 * wide + normed + 2 * vision.ffn_hidden_size) * b + norms + 4 * tiles * tokens * vision.num_attention_heads
        return features + pixels + vision.num_layers * layer

    @cached_property
    def projector_bytes(self) -> int:
        vision, tiles = self.model.vision, self.batch.tiles
        return tiles * (2 * vision_tokens(vision) * vision.hidden_size + 2 * tokens_per_tile(vision) * self.model.hidden_size) * self.width

    def payload_bytes(self, stage: Stage) -> int:
        """What a stage sends to the next."""
        if stage.last:
            return 0
        tokens, width = source_shape(self.model)
        features = self.batch.tiles * tokens * width * self.width if stage.sends_features else 0
        return (1 + len(stage.sends)) * self.stream_bytes + features

    @cached_property
    def head_bytes(self) -> int:
        """Input of the output layer, kept."""
        return 2 * self.stream_bytes + self._normed(self.slice * self.model.hidden_size)

    @cached_property
    def logits_bytes(self) -> int:
        """While the loss is computed and its gradient begins: the logits in the model's dtype, which `model/token_scores.py` overwrites with their gradient."""
        return self.positions * self.model.vocab_size // self.layout.tp * self.width

    @cached_property
    def workspace_bytes(self) -> Mapping[Kind, int]:
        """What the backward pass of one layer needs beside what was kept. Experts: gradients around them, their activations made again, and, where the kernel
        wants weights stacked, a copy of the layer's experts and its gradient. Dense: gradients of what it keeps."""
        model, b = self.model, self.width
        here, ffn = self.slice * model.experts_per_token * self.layout.etp, model.expert_ffn_hidden_size // self.layout.etp
        stacked = 2 * 3 * model.num_experts // self.layout.ep * ffn * model.hidden_size * b if b == 2 else 0
        around = 3 * self.positions * model.hidden_size * b
        return {"experts": here * (3 * model.hidden_size + 6 * ffn) * b + stacked + around, "dense": self.feed_forward_bytes["dense"] + around}

    def _normed(self, numel: int) -> int:
        """What a norm keeps beside its input. Without a fused kernel, torch's RMSNorm keeps the normed numbers too, in float32."""
        if self.kernels.fused_norms:
            return 0
        return 4 * numel if self.width == 4 else 6 * numel

    def _keys_read(self) -> float:
        """Positions of keys, repeated for the query heads, that this rank's queries are given. Under context parallelism the two parts of a sample read all
        keys before them: (2 cp + 1) / (2 cp) times the sample together."""
        cp = self.layout.cp
        return self.positions if cp == 1 else self.batch.tokens * (2 * cp + 1) / (2 * cp)
