"""Records where the time of a few steps goes, on one rank: `profile/<rank>.trace.json.gz` for ui.perfetto.dev, and `profile/<rank>.json` with its tables.

    begin, end      around every step, whether it is recorded or not
    the first steps are let go by; then `steps` of them are recorded, written, and nothing is left of it

Names of phases are put around functions for as long as it records (`phases.py`), and torch's profiler costs nothing while it does not. A recording ends early
after MOST_PHASES calls of named functions, so that a file stays small however long a step is. Whatever goes wrong with it is said, and the run
goes on without.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from megatron_ext.observe.phases import Phase, named
from megatron_ext.observe.profile_table import STEP, table
from megatron_ext.observe.profiles import FOLDER, Profile

LET_GO, MOST_PHASES = 2, 5000


def profiled_ranks(num_ranks: int, pp: int) -> range:
    """The first rank of every pipeline stage.

    >>> profiled_ranks(8, 2)
    range(0, 8, 4)
    """
    return range(0, num_ranks, num_ranks // pp)


class Profiler:
    """One rank's. `left`: how many steps there will be, so that a short stage is recorded too. Without `steps` it does nothing."""

    def __init__(self, stage_dir: Path, rank: str, steps: int, left: int, phases: Sequence[Phase], most_phases: int = MOST_PHASES) -> None:
        self._folder, self._rank, self._steps, self._phases = stage_dir / FOLDER, rank, steps, phases
        self._wait, self._most = max(0, min(LET_GO, left - steps)), most_phases
        self._until = min(self._wait + steps, left)
        self._seen, self._calls, self._inside = 0, 0, False
        self._recording: torch.autograd.profiler.profile | None = None
        self._hooks, self._span = ExitStack(), ExitStack()

    def begin(self) -> None:
        """A step begins, unless one is under way."""
        if self._inside:
            return
        self._inside = True
        if self._steps and self._seen == self._wait:
            self._safely(self._start)
        if self._recording is not None:
            self._span.enter_context(torch.profiler.record_function(STEP))

    def end(self) -> None:
        """The step that is under way, if one is, ends."""
        if not self._inside:
            return
        self._inside = False
        self._span.close()
        self._seen += 1
        if self._recording is not None and self._seen == self._until:
            self._finish(complete=True)

    @contextmanager
    def step(self) -> Iterator[None]:
        self.begin()
        try:
            yield
        finally:
            self.end()

    def close(self) -> None:
        """Writes what there is of a recording that has not come to its end."""
        if self._recording is not None:
            self._finish(complete=False)

    def _start(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it announces itself on the terminal
        device = "cuda" if torch.cuda.is_available() else None
        # What `torch.profiler.profile` stands on. That one imports the compiler first: 3 s, within a step.
        recording = torch.autograd.profiler.profile(use_kineto=True, use_device=device)
        recording.__enter__()
        self._recording = recording
        self._hooks.enter_context(named(self._phases, self._ended))

    def _ended(self, outermost: bool) -> None:
        self._calls += 1
        if outermost and self._calls >= self._most and self._recording is not None:
            self._finish(complete=False)

    def _finish(self, complete: bool) -> None:
        self._span.close()
        self._hooks.close()
        recording, self._recording, self._steps = self._recording, None, 0
        assert recording is not None
        self._safely(lambda: self._write(recording, complete))

    def _write(self, recording: torch.autograd.profiler.profile, complete: bool) -> None:
        recording.__exit__(None, None, None)
        self._folder.mkdir(parents=True, exist_ok=True)
        name = self._rank.replace(" ", "-")
        partial = self._folder / f"{name}.partial"
        try:
            recording.export_chrome_trace(str(partial))
            written = partial.read_bytes()
            with gzip.open(self._folder / f"{name}.trace.json.gz", "wb", compresslevel=5) as file:
                file.write(written)
        finally:
            partial.unlink(missing_ok=True)
        Profile(self._rank, complete, table(json.loads(written)["traceEvents"])).write(self._folder / f"{name}.json")

    def _safely(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # a run is worth more than its profile
            self._hooks.close()
            recording, self._recording, self._steps = self._recording, None, 0
            if recording is not None:
                recording.__exit__(None, None, None)  # one that is left running takes the process down when that ends
            print(f"profile of {self._rank} given up: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


UNPROFILED = Profiler(Path(), "", 0, 0, ())
