"""The experts' kernels compute the same in every layout of experts: spread, split, both; gradients in the buffers that data parallelism reduces."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from megatron_ext.config.schema import ParallelConfig
from megatron_ext.parallel.local import run_ranks
from tests.support.layouts import Case, train

LAYOUTS = {
    "one rank": ParallelConfig(),
    "TP2 ETP2": ParallelConfig(num_ranks=2, tp=2, etp=2),
    "EP2": ParallelConfig(num_ranks=2, ep=2, overlap_grad_reduce=True),
    "TP2 EP2 ETP2": ParallelConfig(num_ranks=4, tp=2, ep=2, etp=2),
}


@cache
def sequential() -> dict[str, Any]:
    """Megatron's own experts on one rank."""
    return run_ranks(train, 1, Case(ParallelConfig(), changes={"experts_kernel": "sequential"}), None, timeout_s=100)[0]


LONG = {("TP2 ETP2", "grouped_mm"), ("TP2 EP2 ETP2", "grouped_mm")}
"""Journeys: these layouts train with this kernel in test_layouts.py too."""
CASES = [
    pytest.param(layout, kernel, marks=[pytest.mark.journey] if (layout, kernel) in LONG else []) for layout in LAYOUTS for kernel in ("in_place", "grouped_mm")
]


@pytest.mark.parametrize(("layout", "kernel"), CASES)
def test_losses_and_gradients_are_those_of_megatrons_experts_on_one_rank(layout: str, kernel: str) -> None:
    expected, parallel = sequential(), LAYOUTS[layout]
    ranks = run_ranks(train, parallel.num_ranks, Case(parallel, changes={"experts_kernel": kernel}), expected["start"], timeout_s=100)
    for rank in ranks:
        for name in ("loss", "grad_norm"):
            assert [step[name] for step in rank["curve"]] == pytest.approx([step[name] for step in expected["curve"]], rel=1e-5), name
    for name, gradient in expected["gradients"].items():
        assert (ranks[0]["gradients"][name] - gradient).norm() <= 1e-5 * gradient.norm().clamp(min=1e-12), name
