"""Two ranks that train, one of which is slowed down. In a module of its own, because ranks import it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from megatron_ext.config.schema import ParallelConfig, TrainConfig
from megatron_ext.observe.timeline import Track
from megatron_ext.parallel.groups import open_parallel
from megatron_ext.parallel.stopping import StopRequest
from megatron_ext.training.loop import supervised, train
from tests.support.training import own_microbatches, start

STEPS, LOG_EVERY = 4, 2


def train_slowed(
    rank: int, world_size: int, init_method: str, parallel: ParallelConfig, read_s: list[float], compute_s: list[float]
) -> tuple[list[dict[str, float]], list[list[Any]]]:
    """Every report's metrics, and the tracks of both ranks. `read_s`, `compute_s`: by rank, how much longer a step's reading and computing take."""
    with open_parallel(parallel, rank, world_size, init_method, 0) as context:
        reports: list[dict[str, float]] = []
        tracks: list[list[Any]] = [[] for _ in range(world_size)]

        def batch(step: int) -> Any:
            time.sleep(read_s[rank])
            return own_microbatches(step, 8, context)

        def trace(fresh: Sequence[Track]) -> None:
            for number, track in enumerate(fresh):
                tracks[number] += track

        engine = start(context)
        engine.chunks[0].register_forward_pre_hook(lambda *_: burn(compute_s[rank]))
        train(
            engine,
            batch,
            supervised(engine, context),
            TrainConfig(steps=STEPS, global_batch=8, log_every=LOG_EVERY, save_every=LOG_EVERY),
            context,
            save=lambda step: time.sleep(0.01),
            report=lambda step, metrics: reports.append({"step": float(step), **metrics}),
            trace=trace,
            stop=StopRequest(),
        )
        return reports, tracks


def burn(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass
