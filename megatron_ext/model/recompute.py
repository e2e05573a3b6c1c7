"""Activations that are dropped in the forward pass and computed again in the backward pass (Chen et al., 2016, arXiv 1604.06174).

Megatron's checkpoint runs the function once without gradients and once, in the backward pass, with them. What counts or logs (routers, metrics) looks at
`torch.is_grad_enabled()` and so counts once. What a layer must find as it was, because other micro-batches have passed meanwhile, is kept here: what routers
know of the micro-batch, the routes that are being replayed, and what their scores are pulled to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.tensor_parallel import checkpoint

from megatron_ext.model.router import Router, RouterCall
from megatron_ext.model.router_tap import Steer


def recomputed(run: Callable[..., Any], routers: Sequence[Router], first: torch.Tensor, *tensors: torch.Tensor) -> Any:
    """`run(first, *tensors)`. Gradients reach the given tensors, and weights that `run` uses; every other tensor with a gradient must be among them."""
    kept = [(router, router.call, router.router_replay.targets, router.router_replay.steer) for router in routers]

    def run_or_repeat(*args: torch.Tensor) -> Any:
        if not torch.is_grad_enabled():
            return run(*args)
        with _as_it_was(kept):
            return run(*args)

    # The backward pass starts from an input's gradient: with everything before it frozen there is none, and the weights inside would get none either.
    start = first if first.requires_grad else first.detach().requires_grad_()
    return checkpoint(run_or_repeat, False, start, *tensors)


@contextmanager
def _as_it_was(kept: Sequence[tuple[Router, RouterCall, torch.Tensor | None, Steer | None]]) -> Iterator[None]:
    """Routers in the state of the first run, and their taps deaf: what they decide was recorded then."""
    taps = [router.router_replay for router, *_ in kept]
    now = [(router.call, tap.targets, tap.steer, tap.listening) for (router, *_), tap in zip(kept, taps, strict=True)]
    for (router, call, targets, steer), tap in zip(kept, taps, strict=True):
        router.call, tap.targets, tap.steer, tap.listening = call, targets, steer, False
    try:
        yield
    finally:
        for (router, *_), tap, (call, targets, steer, listening) in zip(kept, taps, now, strict=True):
            router.call, tap.targets, tap.steer, tap.listening = call, targets, steer, listening
