"""The router's balancing, with values worked by hand, and against Megatron's own formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias, switch_load_balancing_loss_func, z_loss_func

from megatron_ext.config.schema import ModelConfig
from megatron_ext.model.assembly import VisionLanguageModel, build_model
from megatron_ext.model.router import Router, RouterCall, balancing_loss, called, within_capacity
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.training.moe_metrics import ExpertLoad, moved
from tests.support.models import IMAGE, small_batch, small_config

SIGMOID = {"moe_score_function": "sigmoid", "moe_expert_bias": True}


def model_of(context: ParallelContext, **changes: object) -> VisionLanguageModel:
    return build_model(small_config(**changes), IMAGE, context, seed=2)


def router_of(context: ParallelContext, **changes: object) -> Router:
    return model_of(context, **changes).decoder.routers()[0]


def routed(router: Router, logits: list[list[float]], call: RouterCall | None = None, padding: list[bool] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates and map of tokens with these logits for the first experts; the others are out of reach."""
    full = torch.full((len(logits), 1, 8), -20.0)
    full[:, 0, : len(logits[0])] = torch.tensor(logits)
    with called([router], call or RouterCall()):
        return router.routing(full.requires_grad_(), None if padding is None else torch.tensor(padding)[:, None])


def test_four_tokens_at_two_experts_balance_as_by_hand() -> None:
    """K = 1, E = 2, three tokens at expert 0. Scores sum to 2.4 and 1.6: 2 (3/4 * 2.4/4 + 1/4 * 1.6/4) = 1.1."""
    assert float(balancing_loss(torch.tensor([[3.0, 1.0]]), torch.tensor([[2.4, 1.6]]), 1)) == pytest.approx(1.1)


def test_two_samples_that_are_uneven_in_opposite_ways_are_even_together_and_uneven_alone() -> None:
    """Sample 0 sends two tokens to expert 0 with score 0.9, sample 1 two to expert 1: each alone has 2 * 0.9 = 1.8, together 2 * 1/2 * (1/2 + 1/2) = 1."""
    counts, scores = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.8, 0.2], [0.2, 1.8]])
    assert float(balancing_loss(counts, scores, 1)) == pytest.approx(1.8)
    assert float(balancing_loss(counts.sum(0, keepdim=True), scores.sum(0, keepdim=True), 1)) == pytest.approx(1.0)


def test_a_sample_without_tokens_does_not_count_and_one_of_other_length_weighs_the_same() -> None:
    """Lengths 2, 0 and 6: mean of 1.8 and 1.0."""
    counts, scores = torch.tensor([[2.0, 0.0], [0.0, 0.0], [3.0, 3.0]]), torch.tensor([[1.8, 0.2], [0.0, 0.0], [3.0, 3.0]])
    assert float(balancing_loss(counts, scores, 1)) == pytest.approx((1.8 + 1.0) / 2)


@given(st.integers(1, 4), st.integers(4, 9), st.integers(0, 2**31))
def test_the_loss_of_one_sample_is_megatrons_and_of_equal_ones_its_sequence_loss(topk: int, experts: int, seed: int) -> None:
    scores_NSE = torch.rand(3, 10, experts, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    map_NSE = torch.zeros_like(scores_NSE).scatter(2, scores_NSE.topk(topk, dim=-1).indices, 1.0)
    whole = switch_load_balancing_loss_func(scores_NSE.flatten(0, 1), map_NSE.sum((0, 1)), 30, topk, experts, 1.0)
    torch.testing.assert_close(balancing_loss(map_NSE.sum((0, 1))[None], scores_NSE.sum((0, 1))[None], topk), whole)
    by_sample = sum(switch_load_balancing_loss_func(scores, map_SE.sum(0), 10, topk, experts, 1.0) for scores, map_SE in zip(scores_NSE, map_NSE, strict=True))
    torch.testing.assert_close(balancing_loss(map_NSE.sum(1), scores_NSE.sum(1), topk), by_sample / 3)


def test_the_sequence_loss_takes_padded_rows_and_packed_samples_for_the_same(context: ParallelContext) -> None:
    """Two samples of 2 and 4 tokens: as two rows of four positions, and one after the other."""
    torch.manual_seed(0)
    first, second = torch.randn(2, 8), torch.randn(4, 8)
    router = router_of(context, moe_balancing="seq_aux_loss")
    rows_SBE = torch.stack([torch.cat([first, torch.randn(2, 8)]), second], dim=1)
    padding_SB = torch.tensor([[False, False], [False, False], [True, False], [True, False]])
    losses = []
    for logits, padding, samples in (
        (rows_SBE, padding_SB, torch.tensor([0, 1] * 4)),
        (torch.cat([first, second])[:, None], None, torch.tensor([0, 0, 1, 1, 1, 1])),
    ):
        router.tally.clear()
        with called([router], RouterCall(samples_T=samples, num_samples=2)):
            router.routing(logits.clone().requires_grad_(), padding)
        losses.append(router.tally["aux_loss"])
    torch.testing.assert_close(*losses)


def test_the_z_loss_is_the_mean_square_of_the_log_partition_padding_left_out(context: ParallelContext) -> None:
    """logsumexp(ln 3, ln 5) = ln 8 (the other experts weigh e^-20) for one token, ln 2 for the other; the third is padding."""
    router = router_of(context, moe_z_loss_coeff=0.1)
    logits = [[math.log(3), math.log(5)], [0.0, 0.0], [9.0, 9.0]]
    routed(router, logits, padding=[False, False, True])
    assert float(router.tally["z_loss"]) == pytest.approx((math.log(8) ** 2 + math.log(2) ** 2) / 2, rel=1e-5)
    full = torch.full((2, 8), -20.0)
    full[:, :2] = torch.tensor(logits[:2])
    torch.testing.assert_close(router.tally["z_loss"], z_loss_func(full, 1.0))


def test_balancing_losses_reach_the_logits_with_their_coefficient_and_the_weight_of_the_micro_batch(context: ParallelContext) -> None:
    """By autograd of the formula: 0.1 * 7 * z-loss."""
    router = router_of(context, moe_balancing="none", moe_z_loss_coeff=0.1)
    logits = torch.randn(5, 1, 8).requires_grad_()
    with called([router], RouterCall(weight=7.0)):
        gates, _ = router.routing(logits)
    (0.0 * gates.sum()).backward()
    again = logits.detach().clone().requires_grad_()
    (0.1 * 7 * again.logsumexp(-1).square().mean()).backward()
    torch.testing.assert_close(logits.grad, again.grad)


def test_a_bias_decides_who_is_chosen_and_is_no_part_of_the_gates(context: ParallelContext) -> None:
    """Scores 0.9, 0.8, 0.7, and a bias of 0.3 on the third: experts 0 and 2 are chosen, with gates 0.9 / 1.6 and 0.7 / 1.6."""
    router = router_of(context, **SIGMOID)
    logits = [[math.log(s / (1 - s)) for s in (0.9, 0.8, 0.7)]]
    assert routed(router, logits)[1][0].nonzero().flatten().tolist() == [0, 1]
    router.expert_bias[2] = 0.3
    gates, chosen = routed(router, logits)
    assert chosen[0].nonzero().flatten().tolist() == [0, 2]
    assert gates[0, [0, 2]].tolist() == pytest.approx([0.9 / 1.6, 0.7 / 1.6])


@pytest.mark.parametrize("changes", [{}, {"norm_topk_prob": False}, {"moe_score_function": "sigmoid"}, SIGMOID], ids=["softmax", "over all", "sigmoid", "bias"])
def test_recorded_gates_are_the_routers_own_live_and_replayed(context: ParallelContext, changes: dict[str, object]) -> None:
    model = model_of(context, **changes)
    router = model.decoder.layers[1].mlp.router
    if router.expert_bias is not None:
        router.expert_bias.copy_(torch.linspace(-0.4, 0.4, 8))
    seen: list[torch.Tensor] = []
    router.register_forward_hook(lambda _module, _inputs, outputs: seen.append(outputs[0]))
    taken = []
    for listening in (model.router_tap.record(), model.router_tap.replay(torch.tensor([6, 1]).expand(3, 24, 3, 2))):
        with torch.no_grad(), listening as routes:
            model(small_batch())
            taken.append((routes.experts(72), routes.gates(72)))
    for (experts, gates), gates_TE in zip(taken, seen, strict=True):
        chosen = gates_TE.gather(1, experts[:, 1])
        torch.testing.assert_close(gates[:, 1], chosen / chosen.sum(-1, keepdim=True))
    assert not (taken[0][0] == torch.tensor([6, 1])).all() and (taken[1][0] == torch.tensor([6, 1])).all()


def test_the_bias_goes_down_for_experts_above_the_mean_up_below_and_as_megatrons(context: ParallelContext) -> None:
    """Loads 5, 3, 1, 3 have mean 3."""
    counts, bias = torch.tensor([5.0, 3.0, 1.0, 3.0]), torch.tensor([0.2, 0.0, 0.0, -0.1])
    assert moved(counts).tolist() == [-1, 0, 1, 0]
    torch.testing.assert_close(bias + 0.01 * moved(counts), get_updated_expert_bias(counts.clone(), bias, 0.01))


def test_a_step_moves_the_biases_by_their_rate_and_a_rate_of_zero_holds_them(context: ParallelContext) -> None:
    for rate in (0.25, 0.0):
        router = router_of(context, **SIGMOID, moe_expert_bias_rate=rate)
        ExpertLoad([router], small_config()).balance(torch.tensor([[8.0, 0, 0, 0, 0, 0, 0, 0]]).numpy())
        assert router.expert_bias.tolist() == [-rate, *[rate] * 7]


def test_a_bias_stays_in_float32_when_the_model_does_not(context: ParallelContext) -> None:
    router = router_of(context, **SIGMOID)
    router.expert_bias.fill_(1.001)
    router.to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16 and router.expert_bias.dtype == torch.float32
    assert float(router.expert_bias[0]) == pytest.approx(1.001, rel=1e-6)


def test_padding_and_passes_without_gradients_are_not_counted(context: ParallelContext) -> None:
    router = router_of(context)
    routed(router, [[2.0, 1.0, 0.0], [2.0, 0.0, 1.0], [0.0, 1.0, 2.0]], padding=[False, False, True])
    with torch.no_grad():
        routed(router, [[2.0, 1.0, 0.0]])
    assert router.tally["chosen"].tolist() == [2, 1, 1, 0, 0, 0, 0, 0]


def test_a_full_expert_keeps_the_largest_gates_or_the_first_tokens() -> None:
    gates = torch.tensor([[0.3, 0.7], [0.6, 0.4], [0.5, 0.5], [0.9, 0.1]])
    wanted = torch.tensor([[True, True], [True, False], [True, True], [True, False]])
    assert within_capacity(gates, wanted, 2, "probs").tolist() == [[False, True], [True, False], [False, True], [True, False]]
    assert within_capacity(gates, wanted, 2, "position").tolist() == [[True, True], [True, False], [False, True], [False, False]]
    assert within_capacity(gates, wanted, 4, "probs").equal(wanted)


def test_four_tokens_at_the_same_two_of_eight_experts_keep_one_place_each_at_factor_one(context: ParallelContext) -> None:
    """Capacity ceil(1 * 2 * 4 / 8) = 1: 2 of 8 assignments stay. Padding takes no place; what is balanced is what was wanted."""
    router = router_of(context, moe_capacity_factor=1.0, moe_drop_policy="position")
    tokens = [[5.0, 5.0], [2.0, 1.0], [2.0, 1.0], [2.0, 1.0]]
    gates, kept = routed(router, tokens, RouterCall(drops=True), padding=[True, False, False, False])
    assert kept.nonzero().tolist() == [[1, 0], [1, 1]] and (gates > 0).equal(kept)
    assert router.tally["chosen"].tolist()[:2] == [3, 3] and float(router.tally["kept"]) == 2
    assert routed(router, tokens)[1].sum() == 8  # outside of training nobody is dropped


@pytest.mark.parametrize("padded", [False, True])
def test_a_capacity_that_holds_everyone_changes_nothing_and_a_small_one_does(context: ParallelContext, padded: bool) -> None:
    """E / K = 4 times the even share is all tokens."""
    batch = small_batch()
    outputs = {factor: model_of(context, moe_capacity_factor=factor, moe_pad_to_capacity=padded and factor is not None)(batch) for factor in (None, 4.0, 0.5)}
    torch.testing.assert_close(outputs[4.0], outputs[None], rtol=1e-5, atol=1e-5)
    assert (outputs[0.5] - outputs[None]).abs().max() > 0.01


def test_padded_experts_compute_what_unpadded_ones_do_and_have_the_same_gradients(context: ParallelContext) -> None:
    batch, found = small_batch(), []
    for padded in (False, True):
        model = model_of(context, moe_capacity_factor=1.0, moe_pad_to_capacity=padded)
        with torch.no_grad():
            whole = model(batch)
        output = model(batch)
        output.square().mean().backward()
        found.append((output, whole, {name: parameter.grad for name, parameter in model.named_parameters()}))
    (output, whole, gradients), (padded_output, padded_whole, padded_gradients) = found
    torch.testing.assert_close(padded_output, output)
    torch.testing.assert_close(padded_whole, whole)  # nothing is dropped without gradients, padded or not
    assert (output - whole).abs().max() > 0.01
    for name, gradient in gradients.items():
        torch.testing.assert_close(padded_gradients[name], gradient, msg=name)


def test_metrics_name_what_is_on(context: ParallelContext) -> None:
    settings = ModelConfig(moe_balancing="seq_aux_loss", moe_z_loss_coeff=0.1, moe_capacity_factor=0.5, **SIGMOID).model_dump()
    model = model_of(context, **{name: settings[name] for name in settings if name.startswith("moe_")})
    load = ExpertLoad(model.decoder.routers(), model.model_config)
    model.decoder.routers()[1].expert_bias[3] = -0.2
    model(small_batch())
    metrics, counts = load.reduced(1, context)
    assert set(metrics) == {"moe/seq_aux_loss", "moe/z_loss", "moe/dropped_frac", "moe/expert_bias_max", "moe/max_vio", "moe/load_entropy"}
    assert metrics["moe/expert_bias_max"] == pytest.approx(0.2)
    assert 0.5 <= metrics["moe/dropped_frac"] < 1.0  # at most half of the even share is kept
    assert counts.sum() == 3 * 24 * 2 * 3
    load.reset()
    model_without = model_of(context, moe_balancing="none")
    model_without(small_batch())
    assert set(ExpertLoad(model_without.decoder.routers(), model_without.model_config).reduced(1, context)[0]) == {"moe/max_vio", "moe/load_entropy"}
