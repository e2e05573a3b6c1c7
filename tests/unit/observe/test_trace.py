"""Traces of answers: there and back through JSON, in the terminal, in TensorBoard, on a page that holds no markup of an answer's."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from megatron_ext.errors import DataError
from megatron_ext.observe.board import board_traces
from megatron_ext.observe.trace import AnswerTrace, read_traces, without_heads, write_trace_page
from megatron_ext.observe.trace_text import print_trace
from tests.support.traces import small_trace


def test_a_trace_comes_back_from_json_with_its_maps_to_half_a_step_of_255_of_their_peak() -> None:
    trace = small_trace()
    back = AnswerTrace.of_json(json.loads(json.dumps(trace.to_json(), allow_nan=False)))
    assert (back.text, back.tokens, back.boxes, back.pictures) == (trace.text, trace.tokens, [list(box) for box in trace.boxes], trace.pictures)
    np.testing.assert_array_equal(back.experts_TLK, trace.experts_TLK)
    np.testing.assert_allclose(back.logprobs_T, trace.logprobs_T, rtol=1e-3)
    for one, other in zip(back.taps, trace.taps, strict=True):
        assert np.abs(one.maps_TNC - other.maps_TNC).max() <= other.maps_TNC.max() * (0.5 / 255 + 1e-3)


def test_an_answer_without_picture_experts_or_tokens_is_a_trace_too() -> None:
    trace = small_trace(taps=1)
    bare = replace(trace, pictures=[], boxes=[], taps=[], layers=[], experts_TLK=np.zeros((5, 0, 1), int), gates_TLK=np.zeros((5, 0, 1)))
    assert AnswerTrace.of_json(bare.to_json()).experts_TLK.shape[:2] == (5, 0)
    empty = replace(bare, tokens=[], alternatives=[], logprobs_T=np.zeros(0), experts_TLK=np.zeros((0, 0, 1), int), gates_TLK=np.zeros((0, 0, 1)))
    assert AnswerTrace.of_json(json.loads(json.dumps(empty.to_json()))).tokens == []
    print_trace(bare, Console(file=io.StringIO(), width=100))


def test_shapes_that_disagree_are_refused() -> None:
    with pytest.raises(ValueError, match="maps_TNC"):
        replace(small_trace(), pictures=[])


def test_without_heads_a_trace_keeps_the_mean() -> None:
    found = without_heads(small_trace().to_json())
    assert [len(peaks) for peaks in found["taps"][1]["peaks"]] == [1] * 5
    np.testing.assert_allclose(AnswerTrace.of_json(found).taps[1].maps_TNC[:, 0], small_trace().taps[1].maps_TNC[:, 0], atol=5e-3)


def test_the_terminal_shows_tokens_alternatives_the_brightest_cell_and_the_cluster_s_experts() -> None:
    console = Console(width=140, record=True, file=io.StringIO())
    print_trace(small_trace(), console)
    text = console.export_text()
    for words in (
        "answer: 4 </script> 2",
        "</ocr>",
        "other 0.22",
        "(1, 2) 100%, boxes 40%",
        "0: 0 0.75, 1* 0.25",
        "2: 2 0.50, 3 0.50",
        "*: in the expert cluster of ocr",
    ):
        assert words in text, words


def test_no_text_of_an_answer_ends_the_script_it_stands_in(tmp_path: Path) -> None:
    write_trace_page(tmp_path / "a.html", [small_trace()])
    page = (tmp_path / "a.html").read_text()
    assert page.count("</script>") == 2, "the data's and the viewer's"
    assert "http" not in page.replace("http://www.w3.org/2000/svg", ""), "nothing is fetched"


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    path = tmp_path / "traces.json"
    assert read_traces(path) == []
    path.write_text('[{"schema_version": 7}]')
    with pytest.raises(DataError, match=r"traces\.json.*evaluate again"):
        read_traces(path)


def test_tensorboard_gets_a_picture_of_each_traced_answer(tmp_path: Path) -> None:
    board_traces(tmp_path, [small_trace().to_json(), small_trace("k", seed=1).to_json(), replace(small_trace(), taps=[]).to_json()])
    (events,) = tmp_path.glob("events*")
    images = [value for event in EventFileLoader(str(events)).Load() for value in event.summary.value]
    assert [value.tag for value in images] == ["gaze/ocr/0", "gaze/ocr/1"]
