"""Carries out the runs of a study on this machine, and says how far they are.

registered -> shared runs -> linked into the runs of the arms -> `megatron-ext run` in a process of its own -> logs/<arm>-seed-<k>.log
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.cli.marks import DONE, STARTED, read_mark
from megatron_ext.cli.study_cells import Cell, Cells
from megatron_ext.cli.study_sharing import hand_over
from megatron_ext.config.study_schema import LOGS, StudyConfig
from megatron_ext.durable import make_folder
from megatron_ext.errors import UserError
from megatron_ext.observe.metrics_file import FILE_NAME
from megatron_ext.study.results import RunFacts
from megatron_ext.study.schedule import Board

_TAIL_BYTES = 4000


@dataclass(frozen=True)
class CellRun:
    """A cell that the schedule can start. `force`: a stage whose settings were amended starts again, its old folder renamed."""

    study: StudyConfig
    cells: Cells
    cell: Cell
    force: bool

    @property
    def name(self) -> str:
        return self.cell.name

    @property
    def needs(self) -> str | None:
        return self.cell.needs

    def start(self) -> Process:
        prepare(self.cell, self.cells)
        arguments = [sys.executable, "-m", "megatron_ext.cli", "run", *run_arguments(self.study, self.cell, self.force)]
        log = log_of(self.study, self.cell)
        make_folder(log.parent)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ {shlex.join(arguments)}\n")
            file.flush()
            # A session of its own: Ctrl-C reaches the study alone, which passes it on once.
            return Process(subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True))


@dataclass(frozen=True)
class Process:
    popen: subprocess.Popen[bytes]

    def poll(self) -> int | None:
        return self.popen.poll()

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            self.popen.send_signal(signal.SIGTERM)


def prepare(cell: Cell, cells: Cells) -> None:
    """Links what its seed's shared run has done. Raises UserError where that is not done."""
    if cell.needs is None:
        return
    shared = cells.shared[cell.seed]
    if not shared.done:
        raise UserError(cell.name, f"needs {shared.name}, which is not done", "`megatron-ext study FILE` does it first")
    hand_over(shared.folder.root, cell.folder.root, cell.given)


def run_arguments(study: StudyConfig, cell: Cell, force: bool) -> list[str]:
    """What is typed behind `megatron-ext run`."""
    return [str(study.recipe), *cell.overrides, "--until", cell.until, *(["--force"] if force else [])]


def log_of(study: StudyConfig, cell: Cell) -> Path:
    return study.study_dir / LOGS / f"{cell.name.replace('/', '-')}.log"


def jobs_of(study: StudyConfig, cells: Cells) -> int:
    """How many runs share the machine."""
    if study.jobs:
        return study.jobs
    each = max(cell.config.parallel.num_ranks * cell.config.parallel.threads_per_rank for cell in cells.every)
    return max(1, len(os.sched_getaffinity(0)) // each)


def facts(cell: Cell, board: Board | None = None) -> RunFacts:
    """What the study's report says of a run; the states of `board` are those of the present call."""
    done = cell.done
    state: str = "done" if done else board.states[cell.name] if board is not None else "not done"
    if board is not None and cell.name in board.why:
        state = f"{state}: {board.why[cell.name]}"
    marks = [read_mark(stage.folder(cell.folder) / DONE) for stage in cell.own]
    seconds = sum(mark.seconds for mark in marks if mark is not None)
    return RunFacts(cell.name, cell.arm, cell.seed, state, done, seconds, cell.folder.root, cell.evaluation, tuple(stage.name for stage in cell.own))


def whereabouts(cell: Cell) -> tuple[str, int, int]:
    """The stage that a run is in, the steps that it has done of it, and all its steps; 0 of 0 where a stage does not count steps."""
    for stage in cell.own:
        folder = stage.folder(cell.folder)
        if (folder / DONE).exists():
            continue
        steps: int = getattr(getattr(cell.config, stage.name, None), "steps", 0)
        return stage.name if (folder / STARTED).exists() else f"before {stage.name}", _last_step(folder / FILE_NAME) if steps else 0, steps
    return "report", 0, 0


def last_words(log: Path, lines: int = 3) -> str:
    """The end of a log: an error's message stands there."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        said = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return "\n".join(f"    {line}" for line in said[-lines:])


def time_left_s(cells: Cells, board: Board, jobs: int, now_s: float) -> float | None:
    """By the mean time of this call's finished runs of arms; None before the first."""
    shared = {cell.name for cell in cells.shared.values()}
    took = [seconds for name, seconds in board.took_s.items() if board.states[name] == "done" and name not in shared]
    if not took:
        return None
    mean = sum(took) / len(took)
    running = [max(0.0, mean - (now_s - board.began_s[name])) for name in board.named("running")]
    return (sum(running) + mean * len(board.named("waiting"))) / jobs


def _last_step(path: Path) -> int:
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 16 * _TAIL_BYTES))
        for line in reversed(file.read().splitlines()):
            with suppress(ValueError, KeyError, TypeError):
                return int(json.loads(line)["step"])
    return 0


def differing(study: StudyConfig, settings: Mapping[str, Mapping[str, object]]) -> Iterator[tuple[str, str]]:
    """(arm, what it changes against the baseline, every setting of it that differs, derived ones as well)."""
    base = settings[study.baseline]
    for arm, values in settings.items():
        changed = [f"{name}={json.dumps(values.get(name))}" for name in sorted({*base, *values}) if values.get(name) != base.get(name)]
        yield arm, "the baseline" if arm == study.baseline else ", ".join(changed)
