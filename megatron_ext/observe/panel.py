"""The health of a stage for the person who waits: on a terminal a panel under the progress bar, redrawn in place; in a log file a plain line now and then.

    with stage_health("sft", total=600, start=120, goal=("loss", "loss")) as show:
        for step in range(120, 600):
            ...
            show(step + 1, metrics)

A warning stays in the panel to the end of the stage; in a log file it is a line when it comes up first. Both repeat all of them at the end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from megatron_ext.observe.fleet_watch import FleetWatch
from megatron_ext.observe.health import Health
from megatron_ext.observe.progress import PLAIN_EVERY_S, PlainProgress, progress_bar

Show = Callable[[int, Mapping[str, float]], None]
"""(steps done, metrics of the latest report)."""
_REDRAWN_PER_S = 2


@contextmanager
def stage_health(
    name: str,
    total: int,
    start: int = 0,
    *,
    goal: tuple[str, str],
    fleet: FleetWatch | None = None,
    stream: TextIO | None = None,
    every_s: float = PLAIN_EVERY_S,
) -> Iterator[Show]:
    """From step `start` to `total`. `goal`: the metric that the stage is about, and its short name; `fleet`: whose ranks are shown, in RL."""
    stream = stream if stream is not None else sys.stderr
    health = Health(goal)
    show = _on_terminal if stream.isatty() else _in_log
    with show(name, total, start, health, fleet, stream, every_s) as shown:
        yield shown


@contextmanager
def _on_terminal(name: str, total: int, start: int, health: Health, fleet: FleetWatch | None, stream: TextIO, _: float) -> Iterator[Show]:
    console = Console(file=stream)
    bar = progress_bar(console)
    task = bar.add_task(name, total=total, completed=start, numbers="")

    def show(step: int, metrics: Mapping[str, float]) -> None:
        health.update(step, metrics)
        bar.update(task, completed=step)

    with Live(get_renderable=lambda: Group(bar, panel(health, fleet)), console=console, refresh_per_second=_REDRAWN_PER_S):
        yield show


@contextmanager
def _in_log(name: str, total: int, start: int, health: Health, fleet: FleetWatch | None, stream: TextIO, every_s: float) -> Iterator[Show]:
    plain = PlainProgress(stream, name, total, start, every_s)

    def show(step: int, metrics: Mapping[str, float]) -> None:
        for words in health.update(step, metrics):
            print(f"{name} {step}/{total}  warning: {words}", file=stream, flush=True)
        plain.show(step, health.line())

    try:
        yield show
    finally:
        plain.close()
        for warned in health.warnings.values():
            print(f"{name}: warned: {warned}", file=stream, flush=True)


def panel(health: Health, fleet: FleetWatch | None = None) -> RenderableType:
    """What is known so far, a row each; warnings in yellow."""
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column()
    for label, words in [*health.rows(), *_fleet_rows(fleet)]:
        rows.add_row(label, Text(words))
    for warned in health.warnings.values():
        rows.add_row(Text("warning", style="bold yellow"), Text(str(warned), style="yellow"))
    return Panel(rows, expand=False, border_style="yellow" if health.warnings else "dim") if rows.row_count else Text()


def _fleet_rows(fleet: FleetWatch | None) -> list[tuple[str, str]]:
    """Who is there, and what is under way now, which may be long before the next report."""
    if fleet is None or not (roles := fleet.roles()):
        return []
    words = "; ".join(f"{role} ranks: {state.alive} of {state.known} alive, {state.working} working" for role, state in roles.items())
    now, culprit = fleet.now(), fleet.culprit()
    rows = [("fleet", words), ("now", f"{now[0].replace('_', ' ')}, for {now[1]:.0f} s" if now is not None else "between two steps")]
    return rows if culprit is None else [*rows, ("silent", culprit)]
