"""From scored rollouts to what each learner rank computes on.

    scored rollouts, advantages_R -> minibatches of whole groups -> a shard per data-parallel rank -> microbatches, sorted by length

A shard holds equally many rows on every rank, so that ranks that meet in collectives run equally many forward passes: filler rows, which no loss sees, make
up the difference. Groups stay together on one rank, so that the rollouts of a prompt share its images. Nothing is ever dropped: every sampled token is in
exactly one microbatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_ext.batch import LearnerBatch, Prompt, Rollout, ScoredRollout, Tiles, route_digest
from megatron_ext.shapes import check_shape, round_up

FILLER_KEY = ""


@dataclass(frozen=True)
class Shard:
    """Rows of one rank with what identifies them: `lengths_B` real tokens of each row, `keys_B` "<prompt key>#<sample>", `digests_B` the digest of the routes
    its rollout recorded.
    """

    batch: LearnerBatch
    lengths_B: np.ndarray
    keys_B: tuple[str, ...]
    digests_B: tuple[str, ...]

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
                advantages_B=batch.advantages_B[rows_B],
                experts_BSLK=batch.experts_BSLK[rows_B, :length],
                tiles=batch.tiles[used[absent:]],
                row_tiles_BM=row_tiles.reshape(len(rows_B), -1).astype(np.int32) - absent,
                version=batch.version,
            ),
            lengths_B,
            tuple(self.keys_B[row] for row in rows_B),
            tuple(self.digests_B[row] for row in rows_B),
        )


def row_key(rollout: Rollout) -> str:
    return f"{rollout.prompt.key}#{rollout.sample}"


def plan_shards(scored: Sequence[ScoredRollout], advantages_R: np.ndarray, *, minibatches: int, dp_size: int, multiple: int, pad_id: int) -> list[list[Shard]]:
    """The shards of every data-parallel rank: `[dp_rank][minibatch]`. The minibatches share the groups out as they come; within each, ranks get groups of
    like lengths in turn.
    """
    check_shape("advantages_R", advantages_R, len(scored))
    form = BatchForm.of(scored, multiple, pad_id)
    shards: list[list[Shard]] = [[] for _ in range(dp_size)]
    for groups in _chunks(_groups(scored), minibatches):
        per_rank = _deal(groups, [sum(_length(scored[row]) for row in group) for group in groups], dp_size)
        rows = max(sum(len(group) for group in own) for own in per_rank)
        for rank, own in enumerate(per_rank):
            members = [row for group in own for row in group]
            shards[rank].append(join([scored[row] for row in members], advantages_R[members], rows, form))
    return shards


@dataclass(frozen=True)
class BatchForm:
    """What all shards of a step have in common: (L, K) of the routes, the version that sampled them, what lengths are a multiple of, and what fills them up."""

    layers_topk: tuple[int, ...]
    version: int
    multiple: int
    pad_id: int

    @classmethod
    def of(cls, scored: Sequence[ScoredRollout], multiple: int, pad_id: int) -> BatchForm:
        """Raises ValueError where rollouts were sampled under different weights."""
        versions = {version for answer in scored for version in (answer.rollout.version, answer.rollout.newest)}
        if len(versions) > 1:
            raise ValueError(f"rollouts of versions {sorted(versions)} in one batch")
        return cls(scored[0].rollout.routes.experts_SLK.shape[1:], versions.pop(), multiple, pad_id)


def join(scored: Sequence[ScoredRollout], advantages_R: np.ndarray, rows: int, form: BatchForm) -> Shard:
    """One shard of `rows` rows: the given rollouts, then filler."""
    lengths_B = np.array([*map(_length, scored), *[1] * (rows - len(scored))], dtype=np.int64)
    length = round_up(int(lengths_B.max()), form.multiple)
    tiles, row_tiles = _tiles([answer.rollout.prompt for answer in scored], rows)
    batch = LearnerBatch(
        tokens_BS=np.full((rows, length), form.pad_id, dtype=np.int32),
        response_mask_BS=np.zeros((rows, length), dtype=np.uint8),
        logprobs_BS=np.zeros((rows, length), dtype=np.float32),
        advantages_B=np.concatenate([advantages_R, np.zeros(rows - len(scored))]).astype(np.float32),
        experts_BSLK=np.full((rows, length, *form.layers_topk), -1, dtype=np.int16),
        tiles=tiles,
        row_tiles_BM=row_tiles,
        version=form.version,
    )
    for row, answer in enumerate(scored):
        _write_row(batch, row, answer)
    filler = (FILLER_KEY,) * (rows - len(scored))
    keys = tuple(row_key(answer.rollout) for answer in scored)
    return Shard(batch, lengths_B, keys + filler, tuple(route_digest(answer.rollout.routes.experts_SLK) for answer in scored) + filler)


def microbatches(shard: Shard, micro_batch: int, multiple: int, parts_multiple: int = 1) -> list[Shard]:
    """The shard's rows sorted by length, in equal parts of at most `micro_batch` rows, each as short as its longest row. The number of parts is a multiple of
    `parts_multiple` (interleaved pipelines need one of pp), for which there must be rows enough."""
    order = np.argsort(shard.lengths_B, kind="stable")
    parts = round_up(-(-len(order) // micro_batch), parts_multiple)
    if parts > len(order):
        raise ValueError(f"{len(order)} rows cannot make {parts} micro-batches")
    return [shard.select(rows, multiple) for rows in np.array_split(order, parts)]


def _write_row(batch: LearnerBatch, row: int, answer: ScoredRollout) -> None:
    rollout = answer.rollout
    start, stop = len(rollout.prompt.tokens_S), _length(answer)
    batch.tokens_BS[row, :start] = rollout.prompt.tokens_S
    batch.tokens_BS[row, start:stop] = rollout.response_T
    batch.response_mask_BS[row, start:stop] = 1
    batch.logprobs_BS[row, start:stop] = rollout.logprobs_T
    batch.experts_BSLK[row, : stop - 1] = rollout.routes.experts_SLK


def _tiles(prompts: Sequence[Prompt], rows: int) -> tuple[Tiles, np.ndarray]:
    """The distinct tiles, once for each prompt, and which of them every row shows."""
    first: dict[str, int] = {}
    shown: list[Tiles] = []
    row_tiles_BM = np.full((rows, max([1, *(len(prompt.tiles) for prompt in prompts)])), -1, dtype=np.int32)
    for row, prompt in enumerate(prompts):
        if prompt.key not in first:
            first[prompt.key] = sum(map(len, shown))
            shown.append(prompt.tiles)
        row_tiles_BM[row, : len(prompt.tiles)] = first[prompt.key] + np.arange(len(prompt.tiles))
    return Tiles.join(shown), row_tiles_BM


def _groups(scored: Sequence[ScoredRollout]) -> list[list[int]]:
    """Rows by prompt, in order of first appearance."""
    groups: dict[str, list[int]] = {}
    for row, answer in enumerate(scored):
        groups.setdefault(answer.rollout.prompt.key, []).append(row)
    return list(groups.values())


def _deal(groups: list[list[int]], costs: list[int], hands: int) -> list[list[list[int]]]:
    """Groups to `hands` in a snake, the longest first: counts differ by one at most and tokens by little."""
    dealt: list[list[list[int]]] = [[] for _ in range(hands)]
    for turn, index in enumerate(sorted(range(len(groups)), key=lambda index: -costs[index])):
        lap, place = divmod(turn, hands)
        dealt[place if lap % 2 == 0 else hands - 1 - place].append(groups[index])
    return dealt


def _chunks(groups: list[list[int]], parts: int) -> list[list[list[int]]]:
    bounds = np.linspace(0, len(groups), min(parts, len(groups)) + 1).astype(int)
    return [groups[start:stop] for start, stop in pairwise(bounds)]


def _length(answer: ScoredRollout) -> int:
    return len(answer.rollout.prompt.tokens_S) + len(answer.rollout.response_T)
