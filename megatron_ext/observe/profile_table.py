"""Where the time of a recorded stretch went, by phase and by operator: from the events that torch's profiler writes, with plain Python.

    events of one process -> whose thread, who is inside whom -> self time of each -> its phase -> two tables

Self time is what an event takes less the events within it, so that a table adds up to the recorded time. The phase of a piece of time is the innermost of
these around it; time in none of them is `other`:

    a phase         an annotation "phase/<name>" (`phases.py`)
    communication   an operator of torch's process groups; and time of the main thread without an operator while one of them is on its way
    gradients       adding up a parameter's gradient
    backward        an autograd node: the phase of the forward operator that has its sequence number

Time of an annotation itself is Python between operators. On a GPU an operator's time is that of launching its kernels; `device_s` is the kernels' own, by who
launched them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

PHASE, STEP = "phase/", "phase/step"
OTHER, COMMUNICATION, GRADIENTS = "other", "communication", "gradients"
MOST_OPERATORS = 20
_NODE, _ACCUMULATE = "autograd::engine::evaluate_function: ", "torch::autograd::AccumulateGrad"
_SENT = ("c10d::", "gloo:", "nccl:", "record_param_comms", "_c10d_functional::")
_LAUNCHES, _KERNELS = ("cuda_runtime", "cuda_driver"), ("kernel", "gpu_memcpy", "gpu_memset")
_HOST = ("cpu_op", "user_annotation", *_LAUNCHES)
Event = Mapping[str, Any]
Span = tuple[float, float]


@dataclass
class Spent:
    """Seconds: of the host in all, of them in backward passes and in Python between operators; of the device. `calls`: of operators."""

    host_s: float = 0.0
    backward_s: float = 0.0
    python_s: float = 0.0
    device_s: float = 0.0
    calls: int = 0


@dataclass(frozen=True)
class Table:
    """`recorded_s` of `steps` steps; phases and operators by name, the longest first."""

    recorded_s: float
    steps: int
    phases: dict[str, Spent]
    operators: dict[str, Spent]


@dataclass
class _Ledger:
    """What was found so far. `forward`: phases by sequence number; `launched`: (phase, operator) by correlation."""

    phases: dict[str, Spent] = field(default_factory=lambda: defaultdict(Spent))
    operators: dict[str, Spent] = field(default_factory=lambda: defaultdict(Spent))
    forward: dict[int, str] = field(default_factory=dict)
    launched: dict[int, tuple[str, str]] = field(default_factory=dict)


@dataclass
class _Open:
    """An event that others may be inside of. `free`: where none of them is, so far up to `reached`."""

    event: Event
    phase: str
    backward: bool
    operator: str
    reached: float
    free: list[Span] = field(default_factory=list)

    @property
    def end(self) -> float:
        return float(self.event["ts"] + self.event["dur"])


def table(events: Sequence[Event]) -> Table:
    """`events`: `traceEvents` of Chrome's trace format. The main thread is the one with the steps; without a step the table is empty."""
    timed = sorted((event for event in events if event.get("ph") == "X"), key=lambda event: (event["ts"], -event["dur"]))
    steps = [event for event in timed if event["name"] == STEP]
    if not steps:
        return Table(0.0, 0, {}, {})
    main = steps[0]["tid"]
    on_way = [event for event in timed if _is_on_way(event)]
    on_host = [event for event in timed if event.get("cat") in _HOST and not _is_on_way(event)]
    threads = {tid: list(found) for tid, found in groupby(sorted(on_host, key=lambda event: str(event["tid"])), key=lambda event: event["tid"])}
    workers = {tid: found for tid, found in threads.items() if tid != main and any(event["name"].startswith(_NODE) for event in found)}
    busy = _joined(event for found in workers.values() for event in found)
    sent = _joined(event for event in on_way if event["tid"] not in workers)
    ledger = _Ledger()
    within = _joined(steps)
    _sweep([event for event in threads[main] if _overlap((event["ts"], event["ts"]), within) is not None], ledger, sent, busy)
    for found in workers.values():
        _sweep(found, ledger, [], [])
    for event in timed:
        if event.get("cat") in _KERNELS:
            _kernel(event, ledger)
    recorded_s = sum(stop - start for start, stop in within) / 1e6
    operators = dict(_longest(ledger.operators)[:MOST_OPERATORS])
    return Table(recorded_s, len(steps), dict(_longest(ledger.phases)), operators)


def _is_on_way(event: Event) -> bool:
    """What torch notes of a message from its begin to its end, whatever the thread does meanwhile."""
    return event.get("cat") == "user_annotation" and event["name"].startswith(_SENT)


def _sweep(events: Sequence[Event], ledger: _Ledger, sent: Sequence[Span], busy: Sequence[Span]) -> None:
    """One thread's events in the order of their starts, the longer first. Time without an operator is communication while `sent`, and nobody's while other
    threads are `busy`: they have it in their own sweep."""
    inside: list[_Open] = []

    def close() -> None:
        done = inside.pop()
        if done.end > done.reached:
            done.free.append((done.reached, done.end))
        if inside:
            inside[-1].reached = max(inside[-1].reached, done.end)
        _book(done, ledger, sent, busy)

    for event in events:
        while inside and inside[-1].end <= event["ts"]:
            close()
        if inside and event["ts"] > inside[-1].reached:
            inside[-1].free.append((inside[-1].reached, event["ts"]))
        inside.append(_opened(event, inside[-1] if inside else None, ledger))
    while inside:
        close()


def _opened(event: Event, around: _Open | None, ledger: _Ledger) -> _Open:
    name, sequence = str(event["name"]), event.get("args", {}).get("Sequence number")
    phase, backward = (around.phase, around.backward) if around is not None else (OTHER, False)
    operator = name
    if event.get("cat") in _LAUNCHES:
        operator = around.operator if around is not None else name
        ledger.launched[event["args"].get("correlation")] = phase, operator
    elif name.startswith(PHASE):
        phase = OTHER if name == STEP else name.removeprefix(PHASE)
    elif name.startswith(_SENT):
        phase = COMMUNICATION
    elif name.startswith(_NODE):
        backward = True
        phase = GRADIENTS if name.endswith(_ACCUMULATE) else ledger.forward.get(sequence, phase)
    elif sequence is not None and not backward:
        ledger.forward[sequence] = phase  # the last operator with a number is the one that the node is of
    return _Open(event, phase, backward, operator, float(event["ts"]))


def _book(done: _Open, ledger: _Ledger, sent: Sequence[Span], busy: Sequence[Span]) -> None:
    annotation = done.event["name"].startswith(PHASE)
    for start, stop in done.free:
        seconds = (stop - start) / 1e6
        if annotation:
            waited_s = _shared((start, stop), sent) / 1e6
            elsewhere_s = _shared((start, stop), busy) / 1e6
            seconds = max(0.0, seconds - waited_s - elsewhere_s)
            ledger.phases[done.phase].python_s += seconds
            if waited_s:
                ledger.phases[COMMUNICATION].host_s += waited_s
        ledger.phases[done.phase].host_s += seconds
        ledger.phases[done.phase].backward_s += seconds * done.backward
        if not annotation:
            ledger.operators[done.operator].host_s += seconds
    if not annotation and done.operator == done.event["name"]:
        ledger.operators[done.operator].calls += 1


def _kernel(event: Event, ledger: _Ledger) -> None:
    phase, operator = ledger.launched.get(event.get("args", {}).get("correlation"), (OTHER, event["name"]))
    phase = COMMUNICATION if event["name"].startswith("nccl") else phase
    ledger.phases[phase].device_s += event["dur"] / 1e6
    ledger.operators[operator].device_s += event["dur"] / 1e6


def _longest(found: Mapping[str, Spent]) -> list[tuple[str, Spent]]:
    return sorted(found.items(), key=lambda item: -max(item[1].host_s, item[1].device_s))


def _joined(events: Iterator[Event] | Sequence[Event]) -> list[Span]:
    """The time that any of them takes, as spans in order that do not touch."""
    joined: list[Span] = []
    for start, stop in sorted((float(event["ts"]), float(event["ts"] + event["dur"])) for event in events):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], stop)
        else:
            joined.append((start, stop))
    return joined


def _overlap(span: Span, spans: Sequence[Span]) -> int | None:
    """The first of the joined spans that shares a moment with this one."""
    first = max(0, bisect_right(spans, (span[0], float("inf"))) - 1)
    found = next((at for at in range(first, min(first + 2, len(spans))) if spans[at][1] >= span[0] and spans[at][0] <= span[1]), None)
    return found


def _shared(span: Span, spans: Sequence[Span]) -> float:
    """How long the joined spans last within this one."""
    at, shared = _overlap(span, spans), 0.0
    while at is not None and at < len(spans) and spans[at][0] < span[1]:
        shared += max(0.0, min(span[1], spans[at][1]) - max(span[0], spans[at][0]))
        at += 1
    return shared
