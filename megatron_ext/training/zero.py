"""DeepSpeed's engine on Megatron's process groups: what `deepspeed.initialize` cannot know about a Megatron model, told through its own attributes.

    deepspeed.comm     wraps the open torch.distributed world
    groups             "data parallel" is Megatron's data x context parallel group, "model parallel" its tensor-parallel one
    experts            parameters that Megatron marks `allreduce = False` get a group of their own, named ep_size_<n>
    MegatronZero       `reduce` -> `norm` -> `apply`: DeepSpeed's `step` in the three parts that the training step wants apart

Nothing of DeepSpeed is imported before `open_zero` is called. What is used here are names that DeepSpeed does not promise to keep: pyproject.toml holds the
minor version, and tests/parallel/test_deepspeed.py compares the numbers with engine megatron.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_ext.config.deepspeed import Settings
from megatron_ext.device import backend
from megatron_ext.device.patching import Patch, applied
from megatron_ext.parallel.environment import environment
from megatron_ext.parallel.groups import ParallelContext


@dataclass(frozen=True)
class Groups:
    """Megatron's groups by the names that DeepSpeed asks for (its `mpu`). Without pipeline stages, model parallel is tensor parallel."""

    context: ParallelContext

    def get_data_parallel_group(self) -> Any:
        return self.context.pgs.dp_cp

    def get_data_parallel_world_size(self) -> int:
        return int(self.context.pgs.dp_cp.size())

    def get_data_parallel_rank(self) -> int:
        return int(self.context.pgs.dp_cp.rank())

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(torch.distributed.get_process_group_ranks(self.context.pgs.dp_cp))

    def get_model_parallel_group(self) -> Any:
        return self.context.pgs.tp

    def get_model_parallel_world_size(self) -> int:
        return int(self.context.pgs.tp.size())

    def get_model_parallel_rank(self) -> int:
        return self.context.tp_rank

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


def expert_group(context: ParallelContext) -> str:
    """The name of the experts' groups; DeepSpeed reads the number out of it."""
    return f"ep_size_{context.layout.ep}"


def is_expert(parameter: nn.Parameter) -> bool:
    """Whether other data-parallel ranks hold other experts in its place: Megatron's mark, and DeepSpeed's."""
    return not getattr(parameter, "allreduce", True)


def open_zero(model: nn.Module, groups: list[dict[str, Any]], settings: Settings, context: ParallelContext) -> Any:
    """A `MegatronZero` around a bare model, with `groups` as the optimizer's parameter groups and `settings` filled in."""
    os.environ["LOCAL_RANK"] = str(context.device.index or 0)  # where DeepSpeed finds its device; it asks again as long as it lives
    with environment(_surroundings(context)):
        import deepspeed
        import deepspeed.ops
        from deepspeed.runtime.config import DeepSpeedConfig

        # Its notes about itself would stand between the lines of a run; warnings stay.
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a minute of compiling for faster sums inside one machine
        deepspeed.comm.init_distributed(dist_backend=backend(), dist_init_required=False)
        _register_experts(model, context)
        mpu = Groups(context)
        with applied([_SCALARS]):
            return _engine_class()(
                None, model, model_parameters=groups, mpu=mpu, config=settings, config_class=DeepSpeedConfig(settings, mpu), dist_init_required=False
            )


def _surroundings(context: ParallelContext) -> dict[str, str]:
    """DeepSpeed compiles its CPU optimizer with a `ninja` that it looks for on the PATH."""
    found = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    return found if context.device.type == "cuda" else {**found, "DS_ACCELERATOR": "cpu"}


def _take_in_scalars(take_in: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    def take_in_any(self: Any, parameter: Any) -> None:
        shape = parameter.shape
        if not shape:
            parameter.data = parameter.data.view(1)
        take_in(self, parameter)
        parameter.ds_shape = shape

    return take_in_any


_SCALARS = Patch(
    "deepspeed.runtime.zero.partition_parameters:Init",
    "_zero_init_param",
    "ZeRO-3 broadcasts each weight as bytes before it splits it, which fails on one without axes, such as a gate",
    _take_in_scalars,
)


def _register_experts(model: nn.Module, context: ParallelContext) -> None:
    """DeepSpeed keeps its groups in module-level tables, of which the latest engine's is the one that counts."""
    from deepspeed.utils import groups

    name = expert_group(context)
    for table, group in ((groups._EXPERT_PARALLEL_GROUP, context.pgs.ep), (groups._EXPERT_DATA_PARALLEL_GROUP, context.pgs.expt_dp)):
        table.clear()
        table[name] = group
    for table, group in ((groups._EXPERT_PARALLEL_GROUP_RANKS, context.pgs.ep), (groups._EXPERT_DATA_PARALLEL_GROUP_RANKS, context.pgs.expt_dp)):
        table.clear()
        table[name] = torch.distributed.get_process_group_ranks(group)
    for parameter in filter(is_expert, model.parameters()):
        parameter.group_name = name  # type: ignore[attr-defined]
        parameter.model_parallel = True  # type: ignore[attr-defined]  # every rank's part counts in the gradient norm
        # ZeRO-3 shards over the experts' group where it is told that its own AutoEP made them.
        parameter.ds_zero_placement_family, parameter.ds_zero_partition_group_name = "autoep_expert", name  # type: ignore[attr-defined]


@cache
def _engine_class() -> type:
    from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine
    from deepspeed.runtime.utils import combine_grad_norm_groups
    from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

    class MegatronZero(DeepSpeedEngine):
        """DeepSpeed's engine with experts that are not its own. `optimizer` is always one of its ZeRO optimizers."""

        gathered = False
        """ZeRO-3's weights are whole, for readers outside the schedule (`checkpoint/deepspeed_state.py`)."""

        def _configure_distributed_model(self, model: nn.Module) -> None:
            self.has_moe_layers = any(map(is_expert, model.parameters()))
            self.num_experts = [model.config.num_moe_experts] if self.has_moe_layers else []  # type: ignore[union-attr]
            super()._configure_distributed_model(model)

        def _broadcast_model(self) -> None:
            """Weights are equal on the ranks that share them, as they were drawn or loaded."""

        def _validate_zero3_moe_compatibility(self) -> None:
            """Upstream knows no experts but its own. What does not go with ours is refused in `parallel/plan.py`."""

        def _do_optimizer_sanity_check(self, basic_optimizer: Any) -> str:
            """One kind of optimizer for all: upstream has another one for stage 1 in bf16, which takes no divisor."""
            super()._do_optimizer_sanity_check(basic_optimizer)
            return str(ZERO_OPTIMIZATION)

        @property
        def stage(self) -> int:
            return int(self.zero_optimization_stage())

        def clear(self) -> None:
            """No gradients, neither of the step that was made nor of one that was given up: what upstream does where a loss scale overflows."""
            optimizer = self.optimizer
            optimizer.custom_loss_scaler = False  # `reduce` sets the divisor; backward passes must not multiply by it
            if self.stage == 3:
                optimizer._pre_step()
                optimizer._overflow_clean_up(1.0)
                return
            optimizer.zero_grad(set_to_none=True)
            optimizer._release_preflattened_grad_buffers()
            optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
            for table in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
                table.update(dict.fromkeys(table))
            if optimizer.cpu_offload:
                optimizer._offload_accumulated_param_ids = set()
                optimizer.reset_cpu_buffers()

        def reduce(self, divisor: float) -> None:
            """Gradients of all micro-batches become this rank's shard of their mean over ranks, to be divided by `divisor`."""
            self._running_engine_step = True
            if self.stage >= 2:
                self.optimizer.finalize_gradient_accumulation_boundary()
            else:
                self.allreduce_gradients()
            self._running_engine_step = False
            self.optimizer.override_loss_scale(divisor)

        def norm(self) -> float:
            optimizer = self.optimizer
            total = combine_grad_norm_groups(optimizer._get_norm_groups()) if self.stage == 3 else optimizer.scaled_global_norm()
            return float(total) / float(optimizer.loss_scale)

        def apply(self) -> None:
            self.optimizer.step()

        def save_checkpoint(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("DeepSpeed's own checkpoints keep the experts of one rank only: use megatron_ext.checkpoint.dist")

        load_checkpoint = save_checkpoint

    return MegatronZero
