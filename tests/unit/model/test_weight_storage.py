"""Weights that lie as generation wants them are the same weights: names, shapes, values, answers; and new ones can be loaded into them."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.checkpoint.full_tensors import digest, full_tensors
from megatron_ext.model.assembly import VisionLanguageModel, build_model
from megatron_ext.model.experts import GroupedExperts, chosen_experts
from megatron_ext.model.weight_storage import store_for_generation
from megatron_ext.parallel.groups import ParallelContext
from tests.support.models import IMAGE, small_batch, small_config
from tests.support.weights import load_full_tensors


def build(context: ParallelContext, seed: int, **changes: object) -> VisionLanguageModel:
    return build_model(small_config(init_std=0.3, **changes), IMAGE, context, seed=seed)


@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": True}, {"experts_kernel": "sequential"}, {"expert_ffn_hidden_size": 66}, {"dtype": "bf16"}, {"num_experts": 0}]
)
def test_stored_for_generation_a_model_has_the_same_weights_and_logits(context: ParallelContext, changes: dict[str, object]) -> None:
    model = build(context, 3, **changes).eval()
    with torch.no_grad():
        before, logits = digest(full_tensors(model, context)), model(small_batch())
        store_for_generation(model)
        assert digest(full_tensors(model, context)) == before
        torch.testing.assert_close(model(small_batch()), logits, **({"rtol": 0.05, "atol": 0.05} if changes.get("dtype") == "bf16" else {}))


def test_weights_loaded_later_are_those_that_answer(context: ParallelContext) -> None:
    """As at every refit; `tests/unit/rl/test_refit.py` does it with slices."""
    other, model = build(context, 4).eval(), build(context, 3).eval()
    store_for_generation(model)
    load_full_tensors(model, dict(full_tensors(other, context)), context)
    assert digest(full_tensors(model, context)) == digest(full_tensors(other, context))
    with torch.no_grad():
        torch.testing.assert_close(model(small_batch()), other(small_batch()))


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_experts_in_one_piece_answer_like_one_after_the_other(context: ParallelContext, tokens: int) -> None:
    model = build(context, 5, num_experts=32)
    apart = model.decoder.layers[0].mlp.experts
    x_TH = torch.randn(tokens, model.model_config.hidden_size)
    gates_TK, experts_TK = torch.rand(tokens, 32).topk(2, dim=1)
    with torch.no_grad():
        plain = chosen_experts(apart, x_TH, gates_TK, experts_TK)
        store_for_generation(model)
        assert isinstance(apart, GroupedExperts) and apart.piece is not None
        torch.testing.assert_close(chosen_experts(apart, x_TH, gates_TK, experts_TK), plain)
    one = sum(gates_TK[0, k] * expert_of(apart, int(experts_TK[0, k]), x_TH[0]) for k in range(2))
    torch.testing.assert_close(plain[0], one, rtol=1e-4, atol=1e-5)


def expert_of(experts: GroupedExperts, number: int, x_H: torch.Tensor) -> torch.Tensor:
    """fc2 (silu(u) * v), [u; v] = fc1 x."""
    u, v = (experts.local_experts[number].linear_fc1.weight @ x_H).chunk(2)
    return experts.local_experts[number].linear_fc2.weight @ (torch.nn.functional.silu(u) * v)
