"""Rewards in processes of their own: a reward that raises, hangs, returns nonsense or kills its process costs one rollout and nothing else.

    score(rollouts) -> one task per prompt (the prompt travels once, its texts together)
                    -> idle worker -> replies, one a text, each within timeout_s of the one before
                    -> ScoredRollout, or FailedRollout with the reason, in the order of the rollouts

    final at once            reward_raised  reward_not_finite  reward_wrong_type      the reward's own word: it would say the same again
    tried once more, anew    reward_timeout  reward_worker_died                       may be the machine's doing: memory, a signal, a busy disk

A hung or dead worker is killed by its own pid and replaced, and the texts it still had go to another. A reward that hangs on everything would take its
time limit twice for every text: after `MOST_RETRIES` in one call of `score`, such failures are final at once, too. How workers live and end: `process.py`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from types import TracebackType
from typing import Self

from megatron_ext.batch.rollout import FailedRollout, Rollout, ScoredRollout
from megatron_ext.rl.scoring.process import Task, Worker

MOST_RETRIES = 8


class RewardPool:
    """`workers` processes that run the reward at `path`. Raises UserError when the reward cannot be loaded. Use as a context manager, or `close` it."""

    def __init__(self, path: str, workers: int, timeout_s: float, memory_bytes: int = 0) -> None:
        """`memory_bytes` limits the address space of a worker (0: no limit); beyond it the reward sees a MemoryError."""
        self._path, self._timeout_s, self._memory_bytes = path, timeout_s, memory_bytes
        self._workers: list[Worker] = []
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
            busy = {slot: worker for slot, worker in enumerate(self._workers) if worker.task}
            patience_s = min((worker.deadline for worker in busy.values()), default=0.0) - time.monotonic()
            ready = set(wait([end for worker in busy.values() for end in (worker.connection, worker.ended)], timeout=max(0.0, patience_s)))
            for slot, worker in busy.items():
                if worker.connection in ready or worker.ended in ready:
                    self._receive(slot, batch)
                # Only a worker that still has said nothing is late: this process may itself have been kept from looking.
                elif time.monotonic() > worker.deadline and not worker.connection.poll():
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
        reply = worker.receive()
        if reply is None:
            self._give_up(slot, "reward_worker_died", worker.epitaph(), batch)
            return
        batch.settle(worker.task.rows.popleft(), reply)
        worker.deadline = time.monotonic() + self._timeout_s
        if not worker.task.rows:
            worker.task = None

    def _give_up(self, slot: int, reason: str, detail: str, batch: _Batch) -> None:
        """Fails the text that the worker was at, or has it tried again; hands its other texts back, and starts another worker in its place."""
        task = self._workers[slot].task
        assert task is not None
        row = task.rows.popleft()
        if task.rows:
            batch.waiting.append(Task(task.prompt, {row: task.texts[row] for row in task.rows}))
        if row in batch.retried or len(batch.retried) >= MOST_RETRIES:
            batch.fail(row, reason, ("twice: " if row in batch.retried else "") + detail)
        else:
            batch.retried.add(row)
            batch.waiting.append(Task(task.prompt, {row: task.texts[row]}))
        self._replace(slot)

    def _replace(self, slot: int) -> None:
        self._workers[slot].kill()
        self._workers[slot] = self._start()
        self._workers[slot].await_ready()

    def _start(self) -> Worker:
        return Worker(self._path, self._timeout_s, self._memory_bytes)


@dataclass
class _Batch:
    """`retried`: rows that are or were tried again."""

    rollouts: Sequence[Rollout]
    outcomes: list[ScoredRollout | FailedRollout | None]
    waiting: deque[Task]
    retried: set[int] = field(default_factory=set)

    def settle(self, row: int, reply: tuple[object, ...]) -> None:
        """What a worker said of a row (`worker.py`)."""
        match reply:
            case ("scored", float(reward), dict(parts)):
                self.outcomes[row] = ScoredRollout(self.rollouts[row], reward, parts)
            case (_, reason, detail):
                self.fail(row, str(reason), str(detail))

    def fail(self, row: int, reason: str, detail: str) -> None:
        rollout = self.rollouts[row]
        self.outcomes[row] = FailedRollout(rollout.prompt, rollout.sample, reason, detail)


def _tasks(rollouts: Sequence[Rollout]) -> list[Task]:
    """Rollouts of the same prompt share a task, so that its images travel once."""
    texts: dict[int, dict[int, str]] = {}
    for row, rollout in enumerate(rollouts):
        texts.setdefault(id(rollout.prompt), {})[row] = rollout.text
    return [Task(rollouts[next(iter(rows))].prompt, rows) for rows in texts.values()]
