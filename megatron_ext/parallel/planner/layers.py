"""What a decoder layer has behind its attention: experts, or one SwiGLU. Without torch.

A model is a row of kinds, and so is a stage: what differs between kinds is looked up by kind, and what is counted is counted by kind.
"""

from __future__ import annotations

from itertools import groupby
from typing import Literal

from megatron_ext.config.schema import ModelConfig
from megatron_ext.config.sizes import expert_layers

Kind = Literal["experts", "dense"]
KINDS: tuple[Kind, ...] = ("experts", "dense")
Rows = tuple[tuple[Kind, int], ...]
"""Layers in order, as many of a kind as follow each other: three of experts and a dense one are (("experts", 3), ("dense", 1))."""


def layer_kinds(model: ModelConfig) -> tuple[Kind, ...]:
    """Of every layer.

    >>> layer_kinds(ModelConfig(num_layers=3, dense_layers=(0,)))
    ('dense', 'experts', 'experts')
    """
    with_experts = set(expert_layers(model))
    return tuple("experts" if layer in with_experts else "dense" for layer in range(model.num_layers))


def rows_of(kinds: tuple[Kind, ...]) -> Rows:
    """
    >>> rows_of(("dense", "experts", "experts"))
    (('dense', 1), ('experts', 2))
    """
    return tuple((kind, len(list(layers))) for kind, layers in groupby(kinds))


def totals(rows: Rows) -> Rows:
    """Of every kind that occurs, in the order of KINDS.

    >>> totals((("dense", 1), ("experts", 2), ("dense", 1)))
    (('experts', 2), ('dense', 2))
    """
    counts = ((kind, sum(count for other, count in rows if other == kind)) for kind in KINDS)
    return tuple((kind, count) for kind, count in counts if count)
