"""Where the taps of one model look: the attention of CLVR over the image, position by position, while the model does whatever it does.

    with record_gaze(model, slice(start, stop)) as gaze:    positions that are kept of passes over sequences; steps of generation are all kept
        model(inputs)           or an engine's prefill, in whatever parts, and its steps
    gaze.weights()              of every tap, float32 [B, T, N, V]

It listens to what taps ask (`asked.py`) and makes the weights beside the fused attention that the model runs; without a recording the model has no hook and
pays nothing. Read on: `sight.py` (the weights), `observe/gaze_map.py` (where vision token v lies in the picture).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

from megatron_ext.model.asked import on_ask
from megatron_ext.model.assembly import VisionLanguageModel
from megatron_ext.model.clvr import ClvrTap
from megatron_ext.model.sight import Sight, attention_weights


class Gaze:
    """What one recording has seen of each tap. `numbers`: the taps of the model that are here, in order."""

    def __init__(self, numbers: list[int], kept: slice) -> None:
        self.numbers = numbers
        self._kept = range(kept.start or 0, torch.iinfo(torch.int64).max if kept.stop is None else kept.stop)
        self._passed = dict.fromkeys(numbers, 0)
        self._found: dict[int, list[torch.Tensor]] = {number: [] for number in numbers}

    def weights(self) -> list[torch.Tensor]:
        """Float32 [B, T, N, V] of every tap, on the CPU: the kept positions in order, all heads. A position's weights sum to 1 over the vision tokens that it
        may look at and are 0 elsewhere. Empty where the model saw no image. Rows are those of the passes, so an engine must have kept the same ones."""
        return [torch.cat(self._found[number], dim=1) for number in self.numbers if self._found[number]]

    def take(self, number: int, tp_group: Any, query_SBND: torch.Tensor, keys_BNVD: torch.Tensor, sight: Sight) -> None:
        """What a tap asks, once. Collective under tensor parallelism."""
        if sight.seats is None:
            places = self._places(number, len(query_SBND))
            query_SBND, sight = query_SBND[places], sight.part(places)
        if query_SBND.shape[0]:
            heads_BSVN = attention_weights(query_SBND, keys_BNVD, sight).permute(0, 2, 3, 1).contiguous()
            whole_BSVN = gather_from_tensor_model_parallel_region(heads_BSVN, group=tp_group)
            self._found[number].append(whole_BSVN.transpose(2, 3).cpu())

    def _places(self, number: int, count: int) -> slice:
        """Which of a tap's next `count` positions are kept."""
        first = self._passed[number]
        self._passed[number] += count
        start, stop = (min(max(edge - first, 0), count) for edge in (self._kept.start, self._kept.stop))
        return slice(start, max(start, stop))


@contextmanager
def record_gaze(model: VisionLanguageModel, kept: slice = slice(None)) -> Iterator[Gaze]:
    """The gaze of every tap that this rank holds. Of a position it takes N V floats, so that of a long prompt only those asked for should be `kept`."""
    gaze = Gaze([number for number in model.stage.asks if isinstance(model.decoder.taps[number], ClvrTap)], kept)
    taps = {number: model.decoder.taps[number] for number in gaze.numbers}
    handles = [handle for number, tap in taps.items() for handle in on_ask(tap, partial(gaze.take, number, tap.tp_group))]
    try:
        yield gaze
    finally:
        for handle in handles:
            handle.remove()
