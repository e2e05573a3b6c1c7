"""From scored rollouts to what travels to each learner rank.

    scored rollouts, advantages_R -> minibatches of whole groups -> a parcel per data-parallel rank -> (there) `batching.unpack`

A parcel is as small as what it says: nothing is padded, and what the answers of a prompt share, its tokens, images and routes, is in it once. Images are
references where they are stored (`batch/images.py`).

Parcels make equally many rows on every rank, so that ranks that meet in collectives run equally many forward passes: filler rows, which no loss sees, make
up the difference. Groups stay together on one rank, so that the rollouts of a prompt share its images. Nothing is ever dropped: every sampled token is in
exactly one parcel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from megatron_ext.batch import NO_TILES, Rollout, ScoredRollout, Tiles, route_digest
from megatron_ext.rl.goals import Clusters, Goals
from megatron_ext.shapes import check_shape


@dataclass(frozen=True, eq=False)
class Row:
    """One answer. `tokens_S`, `tiles` and `experts_SLK` are of the prompt, and the same objects in all rows of a prompt; `response_T`, `logprobs_T`,
    `versions_T` and `experts_TLK`, the routes of its positions but the last, are the answer's own. `key`: "<prompt key>#<sample>"; `digest`: of all routes that
    its rollout recorded; `further`: tiles that it shows besides those of the prompt, which follow them; `goal_T`: whose cluster counts (`goals.py`), None
    without goals."""

    tokens_S: np.ndarray
    tiles: Tiles
    experts_SLK: np.ndarray
    response_T: np.ndarray
    logprobs_T: np.ndarray
    versions_T: np.ndarray
    experts_TLK: np.ndarray
    advantage: float
    key: str
    digest: str
    further: Tiles = NO_TILES
    goal_T: np.ndarray | None = None

    @property
    def length(self) -> int:
        return len(self.tokens_S) + len(self.response_T)


@dataclass(frozen=True)
class BatchForm:
    """What all parcels of a step have in common: (L, K) of the routes, what lengths are a multiple of, and what fills them up."""

    layers_topk: tuple[int, ...]
    multiple: int
    pad_id: int

    @classmethod
    def of(cls, scored: Sequence[ScoredRollout], multiple: int, pad_id: int) -> BatchForm:
        return cls(scored[0].rollout.routes.shape[1:], multiple, pad_id)


@dataclass(frozen=True)
class Parcel:
    """One rank's part of a minibatch: `rows`, to be filled up to `num_rows`. `clusters`: what their goals are of; None where routers have none."""

    rows: tuple[Row, ...]
    num_rows: int
    form: BatchForm
    clusters: Clusters | None = None


def row_key(rollout: Rollout) -> str:
    return f"{rollout.prompt.key}#{rollout.sample}"


def plan_parcels(
    scored: Sequence[ScoredRollout],
    advantages_R: np.ndarray,
    *,
    minibatches: int,
    dp_size: int,
    multiple: int,
    pad_id: int,
    goals: Goals | None = None,
) -> list[list[Parcel]]:
    """The parcels of every data-parallel rank: `[dp_rank][minibatch]`. The minibatches share the groups out as they come; within each, ranks get groups of
    like lengths in turn."""
    check_shape("advantages_R", advantages_R, len(scored))
    form = BatchForm.of(scored, multiple, pad_id)
    rows, clusters = rows_of(scored, advantages_R), None
    if goals is not None:
        rows = [replace(row, goal_T=goal_T) for row, goal_T in zip(rows, goals.of_rollouts, strict=True)]
        clusters = goals.clusters
    parcels: list[list[Parcel]] = [[] for _ in range(dp_size)]
    for groups in _chunks(_groups(scored), minibatches):
        per_rank = _deal(groups, [sum(rows[row].length for row in group) for group in groups], dp_size)
        most = max(sum(len(group) for group in own) for own in per_rank)
        for rank, own in enumerate(per_rank):
            parcels[rank].append(Parcel(tuple(rows[row] for group in own for row in group), most, form, clusters))
    return parcels


def rows_of(scored: Sequence[ScoredRollout], advantages_R: np.ndarray) -> list[Row]:
    """A row for each answer. The answers of a prompt may have been read apart, and with other rounding: then their routes differ."""
    tiles: dict[str, Tiles] = {}
    arrays: dict[str, list[np.ndarray]] = {}
    rows = []
    for answer, advantage in zip(scored, advantages_R, strict=True):
        rollout, prompt, routes = answer.rollout, answer.rollout.prompt, answer.rollout.routes
        shared, split = arrays.setdefault(prompt.key, []), len(prompt.tokens_S)
        rows.append(
            Row(
                tokens_S=_once(prompt.tokens_S, shared),
                tiles=tiles.setdefault(prompt.key, prompt.tiles),
                experts_SLK=_once(routes.rows(0, split).experts_SLK, shared),
                response_T=rollout.response_T,
                logprobs_T=rollout.logprobs_T,
                versions_T=rollout.versions_T,
                experts_TLK=routes.rows(split, len(routes)).experts_SLK,
                advantage=float(advantage),
                key=row_key(rollout),
                digest=route_digest(routes.experts_SLK),
                further=rollout.further,
            )
        )
    return rows


def _once(array: np.ndarray, known: list[np.ndarray]) -> np.ndarray:
    """The known array that is equal, else this one, known from now on."""
    for one in known:
        if one is array or (one.dtype == array.dtype and np.array_equal(one, array)):
            return one
    known.append(array)
    return array


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
