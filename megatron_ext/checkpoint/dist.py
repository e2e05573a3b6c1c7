"""Checkpoints that any layout can resume: model, Adam's moments, schedule, random states and whatever the caller wants back as JSON.

    step_000100/
      __0_0.distcp, __1_0.distcp, .metadata, common.pt, metadata.json     the tensors, in Megatron's torch_dist format
      state.json                                                          step, optimizer and schedule counters, the caller's state, the model's configuration
      rng_0000.safetensors                                                one per rank
      manifest.json                                                       sizes and SHA-256 of all of these

How they are written is in `writing.py`, how that happens beside training in `saver.py`; this is the way back.
Tensors are stored whole, by name, so a run may change its layout in the middle; random states return only to the layout that saved them.
Hyperparameters (learning rate, decay) are those of the configuration that loads, never those of the checkpoint. A load checks everything it can before
it changes anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_ext.checkpoint import folder as files
from megatron_ext.checkpoint.folder import latest_step
from megatron_ext.checkpoint.full_tensors import Model, as_chunks
from megatron_ext.checkpoint.optimizer_state import OptimizerState
from megatron_ext.checkpoint.saver import open_saver
from megatron_ext.checkpoint.sharded import sharded_model, whole_name
from megatron_ext.checkpoint.torch_dist import InProcessLoad, NothingInCommon, check_tensors
from megatron_ext.checkpoint.writing import FORMAT, STATE, rng_file
from megatron_ext.config.schema import ModelConfig
from megatron_ext.errors import CheckpointError
from megatron_ext.parallel.groups import ParallelContext

__all__ = ["latest_step", "load_checkpoint", "model_differences", "read_state", "save_checkpoint"]

_ADAPTERS = "decoder.taps."
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
    """One save on its own; a run that saves again and again opens a `Saver`. Collective; returns once the checkpoint is published."""
    with open_saver(folder, keep, context, model_config, asynchronous=False) as saver:
        saver.save(step, model, optimizer, state)
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
    Without, only weights: load them before `build_engine`, which copies them. CLVR adapters that a checkpoint without CLVR cannot have stay as they were drawn,
    which leaves what the model computes as it was.
    Raises CheckpointError, with nothing changed, when the checkpoint is missing, damaged or of another model.
    """
    checkpoint = files.find_checkpoint(path)
    _verify(checkpoint, context)
    record = read_state(checkpoint)
    wanted, saved = model_config.model_dump(mode="json"), {**_DEFAULTS, **record["model"]}
    saved["clvr"] = {**_DEFAULTS["clvr"], **saved["clvr"]}
    fresh = optimizer is None and wanted["clvr"]["enabled"] and not saved["clvr"]["enabled"]
    _compare({**saved, "clvr": wanted["clvr"]} if fresh else saved, wanted, checkpoint)
    if optimizer is not None and record["updates"] is None:
        raise CheckpointError(str(checkpoint), "holds no optimizer state", "load its weights only, as the start of a new stage")
    sharded = _wanted(model, optimizer, context)
    if fresh:
        sharded["model"] = {name: entry for name, entry in sharded["model"].items() if not name.startswith(_ADAPTERS)}
    check_tensors(load_preprocess(sharded)[0], checkpoint)
    loaded = dist_checkpointing.load(sharded, str(checkpoint), InProcessLoad(), NothingInCommon(), validate_access_integrity=False)
    for chunk in as_chunks(model):
        drawn = {name: value for name, value in chunk.state_dict().items() if fresh and name.startswith(_ADAPTERS)}
        chunk.load_state_dict({name: drawn.get(name, loaded["model"].get(whole_name(name, chunk))) for name in chunk.state_dict()}, strict=True)
    if optimizer is not None:
        optimizer.restore(loaded.get("optimizer", {}), record["updates"], int(record["schedule"] or 0))
        if record["layout"] == asdict(context.layout):
            _restore_rng(safetensors.torch.load_file(rng_file(checkpoint, context.rank)))
    return {**record["state"], "step": record["step"]}


def read_state(checkpoint: Path) -> dict[str, Any]:
    """`state.json` of a step folder."""
    path = checkpoint / STATE
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(str(path), f"cannot be read ({error})", "the checkpoint is damaged: use another one") from error
    if record.get("format") != FORMAT:
        raise CheckpointError(str(path), f"has format {record.get('format')!r}, this version reads {FORMAT}", "use the version that wrote it")
    return dict(record)


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
    differing = list(model_differences(saved, wanted))
    if differing:
        more = f" (and {len(differing) - 3} more)" if len(differing) > 3 else ""
        raise CheckpointError(str(checkpoint), "is of another model: " + "; ".join(differing[:3]) + more, "use the configuration it was trained with")


_NOT_THE_WEIGHTS = {
    *(f"model.{name}" for name in ("preset", "dtype", "init_std", "max_positions", "experts_kernel", "vision.layer_scale_init")),
    *(f"model.moe_{name}" for name in ("balancing", "aux_loss_coeff", "z_loss_coeff", "expert_bias_rate", "capacity_factor", "drop_policy", "pad_to_capacity")),
}
"""Settings that say how weights are made or trained, not what they mean."""


def model_differences(saved: Any, wanted: Any, name: str = "model") -> Iterator[str]:
    """Where two models differ in what their weights mean, in words."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        for key in sorted(saved.keys() | wanted.keys()):
            yield from model_differences(saved.get(key), wanted.get(key), f"{name}.{key}")
    elif saved != wanted and name not in _NOT_THE_WEIGHTS:
        yield f"{name}: checkpoint has {saved}, configuration has {wanted}"


def _wanted(model: Model, optimizer: OptimizerState | None, context: ParallelContext) -> dict[str, Any]:
    """What this rank loads. The optimizer's tensors are named and shaped like the parameters they belong to."""
    sharded: dict[str, Any] = {"model": sharded_model(model, context)}
    if optimizer is not None:
        sharded["optimizer"] = optimizer.sharded_to_load(sharded["model"])
    return sharded


def _restore_rng(states: dict[str, torch.Tensor]) -> None:
    tracker = get_cuda_rng_tracker()
    tracker.set_states({name: states[f"tracked.{name}"] for name in tracker.get_states()})
    torch.cuda.set_rng_state(states["device"])
    torch.set_rng_state(states["cpu"])
