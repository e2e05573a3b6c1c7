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

from megatron_ext.errors import DataError

FILE_NAME = "metrics.jsonl"
Record = dict[str, float]


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
            kept = [line for line, record in _lines(self._path) if record["step"] < step]
            partial = self._path.with_suffix(".jsonl.partial")
            partial.write_text("".join(kept), encoding="utf-8")
            partial.replace(self._path)
        if self._events is not None:  # tells TensorBoard to hide what it holds from this step on
            self._events.add_event(Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START)))


def read_metrics(folder: Path) -> list[Record]:
    """The lines of a stage in order, non-finite numbers as floats; empty without a file. A malformed line is a DataError, except a last one cut short."""
    path = folder / FILE_NAME
    return [record for _, record in _lines(path)] if path.exists() else []


def series(records: list[Record], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric, where it was written."""
    rows = [(record["step"], record[name]) for record in records if name in record]
    return [step for step, _ in rows], [value for _, value in rows]


def _lines(path: Path) -> list[tuple[str, Record]]:
    found: list[tuple[str, Record]] = []
    text = path.read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if not line.endswith("\n"):  # the writer was stopped in the middle of its last line
            break
        try:
            record = {name: float(value) for name, value in json.loads(line).items()}
            record["step"] = int(record["step"])
        except (ValueError, TypeError, AttributeError, KeyError):
            raise DataError(f"{path}:{number}", "is not a line of metrics", "remove the line, or the file to start it afresh") from None
        found.append((line, record))
    return found


def _to_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
