"""Ranks that leave the device to each other: what a learner gets back, and who is asked when."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.rl.hosts.ranks import Call, Rank
from megatron_ext.rl.turns import Turns
from tests.support.turns import updates_with_a_break


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_updates_after_weights_and_optimizer_were_away_are_those_of_a_learner_that_kept_them(context: ParallelContext, dtype: str) -> None:
    """On this machine, too, through host memory, as on a GPU."""
    kept, moved, held = updates_with_a_break(context, dtype)
    assert moved == kept
    assert held == 0


class Board:
    """Writes down who was asked for what."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def ask(self, calls: list[Call], timeout_s: float) -> list[Any]:
        self.asked += [f"{call.rank.name}: {call.verb}" for call in calls]
        return [None] * len(calls)


def turns(offload: bool = True) -> tuple[Board, Turns]:
    board: Any = Board()
    return board, Turns(board, [Rank("L", None)], [Rank("R", None)], 1.0, offload)


def test_a_step_changes_hands_twice() -> None:
    board, device = turns()
    device.learner()
    device.nobody()  # the first publication
    device.loaded()
    assert board.asked == ["L: offload"]
    board.asked.clear()
    device.rollouts()
    device.rollouts()
    device.learner()
    device.learner()
    device.nobody()
    device.loaded()
    device.rollouts()
    assert board.asked == ["R: rest", "L: onload", "L: offload"]


def test_rollouts_whose_weights_did_not_change_wake_with_them() -> None:
    board, device = turns()
    device.nobody()
    device.loaded()
    device.learner()
    device.rollouts()
    assert board.asked == ["L: offload", "R: rest", "L: onload", "L: offload", "R: wake"]


def test_the_one_leaves_before_the_other_comes_and_without_offload_nobody_leaves() -> None:
    board, device = turns(offload=False)
    for change in (device.learner, device.nobody, device.loaded, device.rollouts):
        change()
    assert board.asked == []
