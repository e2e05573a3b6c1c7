"""Every objective against the formula of its paper, written as plain loops over numbers: losses, and gradients by finite differences."""

from __future__ import annotations

import math
from itertools import product
from typing import get_args

import numpy as np
import pytest
import torch

from megatron_ext.config.algorithms import Aggregation, Correction, KlEstimator
from megatron_ext.rl.objective.divergence import kl_estimate
from megatron_ext.rl.objective.loss import LossSettings, policy_loss

ROWS, LENGTH, LONGEST = 4, 5, 8
AGGREGATIONS = get_args(Aggregation)


def case(seed):
    """Answers of 1 to 5 tokens: log-probs now, before, at rollout, of the reference [ROWS, LENGTH]; advantages; lengths."""
    rng = np.random.default_rng(seed)
    old = -rng.exponential(size=(ROWS, LENGTH))
    new, rollout, reference = (old + scale * rng.normal(size=old.shape) for scale in (0.4, 0.5, 0.5))
    return new, old, rollout, reference, rng.normal(size=ROWS), rng.integers(1, LENGTH + 1, ROWS)


def clip(value, low, high):
    return min(max(value, low), high)


def plain_loss(case, settings, frozen):
    """The objective as papers write it: answer by answer, token by token. `frozen`: the log-probs where no gradient flows."""
    new, old, rollout, reference, advantages, lengths = case
    low, high = 1 - settings.clip_low, 1 + settings.clip_high
    answers = []
    for i in range(ROWS):
        losses = []
        for t in range(lengths[i]):
            ratio, advantage = math.exp(new[i][t] - old[i][t]), advantages[i]
            if settings.surrogate == "gspo" and settings.correction == "none":  # the objective of the paper, without the token-wise rewriting
                ratio = math.exp(mean_difference(new[i], old[i], lengths[i]))
            elif settings.surrogate == "gspo":  # tokens have weights of their own: GSPO-token, equation 13
                ratio = math.exp(mean_difference(frozen[i], old[i], lengths[i]) + new[i][t] - frozen[i][t])
            if settings.surrogate == "cispo":
                loss = -clip(math.exp(frozen[i][t] - old[i][t]), low, high) * advantage * new[i][t]
            else:
                loss = -min(ratio * advantage, clip(ratio, low, high) * advantage)
            if settings.surrogate == "clip" and advantage < 0:
                loss = min(loss, -settings.dual_clip * advantage)
            weight = math.exp(old[i][t] - rollout[i][t])
            if settings.correction == "tis":
                loss *= min(weight, settings.tis_cap)
            if settings.correction == "icepop":
                loss *= weight if settings.icepop_band[0] <= weight <= settings.icepop_band[1] else 0
            if settings.correction == "sequence_mask":
                whole = math.exp(mean_difference(old[i], rollout[i], lengths[i]))
                loss *= min(weight, settings.tis_cap) if settings.sequence_band[0] <= whole <= settings.sequence_band[1] else 0
            d = new[i][t] - reference[i][t]
            losses.append(loss + settings.kl_coeff * {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[settings.kl_estimator])
        answers.append(losses)
    match settings.aggregation:
        case "token_mean":
            return sum(map(sum, answers)) / sum(map(len, answers))
        case "seq_mean_token_mean":
            return sum(sum(losses) / len(losses) for losses in answers) / ROWS
        case "seq_mean_token_sum":
            return sum(map(sum, answers)) / ROWS
        case "seq_mean_token_sum_norm":
            return sum(map(sum, answers)) / (ROWS * LONGEST)


def mean_difference(new, old, length):
    return sum(new[t] - old[t] for t in range(length)) / length


def differences(drawn, settings, step=1e-6):
    """The gradient with respect to the log-probs by central differences."""
    new, *others = drawn
    gradient = np.zeros((ROWS, LENGTH))
    for i, t in product(range(ROWS), range(LENGTH)):
        values = []
        for moved in (new[i][t] + step, new[i][t] - step):
            row = [*new[i][:t], moved, *new[i][t + 1 :]]
            values.append(plain_loss(([*new[:i], row, *new[i + 1 :]], *others), settings, frozen=new))
        gradient[i, t] = (values[0] - values[1]) / (2 * step)
    return gradient


def ours(drawn, settings):
    new, old, rollout, reference, advantages, lengths = map(torch.from_numpy, drawn)
    new = new.clone().requires_grad_()
    mask = torch.arange(LENGTH) < lengths[:, None]
    result = policy_loss(new, old, rollout, advantages, mask, settings, ref_logprobs_BS=reference)
    loss = result.loss_sum / result.divisor
    loss.backward()
    return loss.item(), new.grad.numpy(), result.metrics


BOUNDS = {"clip": [(0.2, 0.28)], "gspo": [(3e-4, 4e-4), (0.05, 0.05), (0.5, 0.05)], "cispo": [(0.3, 0.3), (1.0, 0.3)]}
SURROGATES = [{"surrogate": surrogate, "clip_low": low, "clip_high": high, "dual_clip": 1.1} for surrogate, bounds in BOUNDS.items() for low, high in bounds]
PLACES = [{"aggregation": how, "longest": LONGEST} for how in AGGREGATIONS]
CORRECTIONS = [{"correction": how, "tis_cap": 1.2, "icepop_band": (0.8, 1.5), "sequence_band": (0.8, 1.25)} for how in get_args(Correction)]
DISTANCES = [{"kl_coeff": 0.3, "kl_estimator": estimator} for estimator in get_args(KlEstimator)]
OBJECTIVES = [LossSettings(**{**surrogate, **place, **correction}) for surrogate in SURROGATES for place in PLACES for correction in CORRECTIONS]
OBJECTIVES += [LossSettings(**{**surrogate, **place, **distance}) for surrogate in SURROGATES for place in PLACES for distance in DISTANCES]


def named(settings):
    return f"{settings.surrogate}-{settings.clip_low:g}-{settings.aggregation}-{settings.kl_estimator}x{settings.kl_coeff:g}-{settings.correction}"


@pytest.mark.parametrize("settings", OBJECTIVES, ids=named)
def test_loss_and_gradient_are_those_of_the_formula(settings):
    """Every surrogate over every aggregation, with every correction and every KL."""
    drawn = case(OBJECTIVES.index(settings))
    plain = [values.tolist() for values in drawn]
    loss, gradient, _ = ours(drawn, settings)
    assert loss == pytest.approx(plain_loss(plain, settings, frozen=plain[0]), rel=1e-9)
    np.testing.assert_allclose(gradient, differences(plain, settings), rtol=1e-6, atol=1e-8)


def test_gspo_worked_by_hand():
    """Tokens with ratios 2 and 1/2: the answer's ratio is 1, so that nothing is clipped. With ratios 2 and 2 it is 2, clipped at 1.1."""
    settings = LossSettings("gspo", clip_low=0.1, clip_high=0.1, aggregation="seq_mean_token_mean")
    old = torch.zeros(1, 2)
    for ratios, loss, gradient in (((2.0, 0.5), -3.0, -1.5), ((2.0, 2.0), -3.3, 0.0)):
        new = torch.tensor([ratios]).log().requires_grad_()
        result = policy_loss(new, old, old, torch.tensor([3.0]), torch.ones(1, 2), settings)
        result.loss_sum.backward()
        assert result.loss_sum.item() == pytest.approx(loss) and result.divisor == 1
        assert new.grad.tolist() == [pytest.approx([gradient, gradient])]


def test_cispo_bounds_a_tokens_weight_and_never_its_gradient():
    """Ratio 2 cut at 1.5: weight 1.5, of an answer with advantage 2; -1.5 x 2 x log pi, and its gradient."""
    new = torch.tensor([[math.log(2.0)]]).requires_grad_()
    zero = torch.zeros(1, 1)
    result = policy_loss(new, zero, zero, torch.tensor([2.0]), torch.ones(1, 1), LossSettings("cispo", clip_low=1.0, clip_high=0.5))
    result.loss_sum.backward()
    assert result.loss_sum.item() == pytest.approx(-3 * math.log(2)) and new.grad.item() == pytest.approx(-3)
    assert result.metrics["actor/clipfrac_high"].value == 1


def every_token(estimator):
    """On a policy over four tokens, by enumeration: the estimate's mean, the mean of its gradient, the mean of estimate times grad log pi; and both exact KLs
    (policy to reference, and round) with their gradients, with respect to the policy's logits."""
    torch.manual_seed(0)
    logits, reference = torch.randn(4, dtype=torch.float64, requires_grad=True), torch.randn(4, dtype=torch.float64).log_softmax(0)
    logprobs = logits.log_softmax(0)
    estimate, probs = kl_estimate(estimator, logprobs, reference), logprobs.exp().detach()
    forward = (logprobs.exp() * (logprobs - reference)).sum()
    backward = (reference.exp() * (reference - logprobs)).sum()
    means = (probs * estimate).sum(), (probs * estimate.detach() * logprobs).sum(), forward, backward
    return [mean.item() for mean in means], [torch.autograd.grad(mean, logits, retain_graph=True)[0] for mean in means]


def test_what_kl_estimates_are_worth_as_a_loss_and_in_the_reward():
    (k1, _, kl, _), (as_loss, in_reward, gradient, _) = every_token("k1")
    assert k1 == pytest.approx(kl)
    torch.testing.assert_close(as_loss, torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(in_reward, gradient)
    (k2, _, kl, _), (as_loss, _, gradient, _) = every_token("k2")
    assert k2 != pytest.approx(kl, rel=0.01)
    torch.testing.assert_close(as_loss, gradient)
    (k3, _, kl, _), (as_loss, _, gradient, round_about) = every_token("k3")
    assert k3 == pytest.approx(kl)
    torch.testing.assert_close(as_loss, round_about)
    assert (as_loss - gradient).abs().max() > 0.01
