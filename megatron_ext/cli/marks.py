"""What a finished stage leaves behind so that it is never run twice by accident, nor mixed with other settings.

A stage writes `started.json` when it begins and `done.json` when it has finished. Both hold the settings it depends on, by dotted name, and which runs of
earlier stages it read; their fingerprint is a hash of the two. Settings that change how a stage runs, but not what it learns, are left out.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_ext import __version__
from megatron_ext.config.load import leaves
from megatron_ext.config.schema import RunConfig
from megatron_ext.errors import UserError

STARTED, DONE = "started.json", "done.json"
PACKAGES = ("torch", "megatron-core", "deepspeed", "ray", "numpy", "sentencepiece")
_HOW_NOT_WHAT = {
    "parallel", "micro_batch", "micro_batch_tokens", "packed", "fleet", "replicas", "batch_size", "experts_kernel", "save_every", "keep", "async_save",
    "log_every", "eval_every", "index", "retries", "restarts", "silence_s", "probe", "offload", "placement", "reward_workers", "reward_timeout_s",
    "reward_memory_gib"
}  # fmt: skip


@dataclass(frozen=True)
class Mark:
    """`inputs` maps each stage that was read to the time at which it had finished."""

    stage: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    started_at: str
    finished_at: str = ""
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([self.settings, self.inputs], sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{name}.partial"
        partial.write_text(json.dumps({"fingerprint": self.fingerprint, **asdict(self)}, indent=1, default=str) + "\n", encoding="utf-8")
        partial.replace(folder / name)


def read_mark(path: Path) -> Mark | None:
    """The mark in a file, or None where there is none."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content.pop("fingerprint")
        return Mark(**content)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(str(path), "is damaged", "move the stage's folder away to run the stage again") from None


def settings_of(config: RunConfig, sections: tuple[str, ...]) -> dict[str, Any]:
    """The dotted settings in these sections (or single fields), as JSON values, that change what is learnt."""
    every = leaves(config.model_dump(mode="json"))
    chosen = {name: value for name, value in every.items() if name.split(".")[0] in sections or name in sections}
    return {name: value for name, value in chosen.items() if not set(name.split(".")) & _HOW_NOT_WHAT}


def differences(old: Mark, new: Mark) -> list[str]:
    """What changed between two marks, in words."""
    names = sorted(old.settings.keys() | new.settings.keys())
    changed = [f"{name} was {_show(old, name)}, is now {_show(new, name)}" for name in names if old.settings.get(name) != new.settings.get(name)]
    again = [f"{stage} was run again since" for stage in sorted(old.inputs.keys() | new.inputs.keys()) if old.inputs.get(stage) != new.inputs.get(stage)]
    return changed + again


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """The versions a result depends on."""
    found = {"megatron-ext": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def _show(mark: Mark, name: str) -> str:
    return json.dumps(mark.settings[name]) if name in mark.settings else "not there"
