"""Ranks as processes of this machine, forked from a server that has torch and Megatron already imported: a fleet in a second, without Ray.

The driver and each rank share one pipe. A rank obeys until its pipe closes, which is also how it learns that the driver died. It leads a process group of its
own: Ctrl-C is for the driver to answer.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from megatron_ext.errors import RankFailed, RouteMismatch, UserError, WeightSyncError
from megatron_ext.parallel.forkserver import ForkedProcess
from megatron_ext.rl.hosts.ranks import LOOPBACK, Rank

CARRIED = (UserError, RouteMismatch, WeightSyncError)
"""Errors that cross from a rank to the driver as they are; any other becomes RankFailed with the rank's traceback."""


class LocalHost:
    """See `ranks.Host`. Made by `local_host()`, which also ends it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._processes: list[ForkedProcess] = []

    def address(self, rank: Rank) -> str:
        return LOOPBACK

    def meeting_point(self, world: str, first: Rank) -> str:
        return f"file://{self.folder}/{world}.store"

    def start(self, role: type, names: Sequence[str]) -> list[Rank]:
        ranks = []
        for name in names:
            ours, theirs = Pipe()
            process = ForkedProcess(target=_serve, args=(theirs, role), name=name, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            ranks.append(Rank(name, (process, ours)))
        return ranks

    def send(self, rank: Rank, verb: str, arguments: tuple[Any, ...]) -> None:
        try:
            _pipe(rank).send((verb, arguments))
        except (BrokenPipeError, ConnectionResetError):
            return  # the process is gone: `take` says so

    def ready(self, ranks: Sequence[Rank], timeout_s: float) -> list[Rank]:
        signals = {handle: rank for rank in ranks for handle in (_pipe(rank), rank.process[0].sentinel)}
        ready = {signals[handle].name for handle in wait(list(signals), timeout_s)}
        return [rank for rank in ranks if rank.name in ready]

    def take(self, rank: Rank) -> Any:
        try:
            outcome, value = _pipe(rank).recv()
        except (EOFError, ConnectionResetError):
            process = rank.process[0]
            process.join(1.0)
            raise RankFailed(f"{rank.name} (pid {process.pid}) ended with exit code {process.exitcode} while it was working") from None
        if outcome == "answer":
            return value
        raise value if isinstance(value, CARRIED) else RankFailed(f"{rank.name} failed:\n{value}")

    def close(self) -> None:
        """Ends every rank: those still working are killed."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


@contextmanager
def local_host() -> Iterator[LocalHost]:
    folder = Path(tempfile.mkdtemp(prefix="megatron-ext-"))
    host = LocalHost(folder)
    try:
        yield host
    finally:
        host.close()
        shutil.rmtree(folder, ignore_errors=True)


def _pipe(rank: Rank) -> Connection:
    return rank.process[1]


def _serve(pipe: Connection, role: type) -> None:
    """The life of a rank."""
    os.setpgid(0, 0)
    worker = role()
    while True:
        try:
            verb, arguments = pipe.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            reply = ("answer", getattr(worker, verb)(*arguments))
        except CARRIED as error:
            reply = ("error", error)
        except Exception:
            reply = ("error", traceback.format_exc())
        pipe.send(reply)
