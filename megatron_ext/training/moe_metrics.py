"""How evenly the router spreads its tokens: reduced with the step's other metrics, and answered by the expert bias.

With c_e tokens at expert e of a layer, counted over the positions of all data-parallel ranks, without those marked as padding, before any is dropped:

    max_vio, load_entropy                                         as in `earl/load.py`
    ep_load      = mean over layers of max_r c_r / mean_r c_r     c_r: of the experts that rank r of an expert-parallel group holds; 1: even
    bias_e      += rate * sign(mean_e c_e - c_e)                  after the update                                     (arXiv 2408.15664, algorithm 1)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_ext.config.schema import ModelConfig
from megatron_ext.config.sizes import expert_layers
from megatron_ext.earl.load import load_entropy, max_vio
from megatron_ext.model.router import Router
from megatron_ext.observe.metrics_file import EP_RANK_LOAD
from megatron_ext.parallel.groups import ParallelContext


class ExpertLoad:
    """The tallies of one model's routers (of those that a pipeline stage holds), kept while it trains; generation and evaluation are not counted.

    L counts the layers of the whole model that have experts; without any there are no metrics.
    """

    def __init__(self, routers: Sequence[Router], model: ModelConfig) -> None:
        self.routers, self._model = tuple(routers), model
        self._row = {layer: row for row, layer in enumerate(expert_layers(model))}

    def reset(self) -> None:
        for router in self.routers:
            router.tally.clear()

    def reduced(self, num_microbatches: int, context: ParallelContext) -> tuple[dict[str, float], np.ndarray]:
        """Metrics since the last reset, and tokens per expert [L, E]; all over all ranks and layers. Collective.

        `moe/aux_loss` or `moe/seq_aux_loss`, `moe/z_loss` (mean over layers, without coefficients; the first two are 1 where the load is even), `moe/max_vio`,
        `moe/load_entropy`, `moe/dropped_frac` (of the assignments of tokens to experts), `moe/expert_bias_max` (the largest absolute bias of this step).
        `moe/ep_rank_load_max` (with expert parallelism: how much longer than the mean the busiest rank's experts take; in every layer all wait for it).
        What is switched off is absent. Routers see sequence slices under tensor and context parallelism, and layers live on stages: all is summed.
        """
        if not self._row:
            return {}, np.zeros((0, 0))
        names, biased = self._tallied(), self._model.moe_expert_bias
        replicas = context.layout.tp * context.layout.cp * context.layout.dp
        table = torch.zeros(len(self._row), self._model.num_experts + len(names) + biased, dtype=torch.float64, device=context.device)
        for router in self.routers:
            tally = router.tally
            bias = [] if router.expert_bias is None else [router.expert_bias.abs().max()[None] / replicas]
            table[self._row[router.layer_number - 1]] = torch.cat([tally["chosen"], *(tally[name][None] for name in names), *bias])
        for group in (context.pgs.tp, context.pgs.dp_cp, context.pgs.pp):
            if group.size() > 1:
                torch.distributed.all_reduce(table, group=group)
        counts_LE, more = np.split(table.cpu().numpy(), [self._model.num_experts], axis=1)
        metrics = load_metrics(counts_LE)
        if context.layout.ep > 1:
            metrics[EP_RANK_LOAD] = ep_rank_load(counts_LE, context.layout.ep)
        for column, name in enumerate(names):
            if name == "kept":
                metrics["moe/dropped_frac"] = float(1.0 - more[:, column].sum() / counts_LE.sum())
            else:
                per_sample = name == "aux_loss" and self._model.moe_balancing == "seq_aux_loss"
                metrics["moe/seq_aux_loss" if per_sample else f"moe/{name}"] = float(more[:, column].mean() / (num_microbatches * context.layout.dp))
        if biased:
            metrics["moe/expert_bias_max"] = float(more[:, -1].max())
        return metrics, counts_LE

    def _tallied(self) -> list[str]:
        """What routers count besides `chosen`, in every stage the same whether it has routers or not."""
        model = self._model
        counted = {
            "aux_loss": model.moe_balancing != "none" and model.moe_aux_loss_coeff > 0,
            "kept": model.moe_capacity_factor is not None,
            "z_loss": model.moe_z_loss_coeff > 0,
        }
        return [name for name, on in counted.items() if on]

    def balance(self, counts_LE: np.ndarray) -> None:
        """Moves the expert biases by a step, in the same way on every rank."""
        for router in self.routers:
            if router.expert_bias is not None and router.expert_bias_rate:
                counts_E = torch.from_numpy(counts_LE[self._row[router.layer_number - 1]]).to(router.expert_bias.device)
                router.expert_bias.add_(moved(counts_E).to(router.expert_bias), alpha=router.expert_bias_rate)


def moved(counts_E: torch.Tensor) -> torch.Tensor:
    """Where each expert's bias goes: down where it has more tokens than the mean, up where it has fewer.

    >>> moved(torch.tensor([5.0, 3.0, 1.0, 3.0]))
    tensor([-1.,  0.,  1.,  0.])
    """
    return torch.sign(counts_E.mean() - counts_E)


def load_metrics(counts_LE: np.ndarray) -> dict[str, float]:
    """`moe/max_vio` of the worst layer and the mean `moe/load_entropy` of all layers.

    >>> load_metrics(np.array([[6.0, 2.0, 0.0, 0.0]]))["moe/max_vio"]
    2.0
    """
    return {"moe/max_vio": float(max_vio(counts_LE).max()), "moe/load_entropy": float(load_entropy(counts_LE).mean())}


def ep_rank_load(counts_LE: np.ndarray, ep: int) -> float:
    """Each of `ep` ranks holds a run of E / ep experts.

    >>> ep_rank_load(np.array([[6.0, 2.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]]), 2)
    1.5
    """
    counts_LR = counts_LE.reshape(len(counts_LE), ep, -1).sum(2)
    return float((counts_LR.max(1) / counts_LR.mean(1)).mean())
