"""What is said of a run without training it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ext.cli.dry_run import describe
from megatron_ext.config.load import load_config
from megatron_ext.errors import ConfigError
from tests.support.shards import write_shards


def test_micro_batches_are_told_by_rows_or_by_tokens() -> None:
    budget = ["sft.packed=true", "sft.micro_batch_tokens=512", "parallel.num_ranks=2"]
    told = describe(load_config(None, ["pretrain.micro_batch=16", *budget]).config)
    assert "pretrain       100 steps of 64 rows of at most 256 tokens; a rank: 2 x 16" in told
    assert "sft            100 steps of 64 rows of at most 256 tokens; a rank: 32, in micro-batches of at most 512 tokens" in told
    assert "mpo " not in told
    told = describe(load_config(None, ["mpo.steps=3", "parallel.num_ranks=2"]).config)
    assert "mpo            3 steps of 256 pairs of rows of at most 256 tokens; a rank: 8 x 16 pairs" in told


def test_shards_are_counted_or_missed(tmp_path: Path) -> None:
    write_shards(tmp_path, 3, 1)
    shards = ["data.kind=webdataset", f"data.path={tmp_path}/part-{{000..002}}.tar"]
    assert f"3 shards of {tmp_path}/part-{{000..002}}.tar" in describe(load_config(None, shards).config)
    with pytest.raises(ConfigError, match=r"data\.path: 1 of 4 shards are missing, the first of them .*part-003\.tar"):
        describe(load_config(None, [shards[0], f"data.path={tmp_path}/part-{{000..003}}.tar"]).config)


def test_the_index_of_shards_lies_in_the_run_s_folder_unless_it_is_placed() -> None:
    shards = ["data.kind=webdataset", "data.path=here", "name=mine"]
    unset, placed = load_config(None, shards), load_config(None, [*shards, "data.index=shared"])
    assert (unset.config.data.index, unset.origins["data.index"]) == (Path("runs/mine/shards"), "run folder")
    assert (placed.config.data.index, placed.origins["data.index"]) == (Path("shared"), "command line")
    assert load_config(None).config.data.index is None
