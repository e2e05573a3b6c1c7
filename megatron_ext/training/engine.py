"""What the training step needs of an engine: model chunks that the schedule runs, and an update of their weights. Megatron's own is `megatron_engine.py`;
`Scheduled` is what both engines have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ext.checkpoint.optimizer_state import OptimizerState
from megatron_ext.model.assembly import VisionLanguageModel
from megatron_ext.training.clvr_metrics import RefinementSize
from megatron_ext.training.moe_metrics import ExpertLoad


class Engine(Protocol):
    """A model that is being trained, by one rank. Gradients are summed over micro-batches and ranks and divided by the targets of the step."""

    @property
    def wrapped(self) -> Sequence[Any]:
        """The model chunks as the schedule calls them."""

    @property
    def chunks(self) -> Sequence[VisionLanguageModel]:
        """The same, bare."""

    @property
    def optimizer_state(self) -> OptimizerState:
        """What a checkpoint keeps of the optimizer and its schedule."""

    @property
    def load(self) -> ExpertLoad: ...

    @property
    def refinement(self) -> RefinementSize: ...

    @property
    def step(self) -> int:
        """Updates made so far."""

    @property
    def lr(self) -> float:
        """The learning rate of the latest update, without per-group scales."""

    def begin(self) -> None:
        """Before the first forward pass of a step: no gradients."""

    def gradient_norm(self) -> float:
        """After the last backward pass: the norm of the global gradient, before clipping. Collective."""

    def update(self, norm: float) -> None:
        """Clips to the configured norm, moves the schedule and the weights. Collective."""

    def settle(self) -> None:
        """Weights are whole on every rank that holds them: called before anyone but the schedule reads them."""


@dataclass(frozen=True)
class Scheduled:
    """Of either engine: the chunks, Megatron's schedule, whose `num_steps` counts the updates made so far, and what is measured beside the loss."""

    chunks: list[VisionLanguageModel]
    scheduler: OptimizerParamScheduler
    load: ExpertLoad = field(repr=False)
    refinement: RefinementSize = field(repr=False)

    @property
    def step(self) -> int:
        return int(self.scheduler.num_steps)

    @property
    def lr(self) -> float:
        return float(self.scheduler.get_lr({}))
