"""Attention with its denominator: the kernel for CPUs against plain products, and parts joined against the whole."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.model.attend import attend, attend_plainly, hide_beyond, join

CPU = torch.device("cpu")


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 1000))
def test_the_kernel_for_cpus_finds_what_plain_products_find(lengths: list[int], queries: int, seed: int) -> None:
    query, keys, values = drawn(lengths, queries, seed)
    bias = hide_beyond(np.array(lengths), CPU)
    for fast, plain in zip(attend(query, keys, values, bias), attend_plainly(query, keys, values, bias), strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 1000))
def test_two_parts_joined_are_attention_over_both(first: int, second: int, seed: int) -> None:
    query, keys, values = drawn([first + second], 3, seed)
    none = torch.zeros(1, 1, 1, 1)
    parts = [attend(query, keys[:, :, part], values[:, :, part], none.expand(1, 1, 1, length)) for part, length in parts_of(first, second)]
    torch.testing.assert_close(join(*parts), attend_plainly(query, keys, values, none)[0], rtol=1e-5, atol=1e-5)


def parts_of(first: int, second: int) -> list[tuple[slice, int]]:
    return [(slice(0, first), first), (slice(first, first + second), second)]


def drawn(lengths: list[int], queries: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    query, keys, values = (torch.randn(len(lengths), 2, size, 8, generator=random) for size in (queries, max(lengths), max(lengths)))
    return query, keys, values
