"""Stand-ins for what Megatron asks of CUDA through torch without looking whether there is a GPU.

Work on a CPU is done when the call returns, so there is one stream and it has nothing to wait for. CUDA's random numbers are the CPU's.
`torch.cuda.is_available()` stays false: who asks is told the truth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_ext.device.patching import Patch

_CPU = torch.device("cpu")


class FinishedStream:
    """A stream, and an event, of work that is always finished."""

    def wait_stream(self, _: Any) -> None:
        pass

    def record_event(self) -> FinishedStream:
        return self

    def synchronize(self) -> None:
        pass


_STREAM = FinishedStream()


def _get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _synchronize(*_: Any, **__: Any) -> None:
    pass


def _to_device(self: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return self


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`factory` with a literal `device="cuda"` answered by the CPU. A `TorchFunctionMode` would do it for all, and cost every operator a microsecond."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return make


CUDA_PATCHES = (
    Patch("torch.cuda", "current_device", "every buffer that Megatron allocates is placed on it", lambda _: lambda: _CPU),
    Patch("torch.cuda", "current_stream", "the token dispatcher asks whether it runs beside its own stream", lambda _: lambda: _STREAM),
    Patch("torch.cuda", "get_rng_state", "the tracker of random states keeps one for each kind of region", lambda _: _get_rng_state),
    Patch("torch.cuda", "set_rng_state", "checkpoints bring the random state back", lambda _: _set_rng_state),
    Patch("torch.cuda", "manual_seed", "the tracker of random states seeds each kind of region", lambda _: _manual_seed),
    Patch("torch.cuda", "synchronize", "a pipeline stage waits for what it received", lambda _: _synchronize),
    Patch("torch:Tensor", "cuda", "the distributed optimizer moves its states to the device to gather them", lambda _: _to_device),
    Patch("torch", "tensor", "the optimizer makes its scales and flags on the literal device", _on_cpu),
    Patch("torch", "zeros", "gradient norm, token count and the tracker of auxiliary losses start on the literal device", _on_cpu),
)
