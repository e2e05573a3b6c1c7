"""What a checkpoint keeps of an optimizer, whichever engine it belongs to: moments and master weights named and shaped like the parameters they belong to.

optimizer.state.{param, exp_avg, exp_avg_sq}.<parameter>          Megatron's `fully_reshardable` layout

A save takes two steps, so that the second can run beside training: `share` lists this rank's tensors, of which copies may be taken; `sharded_to_save` puts
the shares of all ranks together.
"""

from __future__ import annotations

import copy
from typing import Any, Protocol

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ext.parallel.groups import Twin

_STATES = ("param", "exp_avg", "exp_avg_sq")

Share = dict[Any, Any]
"""Tensors in nested dictionaries and lists."""


class OptimizerState(Protocol):
    """The optimizer and schedule of one rank."""

    @property
    def updates(self) -> int:
        """Adam's own count."""

    @property
    def scheduled(self) -> int:
        """Steps of the learning-rate schedule."""

    def share(self) -> Share:
        """This rank's share of moments and master weights: the tensors themselves, which the next update changes.

        Quick, and without collectives; an engine that gathers in its own groups only has to do so here, while training waits.
        """

    def sharded_to_save(self, model_sharded: dict[str, Any], share: Share, twin: Twin) -> dict[Any, Any]:
        """Sharded tensors of this rank, named after those of the model, with the values of `share`: what `share()` returned, or a copy of it in host memory.

        Collective, in twins only: training may go on meanwhile.
        """

    def sharded_to_load(self, model_sharded: dict[str, Any]) -> dict[Any, Any]:
        """The same without values: what a load fills."""

    def restore(self, loaded: dict[Any, Any], updates: int, scheduled: int) -> None:
        """Takes back what `sharded_to_load` was filled with."""


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

    def share(self) -> Share:
        return {index: [_tensors(part, parameter) for parameter in part.model_param_group_index_map] for index, part in self._parts()}

    def sharded_to_save(self, model_sharded: dict[str, Any], share: Share, twin: Twin) -> dict[Any, Any]:
        return {index: _with_tensors(part, share[index], twin).sharded_param_state_fully_reshardable(model_sharded, False, {}) for index, part in self._parts()}

    def sharded_to_load(self, model_sharded: dict[str, Any]) -> dict[Any, Any]:
        return {index: part.sharded_param_state_fully_reshardable(model_sharded, True, {}) for index, part in self._parts()}

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


def _tensors(part: DistributedOptimizer, parameter: Any) -> dict[str, Any]:
    """Without the marks that Megatron hangs on its tensors, gradients among them."""
    states = part._get_main_param_and_optimizer_states(parameter)
    return {name: states[name].detach() for name in _STATES}


def _with_tensors(part: DistributedOptimizer, share: list[dict[str, Any]], twin: Twin) -> Any:
    """The optimizer's double: it sees the tensors of `share` as its own, and gathers them on all ranks over gloo instead of the group of training."""
    double: Any = copy.copy(part)
    tensors = dict(zip(part.model_param_group_index_map, share, strict=True))
    if part.data_parallel_group.size() == 1:
        double.get_parameter_state_dp_zero = lambda **_: _gathered_alone(part, tensors)
        return double
    double.data_parallel_group_gloo = twin(part.data_parallel_group)
    double._get_main_param_and_optimizer_states = tensors.__getitem__
    double.get_parameter_state_dp_zero = lambda **_: DistributedOptimizer.get_parameter_state_dp_zero(double, use_gloo_comm=True, return_on_all_ranks=True)
    return double


def _gathered_alone(part: DistributedOptimizer, tensors: dict[Any, dict[str, Any]]) -> dict[int, Any]:
    """What Megatron gathers from data-parallel ranks, where there is one: the tensors themselves. Megatron's way copies them four times."""
    return {
        index: {
            dtype: {name: _Slices({place[0]: tensors[parameter][name] for parameter, place in buffer.param_index_map.items()}) for name in _STATES}
            for dtype in part.gbuf_ranges[index]
        }
        for index, buffer in enumerate(part.buffers)
    }


class _Slices(dict[int, Any]):
    """Reads like a long tensor of which only whole parameters are asked for: those that start where a slice starts."""

    def __getitem__(self, where: Any) -> Any:
        return super().__getitem__(where.start)
