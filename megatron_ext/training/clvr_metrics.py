"""How much CLVR adds, and how sharply it looks, measured where it happens while the model trains.

clvr/tap<i>/update_ratio        RMS(g o) / RMS(x)                     over all positions of all microbatches and ranks; 0 at initialisation
clvr/tap<i>/gate                mean of g                             over channels, and over tokens where each has its own; for taps with gate parameters
clvr/tap<i>/attention_entropy   mean of H(a_t) / log |visible at t|   1: looks everywhere alike, 0: at one vision token; of a sample of positions
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from megatron_ext.config.schema import ClvrConfig
from megatron_ext.model.asked import on_ask
from megatron_ext.model.assembly import VisionLanguageModel
from megatron_ext.model.clvr import ClvrTap
from megatron_ext.model.clvr_gate import gate_values
from megatron_ext.model.sight import Sight, attention_weights
from megatron_ext.parallel.groups import ParallelContext

MOST_POSITIONS = 64
"""Of one row of a step's first microbatch: what the entropy is measured at."""


class RefinementSize:
    """Sums of one model's taps while it trains, by forward hooks: of squares where refinements are injected, of gates and entropies where taps ask. Each is
    measured on the pipeline stage where it happens."""

    def __init__(self, chunks: Sequence[VisionLanguageModel]) -> None:
        self._clvr: ClvrConfig = chunks[0].model_config.clvr
        self._num_taps = len(chunks[0].decoder.ends)
        self.reset()
        for chunk in chunks:
            for tap in chunk.stage.asks:
                # Before the tap runs: ZeRO-3 has its weights whole while it runs, and no longer.
                chunk.decoder.taps[tap].register_forward_pre_hook(self._gate_hook(tap))
                if isinstance(chunk.decoder.taps[tap], ClvrTap):
                    on_ask(chunk.decoder.taps[tap], self._entropy_hook(tap), partial(self._listens, tap))
            for injection in chunk.decoder.injections:
                injection.register_forward_hook(self._hook(injection.tap))

    def _hook(self, tap: int) -> Any:
        def measure(_module: torch.nn.Module, inputs: tuple[torch.Tensor, torch.Tensor], _output: torch.Tensor) -> None:
            if torch.is_grad_enabled():
                stream, refinement = (x.detach().float().square().sum() for x in inputs)
                self._squares[tap] = self._squares[tap].to(stream.device) + torch.stack([refinement, stream])

        return measure

    def _gate_hook(self, index: int) -> Any:
        def note(tap: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            if torch.is_grad_enabled() and tap.gate is not None:
                with torch.no_grad():
                    values = gate_values(self._clvr, tap.gate, inputs[0]).double()
                self._gates[index] = self._gates[index].to(values.device) + torch.stack([values.sum(), values.new_tensor(values.numel())])

        return note

    def _listens(self, index: int) -> bool:
        return torch.is_grad_enabled() and self._entropies[index] is None

    def _entropy_hook(self, index: int) -> Any:
        def measure(*asked: Any) -> None:
            self._entropies[index] = entropy_sums(*asked)

        return measure

    def reset(self) -> None:
        def zeros() -> list[torch.Tensor]:
            return [torch.zeros(2, dtype=torch.float64) for _ in range(self._num_taps)]

        self._squares, self._gates = zeros(), zeros()
        self._entropies: list[torch.Tensor | None] = [None] * self._num_taps

    def metrics(self, context: ParallelContext) -> dict[str, float]:
        """Since the last reset. Collective; sequence slices and heads are summed over the tensor-parallel group first, stages last."""
        if not self._squares:
            return {}
        nothing = torch.zeros(2, dtype=torch.float64)
        kinds = (self._squares, self._gates, [nothing if pair is None else pair for pair in self._entropies])
        sums_KT2 = torch.stack([torch.stack([pair.to(context.device) for pair in pairs]) for pairs in kinds])
        for group in (context.pgs.tp, context.pgs.dp_cp, context.pgs.pp):
            if group.size() > 1:
                torch.distributed.all_reduce(sums_KT2, group=group)
        squares, gates, entropies = (sums_KT2[..., 0] / sums_KT2[..., 1].clamp(min=1e-30)).unbind()
        found = {f"clvr/tap{index}/update_ratio": ratio for index, ratio in enumerate(squares.sqrt().tolist())}
        if self._clvr.has_gate:
            found |= {f"clvr/tap{index}/gate": gate for index, gate in enumerate(gates.tolist())}
        if self._clvr.fusion == "attention":
            found |= {f"clvr/tap{index}/attention_entropy": entropy for index, entropy in enumerate(entropies.tolist())}
        return found


def entropy_sums(query_SBND: torch.Tensor, keys_BNVD: torch.Tensor, sight: Sight) -> torch.Tensor:
    """Float64 [2]: the sum of H(a_t) / log |visible at t| over heads and a sample of positions, and how many these are. The positions are those of one row, the
    first that is refined somewhere, evenly spaced. Nothing waits for the device."""
    active_BS = sight.inject_BS & (sight.until_BS - sight.from_BS > 1)
    row_1 = active_BS.any(1).int().argmax()[None]
    from_S, until_S, active_S = (x_BS.index_select(0, row_1)[0] for x_BS in (sight.from_BS, sight.until_BS, active_BS))
    num_active, order_S = active_S.sum(), active_S.int().argsort(descending=True, stable=True)
    stride = (num_active + MOST_POSITIONS - 1).div(MOST_POSITIONS, rounding_mode="floor")
    place_P = torch.arange(min(MOST_POSITIONS, len(order_S)), device=order_S.device) * stride
    counted_P, positions_P = place_P < num_active, order_S[place_P.clamp(max=len(order_S) - 1)]
    sample = Sight(from_S[positions_P][None], until_S[positions_P][None], active_S[positions_P][None])
    query_P1ND = query_SBND.index_select(1, row_1).index_select(0, positions_P)
    entropy_NP = torch.special.entr(attention_weights(query_P1ND, keys_BNVD.index_select(0, row_1), sample)[0]).sum(-1)
    relative_NP = entropy_NP.double() / (sample.until_BS - sample.from_BS).clamp(min=2).double().log()
    return torch.stack([(relative_NP * counted_P).sum(), counted_P.sum().double() * len(relative_NP)])
