"""A step of mixed preference optimisation on the small real model: what its numbers are, whatever the cut, and what it teaches."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_ext.model.heads import decided
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.training.preference import RunningMean, bco_pair, dpo
from tests.support.pairs import MPO, PAIRS, own_pairs, preference

DELTA = RunningMean(0.3, 8)


def plain(update, batch):
    """Log-probs of answers [R], and the number of their tokens, by log_softmax over all logits."""
    bare = update._engine.chunks[0]
    with torch.no_grad():
        logits_BSV = bare(batch.inputs).transpose(0, 1).double()
    targets_BS, mask_BS = decided(batch.inputs.tokens_BS), decided(batch.mask_BS)
    logprobs_BS = logits_BSV.log_softmax(-1).gather(-1, targets_BS[..., None])[..., 0]
    return (logprobs_BS * mask_BS).sum(1), mask_BS.sum(1)


def test_the_numbers_of_a_step_are_those_of_the_formulas(context: ParallelContext) -> None:
    update = preference(context, DELTA)
    (batch,) = own_pairs(0, context)
    start_R, _ = plain(update, batch)
    update.update([batch])  # the first step moves the policy off its reference, the second is measured
    (batch,) = own_pairs(0, context)
    policy_R, tokens_R = plain(update, batch)
    delta = update.rewards.mean
    metrics = update.update([batch])
    chosen, rejected = MPO.beta * (policy_R - start_R)[0::2], MPO.beta * (policy_R - start_R)[1::2]
    sft = -(policy_R[0::2].sum() / tokens_R[0::2].sum()).item()
    expected = {"dpo": dpo(chosen, rejected).mean().item(), "bco": bco_pair(chosen, rejected, delta).mean().item(), "sft": sft, "delta": delta}
    expected |= {"margin": (chosen - rejected).mean().item(), "logprob_chosen": policy_R[0::2].mean().item(), "logprob_rejected": policy_R[1::2].mean().item()}
    assert {name: metrics[f"mpo/{name}"] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert metrics["loss"] == pytest.approx(0.8 * expected["dpo"] + 0.2 * expected["bco"] + sft, rel=1e-4)


def test_in_the_first_step_policy_and_reference_are_one_in_every_bit(context: ParallelContext) -> None:
    update = preference(context)
    metrics = update.update(own_pairs(0, context))
    assert (metrics["mpo/reward_chosen"], metrics["mpo/reward_rejected"], metrics["mpo/delta"]) == (0, 0, 0)
    assert metrics["mpo/dpo"] == pytest.approx(math.log(2)) and metrics["mpo/bco"] == pytest.approx(2 * math.log(2))
    assert update.rewards == RunningMean(0.0, 2 * PAIRS)


@pytest.mark.parametrize(("micro", "packed"), [(1, False), (2, True), (PAIRS, True)])
def test_a_step_does_not_depend_on_how_it_is_cut_or_packed(context: ParallelContext, micro: int, packed: bool) -> None:
    whole, cut = preference(context, DELTA), preference(context, DELTA)
    for step in range(2):
        expected, metrics = whole.update(own_pairs(step, context)), cut.update(own_pairs(step, context, micro, packed))
        same = [name for name in expected if name.startswith("mpo/") or name in ("loss", "grad_norm")]
        assert {name: metrics[name] for name in same} == pytest.approx({name: expected[name] for name in same}, rel=2e-4, abs=1e-5)


def test_a_few_steps_part_right_answers_from_wrong_ones_and_do_not_make_them_less_likely(context: ParallelContext) -> None:
    update = preference(context)
    curve = [update.update(own_pairs(0, context)) for _ in range(MPO.steps)]
    assert curve[-1]["mpo/margin"] > 0.2 and curve[-1]["mpo/accuracy"] == 1 and curve[-1]["loss"] < curve[0]["loss"]
    assert curve[-1]["mpo/logprob_chosen"] > curve[0]["mpo/logprob_chosen"]


def test_without_the_generation_loss_the_margin_grows_as_well_but_right_answers_gain_less(context: ParallelContext) -> None:
    with_sft, without = preference(context), preference(context, settings=MPO.model_copy(update={"sft_weight": 0.0}))
    for _ in range(5):
        gained, lacking = (update.update(own_pairs(0, context)) for update in (with_sft, without))
    assert lacking["mpo/margin"] > 0
    assert lacking["mpo/logprob_chosen"] < gained["mpo/logprob_chosen"]
