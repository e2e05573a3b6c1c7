"""What a rank notes of its steps, and what the notes of all ranks say together, every `log_every` steps.

step, step, step -> report: one small all-gather of (work, phases) -> means over the steps; slowest and fullest rank; tokens/s; MFU
                                                                   -> when each rank was in which phase, for the timeline
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from megatron_ext.observe.metrics_file import MFU, STEP_S, TILES_PER_ROW, TOKENS_PER_S, TOKENS_PER_S_PER_GPU
from megatron_ext.observe.stopwatch import TIMING, Lap, Stopwatch
from megatron_ext.observe.timeline import Track, traced_ranks
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.parallel.planner.model_flops import Yardstick
from megatron_ext.training.losses import TOKENS_PER_ROW
from megatron_ext.training.rank_work import WorkMeter, rank_metrics

T = TypeVar("T")


@dataclass
class Window:
    """Metrics since the last report: means, but for the values that describe a moment."""

    latest_only: tuple[str, ...] = ("lr",)
    _records: list[dict[str, float]] = field(default_factory=list)

    def add(self, metrics: dict[str, float]) -> None:
        self._records.append(metrics)

    def take(self) -> dict[str, float]:
        records, self._records = self._records, []
        latest = records[-1]
        return {name: latest[name] if name in self.latest_only else sum(record[name] for record in records) / len(records) for name in latest}


class Ledger:
    """`global_batch` rows a step of all ranks. Without a `yardstick` there is no MFU."""

    def __init__(self, global_batch: int, yardstick: Yardstick | None, context: ParallelContext) -> None:
        self._global_batch, self._yardstick, self._context = global_batch, yardstick, context
        self._window, self._meter = Window(), WorkMeter(context.device)
        self._save_s = 0.0
        self._traced = context.rank in traced_ranks(context.world_size)
        self._track: list[tuple[int, Sequence[Lap]]] = []

    @contextmanager
    def working(self, clock: Stopwatch) -> Iterator[None]:
        """Around a step after its data, the time of which is the clock's only lap so far."""
        with self._meter.step(clock.seconds()[STEP_S]):
            yield

    def add(self, metrics: dict[str, float], clock: Stopwatch) -> None:
        """The metrics of a step; `timing_s/save` is of saves after earlier steps, which were reported before."""
        save_s, self._save_s = self._save_s, 0.0
        self._window.add({**metrics, **clock.seconds(), TIMING + "save": save_s})

    def finished(self, step: int, clock: Stopwatch) -> None:
        """A step with its report and its save."""
        self._save_s += clock.phases().get("save", 0.0)
        if self._traced:
            self._track.append((step, clock.laps))

    def report(self) -> tuple[dict[str, float], list[Track]]:
        """Metrics since the last report, equal on all ranks but for `timing_s/*`, which are a rank's own; and every rank's track. Collective."""
        gathered = _gathered((self._meter.take(), self._take_track()), self._context)
        metrics = self._window.take()
        works, tracks = [work for work, _ in gathered], [track for _, track in gathered]
        step_s = sum(work.step_s for work in works) / len(works)
        return {**metrics, **self._rates(metrics, step_s), **rank_metrics(works)}, tracks

    def tracks(self) -> list[Track]:
        """Every rank's track since the last report. Collective."""
        return _gathered(self._take_track(), self._context)

    def _rates(self, metrics: dict[str, float], step_s: float) -> dict[str, float]:
        ranks, tokens = self._context.world_size, metrics[TOKENS_PER_ROW]
        rates = {TOKENS_PER_S: tokens * self._global_batch / step_s, TOKENS_PER_S_PER_GPU: tokens * self._global_batch / step_s / ranks}
        if self._yardstick is not None:
            rates[MFU] = self._yardstick.mfu(self._global_batch, tokens, metrics[TILES_PER_ROW], step_s * ranks)
        return rates

    def _take_track(self) -> Track:
        track, self._track = self._track, []
        return track


def _gathered(mine: T, context: ParallelContext) -> list[T]:
    """Everybody's, in the order of ranks."""
    if context.world_size == 1:
        return [mine]
    everyones: list[Any] = [None] * context.world_size
    torch.distributed.all_gather_object(everyones, mine)
    return everyones
