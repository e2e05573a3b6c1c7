"""What runs in an actor's process. It imports next to nothing, so that signs of life come soon; the role's own imports come with its first verb."""

from __future__ import annotations

import os
import pickle
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

LIFE = "life"
"""Ray's name of the thread that answers while the verbs' own thread is busy."""
KILL_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Home:
    """Where an actor's process is."""

    node: str
    pid: int
    address: str


class RankActor:
    """Holds the role's object."""

    def __init__(self, role: bytes) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to the driver
        self._bytes = role
        self._role: Any = None

    def live(self) -> Home:
        """A sign of life."""
        import ray

        return Home(ray.get_runtime_context().get_node_id(), os.getpid(), ray.util.get_node_ip_address())

    def free_port(self, address: str) -> int:
        from megatron_ext.parallel.store import free_port

        return free_port(address)

    def obey(self, verb: str, arguments: tuple[Any, ...]) -> Any:
        if self._role is None:
            self._role = pickle.loads(self._bytes)()
        return getattr(self._role, verb)(*arguments)


def kill_process(pid: int) -> None:
    """On its own node, stopped or not, with what it started where it leads a process group. Returns when it is gone."""
    with suppress(ProcessLookupError):
        if os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + KILL_TIMEOUT_S
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.01)
