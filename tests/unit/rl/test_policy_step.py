"""The learner's forward pass on real rollouts of a real model: it agrees with the engine that sampled them, and refuses what it cannot vouch for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_ext.batch import ScoredRollout
from megatron_ext.batch.metric import merge_metrics
from megatron_ext.config.algorithms import ALGORITHMS
from megatron_ext.config.schema import OptimizerConfig, RLConfig, RolloutConfig, RunConfig
from megatron_ext.errors import RouteMismatch, UserError
from megatron_ext.inference.engine import Engine
from megatron_ext.model.assembly import build_model
from megatron_ext.model.heads import banned_tokens, policy_logits
from megatron_ext.rl.batching import microbatches, unpack
from megatron_ext.rl.parcels import plan_parcels
from megatron_ext.rl.policy_step import Policy, policy_batch
from megatron_ext.training.megatron_engine import build_engine
from tests.support.models import IMAGE, USABLE, Words, open_gates, small_config, small_prompts

SAMPLES = 3


@pytest.fixture(scope="module")
def model(context):
    built = build_model(small_config(), IMAGE, context)
    open_gates(built)
    return build_engine([built], OptimizerConfig(warmup_steps=0), 10, context).wrapped[0]


@pytest.fixture(scope="module")
def answers(model, context):
    engine = Engine(model.module, context, Words(), RolloutConfig(max_new_tokens=6, temperature=0.7))
    rollouts = engine.generate(small_prompts(4), SAMPLES, seeds=lambda prompt, sample: 10 * prompt + sample, version=0)
    return [ScoredRollout(rollout, float(len(rollout.response_T)), {}) for rollout in rollouts]


def shard_of(answers, multiple=1):
    return unpack(plan_parcels(answers, np.linspace(-1, 1, len(answers)), minibatches=1, dp_size=1, multiple=multiple, pad_id=0)[0][0])


def policy(model, context, reference=None, **rl):
    config = RunConfig(model=small_config(), rollout=RolloutConfig(max_new_tokens=6, temperature=0.7), rl=RLConfig(**{"max_logprob_diff": 1e-4, **rl}))
    return Policy([model], [] if reference is None else [reference], config, USABLE, context)


def loss(learner, model, batch):
    return learner.loss(model, batch, learner.forward(model, batch))


def loss_of(model, context, shard, micro_batch, **rl):
    """(loss sum, divisor, metrics) over the microbatches."""
    parts = [loss(policy(model, context, **rl), model, policy_batch(part, context.device, 0)) for part in microbatches(shard, micro_batch, 1)]
    return sum(part[0].item() for part in parts), sum(int(part[1]) for part in parts), merge_metrics(part[2] for part in parts)


def test_the_learner_recomputes_the_very_log_probs_and_routes_of_the_rollouts(model, context, answers):
    _, divisor, metrics = loss_of(model, context, shard_of(answers), 100)
    assert divisor == sum(len(answer.rollout.response_T) for answer in answers)
    assert metrics["mismatch/logprob_abs_diff_max"].value < 1e-5
    assert metrics["route/digest_ok"].value == metrics["route/coverage"].value == 1
    assert metrics["actor/ratio_max"].value == 1


def test_the_loss_does_not_depend_on_how_rows_are_split_into_microbatches_or_padded(model, context, answers):
    whole = loss_of(model, context, shard_of(answers), 100)
    for shard, micro_batch in ((shard_of(answers), 1), (shard_of(answers), 5), (shard_of(answers, multiple=16), 100)):
        loss, divisor, metrics = loss_of(model, context, shard, micro_batch)
        assert loss == pytest.approx(whole[0], abs=1e-5) and divisor == whole[1]
        assert metrics["actor/entropy"].value == pytest.approx(whole[2]["actor/entropy"].value, rel=1e-5)


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "grpo"])
def test_no_algorithm_depends_on_how_rows_are_split_into_microbatches(model, context, answers, algorithm):
    parts = ALGORITHMS[algorithm]
    whole = loss_of(model, context, shard_of(answers), 100, **parts)
    loss, divisor, metrics = loss_of(model, context, shard_of(answers), 5, **parts)
    assert loss == pytest.approx(whole[0], abs=1e-5) and divisor == whole[1]
    assert metrics["actor/loss"].value == pytest.approx(whole[2]["actor/loss"].value, abs=1e-6) == pytest.approx(loss / divisor, abs=1e-6)


def test_the_gradient_of_an_on_policy_loss_is_minus_advantage_times_the_log_prob_gradient(model, context, answers):
    """The ratio is 1, so nothing is clipped: d loss / d w = - sum A d log pi / d w."""
    shard = shard_of(answers)
    batch = policy_batch(shard, context.device, 0)
    learner = policy(model, context)
    weight = model.module.output_layer.weight
    (gradient,) = torch.autograd.grad(loss(learner, model, batch)[0], weight)
    logprobs_BS, _ = learner.scores(learner.forward(model, batch), batch, model.module.frame(batch.inputs))
    surrogate = -(torch.where(batch.mask_BS[:, 1:], logprobs_BS[:, :-1], 0.0) * batch.advantages_B[:, None]).sum()
    (expected,) = torch.autograd.grad(surrogate, weight)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


def test_the_entropy_is_that_of_the_distribution_that_was_sampled_from(model, context, answers):
    (answer,) = shard_rows = [answers[0]]
    batch = policy_batch(shard_of(shard_rows), context.device, 0)
    _, _, metrics = loss(policy(model, context), model, batch)
    with model.module.router_tap.replay(batch.experts_BSLK), torch.no_grad():
        logits = policy_logits(model(batch.inputs), 0.7, banned_tokens(64, USABLE, [IMAGE], context.pgs.tp, context.device))
    probs = torch.softmax(logits[:-1, 0], dim=-1)[slice(*answer.rollout.response_rows)]
    assert metrics["actor/entropy"].value == pytest.approx(float(-(probs * probs.clamp(min=1e-30).log()).sum(-1).mean()), rel=1e-5)


def test_routes_that_differ_from_what_the_rollout_recorded_stop_the_run_and_name_it(model, context, answers):
    shard = shard_of(answers)
    row = 4
    changed = shard.batch.experts_BSLK.copy()
    changed[row, 2, 0] = changed[row, 2, 0][::-1]  # the same experts in another order
    damaged = replace(shard, batch=replace(shard.batch, experts_BSLK=changed))
    with pytest.raises(RouteMismatch, match=f"rollout {shard.keys_B[row]} recorded"):
        loss(policy(model, context), model, policy_batch(damaged, context.device, 0))


@pytest.mark.parametrize("wrong", [0.01, float("nan")])
def test_log_probs_that_differ_under_the_same_weights_stop_the_run_and_name_the_token(model, context, answers, wrong):
    shard = shard_of(answers)
    logprobs = shard.batch.logprobs_BS.copy()
    position = int(shard.lengths_B[1]) - 1
    logprobs[1, position] += wrong
    damaged = policy_batch(replace(shard, batch=replace(shard.batch, logprobs_BS=logprobs)), context.device, 0)
    for step in (lambda batch: policy(model, context).prepared([batch], with_old=True), lambda batch: loss(policy(model, context), model, batch)):
        with pytest.raises(UserError, match=rf"rl.max_logprob_diff: the learner gives token {position} of {shard.keys_B[1]} .* under the same weights"):
            step(damaged)


def test_old_log_probs_are_those_of_the_weights_before_the_first_minibatch(model, context, answers):
    batch = policy_batch(shard_of(answers), context.device, 0)
    learner = policy(model, context)
    (prepared,) = learner.prepared([batch], with_old=True)
    torch.testing.assert_close(prepared.old_BS[:, :-1][batch.mask_BS[:, 1:]], batch.rollout_BS[batch.mask_BS], atol=1e-5, rtol=0)
    direct, prepared_loss = loss(learner, model, batch), loss(learner, model, prepared)
    assert direct[0].item() == pytest.approx(prepared_loss[0].item(), abs=1e-6)


def with_reference(model, context, batch, reference):
    learner = policy(model, context, reference=reference, kl_coeff=0.1)
    (prepared,) = learner.prepared([batch], with_old=False)
    return loss(learner, model, prepared)


def test_the_kl_to_the_reference_is_zero_while_the_policy_is_the_reference(model, context, answers):
    batch = policy_batch(shard_of(answers), context.device, 0)
    _, _, metrics = with_reference(model, context, batch, model.module)
    assert metrics["actor/kl_ref"].value == pytest.approx(0, abs=1e-9)
    other = build_model(small_config(), IMAGE, context, seed=9)
    _, _, metrics = with_reference(model, context, batch, other)
    assert metrics["actor/kl_ref"].value > 0.01


def test_without_replay_the_learner_routes_by_itself_and_reports_no_digest(model, context, answers):
    _, _, metrics = loss_of(model, context, shard_of(answers), 100, replay_routes=False)
    assert "route/digest_ok" not in metrics
    assert metrics["mismatch/logprob_abs_diff_max"].value < 1e-5


def test_every_answer_has_its_distance_from_the_reference_whatever_the_microbatches(model, context, answers):
    """Zero while the reference is the policy; otherwise k1 summed over an answer's tokens: log-probs at rollout less those of the reference."""
    reference = build_model(small_config(), IMAGE, context, seed=9)
    learner = policy(model, context, reference=reference, kl_coeff=0.1, kl_estimator="k1", kl_placement="reward")
    shard = shard_of(answers)
    found = learner.reference_kl([policy_batch(part, context.device, 0) for part in microbatches(shard, 5, 1)])
    assert sorted(found) == sorted(shard.keys_B)
    batch = policy_batch(shard, context.device, 0)
    with torch.no_grad():
        reference_BS, _ = learner.scores(reference(batch.inputs), batch, reference.frame(batch.inputs))
    for row, key in enumerate(shard.keys_B):
        sampled = batch.mask_BS[row, 1:]
        expected = (batch.rollout_BS[row, 1:][sampled] - reference_BS[row, :-1][sampled]).sum()
        assert found[key] == pytest.approx(float(expected), abs=1e-4)
    same = policy(model, context, reference=model.module, kl_coeff=0.1, kl_estimator="k1", kl_placement="reward").reference_kl([batch])
    assert max(map(abs, same.values())) < 1e-4
    assert learner.prepared([batch], with_old=False)[0].reference_BS is None, "the loss has no term of it"


def aged(shard, *rows):
    """The shard with log-probs of some rows that are off by 0.3, as older weights would have had them; they say so."""
    logprobs, versions = shard.batch.logprobs_BS.copy(), shard.batch.versions_BS.copy()
    for row in rows:
        logprobs[row][shard.batch.response_mask_BS[row] > 0] += 0.3
        versions[row][np.flatnonzero(shard.batch.response_mask_BS[row])[0]] -= 2
    return replace(shard, batch=replace(shard.batch, logprobs_BS=logprobs, versions_BS=versions))


ASYNCHRONOUS = {"max_staleness": 2, "mismatch_correction": "tis", "partial_rollouts": True}


def test_answers_of_older_weights_are_weighed_instead_of_compared(model, context, answers):
    """Rows 1 and 4 have one token of weights two steps older: all of their tokens are taken to be e^-0.3 as likely now. The others agree to rounding."""
    shard = shard_of(answers)
    batch = policy_batch(aged(shard, 1, 4), context.device, 0)
    _, _, metrics = loss(policy(model, context, **ASYNCHRONOUS), model, batch)
    tokens, stale = int(batch.mask_BS.sum()), int(batch.mask_BS[[1, 4]].sum())
    assert metrics["mismatch/logprob_abs_diff_max"].value < 1e-5
    assert metrics["staleness/logprob_abs_diff_mean"].value == pytest.approx(0.3, abs=1e-5)
    assert metrics["is/weight_mean"].value == pytest.approx((tokens - stale + stale * np.exp(-0.3)) / tokens, abs=1e-5)
    assert metrics["staleness/max"].value == 2 and metrics["staleness/mean"].value == pytest.approx(4 / tokens)


def test_their_part_of_the_loss_is_their_weight_times_what_it_was(model, context, answers):
    """With ratio 1: -w A a token. Old log-probs that are taken before the first of several minibatches change nothing."""
    shard, learner = shard_of(answers), policy(model, context, **ASYNCHRONOUS)
    batch = policy_batch(aged(shard, 1, 4), context.device, 0)
    per_row_B = batch.mask_BS.sum(1) * batch.advantages_B
    expected = -(per_row_B.sum() + (np.exp(-0.3) - 1) * per_row_B[[1, 4]].sum()).item()
    assert loss(learner, model, batch)[0].item() == pytest.approx(expected, abs=1e-4)
    (prepared,) = learner.prepared([batch], with_old=True)
    assert loss(learner, model, prepared)[0].item() == pytest.approx(expected, abs=1e-4)


def test_answers_of_the_present_weights_are_still_compared(model, context, answers):
    """Row 2 is off, too, and says that it is of the present weights."""
    shard = aged(shard_of(answers), 1, 2)
    versions = shard.batch.versions_BS.copy()
    versions[2][shard.batch.response_mask_BS[2] > 0] = 0
    lying = policy_batch(replace(shard, batch=replace(shard.batch, versions_BS=versions)), context.device, 0)
    with pytest.raises(UserError, match=rf"rl.max_logprob_diff: the learner gives token \d+ of {shard.keys_B[2]} .* under the same weights \(version 0\)"):
        loss(policy(model, context, **ASYNCHRONOUS), model, lying)


def test_a_batch_of_older_weights_alone_has_no_mismatch_to_tell_of(model, context, answers):
    shard = shard_of(answers)
    _, _, metrics = loss(policy(model, context, **ASYNCHRONOUS), model, policy_batch(aged(shard, *range(len(answers))), context.device, 0))
    assert metrics["mismatch/logprob_abs_diff_max"].count == 0 and metrics["staleness/logprob_abs_diff_max"].value == pytest.approx(0.3, abs=1e-5)
