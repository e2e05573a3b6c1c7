"""Names for what a process is doing, which exist only while it is profiled: functions are wrapped for that time, and the code that runs knows nothing of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from megatron_ext.observe.profile_table import PHASE


@dataclass(frozen=True)
class Phase:
    """A function of `owner`, a class or the module in which it is looked up, is `name`. A phase within another takes its time from it."""

    name: str
    owner: Any
    function: str


@contextmanager
def named(phases: Sequence[Phase], ended: Callable[[bool], None]) -> Iterator[None]:
    """Every call is an annotation of torch's profiler. `ended` is called after each, and told whether it was in no other."""
    depth = [0]
    with ExitStack() as stack:
        for phase in phases:
            plain, inherited = getattr(phase.owner, phase.function), phase.function not in vars(phase.owner)
            setattr(phase.owner, phase.function, _annotated(plain, PHASE + phase.name, depth, ended))
            stack.callback(*((delattr, phase.owner, phase.function) if inherited else (setattr, phase.owner, phase.function, plain)))
        yield


def _annotated(function: Callable[..., Any], name: str, depth: list[int], ended: Callable[[bool], None]) -> Callable[..., Any]:
    @functools.wraps(function)
    def annotated(*args: Any, **kwargs: Any) -> Any:
        depth[0] += 1
        try:
            with torch.profiler.record_function(name):
                return function(*args, **kwargs)
        finally:
            depth[0] -= 1
            ended(depth[0] == 0)

    return annotated
