"""Two ranks over gloo, one of which is slow: their steps take equally long, and still it is known which of them the other waited for."""

from __future__ import annotations

from statistics import median
from typing import Any

import pytest

from megatron_ext.config.schema import ParallelConfig
from megatron_ext.parallel.local import run_ranks
from tests.support.stragglers import LOG_EVERY, STEPS, train_slowed

TWO, EXPERTS_APART = ParallelConfig(num_ranks=2), ParallelConfig(num_ranks=2, ep=2)


def trained(parallel: ParallelConfig, read_s: list[float], compute_s: list[float]) -> list[Any]:
    return run_ranks(train_slowed, 2, parallel, read_s, compute_s, timeout_s=120)


@pytest.fixture(scope="module")
def slow_reader() -> list[Any]:
    """Rank 1 needs 0.4 s longer to read each step; experts are spread over both ranks."""
    return trained(EXPERTS_APART, [0.0, 0.4], [0.0, 0.0])


def last(results: list[Any], rank: int = 0) -> dict[str, float]:
    """The second report: the first one holds the warm-up."""
    return results[rank][0][-1]


def test_a_rank_that_reads_slowly_is_found(slow_reader: list[Any]) -> None:
    assert last(slow_reader)["perf/slowest_rank"] == 1
    assert last(slow_reader)["perf/slowest_over_mean"] > 1.1


@pytest.mark.parametrize("slow", [0, 1])
def test_a_rank_that_computes_for_longer_is_found_whichever_it_is(slow: int) -> None:
    results = trained(TWO, [0.0, 0.0], [0.6 * (slow == 0), 0.6 * (slow == 1)])
    assert last(results)["perf/slowest_rank"] == slow
    assert last(results)["perf/slowest_over_mean"] > 1.1, "on a busy machine both ranks wait for a core besides"


def test_all_ranks_know_the_same_but_for_their_own_clocks(slow_reader: list[Any]) -> None:
    ours, theirs = ({name: value for name, value in last(slow_reader, rank).items() if not name.startswith("timing_s/")} for rank in (0, 1))
    assert ours == theirs
    assert {"perf/mfu", "perf/tokens_per_s", "perf/peak_memory_bytes", "perf/peak_memory_rank", "moe/ep_rank_load_max"} <= ours.keys()
    assert 0 < ours["perf/mfu"] < 1 and 1 <= ours["moe/ep_rank_load_max"] <= 2
    assert last(slow_reader, 0)["timing_s/data"] < 0.4 <= last(slow_reader, 1)["timing_s/data"]


def test_the_phases_make_up_the_step_and_waiting_counts_as_the_phase_that_waits(slow_reader: list[Any]) -> None:
    record = last(slow_reader)
    assert record["timing_s/data"] + record["timing_s/forward_backward"] + record["timing_s/optimizer"] == pytest.approx(record["timing_s/step"])
    assert record["timing_s/forward_backward"] > 0.3, "rank 0 waits for rank 1 in the forward pass, where experts meet"
    assert record["timing_s/save"] == pytest.approx(0.01 / LOG_EVERY, abs=0.1) and record["timing_s/save"] >= 0.01 / LOG_EVERY, "of the save after step 2"


def test_both_ranks_have_a_track_with_every_step_once(slow_reader: list[Any]) -> None:
    for track in slow_reader[0][1]:
        assert [step for step, _ in track] == list(range(1, STEPS + 1))
        plain = ["data", "forward_backward", "optimizer"]
        assert [lap.name for _, laps in track for lap in laps] == 2 * [*plain, *plain, "report", "save"]


def test_tracks_lie_on_one_clock(slow_reader: list[Any]) -> None:
    """Experts meet in the forward pass: no rank is through it before both have read, and in most steps both leave it at nearly the same time."""
    ends = [[{lap.name: lap.end_s for lap in laps} for _, laps in track] for track in slow_reader[0][1]]
    for early, late in zip(*ends, strict=True):
        assert min(early["forward_backward"], late["forward_backward"]) > max(early["data"], late["data"])
    gaps = {phase: median(abs(late[phase] - early[phase]) for early, late in zip(*ends, strict=True)) for phase in ("data", "forward_backward")}
    assert gaps["forward_backward"] < gaps["data"] > 0.2
