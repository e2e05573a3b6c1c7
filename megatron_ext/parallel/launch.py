"""Who starts the ranks of a run. A stage calls its function through `Ranks` and does not know.

    LocalRanks     this process does, on this machine, for every call anew                megatron-ext run CONFIG
    StartedRank    a launcher has: this process is one of them (`started_rank.py`)        srun megatron-ext run CONFIG

Under a launcher every rank runs the whole command. What happens once, the marks of stages, the tokenizer, the report, is done by rank 0, which also
decides what is done next; the others ask it.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from megatron_ext.parallel.local import run_ranks


class Ranks(Protocol):
    @property
    def lead(self) -> bool:
        """Whether this process decides, prints and writes what is written once."""

    def agree(self, question: str, decide: Callable[[], bool]) -> bool:
        """What the leading process decides; every process asks the same questions, each once. What `decide` raises, it raises."""

    def run(self, fn: Callable[..., Any], num_ranks: int, *args: Any, threads_per_rank: int, forward_signals: Sequence[signal.Signals]) -> Any:
        """Calls `fn(rank, num_ranks, where to meet, *args)` on every rank. The result of this process's rank, of rank 0 where it has started them."""


class LocalRanks:
    """See `Ranks`."""

    lead = True

    def agree(self, question: str, decide: Callable[[], bool]) -> bool:
        return decide()

    def run(self, fn: Callable[..., Any], num_ranks: int, *args: Any, threads_per_rank: int, forward_signals: Sequence[signal.Signals]) -> Any:
        return run_ranks(fn, num_ranks, *args, timeout_s=math.inf, threads_per_rank=threads_per_rank, forward_signals=forward_signals)[0]
