"""Which positions a context-parallel rank computes and what they attend to: every pair of a causal mask once, on some rank, and no pair across samples."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.model.frame import Frame, frame_of


class Group:
    """As much of a process group as a frame asks for."""

    def __init__(self, rank: int, ranks: int) -> None:
        self._rank, self._ranks = rank, ranks

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._ranks


def frames(bounds: tuple[int, ...], ranks: int) -> list[Frame]:
    return [frame_of(bounds[-1], bounds, Group(rank, ranks), torch.device("cpu")) for rank in range(ranks)]


def test_two_ranks_share_a_row_of_eight_by_hand() -> None:
    """Parts 0 1 2 3 of two positions each: rank 0 takes parts 0 and 3, rank 1 parts 1 and 2."""
    first, second = frames((0, 8), 2)
    assert first.local_S is not None and first.local_S.tolist() == [0, 1, 6, 7]
    assert second.local_S is not None and second.local_S.tolist() == [2, 3, 4, 5]
    assert [(span.q_start, span.q_stop, span.k_start, span.k_stop) for span in first.spans] == [(0, 2, 0, 2), (2, 4, 0, 8)]
    assert [(span.q_start, span.q_stop, span.k_start, span.k_stop) for span in second.spans] == [(0, 2, 0, 4), (2, 4, 0, 6)]


def test_places_start_again_with_every_packed_sample() -> None:
    (frame,) = frames((0, 3, 5), 1)
    assert frame.positions_S.tolist() == [0, 1, 2, 0, 1]
    assert not frame.is_plain and frame.local_S is None


def test_a_sample_that_does_not_divide_is_named() -> None:
    with pytest.raises(ValueError, match="a sample of 6 positions does not divide into 4 parts for 2 context-parallel ranks"):
        frames((0, 8, 14), 2)


@given(st.integers(1, 4), st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_every_position_attends_to_its_own_past_in_its_own_sample_exactly_once(ranks: int, sizes: list[int]) -> None:
    bounds = (0, *accumulate(size * 2 * ranks for size in sizes))
    length = bounds[-1]
    expected = torch.zeros(length, length, dtype=torch.int64)
    for start, stop in pairwise(bounds):
        expected[start:stop, start:stop] = torch.ones(stop - start, stop - start, dtype=torch.int64).tril()
    seen = torch.zeros_like(expected)
    every = frames(bounds, ranks)
    for frame in every:
        local = torch.arange(length) if frame.local_S is None else frame.local_S
        for span in frame.spans:
            queries = local[span.q_start : span.q_stop]
            keys = torch.arange(span.k_start, span.k_stop)
            offset = len(keys) - len(queries)
            for row, query in enumerate(queries):
                seen[query, keys[: row + offset + 1]] += 1
    assert torch.equal(seen, expected)
    if ranks > 1:
        joined = torch.cat([frame.local_S for frame in every if frame.local_S is not None])
        assert torch.equal(joined[every[0].order_S], torch.arange(length))
        work = [int(seen[frame.local_S].sum()) for frame in every if frame.local_S is not None]
        assert max(work) == min(work)
