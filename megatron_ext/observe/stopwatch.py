"""Seconds by phase, for `timing_s/*` and the timeline."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise

TIMING = "timing_s/"


@dataclass(frozen=True)
class Lap:
    """A phase of a step, from `start_s` to `end_s` of the wall clock (seconds since 1970), which ranks on several machines share."""

    name: str
    start_s: float
    end_s: float


class Stopwatch:
    """Runs from the moment it is made; a lap ends a phase and names it. Laps follow each other without gaps."""

    def __init__(self) -> None:
        self._marks = [("", time.perf_counter())]
        self._epoch_s = time.time() - self._marks[0][1]

    def lap(self, name: str) -> None:
        self._marks.append((name, time.perf_counter()))

    @property
    def laps(self) -> tuple[Lap, ...]:
        return tuple(Lap(name, self._epoch_s + before, self._epoch_s + now) for (_, before), (name, now) in pairwise(self._marks))

    def phases(self) -> dict[str, float]:
        """Seconds of every phase, its laps together."""
        phases: dict[str, float] = {}
        for (_, before), (name, now) in pairwise(self._marks):
            phases[name] = phases.get(name, 0.0) + now - before
        return phases

    def seconds(self) -> dict[str, float]:
        """`timing_s/<phase>` of every phase, and `timing_s/step` of all of them."""
        step_s = self._marks[-1][1] - self._marks[0][1]
        return {**{TIMING + name: seconds for name, seconds in self.phases().items()}, TIMING + "step": step_s}
