"""Rollouts as columns and back: the schema of a segment, which pandas reads as it is (`docs/bank.md`).

A row is an answer, or a failure (`failed` is its reason; then everything of the answer is null). What the answers of a prompt share stands in every row of
the table and once on disk: its columns are dictionary-encoded. Routes are the bytes of their arrays in row-major order, of the prompt's positions and of
the answer's own: `route_shape` is [L, K, bytes of an expert id]; gates are float16.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_ext.batch import ContinuedRoutes, FailedRollout, Prompt, Rollout, RouteTrace, ScoredRollout, Tiles

SCHEMA = pa.schema(
    {
        "draw": pa.int64(),
        "key": pa.string(),
        "sample": pa.int32(),
        "skill": pa.string(),
        "answer": pa.string(),
        "text": pa.string(),
        "finish": pa.string(),
        "reward": pa.float64(),
        "rewards": pa.map_(pa.string(), pa.float64()),
        "seed": pa.int64(),
        "versions": pa.list_(pa.int32()),
        "tokens": pa.list_(pa.int32()),
        "logprobs": pa.list_(pa.float32()),
        "failed": pa.string(),
        "detail": pa.string(),
        "prompt_tokens": pa.list_(pa.int32()),
        "meta": pa.string(),
        "images": pa.string(),
        "images_shape": pa.list_(pa.int32()),
        "further": pa.string(),
        "further_shape": pa.list_(pa.int32()),
        "route_shape": pa.list_(pa.int32()),
        "prompt_experts": pa.binary(),
        "prompt_gates": pa.binary(),
        "experts": pa.binary(),
        "gates": pa.binary(),
    }
)
SHARED_BYTES = ["prompt_experts", "prompt_gates"]
SHARED = ["key", "skill", "answer", "finish", "failed", "meta", "images", "prompt_tokens.list.element", *SHARED_BYTES]
"""Written once for all rows of a row group that have the same."""

Row = dict[str, Any]
FindTiles = Callable[[str, Sequence[int]], Tiles]


def scored_row(draw: int, answer: ScoredRollout, images: str, further: str = "") -> Row:
    """`images`, `further`: the digests of the prompt's tiles and of those that came later; empty where there are none."""
    rollout, routes = answer.rollout, answer.rollout.routes
    split = len(rollout.prompt.tokens_S)
    asked, own = routes.rows(0, split), routes.rows(split, len(routes))
    return _prompt_row(draw, rollout.prompt, images) | {
        "sample": rollout.sample,
        "text": rollout.text,
        "finish": rollout.finish,
        "reward": answer.reward,
        "rewards": list(answer.rewards.items()),
        "seed": rollout.seed,
        "versions": np.asarray(rollout.versions_T, np.int32),
        "tokens": np.asarray(rollout.response_T, np.int32),
        "logprobs": np.asarray(rollout.logprobs_T, np.float32),
        "further": further,
        "further_shape": rollout.further.shape if len(rollout.further) else None,
        "route_shape": [*routes.shape[1:], own.experts_SLK.itemsize],
        "prompt_experts": asked.experts_SLK.tobytes(),
        "prompt_gates": asked.gates_SLK.tobytes(),
        "experts": own.experts_SLK.tobytes(),
        "gates": own.gates_SLK.tobytes(),
    }


def failed_row(draw: int, failure: FailedRollout, images: str) -> Row:
    detail = failure.detail.encode(errors="backslashreplace").decode()  # whatever a reward raised: half a surrogate pair is no text to a file
    return _prompt_row(draw, failure.prompt, images) | {"sample": failure.sample, "failed": failure.reason, "detail": detail}


def _prompt_row(draw: int, prompt: Prompt, images: str) -> Row:
    meta = dict(prompt.meta)
    text = json.dumps(meta)
    if json.loads(text) != meta:
        raise ValueError(f"the meta of {prompt.key} is not made of JSON values: {meta}")
    return {
        "draw": draw,
        "key": prompt.key,
        "skill": prompt.skill,
        "answer": prompt.answer,
        "prompt_tokens": np.asarray(prompt.tokens_S, np.int32),
        "meta": text,
        "images": images,
        "images_shape": prompt.tiles.shape if len(prompt.tiles) else None,
    }


def row_bytes(row: Row) -> int:
    """About what a row takes, of what it does not share with others."""
    return sum(value.nbytes if isinstance(value, np.ndarray) else len(value) for name, value in row.items() if isinstance(value, np.ndarray | bytes | str))


def as_table(rows: Sequence[Row]) -> pa.Table:
    return pa.table([pa.array([row.get(name) for row in rows], kind) for name, kind in zip(SCHEMA.names, SCHEMA.types, strict=True)], schema=SCHEMA)


class Restorer:
    """Rollouts from the tables of one segment; the answers of a prompt share it and its routes. `find_tiles`: tiles by digest and shape."""

    def __init__(self, find_tiles: FindTiles) -> None:
        self._find_tiles = find_tiles
        self._prompts: dict[str, Prompt] = {}
        self._read: dict[str, tuple[bytes, bytes, RouteTrace]] = {}

    def of(self, table: pa.Table) -> Iterator[ScoredRollout | FailedRollout]:
        columns = {name: table.column(name).combine_chunks() for name in table.column_names}
        for index in range(len(table)):
            row = {name: column[index] for name, column in columns.items()}
            yield self._scored(row) if row["failed"].as_py() is None else self._failed(row)

    def _scored(self, row: Row) -> ScoredRollout:
        prompt, tokens_T, versions_T = self._prompt(row), _array(row["tokens"]), _array(row["versions"])
        rollout = Rollout(
            prompt=prompt,
            sample=row["sample"].as_py(),
            seed=row["seed"].as_py(),
            versions_T=versions_T,
            response_T=tokens_T,
            logprobs_T=_array(row["logprobs"]),
            finish=row["finish"].as_py(),
            text=row["text"].as_py(),
            routes=self._routes(row, len(prompt.tokens_S), len(tokens_T) - 1),
            further=self._find_tiles(row["further"].as_py(), row["further_shape"].as_py() or (0, 1, 1, 3)),
        )
        return ScoredRollout(rollout, row["reward"].as_py(), dict(row["rewards"].as_py()))

    def _routes(self, row: Row, asked: int, own: int) -> RouteTrace:
        shape, key = row["route_shape"].as_py(), row["key"].as_py()
        experts, gates = (row[name].as_py() for name in SHARED_BYTES)
        known = self._read.get(key)
        if known is None or known[:2] != (experts, gates):
            known = self._read[key] = (experts, gates, _trace(experts, gates, shape, asked))
        return ContinuedRoutes(known[2], _trace(row["experts"].as_py(), row["gates"].as_py(), shape, own))

    def _failed(self, row: Row) -> FailedRollout:
        return FailedRollout(self._prompt(row), row["sample"].as_py(), row["failed"].as_py(), row["detail"].as_py())

    def _prompt(self, row: Row) -> Prompt:
        key = row["key"].as_py()
        if key not in self._prompts:
            shape = row["images_shape"].as_py()
            tiles = self._find_tiles(row["images"].as_py(), shape or (0, 1, 1, 3))
            meta = json.loads(row["meta"].as_py())
            self._prompts[key] = Prompt(key, row["skill"].as_py(), _array(row["prompt_tokens"]), tiles, row["answer"].as_py(), meta)
        return self._prompts[key]


def _array(scalar: pa.ListScalar) -> np.ndarray:
    """A copy, which does not keep the whole table in memory."""
    return scalar.values.to_numpy(zero_copy_only=False).copy()


def _trace(experts: bytes, gates: bytes, route_shape: list[int], positions: int) -> RouteTrace:
    layers, topk, itemsize = route_shape
    ids = np.uint8 if itemsize == 1 else np.uint16
    return RouteTrace(*(np.frombuffer(data, kind).reshape(positions, layers, topk) for data, kind in ((experts, ids), (gates, np.float16))))
