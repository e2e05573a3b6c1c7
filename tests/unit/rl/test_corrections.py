"""What weighs tokens of another engine or of older weights, worked by hand: losses and gradients. Then laws of it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.batch.metric import merge_metrics
from megatron_ext.rl.objective.aggregation import Rows
from megatron_ext.rl.objective.loss import LossSettings, policy_loss
from megatron_ext.rl.objective.metrics import effective_sample_size

TOKENS = [(0.25, 1.0), (1.0, 1.0), (1.5, 1.0), (8.0, 1.0)]
"""(w, r): the present weights over the rollout's, the policy over the present weights."""
# Two tokens with advantage 2: r = 1.1 is within its bounds [0.8, 1.28], and r = 1.5 is not: -2 x 1.28, without gradient.
TWO = [(0.5, 1.1), (3.0, 1.5)]


def evaluate(answers, advantages, rows=None, **chosen):
    """Of answers as lists of (w, r): loss, its gradient with respect to each log pi, metrics. Old log-probs are log 1/4, and nothing depends on that."""
    length = max(map(len, answers))
    shape, old = (len(answers), length), math.log(0.25)
    new, rollout, mask = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64), torch.zeros(shape)
    for i, answer in enumerate(answers):
        for t, (weight, ratio) in enumerate(answer):
            new[i, t], rollout[i, t], mask[i, t] = old + math.log(ratio), old - math.log(weight), 1
    new.requires_grad_()
    result = policy_loss(new, torch.full_like(rollout, old), rollout, torch.tensor(advantages, dtype=torch.float64), mask, LossSettings(**chosen), rows=rows)
    (result.loss_sum / result.divisor).backward()
    gradient = [new.grad[i, : len(answer)].tolist() for i, answer in enumerate(answers)]
    return (result.loss_sum / result.divisor).item(), gradient, result.metrics


@pytest.mark.parametrize(
    ("correction", "weights"),
    [
        ("none", [1, 1, 1, 1]),
        ("tis", [0.25, 1, 1.5, 2]),
        ("icepop", [0, 1, 1.5, 0]),
        ("sequence_mask", [0.25, 1, 1.5, 2]),
    ],
)
def test_tokens_of_one_answer(correction, weights):
    """Every ratio is 1, the advantage 1: a token is worth minus its weight over four, and so is its gradient. The geometric mean of 0.25, 1, 1.5 and 8 is
    3^(1/4) = 1.316, within the band."""
    loss, gradient, metrics = evaluate([TOKENS], [1.0], correction=correction, sequence_band=(0.7, 1.4))
    assert loss == pytest.approx(-sum(weights) / 4, rel=1e-9)
    assert gradient == [pytest.approx([-weight / 4 for weight in weights], rel=1e-9)]
    assert ("is/clipped_frac" in metrics) == (correction != "none")
    if correction != "none":
        assert metrics["is/weight_mean"].value == pytest.approx(sum(weights) / 4)
        assert metrics["is/clipped_frac"].value == sum(weight != w for weight, (w, _) in zip(weights, TOKENS, strict=True)) / 4


@pytest.mark.parametrize(
    ("correction", "loss", "gradient"),
    [
        ("tis", -(0.5 * 2.2 + 2 * 2.56) / 2, [-0.5 * 2.2 / 2, 0]),  # the second weight is cut at 2
        ("icepop", -(0.5 * 2.2 + 3 * 2.56) / 2, [-0.5 * 2.2 / 2, 0]),
        ("sequence_mask", 0, [0, 0]),  # sqrt(0.5 x 3) = 1.22, outside
    ],
)
def test_the_decoupled_objective_bounds_the_ratio_to_the_present_weights_and_weighs_by_the_way_to_them(correction, loss, gradient):
    """w min(r A, clip(r) A). Had the bounds been about the rollout's weights, w r = 0.55 and 4.5, the first token would count -1.1 as it does, and the second
    -2.56, whatever its weight."""
    found, slope, _ = evaluate([TWO], [2.0], correction=correction)
    assert found == pytest.approx(loss, rel=1e-9) and slope == [pytest.approx(gradient, rel=1e-9)]


def test_a_bad_token_that_older_weights_liked_more():
    """A = -1, w = 0.5, r = 0.9: 0.5 x 0.9 = 0.45, gradient 0.45. At r = 0.7 the lower bound holds it at 0.5 x 0.8, without gradient."""
    for ratio, loss, gradient in ((0.9, 0.45, 0.45), (0.7, 0.4, 0.0)):
        found, slope, _ = evaluate([[(0.5, ratio)]], [-1.0], correction="tis")
        assert found == pytest.approx(loss, rel=1e-9) and slope == [[pytest.approx(gradient, rel=1e-9)]]


def test_a_sequence_mask_leaves_out_whole_answers():
    """Geometric means: sqrt(4 x 1/4) = 1 stays, its weights cut at 2; sqrt(1.2 x 1.2) = 1.2 is left out, and so is sqrt(0.5 x 1) = 0.71, though its second
    token is no worse than others. All six tokens count in the divisor; of the clipped ones are the four left out and the one cut."""
    answers = [[(4.0, 1.0), (0.25, 1.0)], [(1.2, 1.0), (1.2, 1.0)], [(0.5, 1.0), (1.0, 1.0)]]
    loss, gradient, metrics = evaluate(answers, [1.0, 1.0, -3.0], correction="sequence_mask")
    assert loss == pytest.approx(-(2 + 0.25) / 6, rel=1e-9)
    assert gradient == [pytest.approx([-2 / 6, -0.25 / 6], rel=1e-9), [0, 0], [0, 0]]
    assert metrics["is/clipped_frac"].value == pytest.approx(5 / 6) and metrics["is/weight_mean"].value == pytest.approx(2.25 / 6)


def test_gspo_and_cispo_are_weighed_token_by_token():
    """GSPO: ratios 2 and 1/2 make an answer of ratio 1, so that both tokens count A = 3, times 2 and 1/2. CISPO: -w clip(r) A log pi, of which clip(1.5) = 1.28
    has no gradient; log pi = log 0.25 + log 1.5."""
    gspo = {"surrogate": "gspo", "aggregation": "seq_mean_token_mean", "clip_low": 0.1, "clip_high": 0.1}
    loss, gradient, _ = evaluate([[(2.0, 2.0), (0.5, 0.5)]], [3.0], correction="tis", **gspo)
    assert loss == pytest.approx(-(2 * 3 + 0.5 * 3) / 2, rel=1e-9) and gradient == [pytest.approx([-3.0, -0.75], rel=1e-9)]
    loss, gradient, _ = evaluate([[(0.5, 1.5)]], [2.0], surrogate="cispo", correction="tis")
    assert loss == pytest.approx(-0.5 * 1.28 * 2 * math.log(0.375), rel=1e-9) and gradient == [[pytest.approx(-1.28, rel=1e-9)]]


def test_answers_of_older_weights_are_told_apart():
    """w = e^0.1 where both have the same weights, e^-0.5 and e^0.3 under older ones. k3(d) = e^-d + d - 1 with d = -log w."""
    fresh, stale = [(math.exp(0.1), 1.0)], [(math.exp(-0.5), 1.0), (math.exp(0.3), 1.0)]
    rows = Rows(torch.tensor([1, 2]), stale_B=torch.tensor([False, True]))
    _, _, metrics = evaluate([fresh, stale], [1.0, 1.0], rows, correction="tis")
    assert metrics["mismatch/logprob_abs_diff_max"].value == pytest.approx(0.1) and metrics["mismatch/kl"].value == pytest.approx(math.exp(0.1) - 1.1)
    assert metrics["staleness/logprob_abs_diff_max"].value == pytest.approx(0.5) and metrics["staleness/logprob_abs_diff_mean"].value == pytest.approx(0.4)
    assert metrics["staleness/kl"].value == pytest.approx((math.exp(-0.5) - 0.5 + math.exp(0.3) - 1.3) / 2)
    _, _, alone = evaluate([fresh, stale], [1.0, 1.0], correction="tis")
    assert not [name for name in alone if name.startswith("staleness/")]


def test_the_effective_sample_size():
    """Weights 1 and 3: (mean 2)^2 over the mean square 5."""
    _, _, metrics = evaluate([[(1.0, 1.0), (3.0, 1.0)]], [1.0])
    told = {name: metric.value for name, metric in metrics.items()}
    effective_sample_size(told)
    assert told["mismatch/ess"] == pytest.approx(0.8) and not {"mismatch/weight_mean", "mismatch/weight_square_mean"} & told.keys()


POSITIVE = st.floats(0.2, 4.0)
ANSWERS = st.lists(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=4), min_size=2, max_size=5)


@settings(deadline=None, max_examples=50)
@given(ANSWERS, st.sampled_from(["tis", "icepop", "sequence_mask"]))
def test_tokens_that_both_sides_agree_on_weigh_one(answers, correction):
    agreed = [[(1.0, ratio) for _, ratio in answer] for answer in answers]
    advantages = [1.0 - 2 * (i % 2) for i in range(len(answers))]
    plain, corrected = evaluate(agreed, advantages), evaluate(agreed, advantages, correction=correction)
    assert plain[0] == pytest.approx(corrected[0], rel=1e-12) and all(a == pytest.approx(b, rel=1e-12) for a, b in zip(plain[1], corrected[1], strict=True))


@settings(deadline=None, max_examples=50)
@given(ANSWERS, st.lists(st.booleans(), min_size=4, max_size=4))
def test_a_sequence_mask_knows_whole_answers_where_a_rank_holds_slices(answers, first_holds):
    """Context parallelism: any two halves of the positions; the rank that holds the others joins in the sum."""
    answers = [(answer * 4)[:4] for answer in answers]
    weights = torch.tensor([[weight for weight, _ in answer] for answer in answers], dtype=torch.float64)
    ratios = torch.tensor([[ratio for _, ratio in answer] for answer in answers], dtype=torch.float64)
    advantages, ones = torch.linspace(-1, 1, len(answers), dtype=torch.float64), torch.ones_like(weights)
    chosen, zero = LossSettings(correction="sequence_mask", sequence_band=(0.7, 1.5)), torch.zeros_like(weights)
    whole = policy_loss(ratios.log(), zero, -weights.log(), advantages, ones, chosen)
    parts = []
    for held_S, counted in ((torch.tensor(first_holds), True), (~torch.tensor(first_holds), False)):
        rows = Rows(ones.sum(1), counted, lambda part_B: weights.log().sum(1))
        parts.append(policy_loss(*(x[:, held_S] for x in (ratios.log(), zero, -weights.log())), advantages, ones[:, held_S], chosen, rows=rows))
    assert sum(part.loss_sum for part in parts).item() == pytest.approx(whole.loss_sum.item(), rel=1e-9, abs=1e-12)
    merged = merge_metrics(part.metrics for part in parts)
    assert merged["is/clipped_frac"].value == pytest.approx(whole.metrics["is/clipped_frac"].value)
