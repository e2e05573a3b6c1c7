"""The planner's weights, gradients and optimizer states are those of built models, to the byte, on every rank of every layout that the tests train."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from megatron_ext.config.schema import ParallelConfig
from megatron_ext.parallel.local import run_ranks
from megatron_ext.parallel.planner.memory import learner_state
from megatron_ext.parallel.planner.tensors import Training
from tests.parallel.test_layouts import ALONE, DENSE
from tests.parallel.test_layouts import CASES as TRAINED
from tests.support.layouts import TAPS, Case, model_of
from tests.support.sizes import held_by_rank

MORE = {
    "bf16, DP2": Case(ParallelConfig(num_ranks=2), changes={"dtype": "bf16"}),
    "bf16, EP2, odd sizes": Case(ParallelConfig(num_ranks=2, ep=2), changes={"dtype": "bf16", "hidden_size": 36, "head_dim": 6, "expert_ffn_hidden_size": 22}),
    "odd sizes, DP3": Case(ParallelConfig(num_ranks=3), changes={"hidden_size": 36, "head_dim": 6, "expert_ffn_hidden_size": 22}),
    "bf16, PP2 VPP2, frozen ViT": Case(ParallelConfig(num_ranks=2, pp=2, vpp=2), train_vision=False, changes={"dtype": "bf16"}),
    "no CLVR, TP2 EP2": Case(ParallelConfig(num_ranks=2, tp=2, ep=2), changes={"clvr": TAPS.model_copy(update={"enabled": False})}),
    "one gate fixed, CP2": Case(ParallelConfig(num_ranks=2, cp=2), changes={"clvr": TAPS.model_copy(update={"gate": "zero_out"})}),
    "tied embeddings, one stage": Case(ParallelConfig(num_ranks=1), changes={"tie_embeddings": True}),
    "bf16, overlapped, DP2, every other layer dense": Case(
        ParallelConfig(num_ranks=2, overlap_grad_reduce=True), changes={"dtype": "bf16", "dense_layers": (0, 2), "ffn_hidden_size": 100}
    ),
    "PP2 VPP2, dense at both ends": Case(ParallelConfig(num_ranks=2, pp=2, vpp=2), changes={"dense_layers": (0, 3)}),
    "PP2 EP2, a stage without experts": Case(ParallelConfig(num_ranks=4, pp=2, ep=2), changes={"dense_layers": (0, 1)}),
    "CP2, dense, a language model alone, tied": Case(ParallelConfig(num_ranks=2, cp=2), changes={**DENSE, **ALONE, "tie_embeddings": True}),
    "overlapped, DP4": Case(ParallelConfig(num_ranks=4, overlap_grad_reduce=True, overlap_param_gather=True)),
}
CASES = {**TRAINED, **MORE}


def _built(case: Case) -> Case:
    """The case as far as it decides what a rank builds: packed rows and recompute are of the steps."""
    return replace(case, packed=False, parallel=case.parallel.model_copy(update={"recompute": "none", "recompute_layers": 1}))


@cache
def _measured(ranks: int) -> list[tuple[Case, list[dict[str, Any]]]]:
    """Everything that is built in a world of this size, in one launch."""
    cases: list[Case] = []
    for case in map(_built, CASES.values()):
        if case.parallel.num_ranks == ranks and case not in cases:
            cases.append(case)
    of_ranks = run_ranks(held_by_rank, ranks, cases, timeout_s=100)
    return [(case, [found[number] for found in of_ranks]) for number, case in enumerate(cases)]


@pytest.mark.parametrize("name", CASES)
def test_weights_gradients_and_optimizer_states_are_predicted_to_the_byte_on_every_rank(name: str) -> None:
    case = CASES[name]
    model = model_of(case.changes)
    overlaps = bool(case.parallel.overlap_grad_reduce or case.parallel.overlap_param_gather)
    for found in next(held for built, held in _measured(case.parallel.num_ranks) if built == _built(case)):
        predicted = learner_state(model, case.parallel, found["place"], Training(vision=case.train_vision), overlaps)
        assert (predicted.weights_bytes, predicted.gradients_bytes, predicted.optimizer_bytes) == (found["weights"], found["gradients"], found["optimizer"]), (
            found
        )
