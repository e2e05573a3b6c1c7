"""Runs a function on several ranks of this machine and returns what each returned.

    run_ranks -> fork server -> rank 0: fn(0, n, init_method, *args) -> result through a pipe
                             -> rank 1: fn(1, n, init_method, *args) -> ...

The first rank that raises or dies ends the others, and its story is the error. Ranks end when this process does.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from megatron_ext.errors import RankFailed
from megatron_ext.parallel.rank_process import Call, RankProcess

_GRACE_S = 0.5
_LONGEST_WAIT_S = 3600.0
_WATCH_EVERY_S = 0.2


def run_ranks(
    fn: Callable[..., Any],
    num_ranks: int,
    *args: Any,
    timeout_s: float,
    threads_per_rank: int = 1,
    forward_signals: Sequence[signal.Signals] = (),
    watch: Callable[[], None] | None = None,
) -> list[Any]:
    """Calls `fn(rank, num_ranks, init_method, *args)` in `num_ranks` new processes; the results, in rank order.

    `fn` is a top-level function of an importable module; arguments and results travel by value (pickle). `init_method` names a fresh file store.
    Signals in `forward_signals` that reach this process meanwhile are passed on to the ranks, which decide what to do; without, Ctrl-C ends them.
    `watch` is called a few times a second in this process; what it raises ends the ranks at once.

    Raises `RankFailed` naming the rank that failed first, with its traceback, or the ranks still running after `timeout_s`; a rank's `UserError` as it is;
    `StoppedForRequeue` when a rank raised it, after all ranks have finished.
    """
    if fn.__module__ == "__main__":
        raise ValueError(f"{fn.__qualname__} is defined in the main script, which ranks do not import: move it to a module")
    folder = Path(tempfile.mkdtemp(prefix="megatron-ext-ranks-"))
    ranks: list[RankProcess] = []
    try:
        with _forwarding(forward_signals, ranks):
            for rank in range(num_ranks):
                ranks.append(RankProcess(Call(fn, rank, num_ranks, f"file://{folder}/store", args, threads_per_rank, dict(os.environ))))
            _await(ranks, time.monotonic() + timeout_s, timeout_s, watch)
        _raise_first_failure(ranks)
        return [rank.outcome.result for rank in ranks if rank.outcome is not None]
    finally:
        for process in ranks:
            process.end()
        shutil.rmtree(folder, ignore_errors=True)


def _await(ranks: list[RankProcess], deadline: float, timeout_s: float, watch: Callable[[], None] | None) -> None:
    """Returns when every rank has reported, or shortly after one has failed: the others' last words may tell who failed first."""
    while running := [rank for rank in ranks if rank.outcome is None]:
        if watch is not None:
            watch()
        remaining = min(deadline - time.monotonic(), _LONGEST_WAIT_S if watch is None else _WATCH_EVERY_S)
        if remaining <= 0:
            if any(rank.outcome is not None and rank.outcome.failed for rank in ranks):
                return
            names = ", ".join(str(rank.rank) for rank in running)
            raise RankFailed(f"rank {names} of {len(ranks)} did not finish within {timeout_s:g} s", names if len(running) == 1 else "", "late")
        ready = wait([rank.news for rank in running], remaining)
        for rank in running:
            if rank.news in ready:
                rank.read()
                if rank.outcome is not None and rank.outcome.failed:
                    deadline = min(deadline, time.monotonic() + _GRACE_S)


def _raise_first_failure(ranks: list[RankProcess]) -> None:
    """The earliest failure is the cause, what follows are peers that lost it. A rank that died without a word counts as earliest."""
    outcomes = [(rank.rank, rank.outcome) for rank in ranks if rank.outcome is not None]
    failures = sorted(((outcome.at, rank, outcome) for rank, outcome in outcomes if outcome.failed), key=lambda failure: failure[:2])
    if failures:
        _, rank, outcome = failures[0]
        if outcome.error is not None:
            raise outcome.error
        raise RankFailed(f"rank {rank} of {len(ranks)}: {outcome.story}", str(rank), "died" if outcome.at == 0.0 else "raised")
    for _, outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error


@contextmanager
def _forwarding(signals: Sequence[signal.Signals], ranks: list[RankProcess]) -> Iterator[None]:
    """Passes the signals on to the ranks for a while. Only the main thread can receive signals; elsewhere there is nothing to do."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def forward(number: int, _: Any) -> None:
        for rank in ranks:
            if rank.outcome is None:
                rank.send_signal(number)

    before = {number: signal.signal(number, forward) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
