"""Seconds by phase, for `timing_s/*`."""

from __future__ import annotations

import time
from itertools import pairwise


class Stopwatch:
    """Runs from the moment it is made; a lap ends a phase and names it."""

    def __init__(self) -> None:
        self._laps = [("", time.perf_counter())]

    def lap(self, name: str) -> None:
        self._laps.append((name, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """`timing_s/<phase>` of every phase, its laps together, and `timing_s/step` of all of them."""
        laps: dict[str, float] = {}
        for (_, before), (name, now) in pairwise(self._laps):
            laps[f"timing_s/{name}"] = laps.get(f"timing_s/{name}", 0.0) + now - before
        return {**laps, "timing_s/step": self._laps[-1][1] - self._laps[0][1]}
