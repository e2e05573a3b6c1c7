"""Files that are there whole and on disk, or not at all, whatever ends this process in between.

    draft -> written -> fsync -> renamed -> fsync of the folder

A disk that is full is one error that names the file and what is free; the draft is removed.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megatron_ext.errors import StorageError


@contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which has its name, and has reached the disk, when the block ends; a block that raises leaves nothing. Raises StorageError when the
    operating system refuses it."""
    draft = path.with_name(f".{path.name}.{threading.get_native_id()}.tmp")
    try:
        with refusals_told(path), draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            draft.rename(path)
            sync(path.parent)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """The whole of a `durable_file`, in UTF-8."""
    with durable_file(path) as file:
        file.write(text.encode())


def remove_drafts(folder: Path) -> None:
    """What a writer that was killed has left. There must be no other."""
    for draft in folder.glob(".*.tmp"):
        draft.unlink()


def make_folder(path: Path) -> None:
    """A folder, with those above it, whose name has reached the disk."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with refusals_told(path):
        path.mkdir(exist_ok=True)
        sync(path.parent)


def sync(path: Path) -> None:
    """Returns once a file's contents, or a folder's names, have reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def refusals_told(path: Path) -> Iterator[None]:
    """Turns an OSError of the block into a StorageError about `path`."""
    try:
        yield
    except OSError as error:
        folder = next(folder for folder in path.parents if folder.is_dir())
        problem = f"could not be written: {error.strerror or error}; {shutil.disk_usage(folder).free} bytes are free there"
        raise StorageError(str(path), problem, "make room and run again: what was stored before is whole") from error
