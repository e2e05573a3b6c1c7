"""Everything that is kept and shown of a stage while it runs, behind two calls: `report` a step's metrics, `trace` when ranks were in which phase.

report -> metrics.jsonl and TensorBoard, the panel or a line, Prometheus
trace  -> timeline.json
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

from megatron_ext.config.observe import ObserveConfig
from megatron_ext.observe.fleet_watch import FleetWatch
from megatron_ext.observe.metrics import MetricsWriter
from megatron_ext.observe.panel import stage_health
from megatron_ext.observe.prometheus import Exporter, open_exporter
from megatron_ext.observe.stopwatch import Lap
from megatron_ext.observe.timeline import Timeline, Track

Report = Callable[[int, Mapping[str, float]], None]


class StageObserver(Protocol):
    def steps(self, start: int, goal: tuple[str, str]) -> AbstractContextManager[Report]:
        """From step `start` on. `goal`: the metric that the stage is about, and its short name."""

    def trace(self, tracks: Sequence[Track]) -> None:
        """Of every rank in turn."""


class Observer:
    """See `StageObserver`. `fleet` is told of the ranks of an RL fleet. Made by `observe_stage`."""

    def __init__(self, stage: str, total: int, stage_dir: Path, exporter: Exporter, timeline: Timeline | None, fleet: FleetWatch) -> None:
        self._stage, self._total, self._stage_dir = stage, total, stage_dir
        self._exporter, self._timeline, self.fleet = exporter, timeline, fleet

    @contextmanager
    def steps(self, start: int, goal: tuple[str, str]) -> Iterator[Report]:
        with MetricsWriter(self._stage_dir) as writer, stage_health(self._stage, self._total, start, goal=goal, fleet=self.fleet) as show:

            def report(step: int, metrics: Mapping[str, float]) -> None:
                writer.write(step, metrics)
                self._exporter.publish(step, metrics)
                show(step, metrics)

            yield report

    def trace(self, tracks: Sequence[Track]) -> None:
        if self._timeline is not None:
            for rank, track in enumerate(tracks):
                for step, laps in track:
                    self._timeline.step(f"rank {rank}", step, laps)
            self._timeline.flush()

    def trace_loop(self, step: int, laps: Sequence[Lap]) -> None:
        """A step of RL as its driver sees it. What each rank did is known from `fleet`."""
        if self._timeline is not None:
            self._timeline.step("loop", step, laps)
            self._timeline.flush()


class _Silent:
    """Of ranks that say nothing."""

    @contextmanager
    def steps(self, start: int, goal: tuple[str, str]) -> Iterator[Report]:
        yield lambda step, metrics: None

    def trace(self, tracks: Sequence[Track]) -> None:
        return


SILENT = _Silent()


@contextmanager
def observe_stage(settings: ObserveConfig, run: str, stage: str, total: int, stage_dir: Path) -> Iterator[Observer]:
    """Opened before anything is trained, so that what the settings ask for and cannot be had is said then: raises UserError."""
    with Timeline(stage_dir, f"{run}: {stage}") if settings.timeline else nullcontext() as timeline:
        fleet = FleetWatch() if timeline is None else FleetWatch(timeline.span)
        with open_exporter(settings, run, stage, total, fleet) as exporter:
            yield Observer(stage, total, stage_dir, exporter, timeline, fleet)
