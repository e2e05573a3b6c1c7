"""The policy loss: number by number, against verl's documented formula in plain Python, and its gradient against autograd of the plain formula."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.batch.metric import merge_metrics
from megatron_ext.config.algorithms import Aggregation, Correction, Surrogate
from megatron_ext.rl.objective.aggregation import Rows
from megatron_ext.rl.objective.loss import LossSettings, policy_loss

GRPO = LossSettings()
SURROGATES, AGGREGATIONS = st.sampled_from(get_args(Surrogate)), st.sampled_from(get_args(Aggregation))


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values])


def one_token(ratio: float, advantage: float, **changes: float) -> float:
    zero = row(0.0)
    result = policy_loss(row(math.log(ratio)), zero, zero, torch.tensor([advantage]), row(1.0), LossSettings(**changes))
    return result.loss_sum.item()


def verl_vanilla(new, old, advantages, mask, clip_low, clip_high, clip_c, ref=None, kl_coeff=0.0):
    """`compute_policy_loss_vanilla` with agg_loss token-mean and kl_penalty low_var_kl, token by token. Returns the mean loss, kl, low and high fractions."""
    losses, kls, lows, highs = [], [], 0, 0
    for index in zip(*np.nonzero(mask), strict=True):
        negative_approx_kl = min(max(new[index] - old[index], -20.0), 20.0)
        ratio, advantage = math.exp(negative_approx_kl), advantages[index[0]]
        pg_losses1 = -advantage * ratio
        pg_losses2 = -advantage * min(max(ratio, 1 - clip_low), 1 + clip_high)
        clip_pg_losses1 = max(pg_losses1, pg_losses2)
        pg_losses3 = -advantage * clip_c
        clip_pg_losses2 = min(pg_losses3, clip_pg_losses1)
        loss = clip_pg_losses2 if advantage < 0 else clip_pg_losses1
        if ref is not None:
            kl = ref[index] - new[index]
            loss += kl_coeff * (math.exp(kl) - kl - 1)
        losses.append(loss)
        kls.append(-negative_approx_kl)
        lows += advantage < 0 and pg_losses2 > pg_losses1
        highs += advantage > 0 and pg_losses2 > pg_losses1
    count = len(losses)
    return sum(losses) / count, sum(kls) / count, lows / count, highs / count


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [
        (1.0, 2.0, -2.0),
        (1.1, 2.0, -2.2),
        (1.5, 2.0, -2.56),  # clipped at 1.28
        (0.5, 2.0, -1.0),  # a good token that became rarer is not clipped
        (0.9, -2.0, 1.8),
        (0.5, -2.0, 1.6),  # clipped at 0.8
        (1.5, -2.0, 3.0),  # a bad token that became likelier is not clipped ...
        (5.0, -2.0, 6.0),  # ... but for the dual clip at 3
        (5.0, 0.0, 0.0),
    ],
)
def test_one_token_worked_by_hand(ratio, advantage, loss):
    assert one_token(ratio, advantage) == pytest.approx(loss, rel=1e-5)


def test_bounds_are_settings():
    assert one_token(1.5, 2.0, clip_high=0.1) == pytest.approx(-2.2)
    assert one_token(0.5, -2.0, clip_low=0.4) == pytest.approx(1.2)
    assert one_token(5.0, -2.0, dual_clip=4.0) == pytest.approx(8.0)


def test_a_ratio_beyond_e_to_the_20_is_cut_there():
    assert one_token(math.exp(30), -1.0, dual_clip=1e12) == pytest.approx(math.exp(20), rel=1e-5)


def test_k3_worked_by_hand():
    zero = row(0.0)
    result = policy_loss(zero, zero, zero, torch.zeros(1), row(1.0), LossSettings(kl_coeff=0.5), ref_logprobs_BS=row(math.log(2.0)))
    # d = log pi - log ref = -log 2: exp(-d) + d - 1 = 2 - 0.693 - 1
    assert result.metrics["actor/kl_ref"].value == pytest.approx(0.306853, abs=1e-6)
    assert result.loss_sum.item() == pytest.approx(0.153426, abs=1e-6)


def case(seed: int, rows: int = 4, length: int = 7):
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float) -> torch.Tensor:
        return torch.randn(rows, length, generator=generator) * scale

    old = -draw(1.0).abs()
    mask = torch.rand(rows, length, generator=generator) < 0.6
    mask[0, 0] = True
    return old + draw(0.8), old, old + draw(0.01), torch.randn(rows, generator=generator), mask, old + draw(0.3)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.1]))
def test_it_is_verls_formula_number_by_number(seed, kl_coeff):
    new, old, rollout, advantages, mask, ref = case(seed)
    chosen = LossSettings(kl_coeff=kl_coeff)
    result = policy_loss(new, old, rollout, advantages, mask, chosen, ref_logprobs_BS=ref)
    expected = verl_vanilla(*(value.double().numpy() for value in (new, old, advantages)), mask.numpy(), 0.2, 0.28, 3.0, ref.double().numpy(), kl_coeff)
    measured = [result.metrics[name].value for name in ("actor/ppo_kl", "actor/clipfrac_low", "actor/clipfrac_high")]
    assert [(result.loss_sum / result.divisor).item(), *measured] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert result.metrics["actor/loss"].value == pytest.approx(expected[0], rel=1e-4, abs=1e-5)
    assert result.metrics["actor/ratio_max"].value == pytest.approx((new - old)[mask].max().exp().item(), rel=1e-5)
    assert result.metrics["mismatch/logprob_abs_diff_max"].value == pytest.approx((old - rollout)[mask].abs().max().item())
    assert result.metrics["mismatch/logprob_abs_diff_mean"].value == pytest.approx((old - rollout)[mask].abs().mean().item())


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000))
def test_the_gradient_is_that_of_the_plain_formula(seed):
    new, old, rollout, advantages, mask, ref = case(seed)
    ours, plain = new.clone().requires_grad_(), new.double().clone().requires_grad_()
    policy_loss(ours, old, rollout, advantages, mask, LossSettings(kl_coeff=0.1), ref_logprobs_BS=ref).loss_sum.backward()
    ratio, gain = (plain - old).exp(), advantages[:, None].expand_as(plain).double()
    clipped = torch.max(-gain * ratio, -gain * ratio.clamp(0.8, 1.28))
    total = torch.where(gain < 0, torch.min(clipped, -3 * gain), clipped) + 0.1 * ((ref - plain).exp() - (ref - plain) - 1)
    (total * mask).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad.float(), rtol=1e-4, atol=1e-5)


def test_on_policy_the_gradient_is_minus_the_advantage():
    new = torch.zeros(2, 3).requires_grad_()
    result = policy_loss(new, torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([2.0, -1.0]), torch.tensor([[0, 1, 1], [0, 1, 0]]), GRPO)
    result.loss_sum.backward()
    assert new.grad.tolist() == [[0, -2, -2], [0, 1, 0]]


def test_clipped_tokens_have_no_gradient():
    new = row(math.log(2.0), math.log(0.5), math.log(10.0)).requires_grad_()
    zero = torch.zeros(1, 3)
    policy_loss(new, zero, zero, torch.tensor([1.0]), row(1, 0, 0), GRPO).loss_sum.backward()
    policy_loss(new, zero, zero, torch.tensor([-1.0]), row(0, 1, 1), GRPO).loss_sum.backward()
    assert new.grad.tolist() == [[0, 0, 0]]


def test_what_masked_positions_hold_is_never_read():
    new, old, rollout, advantages, mask, ref = case(1)
    dirty = [torch.where(mask, value, torch.full_like(value, bad)) for value, bad in ((new, -math.inf), (old, math.nan), (rollout, math.inf), (ref, math.nan))]
    dirty[0].requires_grad_()
    clean = policy_loss(new, old, rollout, advantages, mask, LossSettings(kl_coeff=0.1), ref_logprobs_BS=ref)
    result = policy_loss(dirty[0], dirty[1], dirty[2], advantages, mask, LossSettings(kl_coeff=0.1), ref_logprobs_BS=dirty[3])
    result.loss_sum.backward()
    assert result.metrics == clean.metrics and torch.isfinite(dirty[0].grad).all()
    assert (dirty[0].grad[~mask] == 0).all()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 3), SURROGATES, AGGREGATIONS, st.sampled_from(get_args(Correction)))
def test_a_split_batch_has_the_loss_and_the_metrics_of_the_whole(seed, cut, surrogate, aggregation, correction):
    new, old, rollout, advantages, mask, _ = case(seed)
    chosen = LossSettings(
        surrogate, aggregation=aggregation, longest=5, correction=correction, tis_cap=1.0, icepop_band=(0.99, 1.01), sequence_band=(0.999, 1.001)
    )
    whole = policy_loss(new, old, rollout, advantages, mask, chosen)
    parts = [policy_loss(new[at], old[at], rollout[at], advantages[at], mask[at], chosen) for at in (slice(0, cut), slice(cut, None))]
    assert sum(part.divisor for part in parts) == whole.divisor
    assert sum(part.loss_sum for part in parts).item() == pytest.approx(whole.loss_sum.item(), rel=1e-4, abs=1e-5)
    for name, metric in merge_metrics(part.metrics for part in parts).items():
        assert metric.value == pytest.approx(whole.metrics[name].value, rel=1e-4, abs=1e-5), name
    assert whole.metrics["actor/loss"].value == pytest.approx((whole.loss_sum / whole.divisor).item(), rel=1e-4, abs=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), SURROGATES, AGGREGATIONS, st.lists(st.booleans(), min_size=7, max_size=7))
def test_ranks_that_hold_slices_of_every_answer_have_the_gradient_and_the_loss_of_one_that_holds_all(seed, surrogate, aggregation, first_holds):
    """Context parallelism: the slices of two ranks are any two halves of the positions."""
    new, old, rollout, advantages, mask, ref = case(seed)
    chosen = LossSettings(surrogate, aggregation=aggregation, longest=5, kl_coeff=0.1)
    whole = new.clone().requires_grad_()
    joint = policy_loss(whole, old, rollout, advantages, mask, chosen, ref_logprobs_BS=ref)
    joint.loss_sum.backward()
    sliced = new.clone().requires_grad_()
    total_B = torch.where(mask, new - old, 0.0).sum(1)
    first_S, parts = torch.tensor(first_holds), []
    for held_S, counted in ((first_S, True), (~first_S, False)):
        rows = Rows(mask.sum(1), counted, lambda part_B: total_B)
        tensors = (sliced[:, held_S], old[:, held_S], rollout[:, held_S])
        parts.append(policy_loss(*tensors, advantages, mask[:, held_S], chosen, ref_logprobs_BS=ref[:, held_S], rows=rows))
    sum(part.loss_sum for part in parts).backward()
    assert sum(part.divisor for part in parts) == joint.divisor
    torch.testing.assert_close(sliced.grad, whole.grad, rtol=1e-5, atol=1e-6)
    merged = merge_metrics(part.metrics for part in parts)
    for name in ("actor/loss", "actor/pg_loss", "actor/clipfrac_low", "actor/ratio_max"):
        assert merged[name].value == pytest.approx(joint.metrics[name].value, rel=1e-4, abs=1e-5), name


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), SURROGATES, AGGREGATIONS, st.permutations(range(4)))
def test_the_order_of_rows_changes_no_gradient(seed, surrogate, aggregation, order):
    new, old, rollout, advantages, mask, _ = case(seed)
    chosen = LossSettings(surrogate, aggregation=aggregation, longest=5)
    plain, shuffled = new.clone().requires_grad_(), new[order].clone().requires_grad_()
    policy_loss(plain, old, rollout, advantages, mask, chosen).loss_sum.backward()
    policy_loss(shuffled, old[order], rollout[order], advantages[order], mask[order], chosen).loss_sum.backward()
    torch.testing.assert_close(shuffled.grad, plain.grad[order])


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), AGGREGATIONS)
def test_on_policy_every_ratio_is_one_and_all_surrogates_have_the_gradient_of_reinforce(seed, aggregation):
    """-A times the token's weight: nothing is clipped, and the ratio of an answer is that of its tokens."""
    new, _, rollout, advantages, mask, _ = case(seed)
    lengths_B1 = mask.sum(1, keepdim=True)
    weight_B1 = 1 / lengths_B1.clamp(min=1) if aggregation == "seq_mean_token_mean" else torch.ones(4, 1)
    for surrogate in get_args(Surrogate):
        live = new.clone().requires_grad_()
        result = policy_loss(live, new, rollout, advantages, mask, LossSettings(surrogate, aggregation=aggregation, longest=5))
        result.loss_sum.backward()
        torch.testing.assert_close(live.grad, -advantages[:, None] * weight_B1 * mask, rtol=1e-5, atol=1e-6)
        assert result.metrics["actor/ratio_max"].value == 1


def test_dr_grpo_divides_by_rows_with_a_response_times_a_constant():
    zero = torch.zeros(3, 4)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    result = policy_loss(zero, zero, zero, torch.tensor([1.0, -0.5, 0.0]), mask, LossSettings(aggregation="seq_mean_token_sum_norm", longest=10))
    assert result.divisor.item() == 20
    assert result.loss_sum.item() == pytest.approx(-2 * 1.0 + 4 * 0.5)


def test_filler_rows_alone_give_a_zero_loss_that_still_has_a_gradient():
    new = torch.zeros(2, 3).requires_grad_()
    result = policy_loss(new, torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2), torch.zeros(2, 3), GRPO, entropy_BS=torch.ones(2, 3))
    result.loss_sum.backward()
    assert (result.loss_sum.item(), result.divisor.item(), new.grad.abs().sum().item()) == (0, 0, 0)
    assert all(metric.count == 0 and math.isnan(metric.value) for metric in result.metrics.values())


def test_entropy_is_reported_when_it_is_given():
    zero = torch.zeros(1, 2)
    result = policy_loss(zero, zero, zero, torch.ones(1), row(1, 0), GRPO, entropy_BS=row(0.5, 9.0))
    assert result.metrics["actor/entropy"].value == 0.5


def test_a_kl_weight_without_a_reference_and_wrong_shapes_are_refused():
    zero = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="no reference log-probs"):
        policy_loss(zero, zero, zero, torch.ones(1), zero, LossSettings(kl_coeff=0.1))
    with pytest.raises(ValueError, match=r"mask_BS has shape \(1, 3\), expected \(1, 2\)"):
        policy_loss(zero, zero, zero, torch.ones(1), torch.zeros(1, 3), GRPO)
