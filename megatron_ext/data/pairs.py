"""Pairs of answers to one question, the right one and a wrong one: from a JSONL file in the style of MMPR, one object a line, or from the suite.

    {"image": "cats/1.jpg", "question": "<image>\\nHow many cats?", "chosen": "Two.", "rejected": "Three."}

`image` is a path or a list of paths, relative to the file's folder; without it the question is text only. A question without `<image>` begins with its images.
`width`, `height` and `skill` are as in `jsonl.py`. Everything wrong with a line is reported as `file:line`. Every line is trained on: a file of pairs has no
splits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from random import Random

import numpy as np

from megatron_ext.batch import Tiles
from megatron_ext.config.schema import DataConfig, VisionConfig
from megatron_ext.config.sizes import tokens_per_tile
from megatron_ext.data.chat import IMAGE, check_placeholders, encode_turns
from megatron_ext.data.collate import TokenBatch, pad_rows
from megatron_ext.data.jsonl import found_images, image_names
from megatron_ext.data.pieces import Tokenizer
from megatron_ext.data.records import Listed, Reader, Record, read_object, sizes_of, skill_of
from megatron_ext.data.stream import checked_mix
from megatron_ext.data.suite.levels import level_of
from megatron_ext.data.suite.render import render
from megatron_ext.data.suite.wrong import draw_comparison
from megatron_ext.errors import DataError

_REMEDY = 'write {"image": ..., "question": ..., "chosen": ..., "rejected": ...}'


@dataclass(frozen=True)
class Pair(Record):
    """One line: its only turn is the question with the right answer."""

    rejected: str


@lru_cache(maxsize=4)
def read_pairs(path: Path) -> tuple[Pair, ...]:
    """Every pair of a file; blank lines are skipped. Raises DataError, as `file:line` where a line is at fault."""
    if not path.is_file():
        raise DataError("mpo.pairs", f"there is no file {path}", "name the JSONL file of pairs")
    with path.open("rb") as lines:
        pairs = tuple(_pair(line, f"{path}:{number}", path.parent) for number, line in enumerate(lines, 1) if line.strip())
    if not pairs:
        raise DataError(str(path), "holds no pair", _REMEDY)
    return pairs


def _pair(line: bytes, where: str, folder: Path) -> Pair:
    entry = read_object(line, where, "write one JSON object a line", '{"question": ...')
    question, chosen, rejected = (_text(entry, name, where) for name in ("question", "chosen", "rejected"))
    if chosen == rejected:
        raise DataError(where, '"chosen" and "rejected" are the same text', "leave the line out: there is nothing to prefer")
    names = image_names(entry, where)
    if IMAGE not in question:
        question = f"{IMAGE}\n" * len(names) + question
    turns = ((question, chosen),)
    check_placeholders((*turns, ("", rejected)), len(names), where)
    sizes = sizes_of(entry, len(names), where)
    return Pair(where, skill_of(entry, where, "pairs"), found_images(names, folder, where), sizes, turns, rejected)


def _text(entry: dict[str, object], name: str, where: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(where, f'has no field "{name}"' if name not in entry else f'"{name}" is {value!r}, not a text', _REMEDY)
    return value


class PairStream:
    """Batches of pairs for one data-parallel rank, as a pure function of (seed, step); see `stream.py`. `mix` weighs the suite's kinds of question."""

    def __init__(
        self,
        pairs: Path | None,
        data: DataConfig,
        vision: VisionConfig,
        tokenizer: Tokenizer,
        *,
        mix: Mapping[str, float],
        seed: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        multiple_of: int = 8,
    ) -> None:
        self._data, self._tokenizer, self._seed = data, tokenizer, seed
        self._dp_rank, self._dp_size, self._multiple_of = dp_rank, dp_size, multiple_of
        self._tile_tokens = tokens_per_tile(vision)
        self._kinds, self._weights = checked_mix(mix)
        self._reader = None if pairs is None else Reader(Listed(read_pairs(pairs)), data, vision, seed)
        if pairs is None:
            level_of(data)

    def batch(self, step: int, pairs: int) -> TokenBatch:
        """The rank's `pairs` pairs of a step, two rows each: row 2 i is the right answer of pair i, row 2 i + 1 the wrong one, and both show the same tiles.
        Raises DataError for an answer that makes a row longer than `data.max_length` and for unreadable images."""
        first = (step * self._dp_size + self._dp_rank) * pairs
        drawn = [self._drawn(number) if self._reader is None else self._read(self._reader, number) for number in range(first, first + pairs)]
        rows = [self._row(one, answer) for one in drawn for answer in (one.chosen, one.rejected)]
        starts = np.concatenate([[0], np.cumsum([len(one.tiles) for one in drawn])])
        shown = [list(range(starts[at], starts[at + 1])) or [-1] for at in range(pairs) for _ in range(2)]
        tokens, masks = zip(*rows, strict=True)
        batch = TokenBatch(
            pad_rows(tokens, self._tokenizer.pad_id, np.int32, self._multiple_of),
            pad_rows(masks, 0, np.uint8, self._multiple_of),
            Tiles.join([one.tiles for one in drawn]),
            pad_rows(shown, -1, np.int32),
        )
        return batch if self._reader is None else replace(batch, num_bad=self._reader.num_bad)

    def _drawn(self, number: int) -> _Example:
        kind = Random(f"comparison mix {self._seed} {number}").choices(self._kinds, self._weights)[0]
        drawn = draw_comparison("train", kind, self._seed, number, self._data)
        tiles = Tiles.whole(render([drawn.scene], self._data.image_size))
        return _Example(f"{kind} comparison {number} of seed {self._seed}", drawn.question, drawn.chosen, drawn.rejected, tiles, (1,))

    def _read(self, reader: Reader, number: int) -> _Example:
        pair, images = reader.read(number)
        assert isinstance(pair, Pair)
        ((question, chosen),) = pair.turns
        return _Example(pair.where, question, chosen, pair.rejected, Tiles.join(images), tuple(map(len, images)))

    def _row(self, one: _Example, answer: str) -> tuple[list[int], list[int]]:
        row, mask = encode_turns([(one.question, answer)], self._tokenizer, self._tile_tokens, one.num_tiles)
        if len(row) > self._data.max_length:
            which = "chosen" if answer == one.chosen else "rejected"
            problem = f'with its "{which}" answer it has {len(row)} tokens, more than data.max_length = {self._data.max_length}'
            raise DataError(one.where, problem, "raise data.max_length or shorten it")
        return row, mask


@dataclass(frozen=True)
class _Example:
    """`num_tiles`: of each image in turn."""

    where: str
    question: str
    chosen: str
    rejected: str
    tiles: Tiles
    num_tiles: tuple[int, ...]
