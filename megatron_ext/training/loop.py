"""The supervised loop: batch, step, metrics, checkpoint, stop.

    for step in start .. steps:
        batch(step)  ->  optimizer_step  ->  metrics every `log_every`  ->  checkpoint every `save_every`  ->  stop if asked

What a step trains on is a function of its number alone, so a resumed run continues as if it had never stopped.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from megatron_ext.config.schema import TrainConfig
from megatron_ext.errors import StoppedForRequeue
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.parallel.stopping import StopRequest
from megatron_ext.training.engine import Engine
from megatron_ext.training.losses import TOKENS_PER_ROW, Microbatch, NextToken
from megatron_ext.training.step import optimizer_step


class Report(Protocol):
    """Where the numbers of a step go. Called on every rank with equal numbers but for timings."""

    def __call__(self, step: int, metrics: dict[str, float]) -> None: ...


@dataclass
class Window:
    """Metrics since the last report: means, but for the values that describe a moment."""

    latest_only: tuple[str, ...] = ("lr", "perf/peak_memory_bytes")
    _records: list[dict[str, float]] = field(default_factory=list)

    def add(self, metrics: dict[str, float]) -> None:
        self._records.append(metrics)

    def take(self) -> dict[str, float]:
        records, self._records = self._records, []
        latest = records[-1]
        return {name: latest[name] if name in self.latest_only else sum(record[name] for record in records) / len(records) for name in latest}


def train(
    engine: Engine,
    batch: Callable[[int], Sequence[Microbatch]],
    config: TrainConfig,
    context: ParallelContext,
    *,
    save: Callable[[int], None],
    poll: Callable[[], None] = lambda: None,
    report: Report,
    stop: StopRequest,
) -> dict[str, float]:
    """Trains from `engine.step` to `config.steps`; `batch(step)` gives this rank's microbatches. Returns the last metrics.

    `save` may return before the checkpoint is written; `poll`, called after every step, then raises what went wrong with it.
    Raises StoppedForRequeue once a requested stop is agreed and the save of its checkpoint begun.
    """
    window, objective = Window(), NextToken()
    last: dict[str, float] = {}
    if config.steps == 0:
        save(0)  # the next stage starts from this one's checkpoint, trained or not
    while (step := engine.step) < config.steps:
        began = time.perf_counter()
        microbatches = batch(step)
        read = time.perf_counter()
        metrics = optimizer_step(engine, microbatches, objective, context)
        done = time.perf_counter()
        window.add(_with_timings(metrics, done - began, read - began, config, context))
        poll()
        step += 1
        if step % config.log_every == 0 or step == config.steps:
            last = window.take()
            report(step, last)
        stopping = step < config.steps and stop.agreed(context)
        if stopping or step == config.steps or (config.save_every and step % config.save_every == 0):
            save(step)
        if stopping:
            raise StoppedForRequeue(f"stopped after step {step} of {config.steps}: run again to resume")
    return last


def _with_timings(metrics: dict[str, float], step_s: float, data_s: float, config: TrainConfig, context: ParallelContext) -> dict[str, float]:
    tokens_per_s = metrics[TOKENS_PER_ROW] * config.global_batch / step_s
    return {
        **metrics,
        "timing_s/step": step_s,
        "timing_s/data": data_s,
        "perf/tokens_per_s": tokens_per_s,
        "perf/tokens_per_s_per_gpu": tokens_per_s / context.world_size,
        "perf/peak_memory_bytes": peak_memory_bytes(),
    }


def peak_memory_bytes() -> float:
    """The most memory this rank has held: allocated on its GPU, or resident without one."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
