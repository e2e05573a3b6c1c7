"""Stopping on request: a signal that reaches any rank, or a file that appears, ends a stage with what it has done on disk.

    SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 -> noted  |    trains: asked for at the step boundary, agreed by all ranks -> checkpoint  |
    a stop file                                   | ->                                                                            | -> StoppedForRequeue
                                                  |    answers: seen by the process that started the ranks, which ends them       |    (exit code 75)

A second Ctrl-C waits for nothing. The file is for a scheduler's script: unlike a signal it cannot come too early, and reaches nobody else. Importing this
does not import torch.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_ext.parallel.groups import ParallelContext

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self.received: signal.Signals | None = None

    @property
    def asked(self) -> bool:
        return self.received is not None or (self._file is not None and self._file.exists())

    def note(self, number: int, _: FrameType | None) -> None:
        if self.received == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def agreed(self, context: ParallelContext) -> bool:
        """Whether any rank was asked to stop; rank 0 looks for the file. Collective over the whole world, so all ranks get the same answer."""
        import torch

        mine = self.asked if context.rank == 0 else self.received is not None
        if context.world_size == 1:
            return mine
        asked = torch.tensor(int(mine), dtype=torch.int32, device=context.device)
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        return bool(asked.item())


@contextmanager
def stop_on_signals(file: Path | None = None) -> Iterator[StopRequest]:
    """Catches the stop signals for a while. Call from the main thread."""
    request = StopRequest(file)
    before = {number: signal.signal(number, request.note) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
