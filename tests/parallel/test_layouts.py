"""The model trains the same however it is laid out: same loss, same gradient of every parameter, same weights after an update."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_ext.config.schema import ParallelConfig
from megatron_ext.parallel.local import run_ranks
from tests.support.layouts import train
from tests.support.models import TANH_GATE

LAYOUTS = {
    "tensor and sequence parallel": ParallelConfig(num_ranks=2, tp=2),
    "expert parallel": ParallelConfig(num_ranks=2, ep=2),
    "data parallel": ParallelConfig(num_ranks=2),
    "experts split over tensor-parallel ranks": ParallelConfig(num_ranks=2, tp=2, etp=2),
    "tensor and expert parallel": ParallelConfig(num_ranks=4, tp=2, ep=2),
    "tensor, expert and expert-tensor parallel": ParallelConfig(num_ranks=4, tp=2, ep=2, etp=2),
}


VARIANTS = {
    "tied embeddings": {"tie_embeddings": True},
    "gates over all experts, refinement everywhere": {"norm_topk_prob": False, "clvr": TANH_GATE.model_copy(update={"inject": "all"})},
}


def one_rank_and(parallel: ParallelConfig, **changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What one rank reports, and what the ranks of this layout report that start from its weights."""
    (one,) = run_ranks(train, 1, ParallelConfig(), changes, None, timeout_s=60)
    return one, run_ranks(train, parallel.num_ranks, parallel, changes, one["start"], timeout_s=60)


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Any]:
    return run_ranks(train, 1, ParallelConfig(), {}, None, timeout_s=60)[0]


@pytest.fixture(scope="module", params=LAYOUTS.values(), ids=LAYOUTS.keys())
def ranks(request: pytest.FixtureRequest, one_rank: dict[str, Any]) -> list[dict[str, Any]]:
    parallel = request.param
    return run_ranks(train, parallel.num_ranks, parallel, {}, one_rank["start"], timeout_s=60)


def different(report: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> dict[str, float]:
    """Parameters whose gradients differ by more than `tolerance` of their norm."""
    differences = {name: float((report["gradients"][name] - grad).norm() / grad.norm().clamp(min=1e-12)) for name, grad in expected["gradients"].items()}
    return {name: difference for name, difference in differences.items() if not difference <= tolerance}


def test_initial_weights_do_not_depend_on_the_layout(ranks: list[dict[str, Any]], one_rank: dict[str, Any]) -> None:
    assert ranks[0]["drawn"] == one_rank["drawn"]


def test_full_tensors_come_back_from_every_layout_bit_for_bit(ranks: list[dict[str, Any]], one_rank: dict[str, Any]) -> None:
    start = ranks[0]["start"]
    assert set(start) == set(one_rank["start"])
    assert all(start[name].equal(one_rank["start"][name]) for name in start)


def test_every_layout_gives_the_loss_and_gradient_norm_of_one_rank(ranks: list[dict[str, Any]], one_rank: dict[str, Any]) -> None:
    for rank in ranks:
        for step in ("first", "second"):
            for metric in ("loss", "grad_norm", "moe/aux_loss"):
                assert rank[step][metric] == pytest.approx(one_rank[step][metric], rel=1e-5), (step, metric)


def test_every_layout_gives_the_gradient_of_every_parameter(ranks: list[dict[str, Any]], one_rank: dict[str, Any]) -> None:
    assert all(float(gradient.norm()) > 0 for gradient in one_rank["gradients"].values())
    assert different(ranks[0], one_rank) == {}


def test_every_layout_makes_the_same_update(ranks: list[dict[str, Any]], one_rank: dict[str, Any]) -> None:
    """Adam's first update is lr * sign(gradient): a gradient of almost zero may flip, so the updates are compared as vectors."""
    for name, weight in one_rank["weights"].items():
        update = weight - one_rank["start"][name]
        difference = ranks[0]["weights"][name] - weight
        assert difference.norm() <= 0.02 * update.norm() + 1e-9, name


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_variants_of_the_model_split_as_well(changes: dict[str, Any]) -> None:
    one, ranks = one_rank_and(ParallelConfig(num_ranks=2, tp=2), **changes)
    assert different(ranks[0], one) == {}
    assert ranks[0]["second"]["loss"] == pytest.approx(one["second"]["loss"], rel=1e-5)
