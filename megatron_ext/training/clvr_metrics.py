"""How much CLVR adds: the size of each tap's refinement against the residual stream it enters, measured where the two meet.

clvr/tap<i>/update_ratio = RMS(g o) / RMS(x)          over all positions of all microbatches and ranks; 0 at initialisation
clvr/tap<i>/gate         = tanh(g)                    for tanh gates
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_ext.model.clvr import ClvrTap
from megatron_ext.model.clvr_block import Injection
from megatron_ext.parallel.groups import ParallelContext


class RefinementSize:
    """Sums of squares [taps, 2] of refinements and residual streams of one model while it trains, by a forward hook on every injection."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._taps = [module for module in model.modules() if isinstance(module, ClvrTap)]
        injections = [module for module in model.modules() if isinstance(module, Injection)]
        self._squares = [torch.zeros(2, dtype=torch.float64) for _ in injections]
        for index, injection in enumerate(injections):
            injection.register_forward_hook(self._hook(index))

    def _hook(self, index: int) -> Any:
        def measure(_module: torch.nn.Module, inputs: tuple[torch.Tensor, torch.Tensor], _output: torch.Tensor) -> None:
            if torch.is_grad_enabled():
                stream, refinement = (x.detach().float().square().sum() for x in inputs)
                self._squares[index] = self._squares[index].to(stream.device) + torch.stack([refinement, stream])

        return measure

    def reset(self) -> None:
        self._squares = [torch.zeros_like(squares) for squares in self._squares]

    def metrics(self, context: ParallelContext) -> dict[str, float]:
        """Since the last reset. Collective; sequence slices are summed over the tensor-parallel group first."""
        if not self._squares:
            return {}
        squares = torch.stack(self._squares).to(context.device)
        for group in (context.pgs.tp, context.pgs.dp_cp):
            if group.size() > 1:
                torch.distributed.all_reduce(squares, group=group)
        ratios = (squares[:, 0] / squares[:, 1].clamp(min=1e-30)).sqrt().tolist()
        found = {f"clvr/tap{index}/update_ratio": ratio for index, ratio in enumerate(ratios)}
        gates = {f"clvr/tap{index}/gate": float(torch.tanh(tap.gate.detach())) for index, tap in enumerate(self._taps) if tap.gate is not None}
        return found | gates
