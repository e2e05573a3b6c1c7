"""Torch's operations on a CPU, such that what they give for a row depends on that row alone: not on how many others there are, nor on where it stands.

Torch chooses by shape how it multiplies and adds, so that the same token gets other last bits in another company. Inside `batch_invariant()`, in float32,

    products        in tiles of a few rows, filled up with zeros: one shape, hence one way, whatever the number of rows (`products.py`)
    convolutions    image by image
    attention       over blocks of keys from the first one on, in one order (`attention.py`)
    exp, silu, ...  whole vectors only: what is left over would go through another implementation
    sums, means     over numbers that lie side by side: over others torch adds in another order

The layers do not know: these take the place of torch's kernels below autograd, so that gradients are made of the same products. (What torch itself offers,
`use_deterministic_algorithms`, repeats a result for the same batch; it promises nothing for another.) That one shape means one way is measured, not promised:
`tests/unit/device/test_batch_invariant.py` has the laws. Machines of different kinds may still differ.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from megatron_ext.device.batch_invariant.attention import attention
from megatron_ext.device.batch_invariant.products import product, products

VECTOR = 64
"""Numbers that go through the vectorised loop of an elementwise operation at once, on any CPU, or a multiple of them."""
ELEMENTWISE = ("exp", "log", "sin", "cos", "tanh", "sigmoid", "silu", "gelu")
SUMS = ("sum.dim_IntList", "mean.dim")

Kernel = Callable[..., Any]

_open = 0


@contextmanager
def batch_invariant(on: bool = True) -> Iterator[None]:
    """Inside, for every thread of the process, torch's CPU kernels are these; one thread computes. Nests. `on` false: nothing changes."""
    global _open
    if not on:
        yield
        return
    _open += 1
    try:
        if _open > 1:
            yield
        else:
            with _replaced(), _one_thread():
                yield
    finally:
        _open -= 1


@contextmanager
def _replaced() -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")  # that torch's own kernel is replaced, which is what is wanted
            for name, kernel in _kernels().items():
                library.impl(name, kernel, "CPU", with_keyset=True, allow_override=True)
        yield
    finally:
        library._destroy()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Several would cut an operation at places that depend on its size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _kernels() -> dict[str, Kernel]:
    """By the operation whose place they take. Each is called with the dispatch keys and then what torch's own kernel is called with."""
    whole: dict[str, Kernel] = {"mm": _mm, "mm.out": _mm_out, "addmm": _addmm, "bmm": _bmm, "_scaled_dot_product_flash_attention_for_cpu": _attention}
    around: dict[str, Kernel] = {"convolution": _convolution, **dict.fromkeys(SUMS, _sum), **dict.fromkeys(ELEMENTWISE, _elementwise)}
    around = {name: partial(kernel, torch.library.get_kernel(f"aten::{name}", "CPU")) for name, kernel in around.items()}
    return {**whole, **around, **{f"{name}_": partial(_in_place, around[name]) for name in ELEMENTWISE}}


def _mm(_keys: Any, x_TK: torch.Tensor, w_KN: torch.Tensor) -> torch.Tensor:
    return product(x_TK, w_KN)


def _mm_out(_keys: Any, x_TK: torch.Tensor, w_KN: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    return out.copy_(product(x_TK, w_KN))


def _addmm(_keys: Any, added: torch.Tensor, x_TK: torch.Tensor, w_KN: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> torch.Tensor:
    made = product(x_TK, w_KN)
    return (made if alpha == 1 else made * alpha) + (added if beta == 1 else added * beta)


def _bmm(_keys: Any, x_BTK: torch.Tensor, w_BKN: torch.Tensor) -> torch.Tensor:
    return products(x_BTK, w_BKN)


def _convolution(own: Any, keys: Any, images_ICHW: torch.Tensor, *more: Any) -> torch.Tensor:
    return torch.cat([own.call_boxed(keys, image, *more) for image in images_ICHW.split(1)])


def _attention(
    _keys: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return attention(query, key, value, attn_mask, is_causal, scale)


def _elementwise(own: Any, keys: Any, x: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
    flat = F.pad(x.reshape(-1), (0, -x.numel() % VECTOR))
    made: torch.Tensor = own.call_boxed(keys, flat, *more, **named)[: x.numel()].view(x.shape)
    return made


def _in_place(kernel: Kernel, keys: Any, x: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
    return x.copy_(kernel(keys, x, *more, **named))


def _sum(own: Any, keys: Any, x: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
    made: torch.Tensor = own.call_boxed(keys, x.contiguous(), *more, **named)
    return made
