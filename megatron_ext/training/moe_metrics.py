"""How evenly the router spreads its tokens: tokens per expert, counted where the router decides, reduced with the step's other metrics.

With c_e tokens at expert e of a layer, counted over all positions of all data-parallel ranks, padding included (it is computed like any other token):

    max_vio      = max_e c_e / mean_e c_e - 1                     0: even; E / K - 1: one set of K experts takes all   (arXiv 2408.15664, MaxVio)
    load_entropy = -sum_e p_e ln p_e / ln E,  p_e = c_e / sum c   1: even; ln K / ln E: one set of K experts takes all
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker, get_moe_layer_wise_logging_tracker
from megatron.core.transformer.moe.router import TopKRouter

from megatron_ext.parallel.groups import ParallelContext


class ExpertLoad:
    """Counts tokens per expert [L, E] of one model while it trains, with a forward hook on every router; generation and evaluation are not counted. Layers on
    other pipeline stages stay at 0."""

    def __init__(self, routers: Sequence[TopKRouter]) -> None:
        self._config = routers[0].config
        self._counts: dict[int, torch.Tensor] = {}
        for router in routers:
            router.register_forward_hook(self._hook(router.layer_number - 1))

    def _hook(self, layer: int) -> Any:
        def count(_module: torch.nn.Module, _inputs: Any, outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
            if torch.is_grad_enabled():
                tokens_E = outputs[1].sum(0, dtype=torch.float32)
                self._counts[layer] = self._counts[layer] + tokens_E if layer in self._counts else tokens_E

        return count

    def reset(self) -> None:
        """Forgets what was counted, and Megatron's table of auxiliary losses: one per process, to which evaluation or another model may have added."""
        self._counts = {}
        clear_aux_losses_tracker()

    def counts(self) -> torch.Tensor:
        """This rank's counts float32 [L, E] since the last reset."""
        nothing = torch.zeros_like(next(iter(self._counts.values())))
        return torch.stack([self._counts.get(layer, nothing) for layer in range(self._config.num_layers)])


_AUX_LOSSES = {"load_balancing_loss": "moe/aux_loss", "seq_load_balancing_loss": "moe/seq_aux_loss"}


def router_metrics(load: ExpertLoad, num_microbatches: int, context: ParallelContext) -> dict[str, float]:
    """`moe/aux_loss`, `moe/seq_aux_loss` (mean over layers, without the coefficient: 1 is even; absent when off), `moe/z_loss`, `moe/max_vio`,
    `moe/load_entropy`.
    Collective. Routers see sequence slices under tensor and context parallelism, so theirs are summed first, and layers are brought together over stages.
    """
    counts_LE = load.counts()
    tracker = get_moe_layer_wise_logging_tracker()
    names = {ours: tracker[theirs]["values"] for theirs, ours in {**_AUX_LOSSES, "z_loss": "moe/z_loss"}.items() if theirs in tracker}
    losses_L = [names[name].to(counts_LE) for name in names]
    flat = torch.cat([*losses_L, counts_LE.flatten()]).double()
    for group in (context.pgs.tp, context.pgs.dp_cp, context.pgs.pp):
        if group.size() > 1:
            torch.distributed.all_reduce(flat, group=group)
    values = flat.cpu().numpy()
    layers = counts_LE.shape[0]
    metrics = load_metrics(values[layers * len(names) :].reshape(counts_LE.shape))
    for place, name in enumerate(names):
        metrics[name] = float(values[layers * place : layers * (place + 1)].mean() / (num_microbatches * context.layout.dp))
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
