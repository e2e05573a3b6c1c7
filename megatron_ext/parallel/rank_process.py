"""One rank as a process: how it starts, what it reports, how it ends. Used by `run_ranks`."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe, parent_process
from multiprocessing.connection import Connection, wait
from typing import Any

from megatron_ext.errors import StoppedForRequeue, UserError
from megatron_ext.parallel.forkserver import ForkedProcess


@dataclass(frozen=True)
class Outcome:
    """What a rank reported last. `error` is its exception where it is for the user (or a stop for requeue), `story` its traceback where it is not."""

    at: float
    result: Any = None
    error: BaseException | None = None
    story: str = ""

    @property
    def failed(self) -> bool:
        return bool(self.story) or isinstance(self.error, UserError)


@dataclass(frozen=True)
class Call:
    """What a rank is to do, and in which surroundings."""

    fn: Callable[..., Any]
    rank: int
    num_ranks: int
    init_method: str
    args: tuple[Any, ...]
    threads: int
    environment: dict[str, str]


class RankProcess:
    """A running rank. `outcome` is None until it has reported or died."""

    def __init__(self, call: Call) -> None:
        self.rank = call.rank
        self.outcome: Outcome | None = None
        self._reports, child_end = Pipe(duplex=False)
        # By value: multiprocessing's own pickler would send tensors as handles to memory of a process that may be gone.
        self._process = ForkedProcess(target=_rank_main, args=(child_end, pickle.dumps(call)), name=f"rank {call.rank}")
        self._process.start()
        child_end.close()

    @property
    def news(self) -> Connection:
        """Becomes readable when the rank has reported or died."""
        return self._reports

    def read(self) -> None:
        """Takes the report, or notes that the rank ended without one."""
        try:
            self.outcome = pickle.loads(self._reports.recv_bytes())
        except EOFError:
            self._process.join(timeout=5)
            self.outcome = Outcome(at=0.0, story=f"ended without a result ({_exit_words(self._process.exitcode)})")

    def send_signal(self, number: int) -> None:
        self._signal_group(number)

    def end(self) -> None:
        """Ends the rank and the processes it started, at once; does nothing to one that has finished."""
        if self.outcome is None:
            self._signal_group(signal.SIGKILL)
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._signal_group(signal.SIGKILL)
            self._process.join()
        self._process.close()
        self._reports.close()

    def _signal_group(self, number: int) -> None:
        """A rank leads a process group of its own; before it has made it, there is only the rank."""
        pid = self._process.pid
        if pid is None or self._process.exitcode is not None:
            return
        try:
            os.killpg(pid, number)
        except ProcessLookupError:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def _exit_words(code: int | None) -> str:
    if code is None:
        return "still running"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _rank_main(reports: Connection, call_bytes: bytes) -> None:
    """The rank's whole life."""
    os.setpgid(0, 0)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        call: Call = pickle.loads(call_bytes)
        os.environ.clear()
        os.environ.update(call.environment, OMP_NUM_THREADS=str(call.threads))
        _set_threads(call.threads)
        outcome = Outcome(time.monotonic(), result=call.fn(call.rank, call.num_ranks, call.init_method, *call.args))
    except (UserError, StoppedForRequeue) as error:
        outcome = Outcome(time.monotonic(), error=error)
    except BaseException:
        outcome = Outcome(time.monotonic(), story=traceback.format_exc())
    sys.stdout.flush()
    sys.stderr.flush()
    reports.send_bytes(_pickled(outcome))
    reports.close()


def _pickled(outcome: Outcome) -> bytes:
    try:
        return pickle.dumps(outcome)
    except Exception:
        return pickle.dumps(Outcome(outcome.at, story=f"its result cannot be pickled\n{traceback.format_exc()}"))


def _set_threads(threads: int) -> None:
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


def _end_with_parent() -> None:
    """Waits for the death of the process that started the ranks, then ends this one and all it started."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.killpg(0, signal.SIGKILL)
