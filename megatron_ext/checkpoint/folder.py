"""The folder that holds checkpoints: which step is the latest, whole or not at all, checked before it is used.

    checkpoints/
      latest                 the name of the newest complete checkpoint
      step_000100/           appears by one rename, once every file in it has reached the disk
        manifest.json        size and SHA-256 of every other file
        ...
      step_000200.tmp/       a save that did not finish: ignored, and replaced by the next one

No torch here: files and names only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from megatron_ext.errors import CheckpointError

CHECKPOINTS = "checkpoints"
"""The folder of a stage that holds its checkpoints."""
MANIFEST = "manifest.json"
_LATEST = "latest"
_BLOCK_BYTES = 1 << 20


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
    if not (found / MANIFEST).exists():
        raise CheckpointError(str(found), f"named by {path / _LATEST}, but has no {MANIFEST}", "restore the folder, or name another step in that file")
    return found


def describe_file(path: Path) -> dict[str, Any]:
    """A file's entry in the manifest."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def read_manifest(checkpoint: Path) -> dict[str, dict[str, Any]]:
    path = checkpoint / MANIFEST
    try:
        files = json.loads(path.read_text())["files"]
        return {str(name): {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])} for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(str(path), f"is not a manifest ({error})", "the checkpoint is damaged: use another one") from error


def check_file(checkpoint: Path, name: str, entry: dict[str, Any]) -> CheckpointError | None:
    """What is wrong with one file, None when it is as it was saved."""
    path = checkpoint / name
    remedy = "the checkpoint is damaged: use another one"
    if not path.exists():
        return CheckpointError(str(path), "is missing", remedy)
    if path.stat().st_size != entry["bytes"]:
        return CheckpointError(str(path), f"has {path.stat().st_size} bytes, was saved with {entry['bytes']}", remedy)
    if describe_file(path)["sha256"] != entry["sha256"]:
        return CheckpointError(str(path), "has other contents than were saved (SHA-256 differs)", remedy)
    return None


def write_synced(path: Path, text: str) -> None:
    with path.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def prepare(folder: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of `step` into; what an unfinished save left there is removed."""
    draft = folder / f"{step_name(step)}.tmp"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    return draft


def publish(folder: Path, step: int, draft: Path, files: dict[str, dict[str, Any]], keep: int) -> Path:
    """Makes a written draft the latest checkpoint, then removes all but the newest `keep`."""
    write_synced(draft / MANIFEST, json.dumps({"files": files}, indent=1, sort_keys=True))
    _sync_folder(draft)
    final = folder / step_name(step)
    if final.exists():
        old = folder / f"{step_name(step)}.old"
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        draft.rename(final)
        shutil.rmtree(old)
    else:
        draft.rename(final)
    write_synced(folder / f"{_LATEST}.tmp", step_name(step) + "\n")
    (folder / f"{_LATEST}.tmp").rename(folder / _LATEST)
    _sync_folder(folder)
    complete = sorted(path for path in folder.glob("step_*") if path.name[5:].isdigit() and path != final)
    for path in complete[: max(0, len(complete) - (keep - 1))]:
        shutil.rmtree(path)
    return final


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
