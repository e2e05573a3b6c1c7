"""Room for what a conversion writes: asked for before the first byte, and one clear error where it ends all the same."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors

from megatron_ext.checkpoint.torch_dist import refusal
from megatron_ext.errors import CheckpointError


def require_space(folder: Path, num_bytes: int) -> None:
    """Raises CheckpointError where the file system that `folder` is on, or will be, has less than this free."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise CheckpointError(str(folder), f"needs {num_bytes / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free there", "free some space, or write elsewhere")


@contextmanager
def refusals_named(folder: Path, remedy: str) -> Iterator[None]:
    """Turns what the operating system refuses (a full disk, a quota, a folder that may not be written) into a CheckpointError that names the folder."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        said = refusal(error) or (error if isinstance(error, safetensors.SafetensorError) else None)
        if said is None:
            raise
        raise CheckpointError(str(folder), f"cannot be written: {said}", remedy) from error
