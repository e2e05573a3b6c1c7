"""Runs that are due, several side by side: what one needs comes first, what fails does not stop the others, a request to stop ends all of them politely.

    due -> started while fewer than `jobs` run -> exit code: 0 done | 75 stopped | anything else failed, and what needs it is blocked

Knows neither processes nor configurations: a run is whatever can be started, asked for its exit code and told to stop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from megatron_ext.errors import EXIT_OK, EXIT_REQUEUE, UserError

State = Literal["waiting", "running", "done", "failed", "blocked", "stopped"]
_LOOK_EVERY_S = 0.25


class Running(Protocol):
    def poll(self) -> int | None:
        """The exit code, None while it runs."""

    def stop(self) -> None:
        """Asks it to end with what it has done on disk."""


class Due(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> str | None:
        """The name of a run that must be done before."""

    def start(self) -> Running:
        """Raises UserError when it cannot begin."""


@dataclass
class Board:
    """How far all runs are. `began_s`, `took_s`: on the monotonic clock."""

    states: dict[str, State]
    why: dict[str, str] = field(default_factory=dict)
    began_s: dict[str, float] = field(default_factory=dict)
    took_s: dict[str, float] = field(default_factory=dict)

    def named(self, *states: State) -> list[str]:
        return [name for name, state in self.states.items() if state in states]


def carry_out(
    runs: Sequence[Due],
    done: Sequence[str],
    jobs: int,
    stop_asked: Callable[[], bool],
    show: Callable[[Board], None] = lambda board: None,
    sleep: Callable[[float], None] = time.sleep,
) -> Board:
    """Brings every run to its end, in order, `jobs` side by side; those named in `done` need nothing. Returns when none is running and none can be started."""
    board = Board({run.name: "done" if run.name in done else "waiting" for run in runs})
    running: dict[str, Running] = {}
    try:
        _carry_out(runs, board, running, jobs, stop_asked, show, sleep)
    except BaseException:  # such as a second Ctrl-C, which waits for nothing
        for process in running.values():
            process.stop()
        raise
    return board


def _carry_out(
    runs: Sequence[Due],
    board: Board,
    running: dict[str, Running],
    jobs: int,
    stop_asked: Callable[[], bool],
    show: Callable[[Board], None],
    sleep: Callable[[float], None],
) -> None:
    asked = False
    while True:
        for name, process in list(running.items()):
            if (code := process.poll()) is not None:
                del running[name]
                _end(board, name, code, asked)
        if not asked and stop_asked():
            asked = True
            for process in running.values():
                process.stop()
        if not asked:
            _start(runs, board, running, jobs)
        show(board)
        if not running and (asked or not board.named("waiting")):
            return
        sleep(_LOOK_EVERY_S)


def _start(runs: Sequence[Due], board: Board, running: dict[str, Running], jobs: int) -> None:
    """Starts what may start. A run whose need has come to nothing is blocked."""
    for run in runs:
        needed = board.states.get(run.needs, "done") if run.needs is not None else "done"
        if board.states[run.name] != "waiting":
            continue
        if needed in ("failed", "blocked", "stopped"):
            board.states[run.name], board.why[run.name] = "blocked", f"{run.needs} {needed}"
        elif needed == "done" and len(running) < jobs:
            board.began_s[run.name] = time.monotonic()
            try:
                running[run.name] = run.start()
                board.states[run.name] = "running"
            except UserError as error:
                board.states[run.name], board.why[run.name] = "failed", str(error)


def _end(board: Board, name: str, code: int, asked: bool) -> None:
    board.took_s[name] = time.monotonic() - board.began_s[name]
    if code == EXIT_OK:
        board.states[name] = "done"
    elif code == EXIT_REQUEUE or asked:
        board.states[name] = "stopped"
    else:
        board.states[name], board.why[name] = "failed", f"exit code {code}"
