"""What a checkpoint keeps of an optimizer, whichever engine it belongs to: moments and master weights named and shaped like the parameters they belong to.

optimizer.state.{param, exp_avg, exp_avg_sq}.<parameter>          Megatron's `fully_reshardable` layout
"""

from __future__ import annotations

from typing import Any, Protocol

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


class OptimizerState(Protocol):
    """The optimizer and schedule of one rank."""

    @property
    def updates(self) -> int:
        """Adam's own count."""

    @property
    def scheduled(self) -> int:
        """Steps of the learning-rate schedule."""

    def sharded(self, model_sharded: dict[str, Any], loading: bool) -> dict[Any, Any]:
        """Sharded tensors of this rank, named after those of the model."""

    def restore(self, loaded: dict[Any, Any], updates: int, scheduled: int) -> None:
        """Takes back what `sharded(..., loading=True)` was filled with."""


class MegatronOptimizerState:
    """Of Megatron's distributed optimizer."""

    def __init__(self, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler) -> None:
        self._optimizer, self._scheduler = optimizer, scheduler

    @property
    def updates(self) -> int:
        for _, part in self._parts():
            for values in part.optimizer.state.values():
                return int(values["step"])
        return 0

    @property
    def scheduled(self) -> int:
        return int(self._scheduler.num_steps)

    def sharded(self, model_sharded: dict[str, Any], loading: bool) -> dict[Any, Any]:
        return {index: part.sharded_param_state_fully_reshardable(model_sharded, loading, {}) for index, part in self._parts()}

    def restore(self, loaded: dict[Any, Any], updates: int, scheduled: int) -> None:
        for index, part in self._parts():
            steps = {parameter: values.pop("step") for parameter, values in part.optimizer.state.items()}
            part.load_parameter_state_from_fully_reshardable(loaded[index])
            for parameter, step in steps.items():
                part.optimizer.state[parameter]["step"] = step.fill_(updates)
        self._scheduler.num_steps = scheduled
        self._scheduler.step(0)

    def _parts(self) -> list[tuple[int, Any]]:
        return [(index, part) for index, part in enumerate(self._optimizer.chained_optimizers) if not part.is_stub_optimizer]
