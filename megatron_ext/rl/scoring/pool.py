"""A user's functions in processes of their own: one that raises, hangs, returns nonsense or kills its process costs one rollout and nothing else.

    RewardPool.score(rollouts) -> ScoredRollout, or FailedRollout with the reason, in the order of the rollouts
    EnvironmentPool.act(...)   -> see `rl/environments.py`

    run(subjects) -> one task per prompt (the prompt travels once, its subjects together)
                  -> idle worker -> replies, one a subject, each within timeout_s of the one before

    final at once            reward_raised  reward_not_finite  reward_wrong_type      the function's own word: it would say the same again
    tried once more, anew    reward_timeout  reward_worker_died                       may be the machine's doing: memory, a signal, a busy disk

(`environment_...` of an environment.) A hung or dead worker is killed by its own pid and replaced, and what it still had goes to another. A function that hangs
on everything would take its time limit twice for every subject: after `MOST_RETRIES` in one call, such failures are final at once, too. How workers live and
end: `process.py`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any, NamedTuple, Self

from megatron_ext.batch.rollout import FailedRollout, Prompt, Rollout, ScoredRollout
from megatron_ext.config.schema import RLConfig
from megatron_ext.rl.scoring.process import Task, Worker

MOST_RETRIES = 8


class Failure(NamedTuple):
    """Why there is no result."""

    reason: str
    detail: str


class WorkerPool:
    """`workers` processes that run the function of a `kind` ("reward", "environment") at `path`. Raises UserError when it cannot be loaded. Use as a context
    manager, or `close` it."""

    kind: str

    def __init__(self, path: str, workers: int, timeout_s: float, memory_bytes: int = 0) -> None:
        """`memory_bytes` limits the address space of a worker (0: no limit); beyond it the function sees a MemoryError."""
        self._path, self._timeout_s, self._memory_bytes = path, timeout_s, memory_bytes
        self._workers: list[Worker] = []
        try:
            self._workers.extend(self._start() for _ in range(workers))
            for worker in self._workers:
                worker.await_ready()
        except BaseException:
            self.close()
            raise

    @classmethod
    def under(cls, path: str, rl: RLConfig) -> Self:
        """With the limits of the configuration."""
        return cls(path, rl.reward_workers, rl.reward_timeout_s, 0 if rl.reward_memory_gib is None else int(rl.reward_memory_gib * 2**30))

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

    def run(self, subjects: Sequence[tuple[Prompt, object]]) -> list[tuple[Any, ...] | Failure]:
        """What the function made of each subject, as a tuple."""
        batch = _Batch([None] * len(subjects), deque(_tasks(subjects)))
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
                    self._give_up(slot, "timeout", f"no result within {self._timeout_s:g} s", batch)
        return [reply for reply in batch.replies if reply is not None]

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
            self._give_up(slot, "worker_died", worker.epitaph(), batch)
            return
        said, *content = reply
        batch.replies[worker.task.rows.popleft()] = tuple(content) if said == "done" else Failure(*map(str, content))
        worker.deadline = time.monotonic() + self._timeout_s
        if not worker.task.rows:
            worker.task = None

    def _give_up(self, slot: int, problem: str, detail: str, batch: _Batch) -> None:
        """Fails the subject that the worker was at, or has it tried again; hands its other subjects back, and starts another worker in its place."""
        task = self._workers[slot].task
        assert task is not None
        row = task.rows.popleft()
        if task.rows:
            batch.waiting.append(Task(task.prompt, {row: task.subjects[row] for row in task.rows}))
        if row in batch.retried or len(batch.retried) >= MOST_RETRIES:
            batch.replies[row] = Failure(f"{self.kind}_{problem}", ("twice: " if row in batch.retried else "") + detail)
        else:
            batch.retried.add(row)
            batch.waiting.append(Task(task.prompt, {row: task.subjects[row]}))
        self._replace(slot)

    def _replace(self, slot: int) -> None:
        self._workers[slot].kill()
        self._workers[slot] = self._start()
        self._workers[slot].await_ready()

    def _start(self) -> Worker:
        return Worker(self.kind, self._path, self._timeout_s, self._memory_bytes)


class RewardPool(WorkerPool):
    """See `roles.Scorer`."""

    kind = "reward"

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout | FailedRollout]:
        found: list[ScoredRollout | FailedRollout] = []
        for rollout, reply in zip(rollouts, self.run([(rollout.prompt, rollout.text) for rollout in rollouts]), strict=True):
            if isinstance(reply, Failure):
                found.append(FailedRollout(rollout.prompt, rollout.sample, *reply))
            else:
                found.append(ScoredRollout(rollout, *reply))
        return found


@dataclass
class _Batch:
    """`retried`: rows that are or were tried again."""

    replies: list[tuple[Any, ...] | Failure | None]
    waiting: deque[Task]
    retried: set[int] = field(default_factory=set)


def _tasks(subjects: Sequence[tuple[Prompt, object]]) -> list[Task]:
    """Subjects of the same prompt share a task, so that its images travel once."""
    by_prompt: dict[int, dict[int, object]] = {}
    for row, (prompt, subject) in enumerate(subjects):
        by_prompt.setdefault(id(prompt), {})[row] = subject
    return [Task(subjects[next(iter(rows))][0], rows) for rows in by_prompt.values()]
