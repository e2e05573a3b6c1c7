"""The tables of a profile as a file, as text for the terminal, and as rows for the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ext.observe.profile_table import Spent, Table

FOLDER = "profile"
SHOWN = 12
"""Operators in a table; the file has more."""
Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class Profile:
    """Of one rank. Not `complete`: recording ended in the middle of a step."""

    rank: str
    complete: bool
    table: Table

    def write(self, path: Path) -> None:
        partial = path.with_suffix(".draft")
        partial.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    @property
    def title(self) -> str:
        """What was recorded, in words."""
        found = self.table
        steps = f"{found.steps} step{'s' if found.steps != 1 else ''}" if self.complete else f"the beginning of step {found.steps}"
        if not self.complete and found.steps > 1:
            steps = f"{found.steps - 1} and the beginning of another step"
        return f"{self.rank}: {steps}, {found.recorded_s:.2f} s"

    @property
    def has_device(self) -> bool:
        return any(spent.device_s for spent in self.table.phases.values())

    def phases(self) -> Rows:
        """A head, and a row for each phase."""
        head = ("phase", "seconds", "share", "backward", "in Python", *(("on the GPU",) if self.has_device else ()))
        return [head, *(self._phase(name, spent) for name, spent in self.table.phases.items())]

    def operators(self, most: int = SHOWN) -> Rows:
        head = ("operator", "calls", "seconds", "share", *(("on the GPU",) if self.has_device else ()))
        return [head, *(self._operator(name, spent) for name, spent in list(self.table.operators.items())[:most])]

    def _phase(self, name: str, spent: Spent) -> tuple[str, ...]:
        return name, f"{spent.host_s:.3f}", self._share(spent.host_s), f"{spent.backward_s:.3f}", f"{spent.python_s:.3f}", *self._device(spent)

    def _operator(self, name: str, spent: Spent) -> tuple[str, ...]:
        return name, str(spent.calls), f"{spent.host_s:.3f}", self._share(spent.host_s), *self._device(spent)

    def _share(self, seconds: float) -> str:
        return f"{100 * seconds / self.table.recorded_s:.1f}%" if self.table.recorded_s else "-"

    def _device(self, spent: Spent) -> tuple[str, ...]:
        return (f"{spent.device_s:.3f}",) if self.has_device else ()


def read_profiles(stage_dir: Path) -> list[Profile]:
    """Those of a stage, in the order of their ranks' names."""
    return [_read(json.loads(path.read_text(encoding="utf-8"))) for path in sorted((stage_dir / FOLDER).glob("*.json"))]


def as_text(profile: Profile) -> str:
    """The title and both tables, in columns."""
    return "\n".join([profile.title, *_columns(profile.phases()), "", *_columns(profile.operators())])


def _read(content: dict[str, Any]) -> Profile:
    found = content["table"]
    phases, operators = ({name: Spent(**spent) for name, spent in found[part].items()} for part in ("phases", "operators"))
    return Profile(content["rank"], content["complete"], Table(found["recorded_s"], found["steps"], phases, operators))


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return ["  " + f"{row[0]:<{widths[0]}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)) for row in rows]
