"""metrics.jsonl: every step once, whatever happened to the process that wrote it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.errors import DataError
from megatron_ext.observe.metrics import MetricsWriter, read_metrics, series


def write_steps(folder: Path, steps: list[int], value: float = 1.0) -> None:
    with MetricsWriter(folder, tensorboard=False) as writer:
        for step in steps:
            writer.write(step, {"loss": value})


def test_a_line_holds_step_time_and_numbers(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(10, {"loss": 0.25, "tokens/s": 100})
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["step"] == 10
    assert line["time"] > 1.7e9
    assert (line["loss"], line["tokens/s"]) == (0.25, 100.0)


def test_numbers_that_json_does_not_have_are_named_and_come_back(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (line["a"], line["b"], line["c"]) == ("nan", "inf", "-inf")
    (record,) = read_metrics(tmp_path)
    assert math.isnan(record["a"])
    assert (record["b"], record["c"]) == (math.inf, -math.inf)


def test_steps_that_are_run_again_after_a_resume_stand_once(tmp_path: Path) -> None:
    """A run that saved at step 20 and was killed after step 40 resumes at 21 and writes step 30 again."""
    write_steps(tmp_path, [10, 20, 30, 40], value=1.0)
    write_steps(tmp_path, [30, 40, 50], value=2.0)
    assert series(read_metrics(tmp_path), "loss") == ([10, 20, 30, 40, 50], [1.0, 1.0, 2.0, 2.0, 2.0])


def test_a_line_cut_short_by_a_crash_is_left_out_and_then_mended(tmp_path: Path) -> None:
    write_steps(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "ti')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    write_steps(tmp_path, [3])
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("line", ["not json", "[1]", '{"loss": 1}', '{"step": 1, "loss": "high"}'])
def test_a_malformed_line_is_named_with_file_and_number(tmp_path: Path, line: str) -> None:
    write_steps(tmp_path, [1])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"metrics.jsonl:2: is not a line of metrics; "):
        read_metrics(tmp_path)


def test_a_stage_that_wrote_nothing_has_no_metrics(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    assert series([], "loss") == ([], [])


def test_tensorboard_shows_the_same_numbers_and_hides_steps_that_were_run_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for value, steps in ((1.0, (1, 2, 3)), (2.0, (2, 3, 4))):
        with MetricsWriter(tmp_path) as writer:
            for step in steps:
                writer.write(step, {"loss": value})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0)]


@given(first=st.lists(st.integers(0, 20), unique=True).map(sorted), again=st.lists(st.integers(0, 20), unique=True, min_size=1).map(sorted))
def test_resuming_keeps_what_came_before_and_replaces_what_comes_after(tmp_path_factory, first: list[int], again: list[int]) -> None:
    folder = tmp_path_factory.mktemp("metrics")
    write_steps(folder, first, value=1.0)
    write_steps(folder, again, value=2.0)
    expected = [(step, 1.0) for step in first if step < again[0]] + [(step, 2.0) for step in again]
    assert [(record["step"], record["loss"]) for record in read_metrics(folder)] == expected
