"""The training stream: the batch of any step, as a pure function of (seed, step). Resuming needs no state, and no file is ever read twice wrongly.

The conversations of a step are numbered over all data-parallel ranks, and each rank takes its own run of numbers; so the global batch does not depend on
how many ranks share it.

    number = (step * dp_size + dp_rank) * rows + row   ->   kind by the mix   ->   conversation   ->   row of the batch
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random

from megatron_ext.batch import Tiles
from megatron_ext.config.schema import DataConfig, VisionConfig
from megatron_ext.config.sizes import tokens_per_tile
from megatron_ext.data.chat import Turn, encode_turns
from megatron_ext.data.collate import TokenBatch, collate
from megatron_ext.data.digits import Split
from megatron_ext.data.pieces import Tokenizer
from megatron_ext.data.records import Reader
from megatron_ext.data.sources import open_records
from megatron_ext.data.suite.draw import KINDS, draw_dialogue
from megatron_ext.data.suite.levels import level_of
from megatron_ext.data.suite.render import render
from megatron_ext.errors import DataError


class TrainingStream:
    """Batches of conversations for one data-parallel rank. `mix` weighs the suite's kinds of conversation; files are read as they are.

    Rows are padded to a multiple of `multiple_of` tokens (tensor parallelism with sequence parallelism needs a multiple of tp).
    """

    def __init__(
        self,
        data: DataConfig,
        vision: VisionConfig,
        tokenizer: Tokenizer,
        *,
        split: Split,
        mix: Mapping[str, float],
        seed: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        multiple_of: int = 8,
    ) -> None:
        self._data, self._vision, self._tokenizer, self._split, self._seed = data, vision, tokenizer, split, seed
        self._dp_rank, self._dp_size, self._multiple_of = dp_rank, dp_size, multiple_of
        self._tile_tokens = tokens_per_tile(vision)
        self._reader: Reader | None = None
        self._kinds, self._weights = checked_mix(mix)
        if data.kind == "suite":
            level_of(data)
        else:
            self._reader = Reader(open_records(data, split), data, vision, seed)

    def batch(self, step: int, rows: int) -> TokenBatch:
        """The rank's `rows` conversations of a step. Raises DataError for a conversation longer than `data.max_length` and for unreadable images."""
        first = (step * self._dp_size + self._dp_rank) * rows
        numbers = range(first, first + rows)
        names, dialogues, num_tiles, tiles = self._draw_suite(numbers) if self._reader is None else _recorded(self._reader, numbers)
        tokens, masks = [], []
        for name, turns, of_images in zip(names, dialogues, num_tiles, strict=True):
            row, mask = encode_turns(turns, self._tokenizer, self._tile_tokens, of_images)
            if len(row) > self._data.max_length:
                remedy = "raise data.max_length or lower data.questions_per_image" if self._data.kind == "suite" else "raise data.max_length or shorten it"
                raise DataError(name, f"the conversation has {len(row)} tokens, more than data.max_length = {self._data.max_length}", remedy)
            tokens.append(row)
            masks.append(mask)
        batch = collate(tokens, masks, [sum(of_images) for of_images in num_tiles], tiles, self._tokenizer.pad_id, self._multiple_of)
        return replace(batch, num_bad=0 if self._reader is None else self._reader.num_bad)

    def _draw_suite(self, numbers: range) -> Drawn:
        kinds = [Random(f"mix {self._seed} {number}").choices(self._kinds, self._weights)[0] for number in numbers]
        dialogues = [draw_dialogue(self._split, kind, self._seed, number, self._data) for kind, number in zip(kinds, numbers, strict=True)]
        names = [f"{kind} conversation {number} of seed {self._seed}" for kind, number in zip(kinds, numbers, strict=True)]
        tiles_IHWC = render([dialogue.scene for dialogue in dialogues], self._data.image_size)
        return names, [dialogue.turns for dialogue in dialogues], [[1]] * len(numbers), Tiles.whole(tiles_IHWC)


Drawn = tuple[list[str], Sequence[tuple[Turn, ...]], list[list[int]], Tiles]
"""Names for errors, turns, the number of tiles of each image of each row, and the tiles of all rows."""


def _recorded(reader: Reader, numbers: range) -> Drawn:
    drawn = [reader.read(number) for number in numbers]
    chosen, images = [record for record, _ in drawn], [tiles for _, tiles in drawn]
    tiles = Tiles.join([of_image for of_record in images for of_image in of_record])
    num_tiles = [[len(of_image) for of_image in of_record] for of_record in images]
    return [record.where for record in chosen], [record.turns for record in chosen], num_tiles, tiles


def checked_mix(mix: Mapping[str, float]) -> tuple[list[str], list[float]]:
    unknown = sorted(set(mix) - set(KINDS))
    if unknown or not mix or min(mix.values()) < 0 or not sum(mix.values()) > 0:
        raise DataError("mix", f"{dict(mix)} does not weigh kinds of conversation", f"give positive weights to some of {', '.join(KINDS)}")
    return list(mix), list(mix.values())
