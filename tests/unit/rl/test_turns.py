"""Ranks that leave the device to each other: what a learner gets back, and who is asked when."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.rl.hosts.ranks import Rank
from megatron_ext.rl.hosts.switchboard import Call
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

    def ask(self, calls: list[Call], timeout_s: float, settle: Any = ()) -> list[Any]:
        self.asked += [f"{call.rank.name}: {call.verb}" for call in calls]
        return [None] * len(calls)


ROLLOUTS = [Rank("R", None)]


def turns(offload: bool = True) -> tuple[Board, Turns]:
    board: Any = Board()
    made = Turns(board, 1.0, offload)
    made.learners, made.rollouts = (lambda: [Rank("L", None)]), (lambda: ROLLOUTS)
    return board, made


def test_a_step_changes_hands_twice() -> None:
    board, device = turns()
    device.learner()
    device.nobody()  # the first publication
    assert board.asked == ["L: offload"]
    board.asked.clear()
    device.rollout(ROLLOUTS)
    device.rollout(ROLLOUTS)
    device.learner()
    device.learner()
    device.nobody()
    device.rollout(ROLLOUTS)
    assert board.asked == ["R: wake", "R: rest", "L: onload", "L: offload", "R: wake"], "a rank that is awake does nothing"


def test_a_learner_that_was_started_again_has_the_device() -> None:
    board, device = turns()
    device.nobody()
    device.begin_anew()
    device.learner()
    device.rollout(ROLLOUTS)
    assert board.asked == ["L: offload", "L: offload", "R: wake"]


def test_without_offload_nobody_leaves() -> None:
    board, device = turns(offload=False)
    for change in (device.learner, device.nobody, lambda: device.rollout(ROLLOUTS)):
        change()
    assert board.asked == []
