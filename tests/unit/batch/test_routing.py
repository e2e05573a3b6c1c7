"""Routes of an answer behind those of its prompt say what one trace of all positions says."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.batch import ContinuedRoutes, RouteTrace, gate_mass


def trace(positions, seed=0):
    rng = np.random.default_rng(seed)
    return RouteTrace(rng.integers(0, 8, (positions, 2, 3)).astype(np.uint8), rng.random((positions, 2, 3)).astype(np.float16))


def equal(one, other):
    return np.array_equal(one.experts_SLK, other.experts_SLK) and np.array_equal(one.gates_SLK, other.gates_SLK) and one.experts_SLK.dtype == np.uint8


@given(st.integers(1, 5), st.integers(0, 5), st.data())
def test_a_continued_trace_is_the_whole_trace_in_every_part_of_it(asked, answered, data):
    whole = trace(asked + answered)
    parts = ContinuedRoutes(whole.rows(0, asked), whole.rows(asked, asked + answered))
    start = data.draw(st.integers(0, asked + answered))
    stop = data.draw(st.integers(start, asked + answered))
    for found in (parts, pickle.loads(pickle.dumps(parts))):
        assert equal(found, whole) and equal(found.rows(start, stop), whole.rows(start, stop))
        assert (len(found), found.shape, found.nbytes) == (len(whole), whole.shape, whole.nbytes)
    if start < stop:
        np.testing.assert_array_equal(gate_mass(parts, 8, start, stop), gate_mass(whole, 8, start, stop))


def test_the_prompt_s_part_is_never_copied_and_is_in_a_message_once():
    asked = trace(1000)
    answers = [ContinuedRoutes(asked, trace(2, sample)) for sample in range(8)]
    assert all(answer.rows(0, 1000) is asked and answer.rows(3, 9).experts_SLK.base is asked.experts_SLK for answer in answers)
    assert len(pickle.dumps(answers)) - len(pickle.dumps(answers[:1])) < 7 * 500 < asked.nbytes
    arrived = pickle.loads(pickle.dumps(answers))
    assert all(answer.prompt is arrived[0].prompt for answer in arrived)


def test_routes_of_another_shape_cannot_follow():
    with pytest.raises(ValueError, match="own"):
        ContinuedRoutes(trace(2), RouteTrace(np.zeros((1, 2, 4), np.uint8), np.zeros((1, 2, 4), np.float16)))
