"""Several sources as one, in the format of InternVL's meta files:

    {"charts": {"root": "charts/images", "annotation": "charts/train.jsonl", "repeat_time": 2},
     "captions": {"annotation": "captions/part-{0000..0031}.tar", "repeat_time": 0.5}}

`annotation` is a JSONL file, whose images lie in `root` (unset: beside it), or shards; paths are relative to the meta file. An epoch takes `repeat_time` times
the conversations of each source, those of a source in its own shuffle, which goes on where the epoch before left it: half of them are not always the same half.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from megatron_ext.data.digits import Split
from megatron_ext.data.jsonl import known
from megatron_ext.data.records import Listed, Record, Records
from megatron_ext.data.shard_index import open_index
from megatron_ext.data.webdataset import ShardRecords
from megatron_ext.errors import DataError

_IGNORED = ("length",)
_KNOWN = ("annotation", "root", "repeat_time", "data_augment", *_IGNORED)


@dataclass(frozen=True)
class Source:
    """An entry of a meta file."""

    name: str
    annotation: Path
    root: Path | None
    repeat_time: float

    @property
    def is_jsonl(self) -> bool:
        return self.annotation.suffix == ".jsonl"

    def skills(self, folder: Path | None) -> set[str]:
        if self.is_jsonl:
            return {record.skill for record in known(self.annotation, self.root, self.name)}
        return set(open_index(self.annotation, folder, self.name).skills)

    def records(self, folder: Path | None, split: Split | None, skill: str) -> Records:
        if not self.is_jsonl:
            return ShardRecords(open_index(self.annotation, folder, self.name), split, skill)
        every = known(self.annotation, self.root, self.name)
        return Listed([record for record in every if split in (None, record.split) and skill in ("", record.skill)])


class BlendRecords:
    """See `records.Records`. `draws` of each part make an epoch. The kind of a position is drawn once, from the seed, and is that of every epoch."""

    def __init__(self, parts: Sequence[Records], draws: Sequence[int]) -> None:
        self._parts, self._draws = parts, np.array(draws)
        self._first = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
        self._mixed = lru_cache(maxsize=2)(self._order)

    def __len__(self) -> int:
        return int(self._draws.sum())

    def __getitem__(self, index: int) -> Record:
        part = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._parts[part][index - int(self._first[part])]

    def place(self, position: int, seed: int) -> int:
        epoch, place = divmod(position, len(self))
        part_of, turn_of = self._mixed(seed)
        part = int(part_of[place])
        return int(self._first[part]) + self._parts[part].place(epoch * int(self._draws[part]) + int(turn_of[place]), seed)

    def _order(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Of every position of an epoch: its part, and how many positions before it are of the same part."""
        part_of = np.random.default_rng([seed, len(self)]).permutation(np.repeat(np.arange(len(self._parts)), self._draws))
        turn_of = np.empty(len(part_of), np.int64)
        for part, draws in enumerate(self._draws):
            turn_of[part_of == part] = np.arange(draws)
        return part_of, turn_of


def blend_records(path: Path | None, folder: Path | None, split: Split | None, skill: str = "") -> Records:
    """The records of all sources. Of one skill, or of all splits, each is there once; where a split is asked for, as often as `repeat_time` says."""
    parts, draws = [], []
    for source in read_meta(path):
        records = source.records(folder, split, skill)
        if len(records):
            times = 1.0 if skill or split is None else source.repeat_time
            parts.append(records)
            draws.append(max(1, round(len(records) * times)))
    return BlendRecords(parts, draws)


@lru_cache(maxsize=4)
def read_meta(path: Path | None) -> tuple[Source, ...]:
    """The sources of a meta file. Raises DataError, as `file:name` where an entry is at fault."""
    if path is None or not path.is_file():
        raise DataError("data.path", f"there is no file {path}", "name the meta file")
    try:
        entries = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(str(path), f"is not JSON ({error})", "write one object, with an entry for each source") from error
    if not isinstance(entries, dict) or not entries:
        raise DataError(str(path), "is no object with sources", 'write {"name": {"annotation": "train.jsonl", "repeat_time": 1}}')
    return tuple(_source(name, entry, path) for name, entry in entries.items())


def _source(name: str, entry: object, path: Path) -> Source:
    where = f"{path}:{name}"
    if not isinstance(entry, dict) or not isinstance(entry.get("annotation"), str):
        raise DataError(where, 'has no "annotation"', "name a JSONL file, or shards")
    unknown = sorted(set(entry) - set(_KNOWN))
    if unknown:
        raise DataError(where, f"{unknown[0]!r} is not known here", f"use {', '.join(_KNOWN)}")
    if entry.get("data_augment"):
        raise DataError(where, '"data_augment" is true, and pictures are never altered here', "set it to false")
    times = entry.get("repeat_time", 1)
    if not isinstance(times, int | float) or not times > 0:
        raise DataError(where, f'"repeat_time" is {times!r}', "write a positive number, or leave the source out")
    root = entry.get("root")
    annotation = path.parent / entry["annotation"]
    if annotation.suffix == ".jsonl" and not annotation.is_file():
        raise DataError(where, f"there is no file {annotation}", "paths are relative to the meta file")
    return Source(name, annotation, None if root is None else path.parent / str(root), float(times))
