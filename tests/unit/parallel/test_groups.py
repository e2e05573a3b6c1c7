"""A rank's world: opened with the grid that was asked for, closed whatever happens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from megatron_ext.config.schema import ParallelConfig
from megatron_ext.errors import UserError
from megatron_ext.parallel.groups import open_parallel
from megatron_ext.parallel.local import run_ranks
from tests.support.rank_functions import grid


def test_one_rank_is_a_world_of_its_own(tmp_path: Path) -> None:
    with open_parallel(ParallelConfig(), 0, 1, f"file://{tmp_path}/store", seed=0) as context:
        assert (context.rank, context.world_size, context.tp_rank, context.dp_rank, context.ep_rank) == (0, 1, 0, 0, 0)
        assert {context.pgs.tp.size(), context.pgs.ep.size(), context.pgs.expt_tp.size(), context.pgs.dp_cp.size()} == {1}


def test_a_world_is_closed_after_an_error_and_the_next_one_opens(tmp_path: Path) -> None:
    for attempt in range(2):
        with pytest.raises(ZeroDivisionError), open_parallel(ParallelConfig(), 0, 1, f"file://{tmp_path}/{attempt}", seed=0):
            raise ZeroDivisionError
        assert not torch.distributed.is_initialized()
        assert not parallel_state.model_parallel_is_initialized()


def test_the_world_must_have_the_size_of_the_grid(tmp_path: Path) -> None:
    world = open_parallel(ParallelConfig(num_ranks=2), 0, 1, f"file://{tmp_path}/store", seed=0)
    with pytest.raises(UserError, match=r"parallel.num_ranks: 2 ranks were asked for, 1 were started; set it to 1"), world:
        pass


def test_four_ranks_form_the_dense_grid_and_the_expert_grid() -> None:
    """Dense parameters: tensor-parallel pairs (0, 1), (2, 3). Experts: spread over pairs of neighbours, replicated across."""
    ranks = run_ranks(grid, 4, ParallelConfig(num_ranks=4, tp=2, ep=2, threads_per_rank=2), timeout_s=60)
    assert [rank["tp"] for rank in ranks] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [rank["dp"] for rank in ranks] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [rank["ep"] for rank in ranks] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [rank["expt_tp"] for rank in ranks] == [[0], [1], [2], [3]]
    assert [rank["expt_dp"] for rank in ranks] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [rank["threads"] for rank in ranks] == [2] * 4
