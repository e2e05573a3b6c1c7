"""The update of the weights that a rank owns: norm of their gradients, clipping, Adam, and the weights back to where the model reads them.

Megatron's distributed optimizer does this parameter by parameter, in five walks over all of them: it cuts each gradient out of its buffer anew, takes its norm,
scales it, hands it to Adam, copies each weight. What these walks find never changes: gradients are cut once, the norm is taken over runs of gradients that
lie side by side, clipping is part of Adam's kernel, and weights that are their own main copy are not copied.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_ext.device import device

RUN_NUMEL = {"cpu": 1 << 18, "cuda": 1 << 30}
"""Numbers of one norm. On a CPU few enough for float32 sums of squares to be exact to 1e-6 and for a core's cache; a GPU cuts them itself."""


class Shards:
    """What one of Megatron's chained optimizers updates on this rank. Its gradients stay cut: nobody may reset them."""

    def __init__(self, part: DistributedOptimizer) -> None:
        self.part = part
        part.prepare_grads()
        self.runs = merged(part.get_main_grads_for_grad_norm()) if not part.is_stub_optimizer else []

    def step(self, divisor: float) -> None:
        """Adam with every gradient divided by `divisor`, which leaves it so."""
        if self.part.is_stub_optimizer:
            return
        adam = self.part.optimizer
        if not isinstance(adam, torch.optim.AdamW):
            torch._foreach_div_([parameter.grad for parameter in self.part.get_parameters()], divisor)
            adam.step()
            return
        for group in adam.param_groups:
            if group["params"]:
                _fused_adam(adam, group, divisor)

    def publish(self) -> None:
        """Main weights in float32 to a model in another dtype. In float32 they are the model's own."""
        if not self.part.is_stub_optimizer and any(self.part.model_float16_groups):
            self.part._copy_main_params_to_model_params()


def gradient_norm(shards: Sequence[Shards]) -> float:
    """Of the whole model. Collective, once over the ranks that all shards have in common, or for each shard over its own."""
    groups = [one.part.get_grad_stats_parallel_group() for one in shards]
    if all(group == groups[0] for group in groups):
        return math.sqrt(_square([run for one in shards for run in one.runs], groups[0]))
    return math.sqrt(sum(_square(one.runs, group) for one, group in zip(shards, groups, strict=True)))


def _square(runs: list[torch.Tensor], group: Any) -> float:
    """The sum of squares over all ranks of the group. A GPU is waited for once, where Megatron without Apex waits for each tensor."""
    square = torch.stack(torch._foreach_norm(runs)).double().square().sum() if runs else torch.zeros((), dtype=torch.float64, device=device())
    torch.distributed.all_reduce(square, group=group)
    return float(square)


def merged(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Flat tensors as fewer, longer ones: those that follow each other in the same memory are one, cut into pieces of at most RUN_NUMEL numbers.

    Buffers keep the order in which they are first met. Their addresses are another in every process, and a norm summed in that order would be another, too.

    >>> x, y = torch.arange(6.0), torch.arange(2.0)
    >>> [run.tolist() for run in merged([x[3:4], y, x[:2], x[2:3], x[5:]])]
    [[0.0, 1.0, 2.0, 3.0], [5.0], [0.0, 1.0]]
    """
    buffers: dict[int, list[torch.Tensor]] = {}
    for tensor in tensors:
        buffers.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor.detach())
    runs: list[torch.Tensor] = []
    for buffer in buffers.values():
        runs += _joined(sorted(buffer, key=torch.Tensor.storage_offset))
    return [piece for run in runs for piece in run.split(RUN_NUMEL[run.device.type])]


def _joined(pieces: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Of one buffer, in its order."""
    runs: list[torch.Tensor] = []
    for piece in pieces:
        if runs and runs[-1].storage_offset() + runs[-1].numel() == piece.storage_offset():
            runs[-1] = runs[-1].as_strided((runs[-1].numel() + piece.numel(),), (1,))
        else:
            runs.append(piece)
    return runs


def _fused_adam(adam: torch.optim.AdamW, group: dict[str, Any], divisor: float) -> None:
    """What `AdamW.step` calls, for all parameters of a group at once."""
    parameters = group["params"]
    states = [adam.state[parameter] for parameter in parameters]
    steps = [state["step"] for state in states]
    torch._foreach_add_(steps, 1)
    torch._fused_adamw_(
        parameters,
        [parameter.grad for parameter in parameters],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        steps,
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
        grad_scale=None if divisor == 1.0 else torch.tensor(divisor, dtype=torch.float32, device=parameters[0].device),
    )
