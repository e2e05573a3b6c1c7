"""Training in several layouts: the same losses and gradients as on one rank, and checkpoints that cross from one layout to another.

More crossings, and runs that resume in the layout they had: test_resume.py.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.batch.metric import Metric, merge_metrics
from megatron_ext.config.schema import ParallelConfig
from megatron_ext.parallel.local import run_ranks
from tests.support.models import small_config
from tests.support.training import load_rank, reduce_rank, same, save_rank, train_rank

ONE = ParallelConfig()
DP2 = ParallelConfig(num_ranks=2)
TP2 = ParallelConfig(num_ranks=2, tp=2)
EP2 = ParallelConfig(num_ranks=2, ep=2)
TP2_EP2 = ParallelConfig(num_ranks=2, tp=2, ep=2)
TP2_EP2_DP2 = ParallelConfig(num_ranks=4, tp=2, ep=2)
STEPS = 3


def names(parallel: ParallelConfig) -> str:
    return f"tp{parallel.tp}-ep{parallel.ep}-ranks{parallel.num_ranks}"


def ranks(fn: Any, parallel: ParallelConfig, *args: Any) -> list[Any]:
    return run_ranks(fn, parallel.num_ranks, parallel, *args, timeout_s=60)


@cache
def on_one_rank(aux: float) -> Any:
    return ranks(train_rank, ONE, small_config(moe_aux_loss_coeff=aux), STEPS, 8)[0]


LONG = pytest.mark.journey
"""Their layouts are held against one rank in test_layouts.py too, their crossings in test_resume.py."""


@pytest.mark.parametrize("parallel", [DP2, TP2_EP2, *(pytest.param(long, marks=LONG) for long in (TP2, EP2, TP2_EP2_DP2))], ids=names)
def test_losses_and_gradient_norms_are_those_of_one_rank(parallel: ParallelConfig) -> None:
    """Microbatches of two rows against one of eight. Without the auxiliary loss, which is a product of means over its microbatch."""
    expected, _ = on_one_rank(0.0)
    for metrics, _ in ranks(train_rank, parallel, small_config(moe_aux_loss_coeff=0.0), STEPS, 2):
        for ours, theirs in zip(metrics, expected, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
            assert ours["num_tokens"] == theirs["num_tokens"]
            assert ours["data/tokens_per_row"] == theirs["data/tokens_per_row"]


def test_two_data_parallel_ranks_end_with_the_weights_of_one() -> None:
    """Adam turns the rounding of near-zero gradients into whole steps, hence the absolute tolerance of one hundredth of a step."""
    _, expected = on_one_rank(0.0)
    (_, first), (_, second) = ranks(train_rank, DP2, small_config(moe_aux_loss_coeff=0.0), STEPS, 4)
    assert same(first, second)
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("parallel", [pytest.param(TP2, marks=LONG), TP2_EP2], ids=names)
def test_the_auxiliary_loss_sees_the_whole_sequence_under_tensor_parallelism(parallel: ParallelConfig) -> None:
    expected, _ = on_one_rank(0.1)
    for metrics, _ in ranks(train_rank, parallel, small_config(moe_aux_loss_coeff=0.1), STEPS, 8):
        for ours, theirs in zip(metrics, expected, strict=True):
            for name in ("loss", "moe/aux_loss", "moe/max_vio", "moe/load_entropy"):
                assert ours[name] == pytest.approx(theirs[name], rel=2e-5), name
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def test_metrics_of_two_ranks_are_those_of_all_their_items() -> None:
    """The law of `merge_metrics`, over processes: a rank without items changes nothing, extremes are extremes."""
    parts = [
        {"mean": Metric(6.0, 2), "most": Metric(-3.0, 1, "max"), "least": Metric(4.0, 2, "min"), "one_sided": Metric(0.0, 0, "max"), "none": Metric(0.0, 0)},
        {"mean": Metric(1.0, 1), "most": Metric(-5.0, 4, "max"), "least": Metric(3.0, 1, "min"), "one_sided": Metric(-7.0, 2, "max"), "none": Metric(0.0, 0)},
    ]
    for reduced in ranks(reduce_rank, DP2, parts):
        assert reduced == merge_metrics(parts)


CROSSINGS = [(DP2, TP2), (TP2, EP2), *(pytest.param(*long, marks=LONG) for long in ((ONE, TP2_EP2), (EP2, ONE), (TP2_EP2, DP2)))]


@pytest.mark.parametrize(("saved", "loaded"), CROSSINGS, ids=names)
def test_a_run_goes_on_in_another_layout(saved: ParallelConfig, loaded: ParallelConfig, tmp_path: Path) -> None:
    expected, _ = ranks(save_rank, saved, tmp_path, 2, 4)[0]
    metrics, _ = ranks(load_rank, loaded, tmp_path, 4)[0]
    for ours, theirs in zip(metrics, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["lr"] == theirs["lr"]
