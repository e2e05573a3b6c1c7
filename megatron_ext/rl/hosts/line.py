"""The driver's line to one rank of this machine: carries a verb to it and the answer back in a thread of its own, so that a process which is stopped in the
middle of either holds up nobody else."""

from __future__ import annotations

import mmap
import os
import pickle
import queue
import signal
import threading
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from megatron_ext.parallel.forkserver import ForkedProcess

Outcome = tuple[str, Any]
"""("answer", value), ("error", an exception or a traceback) or ("lost", None)."""
LOST: Outcome = ("lost", None)


class SignsOfLife:
    """A number that a rank raises and the driver reads, without either waiting for the other: eight bytes of a file that both have mapped."""

    def __init__(self, file: Path) -> None:
        with file.open("r+b") as opened:
            self._count = memoryview(mmap.mmap(opened.fileno(), 8)).cast("Q")

    def give(self) -> None:
        self._count[0] += 1

    def count(self) -> int:
        return int(self._count[0])


class Line:
    """`answered` is notified when the outcome of a verb is there."""

    def __init__(self, process: ForkedProcess, pipe: Connection, signs: SignsOfLife, answered: threading.Condition) -> None:
        self.process, self.signs = process, signs
        self._pipe, self._answered, self._reaping = pipe, answered, threading.Lock()
        self._asked, self._ended = 0, False
        self._outcome: Outcome | None = None
        self._verbs: queue.SimpleQueue[tuple[int, bytes] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def send(self, verb: bytes) -> None:
        """The outcome of an earlier verb that was not taken is forgotten."""
        with self._answered:
            self._asked, self._outcome = self._asked + 1, LOST if self._ended else None
            self._verbs.put((self._asked, verb))

    @property
    def ready(self) -> bool:
        """Whether the outcome of the verb is there. Read it under `answered`."""
        return self._outcome is not None

    def take(self) -> Outcome:
        outcome, self._outcome = self._outcome, None
        assert outcome is not None, "no answer has come"
        return outcome

    def exit_code(self) -> int | None:
        """Of a process that is lost. None when it is still there after a second."""
        with self._reaping:
            self.process.join(1.0)
        return self.process.exitcode

    def end(self) -> None:
        """Kills the process, stopped or not, and all that it started, and waits until it is gone. A verb that is under way is lost."""
        pid = self.process.pid
        assert pid is not None, "a line is made of a process that was started"
        for kill in (os.killpg, os.kill):  # a rank leads a process group of its own; before it has made it, there is only the rank
            with suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)
                break
        with self._reaping:
            self.process.join()
        with self._answered:
            self._ended = True
            self._verbs.put(None)
        self._thread.join()
        self._pipe.close()

    def _carry(self) -> None:
        while (asked := self._verbs.get()) is not None:
            number, verb = asked
            try:
                self._pipe.send_bytes(verb)
                outcome = self._heard()
            except (OSError, EOFError):
                outcome = LOST
            except Exception:
                outcome = ("error", f"its answer cannot be read\n{traceback.format_exc()}")
            with self._answered:
                if number == self._asked:
                    self._outcome = outcome
                    self._answered.notify_all()

    def _heard(self) -> Outcome:
        if self._pipe not in wait([self._pipe, self.process.sentinel]):
            return LOST
        outcome: Outcome = pickle.loads(self._pipe.recv_bytes())
        return outcome
