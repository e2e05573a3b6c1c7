"""Laps: seconds that sum up, on the wall clock."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest

from megatron_ext.observe.stopwatch import Stopwatch


def test_laps_follow_each_other_on_the_wall_clock_and_sum_to_the_step() -> None:
    before = time.time()
    clock = Stopwatch()
    for name in ("generate", "reward", "generate"):
        time.sleep(0.01)
        clock.lap(name)
    seconds = clock.seconds()
    assert list(seconds) == ["timing_s/generate", "timing_s/reward", "timing_s/step"]
    assert seconds["timing_s/step"] == pytest.approx(seconds["timing_s/generate"] + seconds["timing_s/reward"])
    assert all(earlier.end_s == later.start_s for earlier, later in pairwise(clock.laps))
    assert before - 0.01 <= clock.laps[0].start_s and clock.laps[-1].end_s <= time.time() + 0.01
