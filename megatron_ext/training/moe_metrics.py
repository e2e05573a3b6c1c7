"""How evenly the router spreads its tokens: tokens per expert, counted where the router decides, reduced with the step's other metrics.

With c_e tokens at expert e of a layer, counted over all positions of all data-parallel ranks, padding included:

    max_vio      = max_e c_e / mean_e c_e - 1                     0: even; E / K - 1: one set of K experts takes all   (arXiv 2408.15664, MaxVio)
    load_entropy = -sum_e p_e ln p_e / ln E,  p_e = c_e / sum c   1: even; ln K / ln E: one set of K experts takes all
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker, get_moe_layer_wise_logging_tracker
from megatron.core.transformer.moe.router import TopKRouter

from megatron_ext.parallel.groups import ParallelContext


class ExpertLoad:
    """Counts tokens per expert [L, E] of one model while it trains, with a forward hook on every router; generation and evaluation are not counted."""

    def __init__(self, routers: list[TopKRouter]) -> None:
        self.num_layers = len(routers)
        self._counts: list[torch.Tensor | None] = [None] * len(routers)
        for layer, router in enumerate(routers):
            router.register_forward_hook(self._hook(layer))

    def _hook(self, layer: int) -> Any:
        def count(_module: torch.nn.Module, _inputs: Any, outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
            if not torch.is_grad_enabled():
                return
            tokens_E = outputs[1].sum(0, dtype=torch.float32)
            before = self._counts[layer]
            self._counts[layer] = tokens_E if before is None else before + tokens_E

        return count

    def reset(self) -> None:
        """Forgets what was counted, and Megatron's table of auxiliary losses: one per process, to which evaluation or another model may have added."""
        self._counts = [None] * self.num_layers
        clear_aux_losses_tracker()

    def counts(self) -> torch.Tensor:
        """This rank's counts float32 [L, E] since the last reset."""
        return torch.stack([count for count in self._counts if count is not None])


def router_metrics(load: ExpertLoad, num_microbatches: int, context: ParallelContext) -> dict[str, float]:
    """`moe/aux_loss` (mean over layers, without its coefficient: 1 is even; absent when it is off), `moe/max_vio`, `moe/load_entropy`. Collective.

    Routers see sequence slices under tensor parallelism, so theirs are summed over that group first.
    """
    counts_LE = load.counts()
    entry = get_moe_layer_wise_logging_tracker().get("load_balancing_loss")
    aux_L = counts_LE.new_zeros(0) if entry is None else entry["values"]
    flat = torch.cat([aux_L, counts_LE.flatten()]).double()
    for group in (context.pgs.tp, context.pgs.dp_cp):
        if group.size() > 1:
            torch.distributed.all_reduce(flat, group=group)
    values = flat.cpu().numpy()
    metrics = load_metrics(values[len(aux_L) :].reshape(counts_LE.shape))
    if len(aux_L):
        metrics["moe/aux_loss"] = float(values[: len(aux_L)].mean() / (num_microbatches * context.pgs.dp_cp.size()))
    return metrics


def load_metrics(counts_LE: np.ndarray) -> dict[str, float]:
    """`moe/max_vio` of the worst layer and the mean `moe/load_entropy` of all layers.

    >>> load_metrics(np.array([[6.0, 2.0, 0.0, 0.0]]))["moe/max_vio"]
    2.0
    """
    return {"moe/max_vio": float(max_vio(counts_LE).max()), "moe/load_entropy": float(load_entropy(counts_LE).mean())}


def max_vio(counts_LE: np.ndarray) -> np.ndarray:
    """[L]."""
    return counts_LE.max(1) / counts_LE.mean(1) - 1.0


def load_entropy(counts_LE: np.ndarray) -> np.ndarray:
    """[L], as a share of ln E."""
    share_LE = counts_LE / counts_LE.sum(1, keepdims=True)
    logs_LE = np.log(np.where(share_LE > 0, share_LE, 1.0))
    return -(share_LE * logs_LE).sum(1) / math.log(counts_LE.shape[1])
