"""What each answer of a step counted for, beside the bank: a small Parquet file a step, for people. Nothing depends on it: advantages follow from rewards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_ext.batch import ScoredRollout
from megatron_ext.durable import durable_file
from megatron_ext.rl.bank.ledger import Group


def write_advantages(folder: Path, step: int, groups: Sequence[Group], scored: Sequence[ScoredRollout], advantages_R: np.ndarray) -> None:
    """`folder/step_000012.parquet` with the columns step, draw, key, sample, advantage: whole or not at all. A step that is repeated replaces its file."""
    draw_of = {key: draw for draw, key in groups}
    keys = [answer.rollout.prompt.key for answer in scored]
    table = pa.table(
        {
            "step": pa.array([step] * len(keys), pa.int64()),
            "draw": pa.array([draw_of[key] for key in keys], pa.int64()),
            "key": pa.array(keys, pa.string()),
            "sample": pa.array([answer.rollout.sample for answer in scored], pa.int32()),
            "advantage": pa.array(advantages_R, pa.float64()),
        }
    )
    with durable_file(folder / f"step_{step:06d}.parquet") as file:
        pq.write_table(table, file, compression="zstd")
