"""Conversations from a JSONL file in the format of InternVL and LLaVA, one object a line:

    {"image": "cats/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}

`image` is a path or a list of paths, relative to the file's folder (or `data.image_root`), in which the pictures must lie; without it the conversation is text
only. `width` and `height` (numbers, or lists for several images) are checked against the pictures when given; `skill` groups accuracies. Everything wrong with
a line is reported as `file:line`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from megatron_ext.data.chat import check_placeholders
from megatron_ext.data.digits import Split
from megatron_ext.data.records import Record, read_object, sizes_of, skill_of, turns_of
from megatron_ext.data.suite.scene import split_of_text
from megatron_ext.errors import DataError


@dataclass(frozen=True)
class Line(Record):
    """One line, whose `where` is file:line. It belongs to the split that the hash of its text and image names says."""

    split: Split


def read_jsonl(path: Path | None, root: Path | None = None, skill: str = "jsonl") -> list[Line]:
    """Every record of the file; blank lines are skipped. `root`: the folder of its images (unset: the file's own); `skill`: of lines that name none.

    Raises DataError, as `file:line` where a line is at fault.
    """
    if path is None:
        raise DataError("data.path", "is not set, but data.kind is jsonl", "name the JSONL file")
    if not path.is_file():
        raise DataError("data.path", f"there is no file {path}", "name the JSONL file")
    records = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                records.append(_record(line, f"{path}:{number}", path.parent if root is None else root, skill))
    if not records:
        raise DataError(str(path), "holds no conversation", "write one JSON object a line")
    return records


@lru_cache(maxsize=64)
def known(path: Path | None, root: Path | None = None, skill: str = "jsonl") -> tuple[Line, ...]:
    """`read_jsonl`; the file is read once, whatever is asked of it."""
    return tuple(read_jsonl(path, root, skill))


@lru_cache(maxsize=64)
def read_split(path: Path | None, split: Split, skill: str = "", root: Path | None = None) -> tuple[Line, ...]:
    """The records of one split (of one skill, where given, if it has any): 90 % train, 5 % val, 5 % test by the hash of a record's text and image names.
    Raises DataError when there are none in the split."""
    if skill:
        return tuple(record for record in read_split(path, split, root=root) if record.skill == skill)
    records = known(path, root)
    chosen = tuple(record for record in records if record.split == split)
    if not chosen:
        raise DataError(str(path), f"none of its {len(records)} conversations falls into the {split} split", "add conversations; about 40 are needed")
    return chosen


def _record(line: bytes, where: str, folder: Path, skill: str) -> Line:
    entry = read_object(line, where, "write one JSON object a line")
    turns = turns_of(entry, where)
    names = image_names(entry, where)
    check_placeholders(turns, len(names), where)
    images = found_images(names, folder, where)
    split = split_of_text(json.dumps([names, turns]))
    return Line(where, skill_of(entry, where, skill), images, sizes_of(entry, len(images), where), turns, split)


def image_names(entry: dict[str, object], where: str) -> list[str]:
    """What the field `image` names."""
    names = entry.get("image", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError(where, f'"image" is {names!r}', "write a path or a list of paths")
    return names


def found_images(names: list[str], folder: Path, where: str) -> tuple[Path, ...]:
    return tuple(_image(name, folder, where) for name in names)


def _image(name: str, folder: Path, where: str) -> Path:
    """The path of an image. Raises DataError where it is none, or leads out of the folder: a file of conversations from elsewhere may otherwise name any file
    of this machine."""
    if name.startswith(("data:", "http://", "https://")):
        raise DataError(where, f'"image" is {name[:60]!r}: pictures are files here', "store them beside the JSONL file and write their paths")
    image = folder / name
    try:
        found, place = image.is_file(), Path(_real(image.parent)) / image.name
        outside = found and not (place.resolve() if place.is_symlink() else place).is_relative_to(_real(folder))
    except OSError as error:  # a name that is too long
        raise DataError(where, f'"image" is {name[:60]!r}: {error.strerror}', "write a path") from error
    if not found:
        raise DataError(where, f"there is no image {image}", "images are relative to the folder of the JSONL file")
    if outside:
        raise DataError(where, f"the image {name} lies outside of {folder}", "move it there, or name a folder that holds all images: data.image_root")
    return image


@lru_cache(maxsize=4096)
def _real(folder: Path) -> str:
    """Where a folder is, links followed: asked once, as many images share one."""
    return os.path.realpath(folder)
