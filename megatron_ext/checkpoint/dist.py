"""Checkpoints that any layout can resume: model, Adam's moments, schedule, random states and whatever the caller wants back as JSON.

    step_000100/
      __0_0.distcp, __1_0.distcp, .metadata, common.pt, metadata.json     the tensors, in Megatron's torch_dist format
      state.json                                                          step, optimizer and schedule counters, the caller's state, the model's configuration
      rng_0000.safetensors                                                one per rank
      manifest.json                                                       sizes and SHA-256 of all of these

Tensors are stored whole, by name, so a run may change its layout in the middle; random states return only to the layout that saved them.
Hyperparameters (learning rate, decay) are those of the configuration that loads, never those of the checkpoint. A load checks everything it can before
it changes anything.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_ext.checkpoint import folder as files
from megatron_ext.checkpoint.folder import latest_step
from megatron_ext.checkpoint.full_tensors import Model, as_chunks
from megatron_ext.checkpoint.optimizer_state import OptimizerState
from megatron_ext.checkpoint.torch_dist import InProcessLoad, InProcessSave, check_tensors
from megatron_ext.config.schema import ModelConfig
from megatron_ext.errors import CheckpointError
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.parallel.shards import EMBEDDING

__all__ = ["latest_step", "load_checkpoint", "read_state", "save_checkpoint"]

_STATE = "state.json"
_FORMAT = 1
"""Raised when a reader of this format could no longer read what is written."""
_DEFAULTS = ModelConfig().model_dump(mode="json")
"""What a checkpoint that is older than a field of the model's configuration was trained with."""


def save_checkpoint(
    folder: Path,
    step: int,
    model: Model,
    optimizer: OptimizerState | None,
    state: dict[str, Any],
    context: ParallelContext,
    model_config: ModelConfig,
    keep: int,
) -> Path:
    """Writes `folder/step_...` and makes it the latest; keeps the newest `keep`. `model` is bare: one model, or the chunks of it that this rank holds.

    Collective; returns once the checkpoint is published.
    """
    draft = folder / f"{files.step_name(step)}.tmp"
    if context.rank == 0:
        files.prepare(folder, step)
    torch.distributed.barrier()
    # Replicas share the writing; on the way, Megatron checks that the shards cover every tensor exactly once.
    strategy = FullyParallelSaveStrategyWrapper(InProcessSave(), context.pgs.dp_cp)
    dist_checkpointing.save(_sharded(model, optimizer, context, loading=False), str(draft), strategy, validate_access_integrity=False)
    safetensors.torch.save_file(_rng_states(), draft / f"rng_{context.rank:04d}.safetensors")
    if context.rank == 0:
        record = {
            "format": _FORMAT,
            "step": step,
            "layout": asdict(context.layout),
            "updates": None if optimizer is None else optimizer.updates,
            "schedule": None if optimizer is None else optimizer.scheduled,
            "state": state,
            "model": model_config.model_dump(mode="json"),
        }
        files.write_synced(draft / _STATE, json.dumps(record, indent=1))
    manifest = _describe(draft, context)
    if context.rank == 0:
        files.publish(folder, step, draft, manifest, keep)
    torch.distributed.barrier()
    return folder / files.step_name(step)


def load_checkpoint(
    path: Path,
    model: Model,
    optimizer: OptimizerState | None = None,
    *,
    context: ParallelContext,
    model_config: ModelConfig,
) -> dict[str, Any]:
    """Loads a step folder, or the latest one in a folder, and returns the saved `state` with its `step`. Collective.

    With an optimizer, its moments and master weights are restored as well, and so are the random states when the layout is the one that saved them.
    Without, only weights: load them before `build_engine`, which copies them.
    Raises CheckpointError, with nothing changed, when the checkpoint is missing, damaged or of another model.
    """
    checkpoint = files.find_checkpoint(path)
    _verify(checkpoint, context)
    record = read_state(checkpoint)
    _compare({**_DEFAULTS, **record["model"]}, model_config.model_dump(mode="json"), checkpoint)
    if optimizer is not None and record["updates"] is None:
        raise CheckpointError(str(checkpoint), "holds no optimizer state", "load its weights only, as the start of a new stage")
    sharded = _sharded(model, optimizer, context, loading=True)
    check_tensors(load_preprocess(sharded)[0], checkpoint)
    loaded = dist_checkpointing.load(sharded, str(checkpoint), InProcessLoad(), validate_access_integrity=False)
    for chunk in as_chunks(model):
        chunk.load_state_dict({name: loaded["model"].get(_key(name, chunk)) for name in chunk.state_dict()}, strict=True)
    if optimizer is not None:
        optimizer.restore(loaded["optimizer"], record["updates"], int(record["schedule"] or 0))
        if record["layout"] == asdict(context.layout):
            _restore_rng(safetensors.torch.load_file(checkpoint / f"rng_{context.rank:04d}.safetensors"))
    return {**record["state"], "step": record["step"]}


def read_state(checkpoint: Path) -> dict[str, Any]:
    """`state.json` of a step folder."""
    path = checkpoint / _STATE
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(str(path), f"cannot be read ({error})", "the checkpoint is damaged: use another one") from error
    if record.get("format") != _FORMAT:
        raise CheckpointError(str(path), f"has format {record.get('format')!r}, this version reads {_FORMAT}", "use the version that wrote it")
    return dict(record)


def _describe(draft: Path, context: ParallelContext) -> dict[str, dict[str, Any]]:
    """The manifest of a written draft, its files divided among the ranks."""
    torch.distributed.barrier()
    names = sorted(path.name for path in draft.iterdir())
    described: list[Any] = [None] * context.world_size
    own = {name: files.describe_file(draft / name) for name in names[context.rank :: context.world_size]}
    torch.distributed.all_gather_object(described, own)
    return {name: entry for part in described for name, entry in part.items()}


def _verify(checkpoint: Path, context: ParallelContext) -> None:
    """Every file against the manifest, the files divided among the ranks; the first problem is raised on all of them."""
    manifest = files.read_manifest(checkpoint)
    names = sorted(manifest)[context.rank :: context.world_size]
    problems: list[Any] = [None] * context.world_size
    found = next((problem for name in names if (problem := files.check_file(checkpoint, name, manifest[name]))), None)
    torch.distributed.all_gather_object(problems, found)
    for problem in problems:
        if problem is not None:
            raise problem


def _compare(saved: dict[str, Any], wanted: dict[str, Any], checkpoint: Path) -> None:
    differing = list(_differences(saved, wanted, "model"))
    if differing:
        more = f" (and {len(differing) - 3} more)" if len(differing) > 3 else ""
        raise CheckpointError(str(checkpoint), "is of another model: " + "; ".join(differing[:3]) + more, "use the configuration it was trained with")


def _differences(saved: Any, wanted: Any, name: str) -> Any:
    if isinstance(saved, dict) and isinstance(wanted, dict):
        for key in sorted(saved.keys() | wanted.keys()):
            yield from _differences(saved.get(key), wanted.get(key), f"{name}.{key}")
    elif saved != wanted and name not in ("model.preset", "model.experts_kernel"):
        yield f"{name}: checkpoint has {saved}, configuration has {wanted}"


def _sharded(model: Model, optimizer: OptimizerState | None, context: ParallelContext, loading: bool) -> dict[str, Any]:
    """What Megatron saves or loads: names, full shapes and this rank's parts. The optimizer's are named and shaped like the parameters they belong to.

    Tensors only: Megatron's linear layers also list an empty "extra state" as a pickled object, which nothing here needs.
    """
    sharded: dict[str, Any] = {"model": {}}
    for chunk in as_chunks(model):
        entries = chunk.sharded_state_dict(metadata={"dp_cp_group": context.pgs.dp_cp})  # type: ignore[operator]
        for name, entry in entries.items():
            if not isinstance(entry, ShardedObject):
                sharded["model"][_key(name, chunk)] = _on_its_stage(entry, _key(name, chunk), chunk)
    if optimizer is not None:
        sharded["optimizer"] = optimizer.sharded(sharded["model"], loading)
    return sharded


def _key(name: str, chunk: torch.nn.Module) -> str:
    """A tensor's name in the whole model. Only a tied output layer's weight has another one: it is a copy of the embedding."""
    tied = name == "output_layer.weight" and getattr(chunk.output_layer.weight, "shared_embedding", False)  # type: ignore[union-attr]
    return EMBEDDING if tied else name


def _on_its_stage(entry: Any, key: str, chunk: Any) -> Any:
    """Copies on later pipeline stages (a tied embedding, a frozen encoder) are replicas of what the first stage saves."""
    if not isinstance(entry, ShardedTensor):
        return entry
    if key == EMBEDDING:
        entry.key = key
    if chunk.stage.number and (key == EMBEDDING or key.startswith("vision.")) and not isinstance(entry.replica_id, int):
        entry.replica_id = (chunk.stage.number, *entry.replica_id[1:])
    return entry


def _rng_states() -> dict[str, torch.Tensor]:
    tracked = {f"tracked.{name}": state.cpu() for name, state in get_cuda_rng_tracker().get_states().items()}
    return {"cpu": torch.get_rng_state(), "device": torch.cuda.get_rng_state().cpu(), **tracked}


def _restore_rng(states: dict[str, torch.Tensor]) -> None:
    tracker = get_cuda_rng_tracker()
    tracker.set_states({name: states[f"tracked.{name}"] for name in tracker.get_states()})
    torch.cuda.set_rng_state(states["device"])
    torch.set_rng_state(states["cpu"])
