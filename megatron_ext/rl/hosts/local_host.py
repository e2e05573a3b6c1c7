"""Ranks as processes of this machine, forked from a server that has torch and Megatron already imported: a fleet in a second, without Ray.

The driver and each rank share one pipe. A rank obeys until its pipe closes; when the driver dies it ends at once, whatever it is doing. It leads a process
group of its own: Ctrl-C is for the driver to answer.
"""

from __future__ import annotations

import itertools
import os
import pickle
import shutil
import signal
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import Pipe, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from megatron_ext.errors import RankFailed
from megatron_ext.parallel.forkserver import ForkedProcess, leave_server
from megatron_ext.rl.hosts.line import Line, SignsOfLife
from megatron_ext.rl.hosts.pulse import BEAT_EVERY_S, Pulse
from megatron_ext.rl.hosts.ranks import CARRIED, LOOPBACK, Rank


class LocalHost:
    """See `ranks.Host`. Made by `local_host()`, which also ends it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ranks: dict[str, Rank] = {}
        self._numbers = itertools.count()
        self._answered = threading.Condition()
        self._pulse = Pulse(lambda: {rank: _line(rank).signs.count() for rank in list(self._ranks.values())})

    def address(self, rank: Rank) -> str:
        return LOOPBACK

    def whereabouts(self, rank: Rank) -> tuple[str, int]:
        return LOOPBACK, _line(rank).process.pid or 0

    def meeting_point(self, world: str, first: Rank) -> str:
        return f"file://{self.folder}/{world}-{next(self._numbers)}.store"

    def start(self, role: type, names: Sequence[str], world: str = "") -> list[Rank]:
        ranks = []
        for name in names:
            if name in self._ranks:
                self.end(self._ranks[name])
            ranks.append(Rank(name, self._start(role, name), world))
            self._ranks[name] = ranks[-1]
        return ranks

    def send(self, rank: Rank, verb: str, arguments: tuple[Any, ...]) -> None:
        _line(rank).send(pickle.dumps((verb, arguments)))

    def ready(self, ranks: Sequence[Rank], timeout_s: float) -> list[Rank]:
        with self._answered:
            self._answered.wait_for(lambda: any(_line(rank).ready for rank in ranks), timeout_s)
            return [rank for rank in ranks if _line(rank).ready]

    def take(self, rank: Rank) -> Any:
        with self._answered:
            outcome, value = _line(rank).take()
        if outcome == "answer":
            return value
        if outcome == "lost":
            line = _line(rank)
            raise RankFailed(f"{rank.name} (pid {line.process.pid}) ended with exit code {line.exit_code()} while it was working", rank.name, "died")
        raise value if isinstance(value, CARRIED) else RankFailed(f"{rank.name} failed:\n{value}", rank.name, "raised")

    def end(self, rank: Rank) -> None:
        if self._ranks.get(rank.name) is rank:
            _line(rank).end()
            del self._ranks[rank.name]

    def silent_s(self, rank: Rank) -> float:
        return self._pulse.silent_s(rank)

    def close(self) -> None:
        """Ends every rank: those still working are killed."""
        self._pulse.close()
        for rank in list(self._ranks.values()):
            self.end(rank)

    def _start(self, role: type, name: str) -> tuple[ForkedProcess, Line]:
        signs = self.folder / f"signs-{next(self._numbers)}"
        signs.write_bytes(bytes(8))
        ours, theirs = Pipe()
        process = ForkedProcess(target=_serve, args=(theirs, signs, pickle.dumps(role)), name=name, daemon=True)
        process.start()
        theirs.close()
        return process, Line(process, ours, SignsOfLife(signs), self._answered)


@contextmanager
def local_host() -> Iterator[LocalHost]:
    folder = Path(tempfile.mkdtemp(prefix="megatron-ext-"))
    host = LocalHost(folder)
    try:
        yield host
    finally:
        host.close()
        shutil.rmtree(folder, ignore_errors=True)


def _line(rank: Rank) -> Line:
    return rank.process[1]


def _serve(pipe: Connection, signs: Path, role: bytes) -> None:
    """The life of a rank. The role comes as bytes, because importing it may take longer than a sign of life may be away."""
    os.setpgid(0, 0)
    leave_server()
    os.register_at_fork(after_in_child=pipe.close)  # what a rank forks must not keep the pipe of a dead one open
    threading.Thread(target=_live, args=(signs,), daemon=True).start()
    worker = pickle.loads(role)()
    while True:
        try:
            verb, arguments = pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            return
        try:
            reply = pickle.dumps(("answer", getattr(worker, verb)(*arguments)))
        except CARRIED as error:
            reply = pickle.dumps(("error", error))
        except Exception:
            reply = pickle.dumps(("error", traceback.format_exc()))
        pipe.send_bytes(reply)


def _live(file: Path) -> None:
    """Gives signs of life until the driver dies, then ends this process and what it started."""
    signs, driver = SignsOfLife(file), parent_process()
    assert driver is not None
    signs.give()
    while not wait([driver.sentinel], BEAT_EVERY_S):
        signs.give()
    os.killpg(0, signal.SIGKILL)
