"""Items of unequal cost shared out over bins: prompts over replicas, conversations over micro-batches. Nothing is lost; equal costs give equal bins."""

from __future__ import annotations

from collections.abc import Sequence


def split_by_cost(costs: Sequence[int], parts: int) -> list[list[int]]:
    """Indices in `parts` lists of nearly equal cost, each in ascending order: the dearest first, always to the cheapest list (LPT, Graham 1969).

    >>> split_by_cost([5, 1, 1, 4, 1], 2)
    [[0, 2], [1, 3, 4]]
    """
    loads, lists = [0] * parts, [list[int]() for _ in range(parts)]
    for index in _dearest_first(costs):
        part = loads.index(min(loads))
        loads[part] += costs[index]
        lists[part].append(index)
    return [sorted(part) for part in lists]


def bins_needed(costs: Sequence[int], budget: int) -> int:
    """How many bins of `budget` `fill_bins` can do with: at most 11/9 of the fewest, and one (first fit, dearest first).

    >>> bins_needed([5, 1, 1, 4, 1], 6)
    2
    """
    return len(_first_fit(costs, budget))


def fill_bins(costs: Sequence[int], budget: int, bins: int) -> list[list[int]]:
    """Indices in exactly `bins` lists, none empty and none dearer than `budget`, the dearest list first: nearly equal ones where that keeps to the budget;
    where it does not, those of first fit, the dearest of which are split until there are enough.

    Raises ValueError where there are fewer than `bins_needed`, or more than items.

    >>> fill_bins([3, 3, 2, 2, 2], 6, 2)
    [[0, 1], [2, 3, 4]]
    """
    lists = _first_fit(costs, budget)
    if not len(lists) <= bins <= len(costs):
        raise ValueError(f"{len(costs)} items that fill {len(lists)} bins of {budget} cannot be spread over {bins}")

    def cost(chosen: Sequence[int]) -> int:
        return sum(costs[index] for index in chosen)

    balanced = split_by_cost(costs, bins)
    if max(map(cost, balanced)) <= budget:
        lists = balanced
    while len(lists) < bins:
        dearest = max((chosen for chosen in lists if len(chosen) > 1), key=cost)
        lists.remove(dearest)
        lists += [[dearest[place] for place in half] for half in split_by_cost([costs[index] for index in dearest], 2)]
    return sorted(lists, key=lambda chosen: (-cost(chosen), chosen))


def _first_fit(costs: Sequence[int], budget: int) -> list[list[int]]:
    loads, lists = list[int](), list[list[int]]()
    for index in _dearest_first(costs):
        if costs[index] > budget:
            raise ValueError(f"item {index} costs {costs[index]}, more than a bin holds, which is {budget}")
        place = next((place for place, load in enumerate(loads) if load + costs[index] <= budget), len(lists))
        if place == len(lists):
            loads.append(0)
            lists.append([])
        loads[place] += costs[index]
        lists[place].append(index)
    return [sorted(chosen) for chosen in lists]


def _dearest_first(costs: Sequence[int]) -> list[int]:
    return sorted(range(len(costs)), key=lambda index: -costs[index])
