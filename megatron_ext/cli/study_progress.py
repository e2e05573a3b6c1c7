"""How far a study is, for the person who waits: on a terminal a panel, redrawn in place; in a log file a line for every run that begins or
ends, and now and then one for all of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_ext.cli.study_cells import Cells
from megatron_ext.cli.study_runs import time_left_s, whereabouts
from megatron_ext.study.schedule import Board

Show = Callable[[Board], None]
_REDRAWN_PER_S, _PLAIN_EVERY_S, _LOOKED_EVERY_S = 2, 60.0, 1.0


@contextmanager
def study_progress(cells: Cells, jobs: int, stream: TextIO | None = None) -> Iterator[Show]:
    """What the schedule calls with its board, several times a second."""
    stream = stream if stream is not None else sys.stderr
    if not stream.isatty():
        yield _Lines(cells, jobs, stream)
        return
    shown: list[RenderableType] = [Text("")]
    looked = [0.0]

    def show(board: Board) -> None:
        if time.monotonic() - looked[0] >= _LOOKED_EVERY_S:
            shown[0], looked[0] = panel(cells, board, jobs), time.monotonic()

    with Live(get_renderable=lambda: shown[0], console=Console(file=stream), refresh_per_second=_REDRAWN_PER_S):
        yield show


def panel(cells: Cells, board: Board, jobs: int) -> RenderableType:
    """A bar over all runs, and a row for each that is running or has failed."""
    done = len(board.named("done"))
    head = Table.grid(padding=(0, 2))
    head.add_row(Text(f"{done}/{len(board.states)} runs", style="bold"), ProgressBar(len(board.states), done, width=40), Text(summary(cells, board, jobs)))
    rows = Table.grid(padding=(0, 2))
    for name in board.named("running"):
        stage, step, steps = whereabouts(cells.named(name))
        rows.add_row(Text(name, style="cyan"), Text(stage), ProgressBar(steps, step, width=20) if steps else Text(""), Text(f"{step}/{steps}" if steps else ""))
    for name in board.named("failed"):
        rows.add_row(Text(name, style="red"), Text("failed", style="red"), Text(""), Text(board.why.get(name, "")))
    return Panel(Group(head, rows), expand=False, border_style="dim")


def summary(cells: Cells, board: Board, jobs: int) -> str:
    """Counts of what is not simply done, and the time left."""
    counts = [f"{len(names)} {state}" for state in ("running", "failed", "blocked", "stopped") if (names := board.named(state))]
    left = time_left_s(cells, board, jobs, time.monotonic())
    return ", ".join(counts) + (f"  {duration(left)} left" if left is not None and board.named("waiting", "running") else "")


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"


class _Lines:
    def __init__(self, cells: Cells, jobs: int, stream: TextIO) -> None:
        self._cells, self._jobs, self._stream = cells, jobs, stream
        self._seen: dict[str, str] = {}
        self._last_s = time.monotonic()

    def __call__(self, board: Board) -> None:
        for name, state in board.states.items():
            before = self._seen.get(name, "waiting")
            if state != before and not (name not in self._seen and state == "done"):
                took = f" in {duration(board.took_s[name])}" if state == "done" and name in board.took_s else ""
                why = f": {board.why[name]}" if name in board.why else ""
                self._print(f"{name}: {state}{took}{why}")
            self._seen[name] = state
        if time.monotonic() - self._last_s >= _PLAIN_EVERY_S:
            self._last_s = time.monotonic()
            at = [f"{name} {stage} {step}/{steps}" for name in board.named("running") for stage, step, steps in [whereabouts(self._cells.named(name))]]
            self._print(f"study {len(board.named('done'))}/{len(board.states)} runs  {summary(self._cells, board, self._jobs)}  ({'; '.join(at)})")

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)
