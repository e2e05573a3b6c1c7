"""Tokens to experts and back on one rank: the same rows, gates, sums and gradients as with Megatron's dispatcher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_ext.model.assembly import build_model
from megatron_ext.model.decoder import transformer_config
from megatron_ext.model.dispatch import LocalDispatcher
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.parallel.plan import Layout
from tests.support.models import IMAGE, small_batch, small_config


def there_and_back(dispatcher: Any, hidden_SBH: torch.Tensor, gates_NE: torch.Tensor, map_NE: torch.Tensor) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    """Through experts that multiply by their gate: (rows by expert, how many each has, what comes back)."""
    rows_TH, gates_T = dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(hidden_SBH, map_NE, gates_NE))
    rows_TH, counts_E, gates_T = dispatcher.dispatch_postprocess(rows_TH, gates_T)
    back = dispatcher.token_combine(dispatcher.combine_preprocess(rows_TH * gates_T[:, None]))
    return rows_TH, counts_E.tolist(), dispatcher.combine_postprocess(back)


def test_two_tokens_of_two_experts_each_by_hand(context: ParallelContext) -> None:
    """Token 0 (value 1) goes to experts 0 and 2, token 1 (value 10) to 0 and 1: rows 1, 10 | 10 | 1."""
    dispatcher = LocalDispatcher(transformer_config(small_config(num_experts=3, experts_per_token=2), context.layout), context.pgs)
    gates_NE = torch.tensor([[0.25, 0.0, 0.75], [0.5, 0.5, 0.0]])
    rows_TH, counts, back_SBH = there_and_back(dispatcher, torch.tensor([[[1.0]], [[10.0]]]), gates_NE, gates_NE > 0)
    assert rows_TH.flatten().tolist() == [1.0, 10.0, 10.0, 1.0] and counts == [2, 1, 1]
    assert back_SBH.flatten().tolist() == [1.0, 10.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_sums_and_gradients_are_those_of_megatrons_dispatcher_bit_for_bit(context: ParallelContext, dtype: torch.dtype) -> None:
    config = transformer_config(small_config(num_experts=8, experts_per_token=3), Layout.of(context.parallel))
    torch.manual_seed(0)
    gates_NE = torch.zeros(12, 8).scatter(1, torch.rand(12, 8).topk(3).indices, torch.rand(12, 3))
    hidden_SBH, weights_SBH = torch.randn(6, 2, 5, dtype=dtype), torch.randn(6, 2, 5, dtype=dtype)
    found = []
    for dispatcher in (MoEAlltoAllTokenDispatcher(8, list(range(8)), config, context.pgs), LocalDispatcher(config, context.pgs)):
        hidden, gates = hidden_SBH.clone().requires_grad_(), gates_NE.clone().requires_grad_()
        rows_TH, counts, back_SBH = there_and_back(dispatcher, hidden, gates, gates_NE > 0)
        (back_SBH * weights_SBH).sum().backward()
        found.append((rows_TH, torch.tensor(counts), back_SBH, hidden.grad, gates.grad))
    for theirs, ours in zip(*found, strict=True):
        assert torch.equal(theirs, ours)


@pytest.mark.parametrize("changes", [{}, {"moe_capacity_factor": 1.0}])
def test_a_model_on_one_rank_dispatches_so_unless_an_expert_may_be_full(context: ParallelContext, changes: dict[str, Any]) -> None:
    model = build_model(small_config(**changes), IMAGE, context)
    kinds = {type(layer.mlp.token_dispatcher) for layer in model.decoder.layers}
    assert kinds == {MoEAlltoAllTokenDispatcher if changes else LocalDispatcher}
    assert model(small_batch()).isfinite().all()
