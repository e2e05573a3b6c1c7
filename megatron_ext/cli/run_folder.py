"""Where the files of a run are.

    runs/<name>/
      config.yaml                    every value with its origin
      tokenizer/                     tokenizer.model
      pretrain/  sft/  rl/           metrics.jsonl, TensorBoard events, checkpoints/
      discover/                      expert_clusters.json
      evaluate/                      sft.json, rl.json
      report.html

Each stage's folder also holds `started.json` and `done.json` (see marks.py).
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.checkpoint.folder import CHECKPOINTS
from megatron_ext.config.schema import RunConfig
from megatron_ext.errors import UserError


@dataclass(frozen=True)
class RunFolder:
    root: Path

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer"

    @property
    def discover(self) -> Path:
        return self.root / "discover"

    @property
    def clusters(self) -> Path:
        return self.discover / "expert_clusters.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    def checkpoints(self, stage: str) -> Path:
        return self.root / stage / CHECKPOINTS

    def evaluation(self, of: str) -> Path:
        return self.root / "evaluate" / f"{of}.json"

    def start_of_rl(self, config: RunConfig) -> Path:
        """The checkpoint that is surveyed, evaluated before, and improved by RL."""
        return config.rl.init_from or self.checkpoints("mpo" if config.mpo.steps else "sft")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second process from working in the same run."""
        with locked(self.root, "run"):
            yield


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Keeps a second process from working in the folder of a run or a study. Raises UserError where one does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(str(folder), f"another process is working in this {what}", "wait for it, or choose another name=...") from None
        yield


def move_aside(path: Path) -> Path:
    """Renames a file or folder to `<name>.old-<n>` and returns the new path."""
    number = 1
    while (aside := path.with_name(f"{path.stem}.old-{number}{path.suffix}")).exists():
        number += 1
    return path.rename(aside)
