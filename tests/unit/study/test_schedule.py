"""The schedule, on runs that are counters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from megatron_ext.errors import UserError
from megatron_ext.study.schedule import Board, carry_out


@dataclass
class Fake:
    """A run that ends with `code` after being asked `asks` times."""

    name: str
    needs: str | None = None
    code: int = 0
    asks: int = 2
    refuses: bool = False
    starts: int = 0
    stopped: bool = field(default=False)

    def start(self) -> Fake:
        self.starts += 1
        if self.refuses:
            raise UserError(self.name, "cannot begin")
        return self

    def poll(self) -> int | None:
        self.asks -= 1
        return None if self.asks >= 0 else 75 if self.stopped else self.code

    def stop(self) -> None:
        self.stopped = True


def carried(runs: list[Fake], jobs: int = 2, done: tuple[str, ...] = (), stop: Callable[[], bool] = lambda: False) -> tuple[Board, int]:
    """The board, and the most that ran at once."""
    most = [0]

    def show(board: Board) -> None:
        most[0] = max(most[0], len(board.named("running")))

    return carry_out(runs, done, jobs, stop, show, sleep=lambda _: None), most[0]


def test_every_run_is_done_as_many_at_once_as_there_are_places() -> None:
    runs = [Fake(f"run {number}") for number in range(5)]
    board, most = carried(runs)
    assert set(board.states.values()) == {"done"} and most == 2 and all(run.starts == 1 for run in runs)


def test_what_is_done_is_not_started_again() -> None:
    runs = [Fake("one"), Fake("two")]
    carried(runs, done=("one",))
    assert [run.starts for run in runs] == [0, 1]


def test_what_a_run_needs_comes_first() -> None:
    order: list[str] = []

    class Told(Fake):
        def start(self) -> Fake:
            order.append(self.name)
            return super().start()

    carried([Told("shared", asks=3), Told("arm", needs="shared"), Told("other", needs="shared")], jobs=3)
    assert order == ["shared", "arm", "other"]


def test_a_failure_blocks_what_needs_it_and_nothing_else() -> None:
    board, _ = carried([Fake("shared", code=1), Fake("arm", needs="shared"), Fake("alone"), Fake("crooked", refuses=True)])
    assert board.states == {"shared": "failed", "arm": "blocked", "alone": "done", "crooked": "failed"}
    assert board.why == {"shared": "exit code 1", "arm": "shared failed", "crooked": "crooked: cannot begin"}


def test_a_request_to_stop_reaches_every_running_run_once_and_starts_no_other() -> None:
    asked = iter([False, False, True] + [True] * 100)
    runs = [Fake("one", asks=50), Fake("two", asks=50), Fake("three")]
    board, _ = carried(runs, stop=lambda: next(asked))
    assert board.states == {"one": "stopped", "two": "stopped", "three": "waiting"} and runs[2].starts == 0


def test_a_run_that_stops_by_itself_leaves_the_others_running() -> None:
    board, _ = carried([Fake("one", code=75), Fake("two")])
    assert board.states == {"one": "stopped", "two": "done"}


def test_what_ends_the_schedule_itself_ends_its_runs() -> None:
    runs = [Fake("one", asks=50)]

    def interrupted() -> bool:
        if runs[0].starts:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        carried(runs, stop=interrupted)
    assert runs[0].stopped
