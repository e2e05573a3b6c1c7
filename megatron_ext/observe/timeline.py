"""When every rank did what: `timeline.json`, to be opened in https://ui.perfetto.dev or chrome://tracing.

A file is a JSON array of events in Chrome's trace format (the "Trace Event Format"), a track for each rank or actor, microseconds since 1970. The closing
bracket is written at the end of a stage only: the format does without, so that the file of a stage that is running, or was killed, opens as well.

It stays small: it keeps the first 20 000 events and the last 20 000 to 40 000, in all about 8 MB at most. A supervised step is four events a rank or more: on
two ranks those are some 2000 steps from the start and as many before the end. Of more than 64 ranks every n-th is shown. A stage that goes on after a stop
starts a new file.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from megatron_ext.observe.stopwatch import Lap

FILE_NAME = "timeline.json"
MOST_EVENTS, MOST_RANKS = 20_000, 64
Track = Sequence[tuple[int, Sequence[Lap]]]
"""Of one rank: steps, from 1, with their phases. Empty for ranks that are left out."""


def traced_ranks(world_size: int) -> range:
    """The ranks of a supervised stage that have a track.

    >>> len(traced_ranks(8)), traced_ranks(512)[:3]
    (8, range(0, 24, 8))
    """
    return range(0, world_size, -(-world_size // MOST_RANKS))


class Timeline:
    """Writes `folder/timeline.json`, from the first event on; usable as a context manager, from several threads. What is added is on disk after `flush`."""

    def __init__(self, folder: Path, process: str, most_events: int = MOST_EVENTS) -> None:
        self._path, self._most, self._lock = folder / FILE_NAME, most_events, threading.Lock()
        self._tracks: dict[str, int] = {}
        self._names, self._first, self._last = list[str](), list[str](), deque[str](maxlen=most_events)
        self._fresh: list[str] = []
        self._appended, self._named = 0, 0
        self._names.append(_name("process_name", 0, process))

    def step(self, track: str, step: int, laps: Sequence[Lap]) -> None:
        """A step and its phases within it."""
        self._add(track, f"step {step}", laps[0].start_s, laps[-1].end_s)
        for lap in laps:
            self.span(track, lap.name, lap.start_s, lap.end_s)

    def span(self, track: str, name: str, start_s: float, end_s: float) -> None:
        self._add(track, name, start_s, end_s)

    def flush(self) -> None:
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        fresh, self._fresh = self._fresh, []
        room = self._most - len(self._first)
        self._first += fresh[:room]
        self._last.extend(fresh[room:])
        self._appended += len(fresh[room:])
        if (fresh and not self._named) or self._appended > 2 * self._most:
            self._rewrite()
        elif fresh:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(",\n" + event for event in [*self._names[self._named :], *fresh])
            self._named = len(self._names)

    def close(self) -> None:
        self.flush()
        if not self._named:
            return  # there was nothing to do: the file of the run that did it stays
        with self._path.open("a", encoding="utf-8") as file:
            file.write("\n]\n")

    def __enter__(self) -> Timeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _add(self, track: str, name: str, start_s: float, end_s: float) -> None:
        start, end = round(start_s * 1e6), round(end_s * 1e6)  # whole numbers: what lies within a step stays within it
        with self._lock:
            event = {"name": name, "ph": "X", "ts": start, "dur": end - start, "pid": 0, "tid": self._number(track)}
            self._fresh.append(json.dumps(event))

    def _number(self, track: str) -> int:
        """Perfetto shows tracks in the order of their numbers."""
        if track not in self._tracks:
            self._tracks[track] = len(self._tracks) + 1
            self._names.append(_name("thread_name", self._tracks[track], track))
        return self._tracks[track]

    def _rewrite(self) -> None:
        """Everything that is kept, in a file that takes the old one's place at once."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        partial.write_text("[\n" + ",\n".join([*self._names, *self._first, *self._last]), encoding="utf-8")
        partial.replace(self._path)
        self._appended, self._named = len(self._last), len(self._names)


def _name(kind: str, thread: int, name: str) -> str:
    return json.dumps({"name": kind, "ph": "M", "pid": 0, "tid": thread, "args": {"name": name}})
