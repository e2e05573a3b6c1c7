"""`rollout.deterministic`: the learner computes the very numbers that the rollouts were sampled from, in every bit; without it, to rounding.

The engine reads prompts once, in whatever company they are admitted, writes answers a token at a time beside others, and splits attention; the learner computes
whole padded rows. Prompts here have several lengths, with images and without; CLVR looks at the images; each token has three of eight experts.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_ext.batch import ScoredRollout, route_digest
from megatron_ext.config.schema import OptimizerConfig, RLConfig, RolloutConfig, RunConfig
from megatron_ext.device.batch_invariant import batch_invariant
from megatron_ext.errors import UserError
from megatron_ext.inference.engine import Engine
from megatron_ext.model.assembly import build_model
from megatron_ext.model.weight_storage import store_for_generation
from megatron_ext.rl.batching import microbatches, unpack
from megatron_ext.rl.parcels import plan_parcels
from megatron_ext.rl.policy_step import Policy, policy_batch
from megatron_ext.training.megatron_engine import build_engine
from tests.support.models import IMAGE, USABLE, Words, open_gates, small_config, small_prompts

MODEL = small_config(experts_per_token=3, dense_layers=(1,))
PROMPTS, SAMPLES = 10, 4
SETTINGS = {"max_new_tokens": 70, "temperature": 0.7, "deterministic": True, "batch_size": 6}
"""Six answers side by side: four of a prompt and two of the next, then whoever finds a place."""


@pytest.fixture(scope="module")
def model(context):
    built = build_model(MODEL, IMAGE, context)
    open_gates(built)
    return build_engine([built], OptimizerConfig(warmup_steps=0), 10, context).wrapped[0]


@pytest.fixture(scope="module")
def twin(context):
    """The same weights as a rollout worker keeps them."""
    built = build_model(MODEL, IMAGE, context)
    open_gates(built)
    store_for_generation(built)
    return built


def answers(twin, context, **changes):
    engine = Engine(twin, context, Words(), RolloutConfig(**{**SETTINGS, **changes}))
    return engine.generate(small_prompts(PROMPTS), SAMPLES, seeds=lambda prompt, sample: 10 * prompt + sample, version=0)


@pytest.fixture(scope="module")
def rollouts(twin, context):
    return answers(twin, context)


def policy(model, context, deterministic=True, **rl):
    rollout = RolloutConfig(**{**SETTINGS, "deterministic": deterministic})
    return Policy([model], [], RunConfig(model=MODEL, rollout=rollout, rl=RLConfig(**rl)), USABLE, context)


def shard_of(rollouts, multiple=1):
    scored = [ScoredRollout(rollout, 0.0, {}) for rollout in rollouts]
    return unpack(plan_parcels(scored, np.linspace(-1, 1, len(scored)), minibatches=1, dp_size=1, multiple=multiple, pad_id=0)[0][0])


def differences(model, context, rollouts, micro_batch, multiple=1, deterministic=True, **rl):
    """|learner's log-prob - rollout's| of every token."""
    learner, found = policy(model, context, deterministic, **rl), []
    with torch.no_grad(), batch_invariant(deterministic):
        for part in microbatches(shard_of(rollouts, multiple), micro_batch, multiple):
            batch = policy_batch(part, context.device, 0)
            logprobs_BS, _ = learner.scores(learner.forward(model, batch), batch, model.module.frame(batch.inputs))
            found.append((logprobs_BS[:, :-1] - batch.rollout_BS[:, 1:])[batch.mask_BS[:, 1:]].abs())
    return torch.cat(found)


@pytest.mark.parametrize(("micro_batch", "multiple"), [(1, 1), (5, 1), (100, 1), (7, 64)])
def test_the_learner_recomputes_every_bit_whatever_the_micro_batch_and_the_padding(model, context, rollouts, micro_batch, multiple):
    found = differences(model, context, rollouts, micro_batch, multiple)
    assert len(found) == sum(len(rollout.response_T) for rollout in rollouts) > 1000
    assert found.max() == 0


def test_it_does_so_without_replaying_routes_too(model, context, rollouts):
    """Bits that agree route alike."""
    assert differences(model, context, rollouts, 9, replay_routes=False).max() == 0


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"batch_size": 3}, id="three at a time", marks=pytest.mark.journey),
        pytest.param({"batch_size": 44}, id="all at once"),
        pytest.param({"prefill_tokens": 20}, id="prompts read almost one by one", marks=pytest.mark.journey),
        pytest.param({"batch_size": 44, "cache_gib": 200 * 2**10 / 2**30}, id="answers that are begun again"),
    ],
)
def test_an_answer_is_the_same_in_every_bit_whoever_else_is_answered(twin, context, rollouts, changes):
    for found, expected in zip(answers(twin, context, **changes), rollouts, strict=True):
        assert found.response_T.tolist() == expected.response_T.tolist()
        assert found.logprobs_T.tolist() == expected.logprobs_T.tolist()
        assert route_digest(found.routes.experts_SLK) == route_digest(expected.routes.experts_SLK)
        assert found.routes.gates_SLK.tolist() == expected.routes.gates_SLK.tolist()


def test_rows_of_a_learner_do_not_know_each_other_even_without_the_mode_on_the_other_side(model, twin, context, rollouts):
    """The fast mode's gap to the same answers is rounding, and is there."""
    fast = differences(model, context, answers(twin, context, deterministic=False), 9, deterministic=False)
    assert 0 < fast.max() < 1e-4


def test_the_gradient_is_that_of_the_fast_mode_to_rounding(model, context, rollouts):
    def gradient(deterministic):
        learner, batch = policy(model, context, deterministic), policy_batch(shard_of(rollouts[:9]), context.device, 0)
        with batch_invariant(deterministic):
            logprobs_BS, _ = learner.scores(learner.forward(model, batch), batch, model.module.frame(batch.inputs))
            loss = torch.where(batch.mask_BS[:, 1:], logprobs_BS[:, :-1], 0.0).mean()
            return torch.autograd.grad(loss, [weight for weight in model.module.parameters() if weight.requires_grad], allow_unused=True)

    for exact, fast in zip(gradient(True), gradient(False), strict=True):
        if exact is not None:
            torch.testing.assert_close(exact, fast, rtol=1e-3, atol=1e-5)


def test_one_bit_stops_the_run(model, context, rollouts):
    shard = shard_of(rollouts)
    logprobs = shard.batch.logprobs_BS.copy()
    position = int(shard.lengths_B[1]) - 1
    logprobs[1, position] = np.nextafter(logprobs[1, position], np.float32(0))
    learner = policy(model, context)
    with batch_invariant():
        for damaged, outcome in ((shard, None), (replace(shard, batch=replace(shard.batch, logprobs_BS=logprobs)), UserError)):
            batch = policy_batch(damaged, context.device, 0)
            if outcome is None:
                assert learner.loss(model, batch, learner.forward(model, batch))[2]["actor/ratio_max"].value == 1
                continue
            with pytest.raises(UserError, match=rf"rollout.deterministic: the learner gives token {position} of {shard.keys_B[1]} .* allowed is 0"):
                learner.loss(model, batch, learner.forward(model, batch))


def test_a_gpu_is_refused(model, context):
    with pytest.raises(UserError, match=r"rollout.deterministic: true on cuda:0: its kernels are for CPUs"):
        Engine(model.module, replace(context, device=torch.device("cuda:0")), Words(), RolloutConfig(**SETTINGS))
