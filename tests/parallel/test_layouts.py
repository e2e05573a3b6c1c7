"""The model trains the same however it is laid out: same loss curve, same gradient of every parameter, same weights after an update."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from megatron_ext.config.schema import ClvrConfig, ParallelConfig, VisionConfig
from megatron_ext.observe.metrics_file import EP_RANK_LOAD
from megatron_ext.parallel.local import run_ranks
from tests.support.layouts import TAPS, Case, train
from tests.support.models import small_config


def layout(ranks: int, **parallel: Any) -> ParallelConfig:
    return ParallelConfig(num_ranks=ranks, **parallel)


TP2, EP2, DP2, PP2, CP2 = layout(2, tp=2), layout(2, ep=2), layout(2), layout(2, pp=2), layout(2, cp=2)
DENSE = {"num_experts": 0, "ffn_hidden_size": 96}
OPTIONS = {"gate_kind": "dynamic", "kv_tokens": "unshuffled", "kv_layers": (0, 1), "ffn_hidden": 16, "inner_iterations": 2, "query_source": "input_embedding"}
TWO_VIT_LAYERS = {"vision": small_config().vision.model_copy(update={"num_layers": 2})}
ADDED = {"taps": ((0, 1), (1, 2), (2, 3)), "fusion": "addition", "kv_tokens": "projected", "gate_kind": "channel"}
ALONE = {"vision": VisionConfig(enabled=False), "clvr": ClvrConfig(enabled=False, taps=())}
CASES = {
    "TP2": Case(TP2),
    "TP2 ETP2": Case(layout(2, tp=2, etp=2)),
    "EP2": Case(EP2),
    "DP2": Case(DP2),
    "PP2": Case(PP2),
    "CP2": Case(CP2),
    "TP2 EP2": Case(layout(2, tp=2, ep=2)),
    "TP2 EP2 DP2": Case(layout(4, tp=2, ep=2)),
    "TP2 EP2 ETP2": Case(layout(4, tp=2, ep=2, etp=2)),
    "PP2 VPP2": Case(layout(2, pp=2, vpp=2)),
    "PP2 TP2": Case(layout(4, pp=2, tp=2)),
    "PP2 EP2": Case(layout(4, pp=2, ep=2)),
    "PP2 DP2": Case(layout(4, pp=2)),
    "PP2 CP2": Case(layout(4, pp=2, cp=2)),
    "PP4": Case(layout(4, pp=4)),
    "CP2 EP2": Case(layout(2, cp=2, ep=2)),
    "CP2 TP2": Case(layout(4, cp=2, tp=2)),
    "CP2 DP2": Case(layout(4, cp=2)),
    "CP4": Case(layout(4, cp=4), packed=True),
    "one rank, packed": Case(layout(1), packed=True),
    "one rank, recompute full": Case(layout(1, recompute="full", recompute_layers=2)),
    "one rank, recompute selective": Case(layout(1, recompute="selective")),
    "TP2, recompute full, packed": Case(layout(2, tp=2, recompute="full"), packed=True),
    "EP2, recompute selective, packed": Case(layout(2, ep=2, recompute="selective"), packed=True),
    "PP2, recompute full, packed": Case(layout(2, pp=2, recompute="full"), packed=True),
    "PP2 VPP2, recompute full": Case(layout(2, pp=2, vpp=2, recompute="full")),
    "DP2, packed": Case(DP2, packed=True),
    "PP2 VPP2, packed": Case(layout(2, pp=2, vpp=2), packed=True),
    "CP2, recompute selective": Case(layout(2, cp=2, recompute="selective")),
    "CP2 EP2, recompute full, packed": Case(layout(2, cp=2, ep=2, recompute="full"), packed=True),
    "DP2, gradients reduced and weights gathered on the way": Case(layout(2, overlap_grad_reduce=True, overlap_param_gather=True)),
    "EP2, gradients reduced on the way": Case(layout(2, ep=2, overlap_grad_reduce=True)),
    "PP2, frozen ViT": Case(PP2, train_vision=False),
    "PP2 VPP2, frozen ViT": Case(layout(2, pp=2, vpp=2), train_vision=False),
    "TP2 CP2, frozen ViT, packed": Case(layout(4, tp=2, cp=2), train_vision=False, packed=True),
    "PP2 TP2, tied embeddings": Case(layout(4, pp=2, tp=2), changes={"tie_embeddings": True}),
    "TP2, gates over all experts, refinement everywhere": Case(TP2, changes={"norm_topk_prob": False, "clvr": TAPS.model_copy(update={"inject": "all"})}),
    "TP2 CP2, memory tokens, packed": Case(layout(4, tp=2, cp=2), changes={"clvr": TAPS.model_copy(update={"inject": "slots", "num_slots": 16})}, packed=True),
    "TP2, dense": Case(TP2, changes=DENSE),
    "PP2 DP2, dense, packed": Case(layout(4, pp=2), changes=DENSE, packed=True),
    "PP2 TP2, a stage without experts": Case(layout(4, pp=2, tp=2), changes={"dense_layers": (0, 1)}),
    "EP2, every other layer dense": Case(EP2, changes={"dense_layers": (0, 2)}),
    "TP2 EP2 DP2, a language model alone": Case(layout(4, tp=2, ep=2), changes=ALONE),
    "PP2, a language model alone": Case(PP2, changes=ALONE),
    "TP2, options of CLVR": Case(TP2, changes={"clvr": TAPS.model_copy(update={**OPTIONS, "taps": ((0, 1), (0, 2), (0, 3))}), **TWO_VIT_LAYERS}),
    "CP2, options of CLVR": Case(CP2, changes={"clvr": TAPS.model_copy(update={**OPTIONS, "taps": ((0, 1), (0, 2), (0, 3))}), **TWO_VIT_LAYERS}),
    "PP2, projected tokens for a frozen ViT, recompute full": Case(
        layout(2, pp=2, recompute="full"), train_vision=False, changes={"clvr": TAPS.model_copy(update={"kv_tokens": "projected", "memory": "shuffled"})}
    ),
    "PP2 TP2, addition": Case(layout(4, pp=2, tp=2), changes={"clvr": TAPS.model_copy(update=ADDED)}),
    "PP2, without CLVR": Case(PP2, changes={"clvr": ClvrConfig(enabled=False, taps=())}),
}


LONG = {
    "PP4", "PP2 DP2", "CP2 DP2", "DP2, packed", "PP2 VPP2, packed", "one rank, recompute selective", "PP2 VPP2, recompute full", "CP2, recompute selective",
    "EP2, gradients reduced on the way", "PP2 VPP2, frozen ViT", "PP2, a language model alone", "EP2, every other layer dense", "PP2 TP2, addition",
    "CP2 TP2", "PP2 TP2", "PP2 EP2", "TP2 EP2", "TP2 ETP2", "one rank, recompute full",
    "PP2 TP2, tied embeddings", "CP2, options of CLVR", "TP2, gates over all experts, refinement everywhere", "TP2 CP2, frozen ViT, packed", "CP4",
}  # fmt: skip
"""Journeys: each of their features is in another case too, or with the same layout in test_experts_kernels.py and test_moe_balancing.py."""
METRICS = ("loss", "grad_norm", "num_tokens", "moe/aux_loss", "data/tokens_per_row", "data/tiles_per_row", "clvr/tap0/gate", "clvr/tap2/gate")


@cache
def _one_rank(train_vision: bool, changes: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    return run_ranks(train, 1, Case(ParallelConfig(), train_vision=train_vision, changes=dict(changes)), None, timeout_s=60)[0]


def one_rank(case: Case) -> dict[str, Any]:
    return _one_rank(case.train_vision, tuple(sorted(case.changes.items())))


@pytest.fixture(scope="module", params=[pytest.param(case, marks=[pytest.mark.journey] if name in LONG else [], id=name) for name, case in CASES.items()])
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def ranks(case: Case) -> list[dict[str, Any]]:
    return run_ranks(train, case.parallel.num_ranks, case, one_rank(case)["start"], timeout_s=100)


def different(report: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> dict[str, float]:
    """Parameters whose gradients differ by more than `tolerance` of their norm. A gate of one number has a sum over all positions for a gradient, which may all
    but cancel while its rounding stays: of such gates the largest gradient is what the others are measured by."""
    norms = {name: grad.norm().clamp(min=1e-12) for name, grad in expected["gradients"].items()}
    gates = {name: norm for name, norm in norms.items() if name.endswith(".gate") and expected["gradients"][name].numel() == 1}
    norms |= dict.fromkeys(gates, max(gates.values(), default=torch.tensor(1.0)))
    differences = {name: float((report["gradients"][name] - grad).norm() / norms[name]) for name, grad in expected["gradients"].items()}
    return {name: difference for name, difference in differences.items() if not difference <= tolerance}


def test_initial_weights_do_not_depend_on_the_layout_and_come_back_bit_for_bit(case: Case, ranks: list[dict[str, Any]]) -> None:
    expected = one_rank(case)
    assert ranks[0]["drawn"] == expected["drawn"]
    assert ranks[0]["start"].keys() == expected["start"].keys()
    assert all(tensor.equal(expected["start"][name]) for name, tensor in ranks[0]["start"].items())


def test_every_rank_reports_the_loss_curve_of_one_rank(case: Case, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for ours, theirs in zip(rank["curve"], one_rank(case)["curve"], strict=True):
            assert ours.keys() - {EP_RANK_LOAD} == theirs.keys()  # how even the ranks of the experts are depends on the layout
            # The size of refinements is taken over all positions, padding included, of which packed rows have fewer.
            same = {*METRICS, *(() if case.packed else ("clvr/tap0/update_ratio", "clvr/tap2/update_ratio"))}
            for metric in same & theirs.keys():
                assert ours[metric] == pytest.approx(theirs[metric], rel=1e-5), metric


def test_every_parameter_has_the_gradient_of_one_rank(case: Case, ranks: list[dict[str, Any]]) -> None:
    expected = one_rank(case)
    trained = {name for name, gradient in expected["gradients"].items() if float(gradient.norm()) > 0}
    assert expected["gradients"].keys() - trained == {name for name in expected["gradients"] if not case.train_vision and name.startswith("vision.")}
    assert different(ranks[0], expected) == {}


def test_every_parameter_has_the_weights_of_one_rank_after_an_update(case: Case, ranks: list[dict[str, Any]]) -> None:
    """Adam's first step has the size of the learning rate (1e-3) whatever the gradient, so rounding of a vanishing gradient may turn a sign: where it is."""
    expected = one_rank(case)
    for name, weight in ranks[0]["weights"].items():
        gradient = expected["gradients"][name].abs()
        clear = gradient > 1e-4 * gradient.max().clamp(min=1e-12)
        assert (weight - expected["weights"][name])[clear].abs().max() < 1e-5 if clear.any() else True, name


def test_a_wrong_gradient_is_seen(ranks: list[dict[str, Any]]) -> None:
    """The comparison itself: one entry off by a thousandth of the norm is reported by name."""
    gradients = dict(ranks[0]["gradients"])
    name = "decoder.layers.3.self_attention.linear_qkv.weight"
    gradients[name] = gradients[name].clone()
    gradients[name][0, 0] += 1e-3 * gradients[name].norm()
    assert list(different({"gradients": gradients}, ranks[0])) == [name]


def test_checkpoints_know_the_whole_of_every_tensor_that_a_rank_has_a_part_of(ranks: list[dict[str, Any]]) -> None:
    """A tensor that is split, and is saved as if it were whole, would lose what the other ranks hold of it; nothing else but another layout would notice."""
    whole = {name: tuple(tensor.shape) for name, tensor in ranks[0]["start"].items()}
    for rank in ranks:
        assert {name: whole[name] for name in rank["saved"]} == rank["saved"]
    assert {"decoder.final_layernorm.weight", "output_layer.weight"} & set().union(*(rank["saved"] for rank in ranks))
