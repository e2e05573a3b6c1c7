"""What Megatron's own modules need on a CPU beyond `torch.cuda`: type names, random states, the dispatcher's stream and splits. And a name that is missing
everywhere without Transformer Engine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from megatron_ext.device.patches_cuda import FinishedStream
from megatron_ext.device.patching import Patch

_OPTIMIZER = "megatron.core.optimizer."
_RANDOM = "megatron.core.tensor_parallel.random"
_MOE = "megatron.core.transformer.moe."


def _type_as_on_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.type()` says "torch.cuda.FloatTensor" to Megatron's optimizer, which sorts parameters by that text, and the truth to everyone else."""

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        if isinstance(answer, str) and sys._getframe(1).f_globals.get("__name__", "").startswith(_OPTIMIZER):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    return type_


def _get_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


def _splits_on_host(_: Callable[..., Any]) -> Callable[..., Any]:
    """The dispatcher's splits become numpy arrays also when they were on the CPU all along."""

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    return move


MEGATRON_PATCHES = (
    Patch("torch:Tensor", "type", "the optimizer sorts parameters by the names of CUDA tensor types", _type_as_on_cuda),
    Patch(_RANDOM, "_get_cuda_rng_state", "recompute and the tracker of random states read the CUDA generator", lambda _: _get_state),
    Patch(_RANDOM, "_set_cuda_rng_state", "recompute and the tracker of random states write the CUDA generator", lambda _: _set_state),
    Patch(_MOE + "token_dispatcher:MoEAlltoAllTokenDispatcher", "cuda_dtoh_stream", "all dispatchers share a CUDA stream", lambda _: FinishedStream()),
    Patch(_MOE + "token_dispatcher", "maybe_move_tensor_to_cpu", "gloo's all-to-all takes no tensor as splits", _splits_on_host),
)

NAME_PATCHES = (
    Patch(_MOE + "moe_utils", "te_general_gemm", "the router asks whether it is None, also where Transformer Engine is missing", lambda original: original),
)
