"""Conversations from WebDataset shards: tar files whose samples are files of one key.

    part-000000.tar:  cats/1.jpg  cats/1.json     a conversation, as `jsonl.py` describes it; its pictures are the sample's own
                      cats/2.jpg  cats/2.txt      a caption, which answers "<image>"

Samples are read by their offset (`shard_index.py`), so that the sample of any position is known without reading those before it. The shuffle goes through the
shards in an order of its own each epoch, a window of them at a time, and through the samples of a window in any order: reads stay close to each other on the
disk. The split of a sample is the hash of its key: that of its content would mean reading everything.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from megatron_ext.data.chat import IMAGE, Turn, check_placeholders
from megatron_ext.data.digits import Split
from megatron_ext.data.records import Record, read_object, sizes_of, skill_of, turns_of
from megatron_ext.data.shard_index import JSON, PICTURE, SPLITS, TEXT, ShardIndex
from megatron_ext.errors import DataError

WINDOW = 8
"""Shards whose samples are mixed with each other."""
_OPEN = 2 * WINDOW


@dataclass(frozen=True)
class Slice:
    """A file within a shard, read by offset. `name` says which of its sample's it is."""

    shard: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return self.name

    def read_bytes(self) -> bytes:
        found = _opened(self.shard).read(self.offset, self.size)
        if len(found) != self.size:
            raise OSError(f"{self.shard} ends {self.size - len(found)} bytes early")
        return found


class ShardRecords:
    """The samples of one split, or of all, and of one skill where given. See `records.Records`."""

    def __init__(self, index: ShardIndex, split: Split | None, skill: str = "") -> None:
        samples = index.samples_N
        chosen = np.ones(len(samples), bool) if split is None else samples["split"] == SPLITS.index(split)
        if skill:
            chosen &= samples["skill"] == (index.skills.index(skill) if skill in index.skills else -1)
        self._index, self._chosen_N = index, np.flatnonzero(chosen)
        self._shuffle = WindowShuffle(np.bincount(samples["shard"][self._chosen_N], minlength=len(index.shards)))

    def __len__(self) -> int:
        return len(self._chosen_N)

    def __getitem__(self, number: int) -> Record:
        sample = self._index.samples_N[self._chosen_N[number]]
        shard, first = self._index.shards[sample["shard"]], int(sample["first"])
        files = self._index.members[first : first + int(sample["count"])]
        where = f"{shard}:{sample['key'].decode()}"
        text = {int(kind): Slice(shard, where, int(offset), int(size)) for kind, offset, size in files if kind != PICTURE}
        pictures = [(int(offset), int(size)) for kind, offset, size in files if kind == PICTURE]
        images = tuple(Slice(shard, f"picture {place}", *span) for place, span in enumerate(pictures))
        entry = read_object(_read(text[JSON], where), where, "write one JSON object into it") if JSON in text else {}
        if "conversations" in entry or TEXT not in text:
            turns, sizes = _turns(entry, JSON in text, where), sizes_of(entry, len(images), where)
        else:
            turns, sizes = _caption(_read(text[TEXT], where), len(images), where), (None,) * len(images)
        check_placeholders(turns, len(images), where)
        return Record(where, skill_of(entry, where, self._index.skills[sample["skill"]]), images, sizes, turns)

    def place(self, position: int, seed: int) -> int:
        return self._shuffle.place(position, seed)


class WindowShuffle:
    """An endless shuffle of items that lie in runs: `counts` items each. Every epoch visits each item once; at any time those of `window` runs are mixed."""

    def __init__(self, counts: np.ndarray, window: int = WINDOW) -> None:
        self._counts, self._window = counts, window
        self._first = np.concatenate([[0], np.cumsum(counts)])
        self._epoch = lru_cache(maxsize=2)(self._order_of_runs)
        self._mixed = lru_cache(maxsize=2)(self._order_in_window)

    def place(self, position: int, seed: int) -> int:
        epoch, place = divmod(position, int(self._first[-1]))
        _, ends = self._epoch(epoch, seed)
        window = int(np.searchsorted(ends, place, side="right"))
        return int(self._mixed(epoch, window, seed)[place - (ends[window - 1] if window else 0)])

    def _order_of_runs(self, epoch: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Runs in the epoch's order, and at which position each window of them ends."""
        runs = np.random.default_rng([seed, epoch]).permutation(len(self._counts))
        starts = np.arange(0, len(runs), self._window)
        return runs, np.cumsum(np.add.reduceat(self._counts[runs], starts))

    def _order_in_window(self, epoch: int, window: int, seed: int) -> np.ndarray:
        runs = self._epoch(epoch, seed)[0][window * self._window : (window + 1) * self._window]
        items = np.concatenate([np.arange(self._first[run], self._first[run + 1]) for run in runs])
        return np.random.default_rng([seed, epoch, window]).permutation(items)


def _turns(entry: dict[str, object], has_json: bool, where: str) -> tuple[Turn, ...]:
    if not has_json:
        raise DataError(where, "has neither a .json nor a .txt", "write one beside its pictures")
    return turns_of(entry, where)


def _caption(text: bytes, num_images: int, where: str) -> tuple[Turn, ...]:
    try:
        caption = text.decode().strip()
    except UnicodeDecodeError as error:
        raise DataError(where, f"its .txt is not UTF-8 ({error})", "write it again") from error
    if not caption:
        raise DataError(where, "its .txt is empty", "write a caption")
    return (("\n".join([IMAGE] * num_images), caption),)


def _read(file: Slice, where: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(where, f"cannot be read ({error})", "put the shard back") from error


class _Opened:
    """A file that several threads may read by offset, closed when nobody holds it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


_opened = lru_cache(maxsize=_OPEN)(_Opened)
