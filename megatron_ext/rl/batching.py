"""What a learner rank computes on: the rows of its parcel, padded.

    parcel (`parcels.py`) -> a shard: its rows and filler, right-padded -> microbatches, sorted by length

Images are read here, once for each prompt; pixels go no further than this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ext.batch import LearnerBatch, Tiles
from megatron_ext.rl.goals import NO_GOAL, Clusters
from megatron_ext.rl.parcels import Parcel, Row
from megatron_ext.shapes import check_shape, round_up

FILLER_KEY = ""


@dataclass(frozen=True)
class Shard:
    """Rows of one rank with what identifies them: `lengths_B` real tokens of each row, `keys_B` "<prompt key>#<sample>", `digests_B` the digest of the routes
    its rollout recorded. `goal_BS` int16: whose cluster counts where a token was decided (`goals.py`); no goals, no `clusters`.
    """

    batch: LearnerBatch
    lengths_B: np.ndarray
    keys_B: tuple[str, ...]
    digests_B: tuple[str, ...]
    goal_BS: np.ndarray | None = None
    clusters: Clusters | None = None

    def __post_init__(self) -> None:
        rows = self.batch.tokens_BS.shape[0]
        check_shape("lengths_B", self.lengths_B, rows)
        if not len(self.keys_B) == len(self.digests_B) == rows:
            raise ValueError(f"{len(self.keys_B)} keys and {len(self.digests_B)} digests for {rows} rows")

    def select(self, rows_B: np.ndarray, multiple: int) -> Shard:
        """Some of the rows, cut to the longest of them (rounded up to `multiple`), with only the images they show."""
        batch, lengths_B = self.batch, self.lengths_B[rows_B]
        length = min(round_up(int(lengths_B.max()), multiple), batch.tokens_BS.shape[1])
        used, row_tiles = np.unique(batch.row_tiles_BM[rows_B], return_inverse=True)
        absent = int(used[0] == -1)  # -1 sorts first, so taking it out makes the inverse its own new index
        return Shard(
            LearnerBatch(
                tokens_BS=batch.tokens_BS[rows_B, :length],
                response_mask_BS=batch.response_mask_BS[rows_B, :length],
                logprobs_BS=batch.logprobs_BS[rows_B, :length],
                versions_BS=batch.versions_BS[rows_B, :length],
                advantages_B=batch.advantages_B[rows_B],
                experts_BSLK=batch.experts_BSLK[rows_B, :length],
                tiles=batch.tiles[used[absent:]],
                row_tiles_BM=row_tiles.reshape(len(rows_B), -1).astype(np.int32) - absent,
            ),
            lengths_B,
            tuple(self.keys_B[row] for row in rows_B),
            tuple(self.digests_B[row] for row in rows_B),
            None if self.goal_BS is None else self.goal_BS[rows_B, :length],
            self.clusters,
        )


def unpack(parcel: Parcel) -> Shard:
    """One shard: the parcel's rows, then filler. Raises StorageError where a stored image cannot be read."""
    rows, form, filler = parcel.rows, parcel.form, parcel.num_rows - len(parcel.rows)
    lengths_B = np.array([*(row.length for row in rows), *[1] * filler], dtype=np.int64)
    shape = parcel.num_rows, round_up(int(lengths_B.max()), form.multiple)
    tiles, row_tiles = _tiles([(row.tiles, row.further) for row in rows], parcel.num_rows)
    batch = LearnerBatch(
        tokens_BS=np.full(shape, form.pad_id, dtype=np.int32),
        response_mask_BS=np.zeros(shape, dtype=np.uint8),
        logprobs_BS=np.zeros(shape, dtype=np.float32),
        versions_BS=np.full(shape, -1, dtype=np.int32),
        advantages_B=np.array([*(row.advantage for row in rows), *[0.0] * filler], dtype=np.float32),
        experts_BSLK=np.full((*shape, *form.layers_topk), -1, dtype=np.int16),
        tiles=tiles,
        row_tiles_BM=row_tiles,
    )
    for place, row in enumerate(rows):
        _write_row(batch, place, row)
    keys_B, digests_B = (tuple(names) + (FILLER_KEY,) * filler for names in ([row.key for row in rows], [row.digest for row in rows]))
    if parcel.clusters is None:
        return Shard(batch, lengths_B, keys_B, digests_B)
    goal_BS = np.full(shape, NO_GOAL, dtype=np.int16)
    for place, row in enumerate(rows):
        if row.goal_T is not None:
            goal_BS[place, len(row.tokens_S) : row.length] = row.goal_T
    return Shard(batch, lengths_B, keys_B, digests_B, goal_BS, parcel.clusters)


def microbatches(shard: Shard, micro_batch: int, multiple: int, parts_multiple: int = 1) -> list[Shard]:
    """The shard's rows sorted by length, in equal parts of at most `micro_batch` rows, each as short as its longest row. The number of parts is a multiple of
    `parts_multiple` (interleaved pipelines need one of pp), for which there must be rows enough."""
    order = np.argsort(shard.lengths_B, kind="stable")
    parts = round_up(-(-len(order) // micro_batch), parts_multiple)
    if parts > len(order):
        raise ValueError(f"{len(order)} rows cannot make {parts} micro-batches")
    return [shard.select(rows, multiple) for rows in np.array_split(order, parts)]


def _write_row(batch: LearnerBatch, place: int, row: Row) -> None:
    start, stop = len(row.tokens_S), row.length
    batch.tokens_BS[place, :start] = row.tokens_S
    batch.tokens_BS[place, start:stop] = row.response_T
    batch.response_mask_BS[place, start:stop] = row.versions_T >= 0
    batch.logprobs_BS[place, start:stop] = row.logprobs_T
    batch.versions_BS[place, start:stop] = row.versions_T
    batch.experts_BSLK[place, :start] = row.experts_SLK
    batch.experts_BSLK[place, start : stop - 1] = row.experts_TLK


def _tiles(tiles: Sequence[Sequence[Tiles]], rows: int) -> tuple[Tiles, np.ndarray]:
    """The distinct tiles, those of a prompt once, and which of them every row shows: its parts one after the other."""
    first: dict[int, int] = {}
    shown: list[Tiles] = []
    row_tiles_BM = np.full((rows, max([1, *(sum(map(len, parts)) for parts in tiles)])), -1, dtype=np.int32)
    for row, parts in enumerate(tiles):
        place = 0
        for part in parts:
            if id(part) not in first:  # the rows of a prompt hold one object
                first[id(part)] = sum(map(len, shown))
                shown.append(part)
            row_tiles_BM[row, place : place + len(part)] = first[id(part)] + np.arange(len(part))
            place += len(part)
    return Tiles.join(shown), row_tiles_BM
