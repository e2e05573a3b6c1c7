"""Model FLOPs of a step, by the planner's own formulas: what MFU divides by the peak. Without torch.

MFU = FLOPs of forward and backward / (seconds x ranks x peak)          (Chowdhery et al. 2022, arXiv 2204.02311, appendix B)

Counted is what the model has to compute, once: the backward pass of what trains (a frozen encoder has none), tokens without padding, the half of the
attention scores that a causal mask leaves. Not counted is what a layout adds: activations that are computed again, padding, passes that learn nothing.
Rows are taken to be as long as their mean.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ext.config.schema import ModelConfig, ParallelConfig
from megatron_ext.parallel.plan import Layout
from megatron_ext.parallel.planner.activations import Activations, Microbatch
from megatron_ext.parallel.planner.hardware import Cluster, Gpu, known_device
from megatron_ext.parallel.planner.layers import layer_kinds, rows_of, totals
from megatron_ext.parallel.planner.work import Held, Work, parts


@dataclass(frozen=True)
class Yardstick:
    """What the MFU of a run is measured by: its model, and the peak of one of its ranks. Made by `yardstick_of`."""

    model: ModelConfig
    train_vision: bool
    gpu: Gpu
    peak_flops: float

    def mfu(self, rows: float, row_tokens: float, row_tiles: float, rank_seconds: float) -> float:
        """Of `rows` rows that trained, with means of tokens and image tiles a row; `rank_seconds`: seconds times ranks."""
        return rows * self._row_flops(row_tokens, row_tiles) / (rank_seconds * self.peak_flops)

    def _row_flops(self, row_tokens: float, row_tiles: float) -> float:
        """Every part is a constant and a multiple of the tiles."""
        text = self._flops(round(row_tokens), 0)
        return text + row_tiles * (self._flops(round(row_tokens), 1) - text) if row_tiles else text

    def _flops(self, row_tokens: int, row_tiles: int) -> float:
        model, layers = self.model, totals(rows_of(layer_kinds(self.model)))
        vision = int(model.vision.enabled)
        held = Held(layers, len(model.clvr.active_taps), vision, vision, 1, 0, 0, 0)
        shapes = Activations(model, Layout.of(ParallelConfig()), Microbatch(1, row_tokens, row_tiles, packed=False), self.train_vision)
        return parts(Work(shapes, Cluster(self.gpu, 1, 1)), "none", self.train_vision, held.taps > 0, gradients=True).of(held).flops


def yardstick_of(model: ModelConfig, train_vision: bool, torch_name: str, threads: int) -> Yardstick | None:
    """For ranks on devices that torch calls so ("cpu": `threads` cores each). None for a device whose peak is not known: no MFU is better than a guess."""
    gpu = known_device(torch_name)
    if gpu is None:
        return None
    return Yardstick(model, train_vision, gpu, gpu.flops(model.dtype) * (threads if torch_name == "cpu" else 1))
