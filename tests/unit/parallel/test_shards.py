"""Taking a rank's part of a tensor and joining the parts are inverse, whatever is split and however."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.parallel.shards import Shard


def parts(full: torch.Tensor, dim: int | None, ranks: int, halves: int) -> list[torch.Tensor]:
    return [Shard("w", dim, rank, ranks, halves, is_expert=False).take(full) for rank in range(ranks)]


def test_a_gated_matrix_of_two_ranks_keeps_gate_and_up_apart() -> None:
    gate_then_up = torch.tensor([[1.0], [2.0], [10.0], [20.0]])
    first, second = parts(gate_then_up, dim=0, ranks=2, halves=2)
    assert first.flatten().tolist() == [1.0, 10.0]
    assert second.flatten().tolist() == [2.0, 20.0]


def test_an_unsplit_tensor_is_every_ranks_own() -> None:
    full = torch.arange(3.0)
    assert all(part is full for part in parts(full, dim=None, ranks=1, halves=1))


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dim=st.sampled_from([0, 1]),
    ranks=st.sampled_from([1, 2, 3, 4]),
    halves=st.sampled_from([1, 2]),
)
def test_split_and_joined_agree(shape: tuple[int, int], dim: int, ranks: int, halves: int) -> None:
    sizes = [size * ranks * halves if axis == dim else size for axis, size in enumerate(shape)]
    full = torch.arange(float(sizes[0] * sizes[1])).view(sizes)
    split = parts(full, dim, ranks, halves)
    shard = Shard("w", dim, 0, ranks, halves, is_expert=False)
    assert shard.join(split).equal(full)
    assert shard.full_shape(split[0].shape) == tuple(sizes)
