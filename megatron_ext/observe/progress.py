"""Progress of a stage for the person who waits: a bar with time left on a terminal, a plain line now and then in a log file.

    with stage_progress("sft", total=600, start=120) as progress:
        for step in range(120, 600):
            ...
            progress.update(step + 1, {"loss": 0.31, "tokens/s": 5200})

Only one rank should show it. Everything goes to stderr; results go to stdout.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_EVERY_S = 10.0


class StageProgress(Protocol):
    def update(self, step: int, numbers: Mapping[str, float] | None = None) -> None:
        """`step` steps are done in all; `numbers` are shown beside the bar."""


@contextmanager
def stage_progress(name: str, total: int, start: int = 0, stream: TextIO | None = None, every_s: float = PLAIN_EVERY_S) -> Iterator[StageProgress]:
    """Progress from step `start` to `total`. A terminal gets a bar; anything else a plain line every `every_s` seconds and one at the end."""
    stream = stream if stream is not None else sys.stderr
    if stream.isatty():
        with progress_bar(Console(file=stream)) as bar:
            yield _Bar(bar, name, total, start)
    else:
        plain = _Plain(stream, name, total, start, every_s)
        try:
            yield plain
        finally:
            plain.close()


def short_number(value: float) -> str:
    """A number in at most five characters where it can be: 0.312, 12.4, 5.2k, 3.1M.

    >>> [short_number(x) for x in (0.3123, 12.44, 640, 5200, 3.1e6, 2e-5)]
    ['0.312', '12.4', '640', '5.2k', '3.1M', '2e-05']
    """
    size = abs(value)
    for limit, divisor, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e3, 1e3, "k")):
        if size >= limit:
            return f"{value / divisor:.1f}{unit}"
    return f"{value:.3g}"


class _Bar:
    def __init__(self, bar: Progress, name: str, total: int, start: int) -> None:
        self._bar = bar
        self._task = bar.add_task(name, total=total, completed=start, numbers="")

    def update(self, step: int, numbers: Mapping[str, float] | None = None) -> None:
        if numbers is not None:
            self._bar.update(self._task, numbers=_words(numbers))
        self._bar.update(self._task, completed=step)


class PlainProgress:
    """Lines such as "sft 120/600  loss 0.31  5m10s left": one every `every_s` seconds, and a last one."""

    def __init__(self, stream: TextIO, name: str, total: int, start: int, every_s: float) -> None:
        self._stream, self._name, self._total, self._start, self._every_s = stream, name, total, start, every_s
        self._step, self._printed, self._words = start, -1, ""
        self._began = self._last = time.monotonic()

    def show(self, step: int, words: str) -> None:
        self._step, self._words = step, words
        now = time.monotonic()
        if now - self._last >= self._every_s:
            self._print(self._time_left(now))
            self._last = now

    def close(self) -> None:
        if self._printed != self._step:
            self._print()

    def _print(self, left: str = "") -> None:
        print(f"{self._name} {self._step}/{self._total}  {self._words}{left}".rstrip(), file=self._stream, flush=True)
        self._printed = self._step

    def _time_left(self, now: float) -> str:
        done = self._step - self._start
        return f"  {_duration((self._total - self._step) * (now - self._began) / done)} left" if done and self._step < self._total else ""


class _Plain(PlainProgress):
    def update(self, step: int, numbers: Mapping[str, float] | None = None) -> None:
        self.show(step, self._words if numbers is None else _words(numbers))


def progress_bar(console: Console) -> Progress:
    """For a terminal; its tasks have a field `numbers`, shown beside the bar."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}", style="cyan"),
    )
    return Progress(*columns, console=console)


def _words(numbers: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {short_number(value)}" for name, value in numbers.items())


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"
