"""Where the processes of a run live, and how they find each other.

A `Host` is forkserver processes of this machine (`local_host.py`) or Ray actors (`ray_host.py`). A rank is an object of a plain class in a process of its own;
a verb is one of its methods. Many are asked at once by a `Switchboard` (`switchboard.py`). A host restarts nothing and sends nothing again; whoever watches
over it ends a rank that is lost, and starts another of the same name in its place.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Protocol

from megatron_ext.errors import RouteMismatch, UserError, WeightSyncError

LOOPBACK = "127.0.0.1"
WORLD_TIMEOUT_S = 1800.0
"""How long a rank waits for its peers in a collective. A peer that dies is noticed at once; this is for one that hangs while the driver does not ask."""
CARRIED = (UserError, RouteMismatch, WeightSyncError)
"""Errors that cross from a rank to the driver as they are; any other becomes RankFailed with the rank's traceback."""


@dataclass(frozen=True, eq=False)
class Rank:
    """One process of the run. `name` is for people: "learner rank 1", "rollout replica 0 rank 0". Ranks of one `world` meet in collectives: when one is lost,
    the others wait for it in vain. "" is a world of its own."""

    name: str
    process: Any
    world: str = ""


class Host(Protocol):
    """Where ranks live. Threads may use it at once, for different ranks."""

    folder: Path
    """A private folder of this machine."""

    def address(self, rank: Rank) -> str:
        """Where the other ranks reach this one."""

    def whereabouts(self, rank: Rank) -> tuple[str, int]:
        """The node and the process id of a rank that has opened."""

    def meeting_point(self, world: str, first: Rank) -> str:
        """The URL at which the ranks of a new world meet; `first` is its rank 0. Another one every time, also for a world that is started anew."""

    def start(self, role: type, names: Sequence[str], world: str = "") -> list[Rank]:
        """One new process for each name, holding `role()`. One of a name that was there before takes its place, and ends it first."""

    def send(self, rank: Rank, verb: str, arguments: tuple[Any, ...]) -> None:
        """Asks a rank, and returns at once, whatever state it is in. One that is still busy finishes its earlier verb first, whose answer is dropped."""

    def ready(self, ranks: Sequence[Rank], timeout_s: float) -> list[Rank]:
        """Those of the given busy ranks that have answered or died, after at most `timeout_s`; waits for the first of them."""

    def take(self, rank: Rank) -> Any:
        """The answer of a ready rank, or the error that it raised. RankFailed (died, raised) where it did not come to one of its own."""

    def end(self, rank: Rank) -> None:
        """Kills the rank's process, also one that is stopped, and returns when it is gone. Its verb is lost, and said to be to who waits for it. Does nothing
        to a rank that was ended before."""

    def silent_s(self, rank: Rank) -> float:
        """Seconds since its process last gave a sign of life, which it does about every second whatever its verb does. Time in which this process was held up
        itself does not count."""


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
