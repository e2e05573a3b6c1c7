"""Sizes of CLVR that follow from a configuration: what a tap looks at, what travels to it, its parameters. Arithmetic only.

sources   [tokens, width] of a tile: what the model's first stage makes and a later one may be sent        -> kept layers side by side
kv        [tokens, width] of a tile: what keys and values are made of, after the tap has mixed and folded    -> kv_shape
"""

from __future__ import annotations

from megatron_ext.config.clvr_schema import ClvrConfig
from megatron_ext.config.schema import ModelConfig
from megatron_ext.config.vision_sizes import tokens_per_tile, vision_tokens

LORA_RANK = 8
"""Of the map that each of several ViT layers has: 16 x its width parameters a layer, against the square of the width for a full one."""


def source_shape(model: ModelConfig) -> tuple[int, int]:
    """(tokens, width) of a tile's features as they reach the taps."""
    if model.clvr.kv_tokens == "projected":
        return tokens_per_tile(model.vision), model.hidden_size
    return vision_tokens(model.vision), model.vision.hidden_size * max(1, len(model.clvr.kv_layers))


def kv_shape(model: ModelConfig) -> tuple[int, int]:
    """(tokens, width) of a tile as a tap looks at it: keys, values and what a position may see count these tokens.

    >>> kv_shape(ModelConfig(clvr=ClvrConfig(kv_tokens="unshuffled")))
    (16, 256)
    """
    vision = model.vision
    if model.clvr.kv_tokens == "raw":
        return vision_tokens(vision), vision.hidden_size
    return tokens_per_tile(vision), model.hidden_size if model.clvr.kv_tokens == "projected" else vision.hidden_size * vision.downsample**2


def gate_numel(clvr: ClvrConfig, hidden: int) -> int:
    """Gate parameters of a tap: a weight for each channel and a bias, where the hidden state decides."""
    return {"scalar": 1, "channel": hidden, "dynamic": hidden + 1}[clvr.gate_kind] if clvr.has_gate else 0


def tap_numels(model: ModelConfig, tp: int = 1) -> tuple[int, ...]:
    """Sizes of one tap's parameters on a rank, in the order in which the module has them."""
    clvr, hidden, (tokens, width) = model.clvr, model.hidden_size, kv_shape(model)
    gate = (gate_numel(clvr, hidden),) if clvr.has_gate else ()
    learned = (tokens * width,) if clvr.memory == "learned" else ()
    if clvr.fusion == "addition":
        return (*gate, *learned, width, width, width * hidden)
    query, key_value, ffn = clvr.num_heads * clvr.head_dim // tp, clvr.num_kv_heads * clvr.head_dim // tp, clvr.ffn_hidden // tp
    layers, vision = len(clvr.kv_layers), model.vision.hidden_size
    mixed = (layers, layers * vision * LORA_RANK, layers * LORA_RANK * vision) if layers else ()
    behind = (hidden, hidden * ffn, ffn * hidden) if ffn else ()
    attention = (hidden * query, width * key_value, width * key_value, clvr.head_dim, clvr.head_dim, query * hidden)
    return (width, *gate, *learned, *mixed, width, width, hidden, *attention, *behind)
