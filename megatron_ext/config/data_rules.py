"""Rules of the data and of how it is cut into micro-batches; `config/rules.py` asks them with its own."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ext.config.schema import DataConfig, ParallelConfig, TrainConfig
from megatron_ext.config.sizes import data_parallel, length_multiple
from megatron_ext.errors import UserError
from megatron_ext.shapes import round_up


def image_rules(data: DataConfig) -> Iterator[UserError]:
    """Of where pictures are."""
    if data.image_root is not None and data.kind != "jsonl":
        why = {"blend": "sources name their own root", "webdataset": "pictures lie in the shards", "suite": "pictures are drawn"}[data.kind]
        yield UserError("data.image_root", f"{str(data.image_root)!r} would be ignored with data.kind = {data.kind}: {why}", "remove it")


def budget_rules(name: str, stage: TrainConfig, data: DataConfig, parallel: ParallelConfig) -> Iterator[UserError]:
    """Of micro-batches by tokens: with them, every rank can make as many micro-batches as any other, none of them empty."""
    field, budget = f"{name}.micro_batch_tokens", stage.micro_batch_tokens
    if not stage.packed:
        yield UserError(field, f"{budget} counts the tokens of packed rows, but {name}.packed = false", f"set {name}.packed=true")
    multiple = length_multiple(parallel.tp, parallel.cp)
    longest = round_up(data.max_length, multiple)
    if longest > budget:
        rounded = f", as a multiple of {multiple} {longest}" if longest > data.max_length else ""
        what = f"{budget} does not hold the longest conversation, data.max_length = {data.max_length}{rounded}"
        yield UserError(field, what, f"use at least {longest}, or lower data.max_length")
    share, rest = divmod(stage.global_batch, data_parallel(parallel) or 1)
    if parallel.vpp > 1 and not rest and share % parallel.pp:
        yield UserError(
            f"{name}.global_batch",
            f"{stage.global_batch} gives a rank {share} conversations, of which parallel.vpp = {parallel.vpp} needs groups of parallel.pp = {parallel.pp} "
            "micro-batches",
            f"use a multiple of {parallel.pp * data_parallel(parallel)}",
        )
