"""The next step's rows are read while a step is trained on, and nothing else changes."""

from __future__ import annotations

import threading

import pytest

from megatron_ext.errors import DataError
from megatron_ext.training.read_ahead import read_ahead


def test_the_next_step_is_read_while_this_one_is_trained_on_and_none_beyond_the_last() -> None:
    begun = {step: threading.Event() for step in range(6)}

    def read(step: int) -> str:
        begun[step].set()
        return f"rows of {step}"

    with read_ahead(read, steps=5) as rows:
        for step in range(3, 5):
            assert rows(step) == f"rows of {step}"
            assert step == 4 or begun[step + 1].wait(5), "nobody has asked for it yet"
    assert [step for step in begun if begun[step].is_set()] == [3, 4]


def test_the_rows_are_those_that_were_read_without_it_in_whatever_order_steps_are_asked_for() -> None:
    with read_ahead(lambda step: step * step, steps=10) as rows:
        assert [rows(step) for step in (0, 1, 5, 6, 2, 9)] == [0, 1, 25, 36, 4, 81]


def test_what_goes_wrong_with_a_step_is_said_at_that_step() -> None:
    def read(step: int) -> int:
        if step == 2:
            raise DataError("a.jsonl:3", "is broken")
        return step

    with read_ahead(read, steps=5) as rows:
        assert [rows(0), rows(1)] == [0, 1]
        with pytest.raises(DataError, match=r"a\.jsonl:3: is broken"):
            rows(2)


def test_a_step_that_is_never_reached_raises_nothing() -> None:
    def read(step: int) -> int:
        if step == 1:
            raise DataError("a.jsonl:3", "is broken")
        return step

    with read_ahead(read, steps=5) as rows:
        assert rows(0) == 0


def test_leaving_waits_for_the_read_under_way_and_ends_the_thread() -> None:
    gate, begun, done = threading.Event(), threading.Event(), []

    def read(step: int) -> int:
        if step == 1:
            begun.set()
            gate.wait(5)
            done.append(step)
        return step

    with read_ahead(read, steps=5) as rows:
        rows(0)
        assert begun.wait(5), "one that has not begun is given up instead"
        threading.Timer(0.05, gate.set).start()
    assert done == [1]
    assert not any(thread.name.startswith("read-ahead") for thread in threading.enumerate())
