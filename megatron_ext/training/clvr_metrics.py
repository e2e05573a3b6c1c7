"""How much CLVR adds: the size of each tap's refinement against the residual stream it enters, measured where the two meet.

clvr/tap<i>/update_ratio = RMS(g o) / RMS(x)          over all positions of all microbatches and ranks; 0 at initialisation
clvr/tap<i>/gate         = tanh(g)                    for tanh gates
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from megatron_ext.model.assembly import VisionLanguageModel
from megatron_ext.parallel.groups import ParallelContext


class RefinementSize:
    """Sums of squares [taps, 2] of refinements and residual streams of one model while it trains, by a forward hook on every injection. A tap is measured
    on the pipeline stage of its target."""

    def __init__(self, chunks: Sequence[VisionLanguageModel]) -> None:
        self._gates: dict[int, torch.Tensor] = {}
        for chunk in chunks:
            for tap in chunk.stage.asks:
                # Before the tap runs: ZeRO-3 has its weights whole while it runs, and no longer.
                chunk.decoder.taps[tap].register_forward_pre_hook(self._gate_hook(tap))
        self._squares = [torch.zeros(2, dtype=torch.float64) for _ in chunks[0].decoder.ends]
        self._has_gates = chunks[0].model_config.clvr.gate == "tanh_gate"
        for chunk in chunks:
            for injection in chunk.decoder.injections:
                injection.register_forward_hook(self._hook(injection.tap))

    def _hook(self, tap: int) -> Any:
        def measure(_module: torch.nn.Module, inputs: tuple[torch.Tensor, torch.Tensor], _output: torch.Tensor) -> None:
            if torch.is_grad_enabled():
                stream, refinement = (x.detach().float().square().sum() for x in inputs)
                self._squares[tap] = self._squares[tap].to(stream.device) + torch.stack([refinement, stream])

        return measure

    def _gate_hook(self, index: int) -> Any:
        def note(tap: Any, _inputs: Any) -> None:
            if torch.is_grad_enabled() and tap.gate is not None:
                self._gates[index] = tap.gate.detach().clone()

        return note

    def reset(self) -> None:
        self._gates = {}
        self._squares = [torch.zeros_like(squares) for squares in self._squares]

    def metrics(self, context: ParallelContext) -> dict[str, float]:
        """Since the last reset. Collective; sequence slices are summed over the tensor-parallel group first, stages last."""
        if not self._squares:
            return {}
        gates = [math.tanh(float(self._gates[index])) if index in self._gates else 0.0 for index in range(len(self._squares))]
        squares, gates_T = torch.stack(self._squares).to(context.device), torch.tensor(gates, dtype=torch.float64, device=context.device)
        for group in (context.pgs.tp, context.pgs.dp_cp, context.pgs.pp):
            if group.size() > 1:
                torch.distributed.all_reduce(squares, group=group)
        if context.layout.pp > 1:
            torch.distributed.all_reduce(gates_T, group=context.pgs.pp)
        ratios = (squares[:, 0] / squares[:, 1].clamp(min=1e-30)).sqrt().tolist()
        found = {f"clvr/tap{index}/update_ratio": ratio for index, ratio in enumerate(ratios)}
        if self._has_gates:
            found |= {f"clvr/tap{index}/gate": gate for index, gate in enumerate(gates_T.tolist())}
        return found
