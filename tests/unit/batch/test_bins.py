"""Unequal items in bins: nothing lost, nothing above the budget, as many bins as asked for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.batch.bins import bins_needed, fill_bins, split_by_cost

COSTS = st.lists(st.integers(1, 100), min_size=1, max_size=40)


def loads(costs: list[int], lists: list[list[int]]) -> list[int]:
    return [sum(costs[index] for index in chosen) for chosen in lists]


@given(COSTS, st.integers(1, 5))
def test_split_by_cost_keeps_everything_and_no_part_exceeds_the_mean_by_more_than_one_item(costs: list[int], parts: int) -> None:
    lists = split_by_cost(costs, parts)
    assert sorted(index for part in lists for index in part) == list(range(len(costs)))
    assert max(loads(costs, lists)) <= sum(costs) / parts + max(costs)


@given(COSTS, st.integers(0, 100), st.data())
def test_any_number_of_bins_from_those_needed_to_one_an_item_is_filled_within_the_budget(costs: list[int], room: int, data: st.DataObject) -> None:
    budget = max(costs) + room
    bins = data.draw(st.integers(bins_needed(costs, budget), len(costs)))
    lists = fill_bins(costs, budget, bins)
    assert len(lists) == bins and all(lists)
    assert sorted(index for chosen in lists for index in chosen) == list(range(len(costs)))
    filled = loads(costs, lists)
    assert filled == sorted(filled, reverse=True) and filled[0] <= budget
    assert lists == fill_bins(costs, budget, bins)


@given(COSTS, st.integers(0, 100))
def test_two_bins_of_those_needed_hold_more_than_one_bin_may(costs: list[int], room: int) -> None:
    """So that fewer than twice the fewest are needed."""
    budget = max(costs) + room
    needed = bins_needed(costs, budget)
    assert sum(costs) / budget <= needed < 2 * sum(costs) / budget + 1


def test_bins_are_nearly_equal_where_that_keeps_to_the_budget() -> None:
    assert loads([9, 7, 5, 5, 4], fill_bins([9, 7, 5, 5, 4], 20, 2)) == [16, 14]


def test_where_equal_shares_would_exceed_the_budget_first_fit_is_taken_and_split_until_there_are_enough() -> None:
    costs = [3, 3, 2, 2, 2]
    assert max(loads(costs, split_by_cost(costs, 2))) == 7
    assert fill_bins(costs, 6, 2) == [[0, 1], [2, 3, 4]]


@pytest.mark.parametrize(("bins", "message"), [(1, "fill 2 bins of 6 cannot be spread over 1"), (6, "5 items .* cannot be spread over 6")])
def test_bins_that_are_too_few_or_would_be_empty_are_refused(bins: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fill_bins([3, 3, 2, 2, 2], 6, bins)


def test_an_item_that_fits_no_bin_is_refused() -> None:
    with pytest.raises(ValueError, match="item 1 costs 9, more than a bin holds, which is 8"):
        bins_needed([1, 9], 8)
