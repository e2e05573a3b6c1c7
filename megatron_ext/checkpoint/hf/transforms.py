"""How one of our tensors is made of its parts in a Hugging Face checkpoint, and taken apart again. There and back is the identity, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_ext.checkpoint.hf.names import Entry
from megatron_ext.config.schema import ModelConfig


def join(entry: Entry, parts: Sequence[torch.Tensor], model: ModelConfig) -> torch.Tensor:
    """Our tensor."""
    if entry.transform == "same":
        return parts[0]
    if entry.transform == "stack":
        return torch.cat(list(parts))
    query, key, value = (part.unflatten(0, (model.num_query_groups, -1)) for part in parts)
    return torch.cat([query, key, value], dim=1).flatten(0, 1)


def split(entry: Entry, full: torch.Tensor, model: ModelConfig) -> list[torch.Tensor]:
    """The parts, in the order of `entry.parts`, each contiguous."""
    if entry.transform == "same":
        return [full]
    if entry.transform == "stack":
        return [part.contiguous() for part in full.chunk(len(entry.parts))]
    heads = model.num_attention_heads // model.num_query_groups
    grouped = full.unflatten(0, (model.num_query_groups, -1))
    query, key, value = grouped.split([heads * model.head_dim, model.head_dim, model.head_dim], dim=1)
    return [part.flatten(0, 1).contiguous() for part in (query, key, value)]


def part_shapes(entry: Entry, full: Sequence[int], model: ModelConfig) -> list[tuple[int, ...]]:
    """The shapes of the parts of a tensor of shape `full`."""
    rows, rest = full[0] if full else 0, tuple(full[1:])
    if entry.transform == "same":
        return [tuple(full)]
    if entry.transform == "stack":
        return [(rows // len(entry.parts), *rest)] * len(entry.parts)
    query, group = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
    return [(query, *rest), (group, *rest), (group, *rest)]
