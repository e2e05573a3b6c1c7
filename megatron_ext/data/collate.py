"""Rows of tokens and images become the batch one training step reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ext.batch import Tiles
from megatron_ext.shapes import check_shape


@dataclass(frozen=True)
class TokenBatch:
    """B conversations, right-padded to S.

    `tokens_BS` int32; `loss_mask_BS` uint8, 1 where THIS token is a target (position s - 1 predicts it); `tiles`, all of the batch;
    `row_tiles_BM` int32 indexes them in the order of a row's placeholders (-1: no tile). `num_bad`: samples that whoever read the batch has left out so far.
    `hidden_BS` bool: image tokens that self-attention must do without (None: none of them).
    """

    tokens_BS: np.ndarray
    loss_mask_BS: np.ndarray
    tiles: Tiles
    row_tiles_BM: np.ndarray
    num_bad: int = 0
    hidden_BS: np.ndarray | None = None

    def __post_init__(self) -> None:
        rows, length = self.tokens_BS.shape
        check_shape("loss_mask_BS", self.loss_mask_BS, rows, length)
        check_shape("row_tiles_BM", self.row_tiles_BM, rows, None)


def pad_rows(rows: Sequence[Sequence[int]], fill: int, dtype: np.dtype | type, multiple_of: int = 1) -> np.ndarray:
    """[B, S] with every row right-padded by `fill`; S is the longest row's length, rounded up.

    >>> pad_rows([[1, 2, 3], [4]], 0, np.int32, multiple_of=2).tolist()
    [[1, 2, 3, 0], [4, 0, 0, 0]]
    """
    longest = max(map(len, rows))
    padded = np.full((len(rows), -(-longest // multiple_of) * multiple_of), fill, dtype)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded


def collate(
    tokens: Sequence[Sequence[int]], masks: Sequence[Sequence[int]], num_tiles: Sequence[int], tiles: Tiles, pad_id: int, multiple_of: int
) -> TokenBatch:
    """One batch. Row b owns the next `num_tiles[b]` of the tiles."""
    first = np.concatenate([[0], np.cumsum(num_tiles)])
    shown = [range(first[row], first[row + 1]) for row in range(len(tokens))]
    row_tiles_BM = pad_rows([list(numbers) or [-1] for numbers in shown], -1, np.int32)
    return TokenBatch(pad_rows(tokens, pad_id, np.int32, multiple_of), pad_rows(masks, 0, np.uint8, multiple_of), tiles, row_tiles_BM)
