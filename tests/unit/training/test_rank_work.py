"""What ranks' own work says about the slowest of them: worked values, and a thread that is measured."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from megatron_ext.training.rank_work import RankWork, WorkMeter, own_seconds, rank_metrics, thread_seconds
from tests.support.stragglers import burn


def on_cpu(data_s: float, busy_s: float, peak: float = 1e9) -> RankWork:
    return RankWork(data_s, 2.0, busy_s, 0.0, peak, 0.0)


def on_gpu(data_s: float, probe_s: float, share: float = 0.5) -> RankWork:
    return RankWork(data_s, 1.0, 0.9, probe_s, share * 80e9, share)


def test_without_gpus_a_ranks_work_is_reading_and_computing() -> None:
    """1.0 and 2.0 s of work: the second is 2 / 1.5 times the mean, however long both waited."""
    metrics = rank_metrics([on_cpu(0.2, 0.8, 7e9), on_cpu(1.5, 0.5, 5e9)])
    assert metrics["perf/slowest_rank"] == 1 and metrics["perf/slowest_over_mean"] == pytest.approx(2 / 1.5)
    assert metrics["perf/peak_memory_bytes"] == 7e9 and metrics["perf/peak_memory_rank"] == 0
    assert "perf/peak_memory_share" not in metrics


def test_a_gpu_that_is_slow_at_the_probe_is_taken_to_be_slow_at_the_step() -> None:
    """Steps of 1 s on four GPUs, one of which takes twice as long for the probe: 2 / 1.25 of the mean."""
    works = [on_gpu(0.0, 1e-3), on_gpu(0.0, 1e-3, share=0.97), on_gpu(0.0, 2e-3), on_gpu(0.0, 1e-3)]
    metrics = rank_metrics(works)
    assert metrics["perf/slowest_rank"] == 2 and metrics["perf/slowest_over_mean"] == pytest.approx(2 / 1.25)
    assert metrics["perf/peak_memory_share"] == 0.97 and metrics["perf/peak_memory_rank"] == 1


def test_a_gpu_rank_that_reads_slowly_is_seen_too() -> None:
    """Equal GPUs; 0.5 s of reading, and 0.5 s that the other rank waits: 1.0 s of own work against 0.5."""
    early, late = RankWork(0.0, 0.5, 0.4, 1e-3, 1.0, 0.1), RankWork(0.5, 1.0, 0.4, 1e-3, 1.0, 0.1)
    assert own_seconds([early, late]) == [0.5, 1.0]


def test_waiting_is_no_work_and_computing_is() -> None:
    began = thread_seconds()
    time.sleep(1.0)
    slept = thread_seconds() - began
    burn(0.1)
    assert slept < 0.5 and thread_seconds() - began - slept >= 0.1


def test_a_core_that_somebody_else_uses_counts_as_work() -> None:
    """The same computation beside a process on the same core takes about twice as long, and the processor time alone would not say so."""
    before = os.sched_getaffinity(0)
    core = min(before)
    rival = subprocess.Popen([sys.executable, "-S", "-c", f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"])
    try:
        os.sched_setaffinity(0, {core})
        time.sleep(0.3)
        began, ran_before = thread_seconds(), time.thread_time()
        burn(0.3)
        ran = time.thread_time() - ran_before
        assert thread_seconds() - began > 1.3 * ran
    finally:
        os.sched_setaffinity(0, before)
        rival.kill()
        rival.wait()


def test_another_thread_of_the_process_is_not_this_ranks_work() -> None:
    other = threading.Thread(target=burn, args=(0.5,))
    began = thread_seconds()
    other.start()
    other.join()
    assert thread_seconds() - began < 0.4


def test_a_meter_gives_means_and_starts_again() -> None:
    meter = WorkMeter(torch.device("cpu"))
    for data_s in (0.1, 0.3):
        with meter.step(data_s):
            time.sleep(0.01)
    assert meter.take().data_s == pytest.approx(0.2)
    with meter.step(0.5):
        pass
    work = meter.take()
    assert work.data_s == 0.5 and work.step_s >= 0.5 and work.busy_s < 0.5 and work.peak_memory_bytes > 1e7
