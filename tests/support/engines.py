"""What ranks do in the tests that compare engines: several small trainings one after another in the same processes, each in a world of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_ext.checkpoint.dist import load_checkpoint, save_checkpoint
from megatron_ext.checkpoint.full_tensors import full_tensors
from megatron_ext.config.schema import OptimizerConfig, ParallelConfig
from megatron_ext.errors import UserError
from megatron_ext.model.assembly import build_chunks
from megatron_ext.parallel.groups import ParallelContext, open_parallel
from megatron_ext.training import deepspeed_engine
from megatron_ext.training.engine import Engine
from megatron_ext.training.engines import start_engine
from megatron_ext.training.losses import Microbatch, NextToken
from megatron_ext.training.microbatches import microbatches
from megatron_ext.training.step import optimizer_step, run_schedule
from tests.support.layouts import MARKERS, MICRO, ROWS, batch_of, model_of
from tests.support.models import IMAGE, open_gates
from tests.support.training import PAD, part, same
from tests.support.weights import load_full_tensors

STEPS = 2
WHOLE = OptimizerConfig(lr=1e-3, warmup_steps=0, schedule="constant", clip_grad=0.0, weight_decay=0.1)
CLIPPED = OptimizerConfig(lr=1e-3, min_lr=1e-4, warmup_steps=2, schedule="linear", clip_grad=0.5, weight_decay=0.1)


@dataclass(frozen=True)
class Trial:
    """One training. `load` and `save`: checkpoint folders; `last`: the step after which it ends.
    `disturbed`: after each update there is a forward pass without gradients, and steps that fail. `sabotage`: a part of the engine that is left out."""

    parallel: ParallelConfig
    optimizer: OptimizerConfig = WHOLE
    packed: bool = False
    train_vision: bool = True
    router_lr_scale: float = 1.0
    changes: dict[str, Any] = field(default_factory=dict)
    disturbed: bool = False
    sabotage: str = ""
    load: Path | None = None
    save: Path | None = None
    last: int = STEPS


def run_trials(rank: int, world_size: int, init_method: str, trials: list[Trial], weights: dict[str, torch.Tensor] | None) -> list[dict[str, Any]]:
    """The report of each. Tensors, whole and by their full names, come from rank 0 alone."""
    return [_run(trial, rank, world_size, f"{init_method}.{number}", weights) for number, trial in enumerate(trials)]


def _run(trial: Trial, rank: int, world_size: int, init_method: str, weights: dict[str, torch.Tensor] | None) -> dict[str, Any]:
    with open_parallel(trial.parallel, rank, world_size, init_method, seed=rank) as context:
        model = model_of(trial.changes)
        chunks = build_chunks(model, IMAGE, context, seed=3, vision_trains=trial.train_vision, markers=MARKERS)
        for chunk in chunks:
            open_gates(chunk)
        if weights is not None:
            load_full_tensors(chunks, weights, context)
        report: dict[str, Any] = {"start": _copies(full_tensors(chunks, context))}
        with _without(trial.sabotage, chunks):
            engine = start_engine(chunks, trial.optimizer, 10, context, router_lr_scale=trial.router_lr_scale)
        if trial.load is not None:
            load_checkpoint(trial.load, engine.chunks, engine.optimizer_state, context=context, model_config=model)
        curve = []
        for step in range(engine.step, trial.last):
            curve.append(optimizer_step(engine, _own(step, trial, context), NextToken(), context))
            engine.settle()
            if trial.disturbed:
                report.setdefault("errors", []).extend(_disturb(engine, _own(step, trial, context), context))
            if step == 0:
                assert engine.optimizer_state.updates == 1
                report["gradients"] = _copies(full_tensors(chunks, context, of=_gradient))
                report["weights"] = _copies(full_tensors(chunks, context))
        if trial.save is not None:
            save_checkpoint(trial.save, engine.step, engine.chunks, engine.optimizer_state, {}, context, model, keep=1)
        report["end"] = _copies(full_tensors(chunks, context))
        return {**report, "curve": curve} if rank == 0 else {"curve": curve}


def _disturb(engine: Engine, batches: Sequence[Microbatch], context: ParallelContext) -> Iterator[str]:
    """The messages of steps that fail, each of which leaves weights and moments as they were. Weights are whole before and after."""
    run_schedule(engine.wrapped, batches, NextToken(), context, forward_only=True)
    engine.settle()
    engine.optimizer_state  # noqa: B018  links the moments
    before = [_copies(full_tensors(engine.chunks, context, of=of)) for of in (torch.Tensor.detach, _moment)]
    for broken in (_NoNumber(), _Steep()):
        with pytest.raises(UserError) as error:
            optimizer_step(engine, batches, broken, context)
        engine.settle()
        after = [_copies(full_tensors(engine.chunks, context, of=of)) for of in (torch.Tensor.detach, _moment)]
        assert all(same(old, new) for old, new in zip(before, after, strict=True))
        yield str(error.value)
    assert isinstance(engine, deepspeed_engine.DeepSpeedEngine)
    for verb in (engine.zero.save_checkpoint, engine.zero.load_checkpoint):
        with pytest.raises(RuntimeError, match="keep the experts of one rank only"):
            verb("anywhere")


class _NoNumber(NextToken):
    def loss(self, model: Any, batch: Microbatch, output: torch.Tensor) -> Any:
        total, count, metrics = super().loss(model, batch, output)
        return total * float("nan"), count, metrics


class _Steep(NextToken):
    """sqrt at 0: a finite loss with an infinite slope."""

    def loss(self, model: Any, batch: Microbatch, output: torch.Tensor) -> Any:
        total, count, metrics = super().loss(model, batch, output)
        return total + (total - total.detach()).sqrt(), count, metrics


def _own(step: int, trial: Trial, context: ParallelContext) -> Any:
    share = ROWS // context.layout.dp
    rows = part(batch_of(step), context.dp_rank * share, (context.dp_rank + 1) * share)
    return microbatches(rows, MICRO, PAD, context.device, packed=trial.packed, multiple=context.layout.length_multiple)


def _gradient(parameter: Any) -> torch.Tensor:
    """The clipped gradient of the only update so far: Adam's first moment is (1 - beta1) of it. Zero where nothing is trained."""
    if not parameter.requires_grad:
        return torch.zeros_like(parameter)
    if hasattr(parameter, "main_grad"):  # engine megatron, on one rank
        return parameter.main_grad
    return _moment(parameter) / (1 - WHOLE.beta1)


def _moment(parameter: Any) -> torch.Tensor:
    """Adam's first moment under engine deepspeed."""
    from deepspeed.utils import safe_get_full_optimizer_state

    return safe_get_full_optimizer_state(parameter, "exp_avg") if parameter.requires_grad else torch.zeros_like(parameter)


@contextmanager
def _without(what: str, chunks: Any) -> Iterator[None]:
    """An engine with a part left out, for the tests that must then fail."""
    if what == "sum over sequence slices":
        with mock.patch.object(deepspeed_engine, "_sum_over_sequence_slices"):
            yield
        return
    if what == "groups of experts":
        for parameter in chunks[0].parameters():
            parameter.allreduce = True
    yield


def _copies(tensors: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors}
