"""Micro-batches by tokens: however a step is cut, the loss and every gradient are the same; and ranks that meet in collectives run equally many."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from megatron_ext.config.schema import ParallelConfig
from megatron_ext.parallel.local import run_ranks
from tests.support.budget import train_by_tokens

EP2 = ParallelConfig(num_ranks=2, ep=2)
INTERLEAVED = ParallelConfig(num_ranks=2, pp=2, vpp=2)
CP2 = ParallelConfig(num_ranks=2, cp=2)
ALL = 1000


@cache
def fixed() -> dict[str, Any]:
    """Micro-batches of two rows, on one rank."""
    return run_ranks(train_by_tokens, 1, ParallelConfig(), [0], timeout_s=60)[0][0]


@pytest.mark.parametrize(
    ("parallel", "budgets"),
    [(ParallelConfig(), [24, 40, 56, ALL]), (EP2, [24, 56, ALL]), (INTERLEAVED, [56, ALL]), (CP2, [56])],
    ids=["one rank", "EP2", "PP2 VPP2", "CP2"],
)
def test_any_budget_gives_the_loss_and_the_gradients_of_fixed_micro_batches(parallel: ParallelConfig, budgets: list[int]) -> None:
    expected = fixed()
    ranks = run_ranks(train_by_tokens, parallel.num_ranks, parallel, budgets, timeout_s=100)
    for number, budget in enumerate(budgets):
        found = [rank[number] for rank in ranks]
        assert len({len(rank["lengths"]) for rank in found}) == 1, "every rank runs equally many"
        assert max(length for rank in found for length in rank["lengths"]) <= budget
        for name in ("loss", "grad_norm", "num_tokens", "data/tokens_per_row"):
            assert found[0]["metrics"][name] == pytest.approx(expected["metrics"][name], rel=2e-5), (budget, name)
        assert found[0]["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in found[0]["gradients"].items():
            torch.testing.assert_close(gradient, expected["gradients"][name], rtol=1e-3, atol=1e-5, msg=f"{budget} {name}")


def test_the_rank_with_the_most_text_decides_how_many_all_run() -> None:
    """Four rows of 17 to 24 tokens need two micro-batches of 56, four of 13 would fit one."""
    long, short = (rank[0]["lengths"] for rank in run_ranks(train_by_tokens, 2, EP2, [56], timeout_s=60))
    assert len(long) == 2 and sum(long) > 56
    assert short == [26, 26]


def test_an_interleaved_pipeline_gets_a_multiple_of_its_stages() -> None:
    for rank in run_ranks(train_by_tokens, 2, INTERLEAVED, [ALL], timeout_s=60):
        assert len(rank[0]["lengths"]) == 2
