"""Whether the ranks' processes are alive, whatever their verbs do: each gives a sign of life about every second, and a thread of the driver looks for them.

Silence is counted by that thread. Time in which it did not get to look itself, because the driver was stopped or starved, is not held against the ranks: they
may have been stopped with it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Mapping

BEAT_EVERY_S = 1.0
"""Between two signs of life of a rank."""
LOOK_EVERY_S = 0.5
STARVED_S = 2.0
"""A look that comes later than this after the one before comes from a driver that was held up itself."""
Beats = Mapping[Hashable, int | None]
"""How many signs of life each rank has given. None: it has not begun yet, and may take its time."""


class Silence:
    """How long each rank has been silent, from what the looks found.

    >>> silence = Silence()
    >>> for now, signs in ((0.0, 1), (1.0, 2), (2.0, 2), (3.0, 2)):
    ...     silence.look({"a rank": signs}, now)
    >>> silence.of("a rank")
    2.0
    >>> silence.look({"a rank": 2}, 3600.0)  # the driver slept
    >>> silence.of("a rank")
    0.0
    """

    def __init__(self) -> None:
        self._looked: float | None = None
        self._heard: dict[Hashable, tuple[int | None, float]] = {}

    def look(self, beats: Beats, now: float) -> None:
        starved = self._looked is not None and now - self._looked > STARVED_S
        heard = {}
        for rank, count in beats.items():
            before = self._heard.get(rank)
            new = before is None or before[0] != count or count is None or starved
            heard[rank] = (count, now) if new or before is None else before
        self._heard, self._looked = heard, now

    def of(self, rank: Hashable) -> float:
        """Seconds up to the last look; 0 of a rank that nobody has looked at. May be called from another thread."""
        heard, looked = self._heard, self._looked
        return max(0.0, looked - heard[rank][1]) if looked is not None and rank in heard else 0.0


class Pulse:
    """The thread that looks, from its making until `close`. `beats` is called in it."""

    def __init__(self, beats: Callable[[], Beats]) -> None:
        self._beats, self._silence, self._closed = beats, Silence(), threading.Event()
        self._thread = threading.Thread(target=self._look, name="pulse", daemon=True)
        self._thread.start()

    def silent_s(self, rank: Hashable) -> float:
        return self._silence.of(rank)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._closed.wait(LOOK_EVERY_S):
            self._silence.look(self._beats(), time.monotonic())
