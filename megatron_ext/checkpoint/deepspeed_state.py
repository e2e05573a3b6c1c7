"""What a checkpoint keeps of a DeepSpeed optimizer, in the layout of engine megatron, so that a run may change its engine between two checkpoints.

    ZeRO's shards --gathered, a parameter at a time--> optimizer.state.{param, exp_avg, exp_avg_sq}.<parameter>              (save)
    the same tensors --every rank takes its shard--> ZeRO's shards; the weights are then those of the masters, rounded      (load)

Like Megatron's, it holds the whole tensors of this rank's tensor- and expert-parallel part while it saves or loads. `zero` is the engine of `training/zero.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import nn

_MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedOptimizerState:
    """Of a ZeRO optimizer over Adam; see `optimizer_state.OptimizerState`. Weights must be whole (`Engine.settle`) when it saves or loads."""

    def __init__(self, zero: Any, scheduler: OptimizerParamScheduler) -> None:
        self._zero, self._scheduler = zero, scheduler
        _start_adam(zero)

    @property
    def updates(self) -> int:
        return int(next(iter(self._adam.state.values()))["step"])

    @property
    def scheduled(self) -> int:
        return int(self._scheduler.num_steps)

    def share(self) -> dict[Any, Any]:
        """Collective: ZeRO gathers in its own groups, so that training waits for it. The whole tensors of every parameter, on the CPU."""
        return dict(enumerate(map(self._whole, self._parameters())))

    def sharded_to_save(self, model_sharded: dict[str, Any], share: dict[Any, Any], twin: Any) -> dict[Any, Any]:
        entries = self._entries(model_sharded)
        return {index: _named(entry, share[index]) for index, entry in enumerate(entries)}

    def sharded_to_load(self, model_sharded: dict[str, Any]) -> dict[Any, Any]:
        empty = ({name: torch.empty(parameter.shape, dtype=torch.float32) for name in ("param", *_MOMENTS)} for parameter in self._parameters())
        return {index: _named(*pair) for index, pair in enumerate(zip(self._entries(model_sharded), empty, strict=True))}

    @torch.no_grad()
    def restore(self, loaded: dict[Any, Any], updates: int, scheduled: int) -> None:
        release_weights(self._zero, changed=True)  # what is not trained keeps what was loaded into it
        for index, parameter in enumerate(self._parameters()):
            _set_shard(parameter, loaded[index]["param"])
            for name in _MOMENTS:
                _set_shard(parameter, loaded[index][name], name)
        for state in self._adam.state.values():
            state["step"] = state["step"].fill_(updates) if isinstance(state["step"], torch.Tensor) else updates
        _weights_of_masters(self._zero)
        self._scheduler.num_steps = scheduled
        self._scheduler.step(0)

    @property
    def _adam(self) -> Any:
        return self._zero.optimizer.optimizer

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self._zero.module.parameters() if parameter.requires_grad)

    def _entries(self, model_sharded: dict[str, Any]) -> list[Any]:
        """Those of the trained parameters, which the model's entries hold as their data."""
        entries, _ = extract_sharded_tensors_and_factories(model_sharded)
        by_parameter = {id(entry.data): entry for entry in nested_values(entries)}
        return [by_parameter[id(parameter)] for parameter in self._parameters()]

    def _whole(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """Master weight and moments in float32, in the parameter's shape, on the CPU."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        moments = {name: safe_get_full_optimizer_state(parameter, name) for name in _MOMENTS}
        return {name: value.cpu() for name, value in {"param": safe_get_full_fp32_param(parameter), **moments}.items()}


def gather_weights(zero: Any) -> None:
    """Makes ZeRO-3's weights whole on every rank, until `release_weights` or a forward pass; other stages have them whole. Collective."""
    parameters = _split_parameters(zero)
    if parameters:
        parameters[0].all_gather(param_list=parameters)
        zero.gathered = True


def release_weights(zero: Any, changed: bool = False) -> None:
    """Splits gathered weights again; `changed`: their new values, equal on all ranks, are kept."""
    parameters = _split_parameters(zero)
    if parameters and zero.gathered:
        parameters[0].partition(param_list=parameters, has_been_updated=changed)
        zero.gathered = False


def _split_parameters(zero: Any) -> list[Any]:
    """Under ZeRO-3, all; in an order that ranks share."""
    return [parameter for parameter in zero.module.parameters() if hasattr(parameter, "ds_id")]


def _start_adam(zero: Any) -> None:
    """Creates Adam's moments where no update has done so yet, so that a checkpoint may be saved or loaded before one, and tells ZeRO where they are."""
    optimizer = zero.optimizer
    counts_in_tensors = isinstance(optimizer.optimizer, torch.optim.AdamW)  # DeepSpeed's own Adam counts in integers
    for shard in _shards(zero):
        if not optimizer.optimizer.state.get(shard):
            moments = {name: torch.zeros_like(shard) for name in _MOMENTS}
            optimizer.optimizer.state[shard] = {"step": torch.zeros((), dtype=torch.float32) if counts_in_tensors else 0, **moments}
    if not hasattr(optimizer, "fp16_groups"):
        optimizer._hp_optimizer_states_linked = False  # upstream links all groups after the first one's update, when the others have no state yet
        optimizer._lazy_init_hp_params_optimizer_state()


def _shards(zero: Any) -> list[torch.Tensor]:
    """This rank's master weights, flat."""
    optimizer = zero.optimizer
    return list(optimizer.fp32_partitioned_groups_flat if hasattr(optimizer, "fp32_partitioned_groups_flat") else optimizer.single_partition_of_fp32_groups)


def _weights_of_masters(zero: Any) -> None:
    """What the forward pass reads, from the masters."""
    optimizer = zero.optimizer
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.update_lp_params()
        return
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)


def _named(entry: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The sharded tensors of one parameter: those of the model (`entry`) under the optimizer's names."""
    named = {}
    for name, tensor in tensors.items():
        changes: dict[str, Any] = {"key": f"optimizer.state.{name}.{entry.key}", "data": tensor}
        named[name] = replace(entry, **changes, **({} if isinstance(entry, ShardedTensorFactory) else {"dtype": tensor.dtype}))
    return named


def _set_shard(parameter: Any, tensor: torch.Tensor, moment: str | None = None) -> None:
    """This rank's part of a whole master weight or moment."""
    if not hasattr(parameter, "ds_id"):
        parameter.set_full_hp_param(tensor, moment)
        return
    # ZeRO-3 cuts a parameter into equal shards, the last one filled up, and forgets that where it sets one from the whole.
    size, group = parameter.partition_numel(), parameter.ds_process_group
    own = nn.functional.pad(tensor.flatten(), (0, size * group.size() - tensor.numel())).narrow(0, size * group.rank(), size)
    parameter._z3_optimizer.set_local_hp_param(own, parameter, moment)
