"""Talking to the processes of a run: every rank answers verbs, one at a time, and every wait has a deadline and names who it waits for.

A `Host` is where ranks live: forkserver processes of this machine (`local_host.py`) or Ray actors (`ray_host.py`). A rank is an object of a plain class in
a process of its own; a verb is one of its methods. A rank whose process is lost fails its pending verb with `RankFailed` naming it; nothing is restarted or
sent again.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Protocol

from megatron_ext.errors import RankFailed
from megatron_ext.observe.fleet_watch import FleetWatch

LOOPBACK = "127.0.0.1"
POLL_S = 0.5
"""The longest single wait: Python runs signal handlers in between."""
WORLD_TIMEOUT_S = 1800.0
"""How long a rank waits for its peers in a collective. A peer that dies is noticed at once; this is for one that hangs while the driver does not ask."""


@dataclass(frozen=True, eq=False)
class Rank:
    """One process of the run. `name` is for people: "learner rank 1", "rollout replica 0 rank 0"."""

    name: str
    process: Any


class Host(Protocol):
    """Where ranks live."""

    folder: Path
    """A private folder of this machine."""

    def address(self, rank: Rank) -> str:
        """Where the other ranks reach this one."""

    def meeting_point(self, world: str, first: Rank) -> str:
        """The URL at which the ranks of a new world meet; `first` is its rank 0."""

    def start(self, role: type, names: Sequence[str]) -> list[Rank]:
        """One new process for each name, holding `role()`."""

    def send(self, rank: Rank, verb: str, arguments: tuple[Any, ...]) -> None:
        """Asks a rank; it must not be busy with another verb."""

    def ready(self, ranks: Sequence[Rank], timeout_s: float) -> list[Rank]:
        """Those of the given busy ranks that have answered or died, after at most `timeout_s`; waits for the first of them."""

    def take(self, rank: Rank) -> Any:
        """The answer of a ready rank, or the error that it raised."""


@dataclass(frozen=True)
class Call:
    rank: Rank
    verb: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Switchboard:
    """Asks many ranks of one host at once."""

    host: Host
    watch: FleetWatch = field(default_factory=FleetWatch)

    def ask(self, calls: Sequence[Call], timeout_s: float, settle: tuple[type[Exception], ...] = ()) -> list[Any]:
        """The answers in the order of the calls. The first error of any rank is raised at once, without waiting for its peers, which may hang in a collective.

        Errors of the types in `settle` stand among the answers instead, and the other ranks are waited for.
        """
        deadline = time.monotonic() + timeout_s
        for call in calls:
            self.host.send(call.rank, call.verb, call.arguments)
            self.watch.began(call.rank.name, call.verb)
        waiting = {index: call.rank for index, call in enumerate(calls)}
        answers: list[Any] = [None] * len(calls)
        while waiting:
            ready = self.host.ready(list(waiting.values()), min(POLL_S, max(0.0, deadline - time.monotonic())))
            if not ready and time.monotonic() >= deadline:
                raise RankFailed(f"no answer to {calls[0].verb!r} within {timeout_s:.0f} s from {', '.join(rank.name for rank in waiting.values())}")
            for index in [index for index, rank in waiting.items() if rank in ready]:
                try:
                    answers[index] = self._take(waiting.pop(index))
                except settle as error:
                    answers[index] = error
        return answers

    def _take(self, rank: Rank) -> Any:
        self.watch.ended(rank.name)
        try:
            return self.host.take(rank)
        except RankFailed:
            self.watch.lost(rank.name)
            raise


@dataclass(frozen=True)
class Place:
    """Where a rank joins its world. `address` is where the others reach it."""

    rank: int
    world_size: int
    meeting_point: str
    address: str


def confine_gloo(address: str) -> None:
    """Keeps gloo's connections inside this machine where the ranks meet on its loopback address, for the process that calls it: gloo would listen on the
    outside address otherwise.
    """
    if ip_address(address).is_loopback:
        names = [name for _, name in socket.if_nameindex()]
        os.environ["GLOO_SOCKET_IFNAME"] = "lo" if "lo" in names else "lo0"
