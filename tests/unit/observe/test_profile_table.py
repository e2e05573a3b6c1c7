"""The tables of a profile: a trace small enough to add up by hand, and laws over random ones."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.observe.profile_table import table

MAIN, GLOO, AUTOGRAD = 1, 2, 3


def event(name: str, start: float, stop: float, thread: int = MAIN, cat: str = "cpu_op", **args: Any) -> dict[str, Any]:
    """From millisecond `start` to `stop`."""
    return {"ph": "X", "name": name, "cat": cat, "tid": thread, "ts": 1000 * start, "dur": 1000 * (stop - start), "args": args}


def phase(name: str, start: float, stop: float) -> dict[str, Any]:
    return event(f"phase/{name}", start, stop, cat="user_annotation")


def numbered(number: int) -> dict[str, int]:
    return {"Sequence number": number}


FORWARD = [
    phase("step", 0, 100),
    phase("attention", 10, 40),
    event("aten::mm", 12, 32, **numbered(7)),
    event("aten::copy_", 14, 18),
]


def ms(seconds: float) -> float:
    return round(1000 * seconds, 6)


def test_what_lies_within_is_counted_there_alone() -> None:
    """100 ms: 30 in attention, of which 20 in a product that spends 4 on a copy; 70 in nothing that has a name."""
    found = table(FORWARD)
    assert ms(found.recorded_s) == 100 and found.steps == 1
    assert {name: (ms(spent.host_s), ms(spent.python_s)) for name, spent in found.phases.items()} == {"other": (70, 70), "attention": (30, 10)}
    assert {name: (ms(spent.host_s), spent.calls) for name, spent in found.operators.items()} == {"aten::mm": (16, 1), "aten::copy_": (4, 1)}


def test_a_backward_pass_belongs_to_the_phase_of_its_forward_operator() -> None:
    node = event("autograd::engine::evaluate_function: MmBackward0", 50, 80, **numbered(7))
    gradient = event("autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", 82, 87)
    found = table([*FORWARD, node, event("aten::mm", 55, 75), gradient])
    assert (ms(found.phases["attention"].host_s), ms(found.phases["attention"].backward_s)) == (60, 30)
    assert ms(found.phases["gradients"].host_s) == 5
    assert ms(found.phases["other"].host_s) == 35


def test_waiting_for_other_ranks_is_communication() -> None:
    """The call takes 2 ms; gloo is at work for 20, of which the main thread computes 6."""
    sent = [event("c10d::allreduce_", 50, 52), event("gloo:all_reduce", 52, 72, thread=GLOO, cat="user_annotation"), event("aten::add", 54, 60)]
    found = table([*FORWARD, *sent])
    assert ms(found.phases["communication"].host_s) == 2 + 14
    assert ms(found.phases["other"].host_s) == 70 - 2 - 14
    assert ms(sum(spent.host_s for spent in found.phases.values())) == 100


def test_a_message_that_the_main_thread_began_and_does_not_wait_for_is_no_call_of_it() -> None:
    """As gloo notes them between pipeline stages: from 20 ms, within the attention, until long after it."""
    found = table([*FORWARD, event("gloo:recv", 20, 90, cat="user_annotation")])
    assert {name: ms(spent.host_s) for name, spent in found.phases.items()} == {"communication": 8 + 50, "attention": 22, "other": 20}


def test_a_backward_pass_on_another_thread_is_counted_once() -> None:
    node = event("autograd::engine::evaluate_function: MmBackward0", 50, 80, thread=AUTOGRAD, **numbered(7))
    found = table([*FORWARD, node])
    assert ms(found.phases["attention"].backward_s) == 30
    assert ms(sum(spent.host_s for spent in found.phases.values())) == 100


def test_a_kernel_is_of_the_phase_and_operator_that_launched_it() -> None:
    launch = event("cudaLaunchKernel", 20, 21, cat="cuda_runtime", correlation=5)
    kernels = [event("gemm", 25, 65, thread=9, cat="kernel", correlation=5), event("ncclDevKernel", 65, 75, thread=9, cat="kernel", correlation=6)]
    found = table([*FORWARD, launch, *kernels])
    assert ms(found.phases["attention"].device_s) == 40 and ms(found.operators["aten::mm"].device_s) == 40
    assert ms(found.phases["communication"].device_s) == 10
    assert ms(found.operators["aten::mm"].host_s) == 16 and found.operators["aten::mm"].calls == 1


def test_time_between_two_steps_is_nobody_s() -> None:
    found = table([phase("step", 0, 10), event("aten::mm", 15, 18), phase("step", 20, 30)])
    assert ms(found.recorded_s) == 20 and found.steps == 2
    assert {name: ms(spent.host_s) for name, spent in found.phases.items()} == {"other": 20}


def test_nothing_recorded_is_an_empty_table() -> None:
    assert table([event("aten::mm", 0, 1)]).phases == {}


@st.composite
def nested(draw: st.DrawFn, start: int = 0, stop: int = 1000, depth: int = 4) -> list[dict[str, Any]]:
    """Events within [start, stop] that lie in each other or apart."""
    cuts = sorted(draw(st.sets(st.integers(start, stop), max_size=6)))
    found = []
    for first, last in zip(cuts[::2], cuts[1::2], strict=False):
        name = draw(st.sampled_from(["phase/experts", "phase/head", "aten::mm", "aten::add", "c10d::send"]))
        found.append(event(name, first, last, cat="user_annotation" if name.startswith("phase") else "cpu_op"))
        if depth:
            found += draw(nested(first, last, depth - 1))
    return found


@given(nested(), st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)), max_size=5))
def test_phases_add_up_to_the_recorded_time(inside: list[dict[str, Any]], sent: list[tuple[int, int]]) -> None:
    gloo = [event("gloo:broadcast", min(span), max(span), thread=GLOO, cat="user_annotation") for span in sent]
    found = table([phase("step", 0, 1000), *inside, *gloo])
    assert sum(spent.host_s for spent in found.phases.values()) == pytest.approx(1.0)
