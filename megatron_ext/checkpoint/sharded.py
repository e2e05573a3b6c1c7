"""A model as Megatron saves and loads it: every tensor by its name in the whole model, with its full shape and the part of it that this rank holds.

The names do not depend on the layout, which is what lets another layout read them.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from megatron_ext.checkpoint.full_tensors import Model, as_chunks
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.parallel.shards import EMBEDDING


def sharded_model(model: Model, context: ParallelContext) -> dict[str, Any]:
    """Sharded tensors of the chunks that this rank holds. Their data are the parameters themselves.

    Tensors only: Megatron's linear layers also list an empty "extra state" as a pickled object, which nothing here needs.
    """
    sharded: dict[str, Any] = {}
    for chunk in as_chunks(model):
        entries = chunk.sharded_state_dict(metadata={"dp_cp_group": context.pgs.dp_cp})  # type: ignore[operator]
        for own_name, entry in entries.items():
            name = whole_name(own_name, chunk)
            # A frozen encoder may stand in several chunks of one rank: the first one's is saved, and what is loaded goes to all.
            if not isinstance(entry, ShardedObject) and name not in sharded:
                sharded[name] = _on_its_stage(entry, name, chunk)
    return sharded


def whole_name(name: str, chunk: torch.nn.Module) -> str:
    """A tensor's name in the whole model. Only a tied output layer's weight has another one: it is a copy of the embedding."""
    tied = name == "output_layer.weight" and getattr(chunk.output_layer.weight, "shared_embedding", False)  # type: ignore[union-attr]
    return EMBEDDING if tied else name


def _on_its_stage(entry: Any, name: str, chunk: Any) -> Any:
    """Copies on later pipeline stages (a tied embedding, a frozen encoder) are replicas of what the first stage saves."""
    if not isinstance(entry, ShardedTensor):
        return entry
    if name == EMBEDDING:
        entry.key = name
    if chunk.stage.number and (name == EMBEDDING or name.startswith("vision.")) and not isinstance(entry.replica_id, int):
        entry.replica_id = (chunk.stage.number, *entry.replica_id[1:])
    return entry
