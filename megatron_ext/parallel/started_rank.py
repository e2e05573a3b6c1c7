"""One rank that a launcher such as srun has started: see `launch.Ranks`.

    rank 0     serves a store -> decides -> tells -> waits until all have heard -> calls the function
    rank 1..   connects to it -> asks ------------------------------------------> calls the function

What travels through the store are words; results and errors stay with the rank that has them, whose exit code and log the launcher keeps.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, Store

from megatron_ext.errors import LeaderEnded
from megatron_ext.parallel.store import join_store, open_store

MEET_TIMEOUT_S = 600.0
"""How long the first rank to come waits for the last: nodes load Python and torch from a shared file system at their own pace."""
PATIENCE = timedelta(days=30)
"""Of ranks that wait while rank 0 does alone what it does alone. One that dies is noticed at once."""


@dataclass(frozen=True)
class StartedRank:
    """Made by `meet()`."""

    rank: int
    num_ranks: int
    store: Store
    _calls: Iterator[int] = field(default_factory=itertools.count)

    @property
    def lead(self) -> bool:
        return self.rank == 0

    def agree(self, question: str, decide: Callable[[], bool]) -> bool:
        if self.rank != 0:
            return self._heard(question)
        try:
            answer = decide()
        except BaseException:
            self._tell(question, "ended")
            raise
        self._tell(question, "yes" if answer else "no")
        return answer

    def run(self, fn: Callable[..., Any], num_ranks: int, *args: Any, threads_per_rank: int, forward_signals: Sequence[signal.Signals]) -> Any:
        return fn(self.rank, self.num_ranks, PrefixStore(f"call-{next(self._calls)}", self.store), *args)

    def _heard(self, question: str) -> bool:
        self.store.wait([question], PATIENCE)
        answer = self.store.get(question)
        self.store.set(f"{question}/heard by {self.rank}", "yes")
        if answer == b"ended":
            raise LeaderEnded("rank 0 has ended the run and says why")
        return bool(answer == b"yes")

    def _tell(self, question: str, answer: str) -> None:
        """Returns once every rank has heard it, so that rank 0, whose end would end the store, may end."""
        self.store.set(question, answer)
        others = [f"{question}/heard by {rank}" for rank in range(1, self.num_ranks)]
        if others:
            self.store.wait(others, PATIENCE)


def meet(rank: int, num_ranks: int, host: str, port: int) -> StartedRank:
    """Joins the ranks that a launcher has started. `host` is an address of rank 0's node at which the others reach it."""
    return StartedRank(rank, num_ranks, open_store(host, MEET_TIMEOUT_S, port) if rank == 0 else join_store(host, port, MEET_TIMEOUT_S))
