"""The folder that holds checkpoints: which step is the latest, whole or not at all, checked before it is used.

    checkpoints/
      latest                 the name of the newest complete checkpoint
      step_000100/           appears by one rename, once every file in it has reached the disk
        manifest.json        size and SHA-256 of every other file, and the SHA-256 of this list: the checkpoint's digest
        ...
      step_000200.tmp/       a save under way, or one that never finished: ignored, and removed by the next one
      step_000100.old/       for an instant, while the same step is saved again: taken for step_000100 if that is where everything ended

No torch here: files and names only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from megatron_ext.durable import sync
from megatron_ext.errors import CheckpointError

CHECKPOINTS = "checkpoints"
"""The folder of a stage that holds its checkpoints."""
MANIFEST = "manifest.json"
_LATEST = "latest"
_BLOCK_BYTES = 1 << 20
_DAMAGED = "the checkpoint is damaged: use another one"


def step_name(step: int) -> str:
    return f"step_{step:06d}"


def latest_step(folder: Path) -> int | None:
    """The step of the newest complete checkpoint in `folder`, None when there is none."""
    path = folder / _LATEST
    if not path.exists():
        return None
    name = path.read_text().strip()
    if not name.startswith("step_") or not name[5:].isdigit():
        raise CheckpointError(str(path), f"holds {name!r}, expected a name like step_000100", "write the name of the step folder to resume from into it")
    return int(name[5:])


def find_checkpoint(path: Path) -> Path:
    """The step folder that `path` means: itself, or the latest one inside it. Raises CheckpointError when there is none."""
    if (path / MANIFEST).exists():
        return path
    step = latest_step(path)
    if step is None:
        raise CheckpointError(str(path), "no checkpoint here", "give a step folder, or a folder of checkpoints with a file named latest")
    found = path / step_name(step)
    for candidate in (found, path / f"{found.name}.old"):
        if (candidate / MANIFEST).exists():
            return candidate
    raise CheckpointError(str(found), f"named by {path / _LATEST}, but has no {MANIFEST}", "restore the folder, or name another step in that file")


def describe_file(path: Path) -> dict[str, Any]:
    """A file's entry in the manifest, as it stands."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def digest_of(checkpoint: Path) -> str:
    """What tells the checkpoint of a step folder from every other. Raises CheckpointError where its list of files is damaged."""
    return _digest(read_manifest(checkpoint))


def read_manifest(checkpoint: Path) -> dict[str, dict[str, Any]]:
    path = checkpoint / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        files = {str(name): {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])} for name, entry in manifest["files"].items()}
        digest = str(manifest["sha256"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(str(path), f"is not a manifest ({error})", _DAMAGED) from error
    if digest != _digest(files):
        raise CheckpointError(str(path), f"has the digest {_digest(files)}, was saved with {digest}", _DAMAGED)
    return files


def write_manifest(checkpoint: Path, files: dict[str, dict[str, Any]]) -> None:
    write_synced(checkpoint / MANIFEST, json.dumps({"sha256": _digest(files), "files": files}, indent=1, sort_keys=True))


def _digest(files: dict[str, dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def check_file(checkpoint: Path, name: str, entry: dict[str, Any]) -> CheckpointError | None:
    """What is wrong with one file, None when it is as it was saved."""
    path = checkpoint / name
    if not path.exists():
        return CheckpointError(str(path), "is missing", _DAMAGED)
    if path.stat().st_size != entry["bytes"]:
        return CheckpointError(str(path), f"has {path.stat().st_size} bytes, was saved with {entry['bytes']}", _DAMAGED)
    if describe_file(path)["sha256"] != entry["sha256"]:
        return CheckpointError(str(path), "has other contents than were saved (SHA-256 differs)", _DAMAGED)
    return None


def write_synced(path: Path, text: str) -> None:
    with path.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def draft_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before it is published."""
    return folder / f"{step_name(step)}.tmp"


def prepare(folder: Path, step: int) -> Path:
    """An empty draft for the checkpoint of `step`; what unfinished saves left in `folder`, which has one writer at a time, is removed or put back."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("step_*.tmp"):
        shutil.rmtree(left)
    for left in folder.glob("step_*.old"):
        if left.with_suffix("").exists():
            shutil.rmtree(left)
        else:
            left.rename(left.with_suffix(""))
    draft = draft_of(folder, step)
    draft.mkdir()
    return draft


def publish(folder: Path, step: int, draft: Path, files: dict[str, dict[str, Any]], keep: int) -> Path:
    """Makes a written draft, whose files have reached the disk, the latest checkpoint, then removes all but the newest `keep`."""
    write_manifest(draft, files)
    sync(draft)
    final = folder / step_name(step)
    old = folder / f"{final.name}.old"
    if final.exists():
        final.rename(old)
    draft.rename(final)
    sync(folder)
    write_synced(folder / f"{_LATEST}.tmp", final.name + "\n")
    (folder / f"{_LATEST}.tmp").rename(folder / _LATEST)
    sync(folder)
    if old.exists():
        shutil.rmtree(old)
    others = sorted((path for path in folder.glob("step_*") if path.name[5:].isdigit() and path != final), key=lambda path: int(path.name[5:]))
    for path in others[: max(0, len(others) - (keep - 1))]:
        shutil.rmtree(path)
    return final
