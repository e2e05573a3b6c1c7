"""Stages that were done once for a seed, given to the runs of its arms: hard links, or copies where the file system has none.

Nothing is written into a stage that is done, so a link is as good as a copy; and the marks of the stage (`done.json`) come along, so that the run
finds it done.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.cli.marks import DONE
from megatron_ext.cli.run_folder import move_aside
from megatron_ext.cli.stages import Stage

_DRAFT = ".linking"


def hand_over(source: Path, target: Path, stages: Sequence[Stage]) -> None:
    """Puts the outputs of finished stages of the run `source` into the run `target`. Each is there whole or not at all; one from elsewhere is renamed."""
    for stage in stages:
        for output in reversed(stage.outputs):  # the folder with the mark comes last
            there, here = source / output, target / output
            if not there.exists() or _same(there, here):
                continue
            if here.exists():
                move_aside(here)
            here.parent.mkdir(parents=True, exist_ok=True)
            draft = here.with_name(here.name + _DRAFT)
            if there.is_dir():
                shutil.rmtree(draft, ignore_errors=True)
                shutil.copytree(there, draft, copy_function=_link)
            else:
                draft.unlink(missing_ok=True)
                _link(str(there), str(draft))
            draft.rename(here)


def _same(there: Path, here: Path) -> bool:
    """Whether a stage's folder has the same mark, or a file says the same."""
    mark, own = (path / DONE if path.is_dir() else path for path in (there, here))
    return mark.is_file() and own.is_file() and mark.read_bytes() == own.read_bytes()


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
