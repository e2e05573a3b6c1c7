"""What a command that a launcher has started says of its end. The environment that it reads is described in `launched.py`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path


class TaskRecord:
    """A launched task's own account of its end, for the post-mortem. A command that no launcher has started keeps none."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._task = int(environment.get("SLURM_PROCID", "0"))
        logs = environment.get("MEGATRON_EXT_LOGS") if "MEGATRON_EXT_TASKS" in environment else None
        self._file = None if logs is None else Path(logs) / f"rank-{self._task:04d}.json"
        self._node = environment.get("SLURMD_NODENAME", "?")
        self.write(None)

    def write(self, code: int | None) -> None:
        """`code`: the exit code, None for a task that has begun."""
        if self._file is not None and self._file.parent.is_dir():
            self._file.write_text(json.dumps({"rank": self._task, "node": self._node, "code": code, "at": time.time()}) + "\n", encoding="utf-8")
