"""The process of a reward or an environment as the pool sees it: started, given work, read, and ended with everything it started.

Workers are plain `python -m` processes rather than forks, so they start without torch, without the main module and without anything that this process has open.
What a reward prints goes to our own stderr, a part of it: a reward that prints without end neither floods it nor waits for a reader.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from multiprocessing.connection import Pipe, wait
from typing import IO

from megatron_ext.batch.rollout import Prompt
from megatron_ext.errors import UserError

START_TIMEOUT_S = 120.0
MOST_PRINTED_BYTES = 1 << 16
_ALARM_MARGIN_S = 5.0
_LAST_BYTES = 2000


@dataclass
class Task:
    """What is still to be done about one prompt, by its row in the batch: texts to reward, or conversations to go on with."""

    prompt: Prompt
    subjects: dict[int, object]
    rows: deque[int] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = deque(self.subjects)


class Worker:
    """`ended` is a descriptor that is readable once the process is gone, whoever still holds its connection."""

    def __init__(self, kind: str, path: str, timeout_s: float, memory_bytes: int) -> None:
        self.connection, theirs = Pipe(duplex=True)
        alarm_s = timeout_s + _ALARM_MARGIN_S
        command = [sys.executable, "-u", "-m", "megatron_ext.rl.scoring.worker", str(theirs.fileno()), str(alarm_s), str(memory_bytes), kind, path]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
        with theirs:
            self.process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )
        assert self.process.stdout is not None
        self.ended = os.pidfd_open(self.process.pid)
        self.task: Task | None = None
        self.deadline = 0.0
        self._said = _Echo(self.process.stdout)

    def await_ready(self) -> None:
        """Raises UserError where it cannot use the reward."""
        if not wait([self.connection, self.ended], timeout=START_TIMEOUT_S):
            raise RuntimeError(f"a reward worker said nothing for {START_TIMEOUT_S:g} s while importing the function")
        try:
            kind, *content = self.connection.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"a reward worker died while importing the function: {self.epitaph()}") from None
        if kind == "unusable":
            raise UserError(*content)

    def give(self, task: Task, timeout_s: float) -> bool:
        """False when the worker is no longer there."""
        if wait([self.ended], timeout=0):
            return False
        try:
            self.connection.send((task.prompt, list(task.subjects.values())))
        except OSError:
            return False
        self.task, self.deadline = task, time.monotonic() + timeout_s
        return True

    def receive(self) -> tuple[object, ...] | None:
        """Its next message; None when it is gone."""
        try:
            return tuple(self.connection.recv()) if self.connection.poll() else None
        except (EOFError, OSError):
            return None

    def epitaph(self) -> str:
        """How the process ended, and the last that it printed."""
        if not wait([self.ended], timeout=5.0):
            return "closed its connection to the pool"
        self.kill()
        code = self.process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return how + (f"; the last it printed: {said}" if (said := self._said.last()) else "")

    def kill(self) -> None:
        """Ends the process and what it started: it leads a session of its own, whose number nobody else has until it is waited for."""
        if self.process.returncode is not None:
            return
        self.connection.close()
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.ended)


class _Echo:
    """Reads what a process prints until nobody can print any more; passes the first `MOST_PRINTED_BYTES` on."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._last = stream, b""
        self._thread = threading.Thread(target=self._read, name="reward output", daemon=True)
        self._thread.start()

    def last(self) -> str:
        """Of a process that is gone."""
        self._thread.join(timeout=1.0)  # a child that left the session may print on
        return self._last.decode(errors="replace").strip()

    def _read(self) -> None:
        left = MOST_PRINTED_BYTES
        with self._stream:
            while some := os.read(self._stream.fileno(), 1 << 16):
                self._last = (self._last + some)[-_LAST_BYTES:]
                if left > 0:
                    print(some[:left].decode(errors="replace"), end="", file=sys.stderr, flush=True)
                    left -= len(some)
                    if left <= 0:
                        print("\n(what else this process prints is dropped)", file=sys.stderr, flush=True)
