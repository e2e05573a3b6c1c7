"""Which rank the others wait for, and which needs the most memory.

In synchronous training every rank's step takes equally long on the clock: who is early waits in a collective for who is late. So it is measured what a rank
does itself, and ranks are compared by that:

    CPU   seconds of reading data + seconds in which the training thread ran, or was ready to run and had no core (Linux's schedstat). A thread that waits in
          gloo sleeps, and sleeping is not counted. A rank whose core somebody else uses is seen, and so is one that got more to compute.
    GPU   seconds of reading data + the step's other seconds x how much slower than the mean of all ranks this GPU was at a fixed product of matrices, timed
          by CUDA events at every report. It finds GPUs that are throttled, broken or shared; uneven work is what `moe/ep_rank_load_max` and the timeline show.
          Timing the step's own kernels would time the waiting in NCCL's too; the seconds between collectives, as Megatron's straggler detector takes them,
          need events around every one of them.

It costs two reads of a file a step, or less than a millisecond of the GPU a report, and no wait of the host within a step.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from megatron_ext.observe.metrics_file import PEAK_MEMORY, PEAK_MEMORY_RANK, PEAK_MEMORY_SHARE, SLOWEST_OVER_MEAN, SLOWEST_RANK

_SCHEDSTAT = Path("/proc/thread-self/schedstat")
_PROBE_SIZE, _PROBE_PRODUCTS, _PROBE_TRIES = 2048, 8, 3


@dataclass(frozen=True)
class RankWork:
    """Of one rank since the last report. `data_s`, `step_s`: mean seconds of a step, reading data and in all. `busy_s`: those of the training thread outside
    reading (CPU); `probe_s`: of the fixed product (GPU, else 0). `memory_share`: of the GPU's memory, 0 without one."""

    data_s: float
    step_s: float
    busy_s: float
    probe_s: float
    peak_memory_bytes: float
    memory_share: float


def rank_metrics(works: Sequence[RankWork]) -> dict[str, float]:
    """What the ranks' work, in the order of their numbers, says about the slowest and the fullest of them.

    >>> two = [RankWork(0.1, 2.0, busy, 0.0, bytes, 0.0) for busy, bytes in ((0.9, 7e9), (1.9, 5e9))]
    >>> rank_metrics(two)["perf/slowest_rank"], round(rank_metrics(two)["perf/slowest_over_mean"], 2), rank_metrics(two)["perf/peak_memory_rank"]
    (1.0, 1.33, 0.0)
    """
    own_s = own_seconds(works)
    slowest, fullest = max(range(len(works)), key=own_s.__getitem__), max(range(len(works)), key=lambda rank: works[rank].peak_memory_bytes)
    shares = [work.memory_share for work in works]
    return {
        SLOWEST_RANK: float(slowest),
        SLOWEST_OVER_MEAN: own_s[slowest] * len(works) / sum(own_s),
        PEAK_MEMORY: works[fullest].peak_memory_bytes,
        PEAK_MEMORY_RANK: float(fullest),
        **({PEAK_MEMORY_SHARE: max(shares)} if max(shares) > 0 else {}),
    }


def own_seconds(works: Sequence[RankWork]) -> list[float]:
    """Of a step, what each rank needs for itself."""
    mean_probe_s = sum(work.probe_s for work in works) / len(works)
    if mean_probe_s == 0:
        return [work.data_s + work.busy_s for work in works]
    return [work.data_s + (work.step_s - work.data_s) * work.probe_s / mean_probe_s for work in works]


class WorkMeter:
    """Measures one rank."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._probe = device, _Probe(device) if device.type == "cuda" else None
        self._steps: list[tuple[float, float, float]] = []

    @contextmanager
    def step(self, data_s: float) -> Iterator[None]:
        """Around what a step does after reading its data, which took `data_s`."""
        began, busy_s = time.perf_counter(), thread_seconds()
        yield
        self._steps.append((data_s, data_s + time.perf_counter() - began, thread_seconds() - busy_s))

    def take(self) -> RankWork:
        """Means of the steps since the last call."""
        steps, self._steps = self._steps, []
        data_s, step_s, busy_s = (sum(column) / len(steps) for column in zip(*steps, strict=True))
        if self._probe is None:
            return RankWork(data_s, step_s, busy_s, 0.0, _resident_bytes(), 0.0)
        peak = float(torch.cuda.max_memory_allocated(self._device))
        share = peak / torch.cuda.get_device_properties(self._device).total_memory
        return RankWork(data_s, step_s, busy_s, self._probe.seconds(), peak, share)


def thread_seconds() -> float:
    """Seconds in which this thread ran or waited for a core; where Linux does not count the latter, in which it ran."""
    try:
        ran_ns, waited_ns, _ = _SCHEDSTAT.read_text(encoding="ascii").split()
    except FileNotFoundError:
        return time.thread_time()
    return (int(ran_ns) + int(waited_ns)) / 1e9


def _resident_bytes() -> float:
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


class _Probe:
    """The fixed product, on a GPU. Its 16 MiB are held from the start: they are not to be missing in the middle of a run."""

    def __init__(self, device: torch.device) -> None:
        self._factor = torch.ones(_PROBE_SIZE, _PROBE_SIZE, dtype=torch.bfloat16, device=device)
        self._product = torch.zeros_like(self._factor)

    def seconds(self) -> float:
        """The best of a few tries: the first one wakes the GPU up."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(_PROBE_TRIES + 1)]
        events[0].record()
        for event in events[1:]:
            for _ in range(_PROBE_PRODUCTS):
                torch.mm(self._factor, self._factor, out=self._product)
            event.record()
        events[-1].synchronize()
        return min(before.elapsed_time(after) for before, after in pairwise(events)) / 1e3
