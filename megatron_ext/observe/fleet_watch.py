"""Which ranks of a fleet there are, which of them are at work, and at what: told by whoever asks them, read by the panel, Prometheus and the timeline."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class RoleState:
    """Ranks of one role: how many answered or were asked so far, how many of them were not lost, and how many are busy now."""

    known: int
    alive: int
    working: int


class FleetWatch:
    """Ranks go by names such as "learner rank 0" and "rollout replica 1 rank 0", whose first word is their role. `span` is told what a rank did, from when to
    when (seconds since 1970)."""

    def __init__(self, span: Callable[[str, str, float, float], None] = lambda rank, verb, start_s, end_s: None) -> None:
        self._span = span
        self._known: dict[str, bool] = {}
        """Whether each rank is alive."""
        self._busy: dict[str, tuple[str, float]] = {}

    def began(self, rank: str, verb: str) -> None:
        self._known.setdefault(rank, True)
        self._busy[rank] = verb, time.time()

    def ended(self, rank: str) -> None:
        verb, start_s = self._busy.pop(rank)
        self._span(rank, verb, start_s, time.time())

    def lost(self, rank: str) -> None:
        self._known[rank] = False

    def roles(self) -> dict[str, RoleState]:
        """By role. May be called from another thread."""
        known, busy = dict(self._known), dict(self._busy)
        found = {}
        for role in dict.fromkeys(rank.split()[0] for rank in known):
            ranks = [rank for rank in known if rank.split()[0] == role]
            found[role] = RoleState(len(ranks), sum(known[rank] for rank in ranks), sum(rank in busy for rank in ranks))
        return found

    def now(self) -> tuple[str, float] | None:
        """The verb that has been under way for longest, and for how many seconds. None while all ranks wait."""
        busy = list(self._busy.values())
        if not busy:
            return None
        verb, start_s = min(busy, key=lambda one: one[1])
        return verb, time.time() - start_s
