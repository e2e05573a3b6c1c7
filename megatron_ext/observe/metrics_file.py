"""Reading `metrics.jsonl`, without what writing it needs: the planner reads the metrics of finished runs and imports nothing heavy.

A line is `{"step": 120, "time": 1790000000.0, "loss": 0.31, ...}`. A number that is not finite is written as the string "nan", "inf" or "-inf", because JSON
has no such numbers.
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron_ext.errors import DataError

FILE_NAME = "metrics.jsonl"
STEP_S, POSITIONS_PER_ROW, TILES_PER_ROW = "timing_s/step", "data/positions_per_row", "data/tiles_per_row"
"""Of supervised stages: what the planner is calibrated by."""
TOKENS_PER_S, TOKENS_PER_S_PER_GPU, MFU = "perf/tokens_per_s", "perf/tokens_per_s_per_gpu", "perf/mfu"
PEAK_MEMORY, PEAK_MEMORY_RANK, PEAK_MEMORY_SHARE = "perf/peak_memory_bytes", "perf/peak_memory_rank", "perf/peak_memory_share"
"""The most that any rank has held, which rank, and how much of its GPU that is (absent without GPUs)."""
SLOWEST_RANK, SLOWEST_OVER_MEAN = "perf/slowest_rank", "perf/slowest_over_mean"
"""Of what ranks do themselves, without waiting for each other: `training/rank_work.py`."""
EP_RANK_LOAD = "moe/ep_rank_load_max"
BAD_SAMPLES = "data/bad_samples"
"""Conversations that could not be read and were left out, by all data-parallel ranks since they started."""
FAILED = "rollout/failed/"
"""Followed by the reason: rollouts of a step that came to nothing."""
Record = dict[str, float]


def read_metrics(folder: Path) -> list[Record]:
    """The lines of a stage in order, non-finite numbers as floats; empty without a file. A malformed line is a DataError, except a last one cut short."""
    path = folder / FILE_NAME
    return [record for _, record in lines(path)] if path.exists() else []


def series(records: list[Record], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric, where it was written."""
    rows = [(record["step"], record[name]) for record in records if name in record]
    return [step for step, _ in rows], [value for _, value in rows]


def lines(path: Path) -> list[tuple[str, Record]]:
    """Every whole line of a file as it stands there, and what it says."""
    found: list[tuple[str, Record]] = []
    text = path.read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if not line.endswith("\n"):  # the writer was stopped in the middle of its last line
            break
        try:
            record = {name: float(value) for name, value in json.loads(line).items()}
            record["step"] = int(record["step"])
        except (ValueError, TypeError, AttributeError, KeyError):
            raise DataError(f"{path}:{number}", "is not a line of metrics", "remove the line, or the file to start it afresh") from None
        found.append((line, record))
    return found
