"""Starting the ranks of one world: learner or replica, for the first time or in place of those that were lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_ext.rl.hosts.ranks import Place, Rank
from megatron_ext.rl.hosts.switchboard import Call, Pending, Switchboard


def begin_world(
    board: Switchboard, role: type, world: str, names: Sequence[str], arguments: tuple[Any, ...], timeout_s: float
) -> tuple[tuple[Rank, ...], Pending]:
    """The ranks, and their verb `open(*arguments, place)`, which is under way: they start side by side with whatever else does."""
    ranks = tuple(board.host.start(role, names, world))
    point = board.host.meeting_point(world, ranks[0])
    places = [Place(number, len(ranks), point, board.host.address(rank)) for number, rank in enumerate(ranks)]
    return ranks, board.post([Call(rank, "open", (*arguments, place)) for rank, place in zip(ranks, places, strict=True)], timeout_s)
