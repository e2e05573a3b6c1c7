"""One save, from a snapshot to the latest checkpoint. The same lines run in the training thread and beside it.

    take_snapshot      this rank's tensors, random states and counters, of one moment; with `hold`, copies of them
    write              draft -> tensors -> random states, state.json -> reach the disk, digests -> one rename makes it the latest

Everything that `write` says to other ranks goes through twin groups, never through those of training. Whatever fails on one rank fails on all, with the
draft removed and the former checkpoint still the latest.
"""

from __future__ import annotations

import json
import shutil
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ext.checkpoint import folder as files
from megatron_ext.checkpoint.full_tensors import Model
from megatron_ext.checkpoint.optimizer_state import OptimizerState, Share
from megatron_ext.checkpoint.sharded import sharded_model
from megatron_ext.checkpoint.torch_dist import refusal, write_common, write_tensors
from megatron_ext.config.schema import ModelConfig
from megatron_ext.durable import sync
from megatron_ext.errors import CheckpointError
from megatron_ext.parallel.groups import ParallelContext, Twin

STATE = "state.json"
FORMAT = 1
"""Raised when a reader of this format could no longer read what is written."""

Hold = Callable[[Share], Share]
"""Copies nested tensors to memory that training does not touch."""


@dataclass(frozen=True)
class Snapshot:
    """What this rank gives to the checkpoint of a step. `values` are the model's tensors by name and the optimizer's share, or copies of both."""

    step: int
    model: dict[str, Any]
    values: Share
    optimizer: OptimizerState | None
    rng: dict[str, torch.Tensor]
    record: dict[str, Any]
    context: ParallelContext


def take_snapshot(
    step: int,
    model: Model,
    optimizer: OptimizerState | None,
    state: dict[str, Any],
    context: ParallelContext,
    model_config: ModelConfig,
    hold: Hold | None = None,
) -> Snapshot:
    """Collective if the optimizer's `share` is. Without `hold` the tensors are training's own: write them before training goes on."""
    sharded = sharded_model(model, context)
    values: Share = {
        "model": {name: entry.data.detach() for name, entry in sharded.items() if isinstance(entry, ShardedTensor | ShardedTensorFactory)},
        "optimizer": {} if optimizer is None else optimizer.share(),
    }
    record = {
        **weights_record(step, state, model_config),
        "layout": asdict(context.layout),
        "updates": None if optimizer is None else optimizer.updates,
        "schedule": None if optimizer is None else optimizer.scheduled,
    }
    return Snapshot(step, sharded, values if hold is None else hold(values), optimizer, _rng_states(), record, context)


def weights_record(step: int, state: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    """`state.json` of a checkpoint that holds weights and nothing of a run."""
    return {"format": FORMAT, "step": step, "layout": None, "updates": None, "schedule": None, "state": state, "model": model.model_dump(mode="json")}


def write(snapshot: Snapshot, folder: Path, keep: int, twin: Twin) -> Path:
    """Writes `folder/step_...` and makes it the latest; keeps the newest `keep`. Collective over the world; returns once the checkpoint is published.

    Raises CheckpointError on every rank, naming the rank and the step, when the operating system refuses something (a full disk); RuntimeError with tracebacks
    for any other failure.
    """
    try:
        return _written(snapshot, folder, keep, twin)
    except (Exception, CheckpointException) as error:
        if snapshot.context.rank == 0:
            shutil.rmtree(files.draft_of(folder, snapshot.step), ignore_errors=True)
        raise _told(error, snapshot.context.rank, folder, snapshot.step) from error


def _written(snapshot: Snapshot, folder: Path, keep: int, twin: Twin) -> Path:
    world, rank, draft = twin(None), snapshot.context.rank, files.draft_of(folder, snapshot.step)
    _together(lambda: files.prepare(folder, snapshot.step) if rank == 0 else None, world)
    common = write_tensors(_sharded(snapshot, twin), draft, twin(snapshot.context.pgs.dp_cp), world)

    def own_files() -> None:
        safetensors.torch.save_file(snapshot.rng, rng_file(draft, rank))
        if rank == 0:
            write_common(common, draft)
            files.write_synced(draft / STATE, json.dumps(snapshot.record, indent=1))

    def digests() -> dict[str, dict[str, Any]]:
        """The files are divided among the ranks."""
        names = sorted(path.name for path in draft.iterdir())[rank :: world.size()]
        for name in names:
            sync(draft / name)
        return {name: files.describe_file(draft / name) for name in names}

    _together(own_files, world)
    manifest = {name: entry for part in _together(digests, world) for name, entry in part.items()}
    _together(lambda: files.publish(folder, snapshot.step, draft, manifest, keep) if rank == 0 else None, world)
    return folder / files.step_name(snapshot.step)


def _sharded(snapshot: Snapshot, twin: Twin) -> dict[str, Any]:
    """What Megatron saves, with the snapshot's values. The optimizer's entries come first: they find theirs by the parameters that the model's still hold."""
    sharded: dict[str, Any] = {"model": snapshot.model}
    if snapshot.optimizer is not None:
        sharded["optimizer"] = snapshot.optimizer.sharded_to_save(snapshot.model, snapshot.values["optimizer"], twin)
    for name, tensor in snapshot.values["model"].items():
        snapshot.model[name].data = tensor
    return sharded


def rng_file(checkpoint: Path, rank: int) -> Path:
    return checkpoint / f"rng_{rank:04d}.safetensors"


def _rng_states() -> dict[str, torch.Tensor]:
    tracked = {f"tracked.{name}": state.cpu() for name, state in get_cuda_rng_tracker().get_states().items()}
    return {"cpu": torch.get_rng_state(), "device": torch.cuda.get_rng_state().cpu(), **tracked}


@dataclass(frozen=True)
class _Failure:
    rank: int
    words: str
    refused: bool
    """By the operating system: not our mistake."""


class _Failures(Exception):
    def __init__(self, of: list[_Failure]) -> None:
        self.of = of
        super().__init__(of)


def _together(work: Callable[[], Any], world: dist.ProcessGroup) -> list[Any]:
    """Every rank does its part, and all learn all results; if one fails, all fail."""
    done: Any
    try:
        done = work()
    except Exception as error:
        done = _failure(world.rank(), error)
    heard: list[Any] = [None] * world.size()
    dist.all_gather_object(heard, done, group=world)
    if failed := [part for part in heard if isinstance(part, _Failure)]:
        raise _Failures(failed)
    return heard


def _failure(rank: int, error: BaseException) -> _Failure:
    refused = refusal(error)
    return _Failure(rank, str(refused or "".join(traceback.format_exception(error))), refused is not None)


def _told(error: BaseException, rank: int, folder: Path, step: int) -> Exception:
    match error:
        case _Failures():
            found = error.of
        case CheckpointException():
            found = [_failure(failed, cause) for failed, (cause, _) in error.failures.items()]
        case _:
            found = [_failure(rank, error)]
    words = "; ".join(f"rank {failure.rank}: {failure.words}" for failure in found)
    if not all(failure.refused for failure in found):
        return RuntimeError(f"the checkpoint of step {step} in {folder} could not be saved\n{words}")
    latest = None
    with suppress(CheckpointError):
        latest = files.latest_step(folder)
    remedy = "mend it and run again" + ("" if latest is None else f": it resumes from step {latest}, whose checkpoint is whole")
    return CheckpointError(str(folder), f"the checkpoint of step {step} could not be saved ({words})", remedy)
