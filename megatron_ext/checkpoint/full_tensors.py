"""A model's weights as layout-independent full tensors, there and back: what is published to rollouts, compared between layouts, exported.

    every rank's parts --gather over tensor-parallel ranks, then over expert-parallel ranks--> name, full tensor      (`full_tensors`)
    full tensors --every rank takes its part--> parameters                                                            (`load_full_tensors`)

Names are those of the model on one rank: experts carry their global index, a gated `linear_fc1` is [gate; up].
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule

from megatron_ext.errors import CheckpointError
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.parallel.shards import Shard, names_over_ranks, shard_of

_SPLIT_MODULES = (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)


def full_tensors(
    model: MegatronModule, context: ParallelContext, of: Callable[[torch.nn.Parameter], torch.Tensor] = torch.Tensor.detach
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and full tensor of every parameter, one at a time, the same on all ranks. Collective: every rank must run through it to the end.

    `of` says what is gathered, by default the weight itself; another tensor of the parameter's shape, such as its gradient, has the same layout.
    A tensor that every rank holds whole is not copied: it changes when the weights do. Raises RuntimeError for a parameter that is split but not marked.
    """
    _require_marks(model)
    for name, parameter in model.named_parameters():
        shard = _shard(name, parameter, model, context)
        full = _gather_parts(of(parameter), shard, context)
        if not shard.is_expert:
            yield shard.name, full
            continue
        experts = _all_gather(full, context.pgs.ep)
        yield from zip(names_over_ranks(name, _experts_per_rank(model, context), context), experts, strict=True)


@torch.no_grad()
def load_full_tensors(model: MegatronModule, tensors: Mapping[str, torch.Tensor], context: ParallelContext) -> None:
    """Copies this rank's part of every full tensor into the model, converting to its dtype. Not collective, but every rank comes to the same verdict.

    Raises CheckpointError, with nothing changed, for a tensor that is missing, unexpected, or of another shape.
    """
    _require_marks(model)
    shards = [(_shard(name, parameter, model, context), parameter) for name, parameter in model.named_parameters()]
    shapes = {
        full_name: shard.full_shape(parameter.shape)
        for (name, parameter), (shard, _) in zip(model.named_parameters(), shards, strict=True)
        for full_name in names_over_ranks(name, _experts_per_rank(model, context), context)
    }
    _check(shapes, tensors)
    for shard, parameter in shards:
        parameter.copy_(shard.take(tensors[shard.name]))


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


def _check(shapes: dict[str, tuple[int, ...]], tensors: Mapping[str, torch.Tensor]) -> None:
    for name, shape in shapes.items():
        if name not in tensors:
            raise CheckpointError(name, "is a parameter of the model and not among the tensors given", "they are of another model")
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(name, f"has shape {tuple(tensors[name].shape)}, this model wants {shape}", "they are of another model")
    for name in tensors:
        if name not in shapes:
            raise CheckpointError(name, "is not a parameter of this model", "they are of another model")


def _require_marks(model: MegatronModule) -> None:
    """Megatron marks split parameters as it initialises them. A model built with `perform_initialization=False` has none: its shards would pass for whole
    tensors here, and its gradient norm would leave out most ranks."""
    for path, module in model.named_modules():
        if isinstance(module, _SPLIT_MODULES) and module.weight is not None and not getattr(module.weight, "tensor_model_parallel", False):
            raise RuntimeError(f"{path}.weight is split over ranks but not marked tensor_model_parallel: build the model with perform_initialization=True")


def _shard(name: str, parameter: torch.nn.Parameter, model: MegatronModule, context: ParallelContext) -> Shard:
    return shard_of(name, parameter, _experts_per_rank(model, context), context)


def _experts_per_rank(model: MegatronModule, context: ParallelContext) -> int:
    return int(model.config.num_moe_experts or 0) // context.layout.ep
