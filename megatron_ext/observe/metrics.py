"""The numbers of a stage, written once: a line of `metrics.jsonl` per step, and the same to TensorBoard.

A line is `{"step": 120, "time": 1790000000.0, "loss": 0.31, ...}`. A number that is not finite is written as the string "nan", "inf" or "-inf", because JSON
has no such numbers. After a resume the lines of steps that are run again are removed, so every step stands once.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from megatron_ext.observe.metrics_file import FILE_NAME, Record, lines, read_metrics, series

__all__ = ["FILE_NAME", "MetricsWriter", "Record", "read_metrics", "series"]


class MetricsWriter:
    """Appends to `folder/metrics.jsonl`. Usable as a context manager; one rank writes.

    The first write decides where the file continues: whatever a former run wrote at that step or later is dropped, together with a line cut short by a crash.
    """

    def __init__(self, folder: Path, tensorboard: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / FILE_NAME
        self._events = EventFileWriter(str(folder)) if tensorboard else None
        self._continued = False

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line. It is on disk when this returns."""
        if not self._continued:
            self._continue_at(step)
        now = time.time()
        numbers = {name: float(value) for name, value in values.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": round(now, 3), **{name: _to_json(value) for name, value in numbers.items()}}) + "\n")
        if self._events is not None:
            summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()])
            self._events.add_event(Event(wall_time=now, step=step, summary=summary))

    def close(self) -> None:
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _continue_at(self, step: int) -> None:
        self._continued = True
        if self._path.exists():
            kept = [line for line, record in lines(self._path) if record["step"] < step]
            partial = self._path.with_suffix(".jsonl.partial")
            partial.write_text("".join(kept), encoding="utf-8")
            partial.replace(self._path)
        if self._events is not None:  # tells TensorBoard to hide what it holds from this step on
            self._events.add_event(Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START)))


def _to_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
