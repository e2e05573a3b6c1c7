"""Sizes that follow from a configuration: image tokens, data-parallel ranks, parameters. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ext.config.clvr_sizes import tap_numels
from megatron_ext.config.schema import ModelConfig, ParallelConfig, VisionConfig
from megatron_ext.config.vision_sizes import patches_per_side as patches_per_side
from megatron_ext.config.vision_sizes import tokens_per_tile as tokens_per_tile
from megatron_ext.config.vision_sizes import vision_tokens as vision_tokens


def data_parallel(parallel: ParallelConfig) -> int:
    """dp = num_ranks / (tp * pp * cp), rounded down; whether it divides is a rule of the layout."""
    return parallel.num_ranks // (parallel.tp * parallel.pp * parallel.cp)


def length_multiple(tp: int, cp: int) -> int:
    """What the length of a row, or of a packed sample, must divide by: context parallelism cuts it into two parts a rank, sequence parallelism each rank's part
    into tp."""
    return tp * (2 * cp if cp > 1 else 1)


def expert_layers(model: ModelConfig) -> tuple[int, ...]:
    """The layers that have experts, in order. Routes and loads know these layers alone.

    >>> expert_layers(ModelConfig(num_layers=4, dense_layers=(0,)))
    (1, 2, 3)
    """
    return tuple(layer for layer in range(model.num_layers) if layer not in model.dense_layers) if model.num_experts else ()


def expert_layers_among(model: ModelConfig, layers: range) -> slice:
    """Which of `expert_layers` are among consecutive layers.

    >>> expert_layers_among(ModelConfig(num_layers=4, dense_layers=(0,)), range(2, 4))
    slice(1, 3, None)
    """
    experts = expert_layers(model)
    return slice(sum(layer < layers.start for layer in experts), sum(layer < layers.stop for layer in experts))


@dataclass(frozen=True)
class Parameters:
    """How many parameters each part of a model has. `active` are those that one token passes through (experts_per_token of num_experts)."""

    vision: int
    projector: int
    embeddings: int
    attention: int
    router: int
    experts: int
    dense: int
    norms: int
    clvr: int
    experts_active: int

    @property
    def total(self) -> int:
        return self.vision + self.projector + self.embeddings + self.attention + self.router + self.experts + self.dense + self.norms + self.clvr

    @property
    def active(self) -> int:
        return self.total - self.experts + self.experts_active


def count_parameters(model: ModelConfig) -> Parameters:
    """The parameters of the whole model, before it is split over ranks."""
    hidden, layers, sparse = model.hidden_size, model.num_layers, len(expert_layers(model))
    query, key_value = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
    expert = 3 * hidden * model.expert_ffn_hidden_size
    return Parameters(
        vision=_vision(model.vision) if model.vision.enabled else 0,
        projector=_projector(model.vision, hidden) if model.vision.enabled else 0,
        embeddings=model.vocab_size * hidden * (1 if model.tie_embeddings else 2),
        attention=layers * (hidden * (query + 2 * key_value) + query * hidden),
        router=sparse * model.num_experts * hidden,
        experts=sparse * model.num_experts * expert,
        dense=(layers - sparse) * 3 * hidden * model.ffn_hidden_size,
        norms=layers * (2 * hidden + 2 * model.head_dim) + hidden,
        clvr=len(model.clvr.active_taps) * sum(tap_numels(model)),
        experts_active=sparse * model.experts_per_token * expert,
    )


def _vision(vision: VisionConfig) -> int:
    width, ffn = vision.hidden_size, vision.ffn_hidden_size
    norm = 2 * width if vision.norm == "layernorm" else width
    embeddings = width + 3 * vision.patch_size**2 * width + width + (vision_tokens(vision) + 1) * width
    attention = 3 * width**2 + (3 * width if vision.qkv_bias else 0) + (2 * width if vision.qk_norm else 0) + width**2 + width
    layer = 2 * norm + attention + 2 * width * ffn + ffn + width + 2 * width
    return embeddings + vision.num_layers * layer


def _projector(vision: VisionConfig, hidden: int) -> int:
    width = vision.hidden_size * vision.downsample**2
    return 2 * width + width * hidden + hidden + hidden**2 + hidden
