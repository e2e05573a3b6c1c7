"""Who can be hit, and with what: the processes of a run, found from outside, as an operator would.

ranks.json        pids of learner and rollout ranks        children of the driver: reward workers, Ray's head (gcs_server, raylet)
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

KINDS = (
    "kill rollout", "stop rollout", "kill learner", "stop learner", "kill reward", "stop reward", "kill gcs_server", "kill raylet", "kill driver", "stop driver"
)  # fmt: skip
PAUSE_S = (2.0, 6.0)
"""How long a stopped driver stays so: nobody but its operator would wake it."""


@dataclass(frozen=True)
class Hit:
    kind: str
    process: str


class Monkey:
    """Draws every kind of fault in turn, in an order of its own each round."""

    def __init__(self, stage_dir: Path, seed: int) -> None:
        self._stage_dir, self.random = stage_dir, random.Random(seed)
        self._kinds = self._rounds()

    def hit(self, driver: int) -> Hit | None:
        """None where the one to be hit is not there; it is another's turn then."""
        kind = next(self._kinds)
        action, victim = kind.split()
        found = [driver] if victim == "driver" else self._pids(victim, driver)
        if not found:
            return None
        pid = self.random.choice(found)
        try:
            name = " ".join(psutil.Process(pid).cmdline()[:3])[:60]
            os.kill(pid, signal.SIGKILL if action == "kill" else signal.SIGSTOP)
            if kind == "stop driver":
                time.sleep(self.random.uniform(*PAUSE_S))
                os.kill(pid, signal.SIGCONT)
        except (ProcessLookupError, psutil.NoSuchProcess):
            return None
        return Hit(kind, f"{pid} {name}")

    def _rounds(self) -> Iterator[str]:
        while True:
            yield from self.random.sample(KINDS, len(KINDS))

    def _pids(self, victim: str, driver: int) -> list[int]:
        if victim in ("learner", "rollout"):
            ranks = json.loads((self._stage_dir / "ranks.json").read_text())
            return [rank["pid"] for name, rank in ranks.items() if name.startswith(victim) and psutil.pid_exists(rank["pid"])]
        marker = "rl.scoring.worker" if victim == "reward" else victim
        return [child.pid for child in _children(driver) if marker in " ".join(child.cmdline())]


def _children(pid: int) -> list[psutil.Process]:
    try:
        return [child for child in psutil.Process(pid).children() if child.status() != psutil.STATUS_ZOMBIE]
    except psutil.NoSuchProcess:
        return []
