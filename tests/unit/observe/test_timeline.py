"""The timeline: what Perfetto reads at any moment, what stands in it, and how long it can get."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.observe.stopwatch import Lap
from megatron_ext.observe.timeline import MOST_RANKS, Timeline, traced_ranks
from tests.support.timelines import as_perfetto_reads, slices


def laps(start_s: float, **seconds: float) -> list[Lap]:
    found = []
    for name, length in seconds.items():
        found.append(Lap(name, start_s, start_s + length))
        start_s += length
    return found


def add_step(timeline: Timeline, step: int) -> None:
    for rank in (0, 1):
        timeline.step(f"rank {rank}", step, laps(1.79e9 + step, data=0.1, forward_backward=0.3, optimizer=0.05))
    timeline.flush()


def test_a_finished_file_is_json_with_a_track_for_each_rank(tmp_path: Path) -> None:
    with Timeline(tmp_path, "tiny: sft") as timeline:
        add_step(timeline, 1)
        timeline.span("rollout replica 0 rank 0", "generate", 1.79e9, 1.79e9 + 2)
    events = json.loads((tmp_path / "timeline.json").read_text())
    assert events == as_perfetto_reads(tmp_path)
    assert events[0]["name"] == "process_name" and events[0]["args"] == {"name": "tiny: sft"}
    tracks = slices(events)
    assert list(tracks) == ["rank 0", "rank 1", "rollout replica 0 rank 0"]
    assert [name for name, *_ in tracks["rank 1"]] == ["step 1", "data", "forward_backward", "optimizer"]
    assert tracks["rollout replica 0 rank 0"] == [("generate", 1_790_000_000_000_000, 1_790_000_002_000_000)]


@given(st.floats(1e9, 2e9), st.lists(st.floats(0, 1e4), min_size=1, max_size=6))
def test_phases_lie_within_their_step_and_make_it_up(start_s: float, seconds: list[float]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with Timeline(Path(folder), "x") as timeline:
            timeline.step("rank 0", 7, laps(start_s, **{f"phase{number}": length for number, length in enumerate(seconds)}))
        (_, start, end), *phases = slices(as_perfetto_reads(Path(folder)))["rank 0"]
    assert phases[0][1] == start and phases[-1][2] == end
    assert all(before[2] == after[1] for before, after in pairwise(phases))
    assert sum(phase[2] - phase[1] for phase in phases) == end - start


def test_a_stage_that_was_killed_leaves_what_perfetto_can_read(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from tests.unit.observe.test_timeline import add_step
from megatron_ext.observe.timeline import Timeline
timeline = Timeline(Path({str(tmp_path)!r}), "x")
for step in (1, 2, 3):
    add_step(timeline, step)
os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    assert done.returncode == -signal.SIGKILL
    text = (tmp_path / "timeline.json").read_text()
    assert not text.rstrip().endswith("]")
    assert json.loads(text + "]") == as_perfetto_reads(tmp_path)
    assert [name for name, *_ in slices(as_perfetto_reads(tmp_path))["rank 0"] if name.startswith("step")] == ["step 1", "step 2", "step 3"]


def test_it_keeps_the_first_and_the_last_events_and_every_track_its_name(tmp_path: Path) -> None:
    with Timeline(tmp_path, "x", most_events=40) as timeline:
        for step in range(1, 201):
            add_step(timeline, step)
            assert len(as_perfetto_reads(tmp_path)) <= 3 + 3 * 40, "three names and the events"
        timeline.span("latecomer", "save", 1.79e9, 1.79e9 + 1)
        for step in range(201, 251):
            add_step(timeline, step)
    tracks = slices(as_perfetto_reads(tmp_path))
    steps = [int(name.split()[1]) for name, *_ in tracks["rank 0"] if name.startswith("step")]
    assert steps[:4] == [1, 2, 3, 4] and steps[-5:] == [246, 247, 248, 249, 250]
    assert 9 <= len(steps) <= 15, "eight events a step: 40 from the start, 40 to 80 from the end"


def test_a_new_run_of_the_stage_starts_a_new_file(tmp_path: Path) -> None:
    for step in (1, 2):
        with Timeline(tmp_path, "x") as timeline:
            add_step(timeline, step)
    with Timeline(tmp_path, "x"):
        pass  # a stage that has nothing left to do
    assert [name for name, *_ in slices(as_perfetto_reads(tmp_path))["rank 0"] if name.startswith("step")] == ["step 2"]


@given(st.integers(1, 5000))
def test_few_ranks_are_all_traced_and_many_evenly(world_size: int) -> None:
    ranks = traced_ranks(world_size)
    assert ranks[0] == 0 and len(ranks) <= MOST_RANKS
    assert world_size > MOST_RANKS or list(ranks) == list(range(world_size))
    assert len(ranks) > MOST_RANKS / 2 or world_size <= MOST_RANKS
