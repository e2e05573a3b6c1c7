"""Memory that is given up for a while."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.device.lending import Lent


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.sampled_from([torch.float32, torch.bfloat16, torch.int64]))
def test_there_and_back_is_the_identity_for_tensors_and_all_their_views(sizes: list[int], dtype: torch.dtype) -> None:
    tensors = [torch.arange(size).to(dtype) for size in sizes]
    views, before = [tensor[size // 2 :] for size, tensor in zip(sizes, tensors, strict=True)], [tensor.clone() for tensor in tensors]
    lent = Lent([*tensors, *views], keep=True)
    assert lent.num_bytes == sum(sizes) * tensors[0].element_size()  # a storage counts once
    for _ in range(2):
        lent.give()
        assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [0] * len(sizes)
        lent.take_back()
        for tensor, view, old in zip(tensors, views, before, strict=True):
            assert torch.equal(tensor, old) and view.data_ptr() == tensor[len(tensor) // 2 :].data_ptr()


def test_what_is_kept_is_what_was_there_when_it_was_given_last() -> None:
    tensor = torch.zeros(3)
    lent = Lent([tensor], keep=True)
    for value in (1.0, 2.0):
        tensor.fill_(value)
        lent.give()
        lent.take_back()
        assert tensor.tolist() == [value] * 3


def test_given_twice_and_taken_back_twice_is_once() -> None:
    tensor = torch.ones(3)
    lent = Lent([tensor], keep=True)
    lent.take_back()
    lent.give()
    lent.give()
    lent.take_back()
    lent.take_back()
    assert tensor.tolist() == [1.0, 1.0, 1.0]


def test_what_is_not_kept_comes_back_as_room_of_the_same_size() -> None:
    tensor = torch.ones(3, 4)
    lent = Lent([tensor], keep=False)
    lent.give()
    assert tensor.untyped_storage().nbytes() == 0
    lent.take_back()
    assert tensor.zero_().tolist() == [[0.0] * 4] * 3
