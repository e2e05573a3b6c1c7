"""Rewards in processes of their own: a reward that raises, hangs, returns nonsense or kills its process costs one rollout and nothing else.

    score(rollouts) -> one task per prompt (the prompt travels once, its texts together)
                    -> idle worker -> replies, one a text, each within timeout_s of the one before
                    -> ScoredRollout, or FailedRollout with the reason, in the order of the rollouts

    reasons   reward_raised  reward_timeout  reward_not_finite  reward_wrong_type  reward_worker_died

A hung or dead worker is killed by its own pid and replaced, and the texts it still had go to another. Workers are plain `python -m` processes rather than
forks, so they start without torch, without the main module and without anything that this process has open.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from types import TracebackType
from typing import Self

from megatron_ext.batch.rollout import FailedRollout, Prompt, Rollout, ScoredRollout
from megatron_ext.errors import UserError

START_TIMEOUT_S = 120.0
_ALARM_MARGIN_S = 5.0


class RewardPool:
    """`workers` processes that run the reward at `path`. Raises UserError when the reward cannot be loaded. Use as a context manager, or `close` it."""

    def __init__(self, path: str, workers: int, timeout_s: float, memory_bytes: int = 0) -> None:
        """`memory_bytes` limits the address space of a worker (0: no limit); beyond it the reward sees a MemoryError."""
        self._path, self._timeout_s, self._memory_bytes = path, timeout_s, memory_bytes
        self._workers: list[_Worker] = []
        try:
            self._workers.extend(self._start() for _ in range(workers))
            for worker in self._workers:
                worker.await_ready()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(worker.process.pid for worker in self._workers)

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout | FailedRollout]:
        batch = _Batch(rollouts, [None] * len(rollouts), deque(_tasks(rollouts)))
        while batch.waiting or any(worker.task for worker in self._workers):
            self._hand_out(batch)
            busy = {worker.connection: slot for slot, worker in enumerate(self._workers) if worker.task}
            patience_s = min((self._workers[slot].deadline for slot in busy.values()), default=0.0) - time.monotonic()
            readable = [busy[connection] for connection in wait(list(busy), timeout=max(0.0, patience_s)) if isinstance(connection, Connection)]
            for slot in readable:
                self._receive(slot, batch)
            # Only a worker that still has said nothing is late: this process may itself have been kept from looking.
            for slot in set(busy.values()) - set(readable):
                if time.monotonic() > self._workers[slot].deadline and not self._workers[slot].connection.poll():
                    self._give_up(slot, "reward_timeout", f"no result within {self._timeout_s:g} s", batch)
        return [outcome for outcome in batch.outcomes if outcome is not None]

    def _hand_out(self, batch: _Batch) -> None:
        for slot, worker in enumerate(self._workers):
            if worker.task is None and batch.waiting:
                if worker.give(batch.waiting[0], self._timeout_s):
                    batch.waiting.popleft()
                else:
                    self._replace(slot)

    def _receive(self, slot: int, batch: _Batch) -> None:
        worker = self._workers[slot]
        assert worker.task is not None
        try:
            kind, *content = worker.connection.recv()
        except (EOFError, OSError):
            self._give_up(slot, "reward_worker_died", worker.epitaph(), batch)
            return
        index = worker.task.rows.popleft()
        if kind == "scored":
            batch.outcomes[index] = ScoredRollout(batch.rollouts[index], content[0], content[1])
        else:
            batch.fail(index, content[0], content[1])
        worker.deadline = time.monotonic() + self._timeout_s
        if not worker.task.rows:
            worker.task = None

    def _give_up(self, slot: int, reason: str, detail: str, batch: _Batch) -> None:
        """Fails the text that the worker was at, hands its other texts back, and starts another worker in its place."""
        task = self._workers[slot].task
        assert task is not None
        batch.fail(task.rows.popleft(), reason, detail)
        if task.rows:
            batch.waiting.append(_Task(task.prompt, {row: task.texts[row] for row in task.rows}))
        self._replace(slot)

    def _replace(self, slot: int) -> None:
        self._workers[slot].kill()
        self._workers[slot] = self._start()
        self._workers[slot].await_ready()

    def _start(self) -> _Worker:
        ours, theirs = Pipe(duplex=True)
        alarm_s = self._timeout_s + _ALARM_MARGIN_S
        command = [sys.executable, "-m", "megatron_ext.rl.scoring.worker", str(theirs.fileno()), str(alarm_s), str(self._memory_bytes), self._path]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
        with theirs:
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True, env=environment)
        return _Worker(process, ours)


@dataclass
class _Task:
    """The texts of one prompt that are still to be scored, by their row in the batch."""

    prompt: Prompt
    texts: dict[int, str]
    rows: deque[int] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = deque(self.texts)


@dataclass
class _Batch:
    rollouts: Sequence[Rollout]
    outcomes: list[ScoredRollout | FailedRollout | None]
    waiting: deque[_Task]

    def fail(self, index: int, reason: str, detail: str) -> None:
        rollout = self.rollouts[index]
        self.outcomes[index] = FailedRollout(rollout.prompt, rollout.sample, reason, detail)


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    task: _Task | None = None
    deadline: float = 0.0

    def await_ready(self) -> None:
        if not self.connection.poll(START_TIMEOUT_S):
            raise RuntimeError(f"a reward worker said nothing for {START_TIMEOUT_S:g} s while importing the reward")
        try:
            kind, *content = self.connection.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"a reward worker died while importing the reward: {self.epitaph()}") from None
        if kind == "unusable":
            raise UserError(*content)

    def give(self, task: _Task, timeout_s: float) -> bool:
        """False when the worker is no longer there."""
        try:
            self.connection.send((task.prompt, list(task.texts.values())))
        except OSError:
            return False
        self.task, self.deadline = task, time.monotonic() + timeout_s
        return True

    def epitaph(self) -> str:
        """How the process ended."""
        try:
            code = self.process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            return "closed its connection to the pool"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        """Ends the process and what it started: it leads a session of its own."""
        self.connection.close()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _tasks(rollouts: Sequence[Rollout]) -> list[_Task]:
    """Rollouts of the same prompt share a task, so that its images travel once."""
    texts: dict[int, dict[int, str]] = {}
    for row, rollout in enumerate(rollouts):
        texts.setdefault(id(rollout.prompt), {})[row] = rollout.text
    return [_Task(rollouts[next(iter(rows))].prompt, rows) for rows in texts.values()]
