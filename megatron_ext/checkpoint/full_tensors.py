"""A model's weights as layout-independent full tensors: what is compared between layouts, and exported.

    every rank's parts --gather over tensor-parallel, then expert-parallel ranks, then from stage to stage--> name, full tensor   (`full_tensors`)

Buffers that a checkpoint keeps (a router's expert bias) are weights like any other here. Names are those of the model on one rank: experts carry their global
index, a gated `linear_fc1` is [gate; up].
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.parallel.shards import Shard, names_over_ranks, shard_of

_SPLIT_MODULES = (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)


Model = torch.nn.Module | Sequence[torch.nn.Module]
"""One model, or the chunks of it that a pipeline rank holds."""
Pick = Callable[[torch.Tensor], torch.Tensor]


def full_tensors(model: Model, context: ParallelContext, of: Pick = torch.Tensor.detach) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and full tensor of every parameter and persistent buffer, one at a time, the same on all ranks. Collective: every rank must run to the end.

    `of` says what is gathered, by default the weight itself; another tensor of the parameter's shape, such as its gradient, has the same layout.
    A tensor that every rank holds whole is not copied: it changes when the weights do. Raises RuntimeError for a parameter that is split but not marked.
    """
    chunks = as_chunks(model)
    _require_marks(chunks)
    if context.layout.pp == 1:
        yield from _own_tensors(chunks, context, of)
        return
    group = context.pgs.pp
    listed: list[Any] = [None] * group.size()
    dist.all_gather_object(listed, list(_announced(chunks, context, of)), group=group)
    seen: set[str] = set()
    for stage, announced in enumerate(listed):
        own = iter(_own_tensors(chunks, context, of)) if stage == group.rank() else None
        for name, shape, dtype in announced:
            full = next(own)[1].contiguous() if own is not None else torch.empty(shape, dtype=dtype, device=context.device)
            if name in seen:  # a frozen encoder, or a tied embedding, that an earlier stage has given
                continue
            dist.broadcast(full, dist.get_global_rank(group, stage), group=group)
            yield name, full
        seen |= {name for name, _, _ in announced}


def as_chunks(model: Model) -> list[torch.nn.Module]:
    """
    >>> len(as_chunks(torch.nn.Linear(1, 1)))
    1
    """
    return [model] if isinstance(model, torch.nn.Module) else list(model)


def own_weights(model: Model, context: ParallelContext) -> Iterator[tuple[str, torch.Tensor, Shard]]:
    """This rank's parameters and persistent buffers by their own names, and where each stands in the whole model. Not collective.

    Raises RuntimeError for a parameter that is split but not marked.
    """
    chunks = as_chunks(model)
    _require_marks(chunks)
    yield from _weights(chunks, context)


def _weights(chunks: list[torch.nn.Module], context: ParallelContext) -> Iterator[tuple[str, torch.Tensor, Shard]]:
    for chunk in chunks:
        kept = chunk.state_dict().keys()
        buffers = ((name, buffer) for name, buffer in chunk.named_buffers() if name in kept)
        for name, weight in (*chunk.named_parameters(), *buffers):
            yield name, weight, shard_of(name, weight, _experts_per_rank(chunk, context), context)


def _own_tensors(chunks: list[torch.nn.Module], context: ParallelContext, of: Pick) -> Iterator[tuple[str, torch.Tensor]]:
    """Full tensors of the weights that this pipeline rank holds."""
    for name, weight, shard in _weights(chunks, context):
        full = _gather_parts(of(weight), shard, context)
        if not shard.is_expert:
            yield shard.name, full
            continue
        experts = _all_gather(full, context.pgs.ep)
        yield from zip(names_over_ranks(name, _experts_per_rank(chunks[0], context), context), experts, strict=True)


def _announced(chunks: list[torch.nn.Module], context: ParallelContext, of: Pick) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """What `_own_tensors` will yield, without gathering it."""
    for name, weight, shard in _weights(chunks, context):
        names = names_over_ranks(name, _experts_per_rank(chunks[0], context), context) if shard.is_expert else [shard.name]
        for full_name in names:
            yield full_name, shard.full_shape(weight.shape), of(weight).dtype


def digest(tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """SHA-256 of each tensor's dtype, shape and bytes: equal digests are equal tensors, on every rank and in every layout."""
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    return {name: _sha256(tensor) for name, tensor in pairs}


def _sha256(tensor: torch.Tensor) -> str:
    plain = tensor.detach().cpu().contiguous()
    hashed = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)}".encode())
    hashed.update(plain.flatten().view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def _gather_parts(part: torch.Tensor, shard: Shard, context: ParallelContext) -> torch.Tensor:
    if shard.dim is None:
        return part
    return shard.join(_all_gather(part, context.pgs.expt_tp if shard.is_expert else context.pgs.tp))


def _all_gather(part: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    if group.size() == 1:
        return [part]
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return parts


def _require_marks(chunks: list[torch.nn.Module]) -> None:
    """Megatron marks split parameters as it initialises them. A model built with `perform_initialization=False` has none: its shards would pass for whole
    tensors here, and its gradient norm would leave out most ranks."""
    for path, module in (found for chunk in chunks for found in chunk.named_modules()):
        if isinstance(module, _SPLIT_MODULES) and module.weight is not None and not getattr(module.weight, "tensor_model_parallel", False):
            raise RuntimeError(f"{path}.weight is split over ranks but not marked tensor_model_parallel: build the model with perform_initialization=True")


def _experts_per_rank(model: torch.nn.Module, context: ParallelContext) -> int:
    return int(model.config.num_moe_experts or 0) // context.layout.ep  # type: ignore[union-attr, arg-type]
