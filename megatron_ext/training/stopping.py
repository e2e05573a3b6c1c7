"""Stopping on request: a signal that reaches any rank makes all ranks stop after the same step.

    SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 -> noted -> asked for at the step boundary, agreed by all ranks -> checkpoint -> StoppedForRequeue (exit code 75)

A second Ctrl-C does not wait for the step.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.training.stage_names import STOP_SIGNALS


class StopRequest:
    """Whether this rank was asked to stop."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def note(self, number: int, _: FrameType | None) -> None:
        if self.received == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def agreed(self, context: ParallelContext) -> bool:
        """Whether any rank was asked to stop. Collective over the whole world, so all ranks get the same answer."""
        if context.world_size == 1:
            return self.received is not None
        asked = torch.tensor(int(self.received is not None), dtype=torch.int32, device=context.device)
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        return bool(asked.item())


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catches the stop signals for a while. Call from the main thread."""
    request = StopRequest()
    before = {number: signal.signal(number, request.note) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
