"""Which ranks of a fleet there are, which of them are at work, at what, and who holds up whom: told by whoever asks them, read by the panel, Prometheus and the
timeline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

QUIET_S = 5.0
"""A rank that has been silent for so long is spoken of."""
MOST_NAMES = 4


@dataclass(frozen=True)
class RoleState:
    """Ranks of one role: how many answered or were asked so far, how many of them were not lost, and how many are busy now."""

    known: int
    alive: int
    working: int


@dataclass(frozen=True)
class Task:
    """What a rank is busy with, since when (seconds since 1970), and in which world: "" is one of its own."""

    verb: str
    world: str
    start_s: float


class FleetWatch:
    """Ranks go by names such as "learner rank 0" and "rollout replica 1 rank 0", whose first word is their role. `span` is told what a rank did, from when to
    when (seconds since 1970). Threads may tell and ask at once."""

    def __init__(self, span: Callable[[str, str, float, float], None] = lambda rank, verb, start_s, end_s: None) -> None:
        self._span = span
        self._lock = threading.Lock()
        self._known: dict[str, bool] = {}
        """Whether each rank is alive."""
        self._busy: dict[str, Task] = {}
        self._silent: dict[str, float] = {}

    def began(self, rank: str, verb: str, world: str = "") -> None:
        """A rank that was lost before has been started anew."""
        with self._lock:
            self._known[rank] = True
            self._busy[rank] = Task(verb, world, time.time())

    def ended(self, rank: str) -> None:
        with self._lock:
            task = self._busy.pop(rank)
            self._silent.pop(rank, None)
            self._span(rank, task.verb, task.start_s, time.time())

    def lost(self, rank: str) -> None:
        with self._lock:
            self._known[rank] = False

    def silent(self, rank: str, seconds: float) -> None:
        """A busy rank has given no sign of life for so long."""
        with self._lock:
            self._silent[rank] = seconds

    def roles(self) -> dict[str, RoleState]:
        """By role."""
        with self._lock:
            known, busy = dict(self._known), dict(self._busy)
        found = {}
        for role in dict.fromkeys(rank.split()[0] for rank in known):
            ranks = [rank for rank in known if rank.split()[0] == role]
            found[role] = RoleState(len(ranks), sum(known[rank] for rank in ranks), sum(rank in busy for rank in ranks))
        return found

    def now(self) -> tuple[str, float] | None:
        """The verb that has been under way for longest, and for how many seconds. None while all ranks wait."""
        with self._lock:
            busy = list(self._busy.values())
        if not busy:
            return None
        task = min(busy, key=lambda one: one.start_s)
        return task.verb, time.time() - task.start_s

    def culprit(self) -> str | None:
        """The story of the busy rank that has been silent for longest. None while all give signs of life."""
        with self._lock:
            quiet = {rank: seconds for rank, seconds in self._silent.items() if seconds > QUIET_S}
        return self.story(max(quiet, key=lambda rank: quiet[rank])) if quiet else None

    def story(self, rank: str) -> str:
        """Of a busy rank: how long it has been silent, at what, and who waits for it since when, the longest first.

        >>> watch = FleetWatch()
        >>> for name in ("rollout replica 0 rank 0", "rollout replica 0 rank 1"):
        ...     watch.began(name, "advance", "replica 0")
        >>> watch.silent("rollout replica 0 rank 1", 12.0)
        >>> watch.story("rollout replica 0 rank 1")
        "rollout replica 0 rank 1 has given no sign of life for 12 s while at 'advance'; waiting for it: rollout replica 0 rank 0 (at 'advance' for 0 s)"
        """
        with self._lock:
            task, seconds, busy = self._busy.get(rank), self._silent.get(rank, 0.0), dict(self._busy)
        if task is None:
            return f"{rank} is at nothing"
        story = f"{rank} has given no sign of life for {seconds:.0f} s while at {task.verb!r}"
        mates = {name: mate for name, mate in busy.items() if name != rank and mate.world == task.world != ""}
        waiting = [f"{name} (at {mate.verb!r} for {time.time() - mate.start_s:.0f} s)" for name, mate in sorted(mates.items(), key=lambda one: one[1].start_s)]
        if len(waiting) > MOST_NAMES:
            waiting[MOST_NAMES:] = [f"{len(waiting) - MOST_NAMES} more"]
        return story + (f"; waiting for it: {', '.join(waiting)}" if waiting else "")
