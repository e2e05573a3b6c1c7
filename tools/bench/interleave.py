"""What benchmarks share: sides that do the same work in one process, in turns, so that whatever else the machine does meets all of them.

On a CPU a time is the CPU time of the process, because the machine may be shared; on a GPU it is elapsed time after the device has finished.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

T = TypeVar("T")


def clock() -> float:
    """Seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def medians(sides: Mapping[str, Callable[[], T]], rounds: int, agree: Callable[[dict[str, T]], None] | None = None, warm_up: int = 1) -> dict[str, float]:
    """Median seconds of a call of each side. The first `warm_up` rounds are not counted. `agree` sees what all sides returned in a round, and raises where they
    did not do the same work."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warm_up + rounds):
        returned = {}
        for name, side in sides.items():
            began = clock()
            returned[name] = side()
            if number >= warm_up:
                seconds[name].append(clock() - began)
        if agree is not None:
            agree(returned)
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine() -> str:
    """Where the numbers are from, in words."""
    device = f"one {torch.cuda.get_device_name()}" if torch.cuda.is_available() else f"{torch.get_num_threads()} thread(s) of {platform.machine()}"
    return f"{device}, torch {torch.__version__}"
