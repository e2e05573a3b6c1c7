"""Where tensors live, and what makes Megatron run where there is no GPU.

`session()` is entered around everything that Megatron does. Without CUDA it lends Megatron stand-ins for what it asks of `torch.cuda` unconditionally, and
takes them back on the way out; with CUDA it supplies one name that Megatron lacks where Transformer Engine is missing. Importing this package changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

_open_sessions = 0


def device() -> torch.device:
    """The GPU this process has chosen, else the CPU."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def device_name(device: torch.device) -> str:
    """What torch calls a device: "NVIDIA H200", or "cpu"."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def backend() -> Literal["nccl", "gloo"]:
    """The torch.distributed back end for tensors on `device()`."""
    import torch

    return "nccl" if torch.cuda.is_available() else "gloo"


@contextmanager
def session() -> Iterator[None]:
    """Inside, Megatron runs on this machine's device. Sessions nest: the outermost one lends the stand-ins and takes them back."""
    import torch

    from megatron_ext.device import patches
    from megatron_ext.device.patching import applied

    global _open_sessions
    _open_sessions += 1
    try:
        if _open_sessions > 1:
            yield
        elif torch.cuda.is_available():
            with applied(patches.WITH_CUDA):
                yield
        else:
            # Megatron's small fused functions are torch.compile'd at import; on a CPU compiling costs seconds and gains nothing.
            with applied(patches.WITHOUT_CUDA), torch.compiler.set_stance("force_eager"):
                yield
    finally:
        _open_sessions -= 1
