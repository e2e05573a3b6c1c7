"""A conversation about pictures, wherever it was read from, and a collection of them in an order to train in.

jsonl.py       a line of a file       |
webdataset.py  a sample of a shard    |->  Records: index -> Record -> load() -> tiles
blend.py       several of the two     |
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from megatron_ext.batch import Tiles
from megatron_ext.config.schema import DataConfig, VisionConfig
from megatron_ext.data.chat import Turn
from megatron_ext.data.images import Picture, load_tiles
from megatron_ext.errors import DataError


@dataclass(frozen=True)
class Record:
    """One conversation: its pictures (and, where given, the sizes they are said to have) and turns. Pixels are read by `load`. `where` names it in errors."""

    where: str
    skill: str
    images: tuple[Picture, ...]
    sizes: tuple[tuple[int, int] | None, ...]
    turns: tuple[Turn, ...]

    def load(self, config: DataConfig, vision: VisionConfig) -> tuple[Tiles, ...]:
        """The tiles of each image. Raises DataError naming the record and the picture, also where the model sees no images."""
        if self.images and not vision.enabled:
            raise DataError(self.where, f"shows {self.images[0].name} to a model without vision (model.vision.enabled = false)", "use conversations of text")
        try:
            return tuple(load_tiles(picture, config, size) for picture, size in zip(self.images, self.sizes, strict=True))
        except DataError as error:
            raise DataError(f"{self.where}: {error.where}", error.problem, error.remedy) from error


class Records(Protocol):
    """Conversations by number, and an endless shuffle of the numbers."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record:
        """Raises DataError where what stands there is no conversation."""

    def place(self, position: int, seed: int) -> int:
        """The index at `position` of the shuffle: a pure function, that visits all of an epoch's before any again."""


@dataclass(frozen=True)
class Listed:
    """Records that are in memory, each once an epoch, in an order of its own."""

    records: Sequence[Record]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]

    def place(self, position: int, seed: int) -> int:
        return shuffled(position, len(self.records), seed)


class Reader:
    """Reads records by number, with their pictures. Where one cannot be read the next that can is taken: at most `data.max_bad_samples` are left out, each told
    once."""

    def __init__(self, records: Records, data: DataConfig, vision: VisionConfig, seed: int) -> None:
        self._records, self._data, self._vision, self._seed = records, data, vision, seed
        self._bad: set[str] = set()

    @property
    def num_bad(self) -> int:
        """Left out so far."""
        return len(self._bad)

    def read(self, number: int) -> tuple[Record, tuple[Tiles, ...]]:
        """Raises DataError where too many are at fault."""
        for later in range(len(self._records)):
            try:
                record = self._records[self._records.place(number + later, self._seed)]
                return record, record.load(self._data, self._vision)
            except DataError as error:
                if error.where not in self._bad:
                    self._bad.add(error.where)
                    if len(self._bad) > self._data.max_bad_samples:
                        raise
                    print(f"left out: {error}", file=sys.stderr, flush=True)
        raise DataError(str(self._data.path), f"none of its {len(self._records)} conversations can be read", "mend the file")


def shuffled(index: int, length: int, seed: int) -> int:
    """Position `index` of an endless shuffle: every epoch visits each of `length` records once, in an order of its own."""
    epoch, position = divmod(index, length)
    return int(_order(epoch, length, seed)[position])


@lru_cache(maxsize=4)
def _order(epoch: int, length: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(length)


def read_object(text: bytes, where: str, remedy: str, start: str = '{"conversations": ...') -> dict[str, object]:
    """The JSON object in a text, which begins with `start`, say. Raises DataError."""
    try:
        entry = json.loads(text)
    except ValueError as error:  # bad JSON or bad UTF-8
        raise DataError(where, f"is not JSON ({error})", remedy) from error
    if not isinstance(entry, dict):
        raise DataError(where, f"holds a {type(entry).__name__}, not an object", f"start with {start}")
    return entry


def turns_of(entry: dict[str, object], where: str) -> tuple[Turn, ...]:
    """Question and answer pairs. Raises DataError unless human and gpt alternate, human first."""
    messages = entry.get("conversations")
    if not isinstance(messages, list) or not messages:
        problem = "has no field" if "conversations" not in entry else "has an empty or malformed field"
        raise DataError(where, f'{problem} "conversations"', 'write [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]')
    values = []
    for position, message in enumerate(messages):
        speaker = "human" if position % 2 == 0 else "gpt"
        if not isinstance(message, dict) or message.get("from") != speaker or not isinstance(message.get("value"), str):
            raise DataError(where, f"message {position + 1} is not a text from {speaker!r}", "human and gpt take turns, human first")
        values.append(message["value"])
    if len(values) % 2:
        raise DataError(where, f"its {len(values)} messages end with a question", "end with an answer from gpt")
    return tuple(zip(values[::2], values[1::2], strict=True))


def skill_of(entry: dict[str, object], where: str, default: str) -> str:
    skill = entry.get("skill", default)
    if not isinstance(skill, str):
        raise DataError(where, f'"skill" is {skill!r}', "write a word")
    return skill


def sizes_of(entry: dict[str, object], num_images: int, where: str) -> tuple[tuple[int, int] | None, ...]:
    """The claimed (width, height) of every image, or None where nothing is claimed."""
    sides = [entry.get(name) for name in ("width", "height")]
    if sides == [None, None]:
        return (None,) * num_images
    widths, heights = (side if isinstance(side, list) else [side] for side in sides)
    if not len(widths) == len(heights) == num_images or not all(isinstance(side, int) for side in widths + heights):
        raise DataError(where, f'"width" and "height" do not give {num_images} sizes', "write two numbers, or two lists with one number per image")
    return tuple(zip(widths, heights, strict=True))
