"""Where everything is in a set of tar shards: read once, kept in a folder, then mapped into memory by every rank.

    a.tar b.tar ... -> headers and .json of every sample, shard by shard -> folder/{shards.json, samples.npy, members.npy}

A sample is the files of a shard that have one key: the name up to the first dot of its last part. Of these count NAME.json, NAME.txt and the pictures: NAME.jpg
(.jpeg, .png, .webp), or NAME.0.jpg, NAME.1.jpg ... for several.

The index says which shards it is of, with their sizes and times. Where one has changed since, samples would move between steps of a run that resumes, so the
index is refused rather than made again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha1
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.data.digits import Split
from megatron_ext.data.shard_names import shards_of
from megatron_ext.data.suite.scene import split_of_text
from megatron_ext.errors import DataError

JSON, TEXT, PICTURE = 0, 1, 2
SPLITS: tuple[Split, ...] = ("train", "val", "test")
_PICTURE = re.compile(r"(?:(\d+)\.)?(?:jpg|jpeg|png|webp)")
_SAMPLE = [("shard", "<i4"), ("split", "<u1"), ("skill", "<i4"), ("first", "<i8"), ("count", "<i4")]
_MEMBER = np.dtype([("kind", "<u1"), ("offset", "<i8"), ("size", "<i8")])
_BLOCK = 512
MOST_TEXT_BYTES = 16 << 20
"""Of a .json or .txt, which are read whole."""


@dataclass(frozen=True)
class ShardIndex:
    """`samples_N` in the order of the shards: key, shard, split, skill, and which of `members` are its own: its .json, its .txt, its pictures in order."""

    shards: tuple[Path, ...]
    skills: tuple[str, ...]
    samples_N: np.ndarray
    members: np.ndarray


@lru_cache(maxsize=64)
def open_index(path: Path | None, folder: Path | None, skill: str = "webdataset") -> ShardIndex:
    """The index of the shards that a path names, in the folder, where it is made if it is not there (None: in memory alone). `skill`: of samples without one.

    Raises DataError for a path without shards, for a shard that is no whole tar or holds no sample, and where the folder's index is of other shards, or of
    these as they were before.
    """
    shards = shards_of(path)
    if path is None or folder is None:
        return _joined(shards, skill)
    stamps = [[str(shard.absolute()), shard.stat().st_size, shard.stat().st_mtime_ns] for shard in shards]
    place = folder / sha1(json.dumps([str(path.absolute()), skill]).encode(), usedforsecurity=False).hexdigest()[:16]
    if not place.is_dir():
        _write(_joined(shards, skill), stamps, place)
    return _read(place, path, shards, stamps)


def _read(place: Path, path: Path, shards: tuple[Path, ...], stamps: list[list[Any]]) -> ShardIndex:
    note, remedy = json.loads((place / "shards.json").read_text()), f"or remove {place}, and a run that resumes goes on with other samples than it would have"
    if changed := {name for name, _, _ in stamps} ^ {name for name, _, _ in note["shards"]}:
        problem = f"named {len(note['shards'])} shards when they were indexed and names {len(stamps)}; one that came or went is {min(changed)}"
        raise DataError(str(path), problem, f"name those of before; {remedy}")
    for (name, size, time), (_, old_size, old_time) in zip(stamps, note["shards"], strict=True):
        if (size, time) != (old_size, old_time):
            how = "was written again" if size == old_size else f"had {old_size} bytes, has {size}"
            raise DataError(name, f"has changed since it was indexed: it {how}", f"put it back; {remedy}")
    arrays = (np.load(place / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("samples", "members"))
    return ShardIndex(shards, tuple(note["skills"]), *arrays)


def _write(index: ShardIndex, stamps: list[list[Any]], place: Path) -> None:
    """Appears as a whole. Where another process was faster, its index stays: it is the same."""
    draft = place.with_name(f"{place.name}.{os.getpid()}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    np.save(draft / "samples.npy", index.samples_N)
    np.save(draft / "members.npy", index.members)
    (draft / "shards.json").write_text(json.dumps({"shards": stamps, "skills": index.skills}, indent=1))
    try:
        os.rename(draft, place)
    except OSError:
        if not place.is_dir():
            raise
        shutil.rmtree(draft)


@dataclass
class _Sample:
    """While a shard is read: (kind, number of the picture) -> (offset, size)."""

    members: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    skill: str = ""


def _joined(shards: Sequence[Path], default: str) -> ShardIndex:
    skills: dict[str, int] = {}
    samples, members, first = list[np.ndarray](), list[np.ndarray](), 0
    for number, shard in enumerate(shards):
        rows: list[tuple[bytes, int, int, int, int, int]] = []
        files: list[tuple[int, int, int]] = []
        for key, sample in _samples(shard).items():
            skill = skills.setdefault(sample.skill or default, len(skills))
            rows.append((key.encode(), number, SPLITS.index(split_of_text(key)), skill, first + len(files), len(sample.members)))
            files += [(kind, *place) for (kind, _), place in sorted(sample.members.items())]
        samples.append(np.array(rows, [("key", f"S{max(len(row[0]) for row in rows)}"), *_SAMPLE]))
        members.append(np.array(files, _MEMBER))
        first += len(files)
    return ShardIndex(tuple(shards), tuple(skills), np.concatenate(samples), np.concatenate(members))


def _samples(shard: Path) -> dict[str, _Sample]:
    """The samples of a shard by key, in its order."""
    found: dict[str, _Sample] = {}
    with shard.open("rb") as stream:
        for name, offset, size in _files(shard, stream):
            folder, slash, base = name.removeprefix("./").rpartition("/")
            stem, _, extension = base.partition(".")
            place = _kind(extension.lower())
            if not stem or place is None:
                continue
            key = f"{folder}{slash}{stem}"
            sample = found.setdefault(key, _Sample())
            if place[0] != PICTURE and size > MOST_TEXT_BYTES:
                raise DataError(
                    f"{shard}:{key}", f"its {base} has {size} bytes, more than {MOST_TEXT_BYTES}", "a conversation or caption is no larger: write it again"
                )
            if place in sample.members:
                raise DataError(
                    f"{shard}:{key}", f"has a second file of the kind of {base}", "give every sample a key of its own; pictures are .0.jpg, .1.jpg ..."
                )
            sample.members[place] = offset, size
            if place[0] == JSON:
                sample.skill = _skill(os.pread(stream.fileno(), size, offset))
    if not found:
        raise DataError(str(shard), "holds no sample", "write files KEY.json or KEY.txt, and KEY.jpg, into it")
    return found


def _files(shard: Path, stream: Any) -> Iterator[tuple[str, int, int]]:
    """(name, offset, bytes) of every file of the shard. Raises DataError unless it is a whole tar: the end of one that was cut off is silent otherwise."""
    size, last = os.fstat(stream.fileno()).st_size, "its beginning"
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # would grow with the shard
                last = member.name
                if member.isreg():
                    yield member.name, member.offset_data, member.size
            end = tar.offset
    except tarfile.TarError as error:
        raise DataError(str(shard), f"is no whole, uncompressed tar: {error}, after {last}", "write it again; shards are not compressed") from error
    if os.pread(stream.fileno(), _BLOCK, end) != bytes(_BLOCK):
        raise DataError(str(shard), f"is broken or was cut off after {last}, at byte {end} of {size}", "write it again")


def _kind(extension: str) -> tuple[int, int] | None:
    """What a file is to its sample, and the picture's number."""
    if extension in ("json", "txt"):
        return (JSON if extension == "json" else TEXT), 0
    picture = _PICTURE.fullmatch(extension)
    return (PICTURE, int(picture[1] or 0)) if picture else None


def _skill(text: bytes) -> str:
    """Of a sample whose JSON says one; what else is wrong with it is told where the sample is read."""
    try:
        skill = json.loads(text)["skill"]
    except (ValueError, KeyError, TypeError):
        return ""
    return skill if isinstance(skill, str) else ""
