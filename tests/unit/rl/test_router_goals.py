"""What routers are taught beside advantages, on real rollouts of a real model: gradients, splits into micro-batches, ceilings, routes that were drawn."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from megatron_ext.batch import ScoredRollout
from megatron_ext.config.schema import EarlConfig, OptimizerConfig, RLConfig, RolloutConfig, RunConfig
from megatron_ext.inference.admission import Request
from megatron_ext.inference.engine import Engine
from megatron_ext.model.assembly import build_model
from megatron_ext.rl.batching import microbatches, unpack
from megatron_ext.rl.goals import Clusters, Goals
from megatron_ext.rl.parcels import plan_parcels
from megatron_ext.rl.policy_step import Policy, policy_batch
from megatron_ext.rl.router_goals import RouterGoals
from megatron_ext.training.megatron_engine import build_engine
from tests.support.models import IMAGE, USABLE, Words, open_gates, small_config, small_prompts

MODEL = small_config(moe_balancing="none")  # as the learner has it
SAMPLES, LAYERS, EXPERTS = 3, 3, 8
DRAWN = (0, 2)
MEMBER = np.zeros((2, LAYERS, EXPERTS), dtype=bool)
MEMBER[0, 0, [1, 2]] = MEMBER[0, 2, 5] = MEMBER[1, 1, 7] = True


@pytest.fixture(scope="module")
def model(context):
    built = build_model(MODEL, IMAGE, context)
    open_gates(built)
    return build_engine([built], OptimizerConfig(warmup_steps=0), 10, context).wrapped[0]


def rollouts_of(model, context, layers=(), greedy=False, batch_size=64):
    session = Engine(model.module, context, Words(), RolloutConfig(max_new_tokens=6, temperature=0.7, batch_size=batch_size)).session()
    requests = [
        Request(number, prompt, tuple((sample, 10 * number + sample) for sample in range(SAMPLES)), greedy, layers)
        for number, prompt in enumerate(small_prompts(4))
    ]
    session.ask(requests)
    found = session.advance(float("inf"), 0)
    return [ScoredRollout(rollout, 1.0, {}) for _, rollout in sorted(found, key=lambda answer: (answer[0], answer[1].sample))]


@pytest.fixture(scope="module")
def drawn(model, context):
    return rollouts_of(model, context, DRAWN)


def goals(answers):
    """Every third answer has none; of the others the first half is as skill 0, the rest as skill 1."""
    of_rollouts = []
    for index, answer in enumerate(answers):
        goal_T = np.ones(len(answer.rollout.response_T), np.int16)
        goal_T[len(goal_T) // 2 :] = 2
        of_rollouts.append(goal_T * (index % 3 > 0))
    return Goals(Clusters(("ocr", "count"), MEMBER), of_rollouts)


def config_of(**earl):
    rl = RLConfig(max_logprob_diff=1e-4)
    return RunConfig(model=MODEL, rollout=RolloutConfig(max_new_tokens=6, temperature=0.7), rl=rl, earl=EarlConfig(**earl))


ADVANTAGES = np.linspace(-1, 1, 12)


def step(model, context, answers, micro_batch, ceilings=None, start=None, dp_size=1, prepare=False, **earl):
    """(gradients of the routers for the whole loss, metrics, ceilings) of one update without its optimizer; `dp_size`: shards one after the other."""
    config = config_of(**earl)
    taught = RouterGoals(config, context, ceilings or {}, start or {})
    learner = Policy([model], [], config, USABLE, context, taught)
    shards = plan_parcels(answers, ADVANTAGES, minibatches=1, dp_size=dp_size, multiple=1, pad_id=0, goals=goals(answers))
    batches = [policy_batch(part, context.device, 0) for (parcel,) in shards for part in microbatches(unpack(parcel), micro_batch, 1)]
    batches = learner.prepared(batches, with_old=prepare)
    routers = [router.weight for router in model.module.decoder.routers()]
    taught.begin(batches)
    total = [torch.zeros_like(weight) for weight in routers]
    divisor = 0
    for batch in batches:
        loss_sum, parts, _ = learner.loss(model, batch, learner.forward(model, batch))
        divisor += int(parts)
        for sum_, gradient in zip(total, torch.autograd.grad(loss_sum, routers), strict=True):
            sum_ += gradient
    return [gradient / divisor for gradient in total], taught.finish(), taught.ceilings


def difference(ours, theirs):
    return [a - b for a, b in zip(ours, theirs, strict=True)]


def logits_of(model, answers, context):
    """By hand: each answer's router logits [S, L, E], with gradient, and experts [S, L, K]."""
    found = []
    for answer in answers:
        (parcel,) = plan_parcels([answer], np.zeros(1), minibatches=1, dp_size=1, multiple=1, pad_id=0)[0]
        batch = policy_batch(unpack(parcel), context.device, 0)
        logits = []
        hooks = [router.register_forward_hook(partial(keep, logits)) for router in model.module.decoder.routers()]
        with model.module.router_tap.replay(batch.experts_BSLK):
            model(batch.inputs)
        for hook in hooks:
            hook.remove()
        found.append((torch.stack(logits, dim=1), batch.experts_BSLK[0].long()))
    return found


def keep(logits, router, args, _):
    logits.append(router.gating(args[0])[:, 0])


def by_hand(model, answers, context, value):
    """mean_i mean_{t, l} value(log p [E], experts [K], skill, layer, answer)."""
    total = 0.0
    for index, (answer, goal_T, (logits_SLE, experts_SLK)) in enumerate(
        zip(answers, goals(answers).of_rollouts, logits_of(model, answers, context), strict=True)
    ):
        start = answer.rollout.response_rows[0]
        positions = [(start + t, int(goal) - 1) for t, goal in enumerate(goal_T) if goal]
        for s, skill in positions:
            layers = [layer for layer in range(LAYERS) if MEMBER[skill, layer].any()]
            for layer in layers:
                logp = torch.log_softmax(logits_SLE[s, layer].float(), -1)
                total = total + value(logp, experts_SLK[s, layer], skill, layer, index) / (len(positions) * len(layers) * len(answers))
    return torch.autograd.grad(total, [router.weight for router in model.module.decoder.routers()]), total.item()


def close(ours, theirs, rtol=1e-4):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=float(b.abs().max()) * 1e-4)


CEILINGS = {"ocr": 0.3, "count": 0.15}


def test_pathwise_is_the_gradient_of_the_capped_mass_of_every_answer_that_has_a_goal(model, context, drawn):
    q = list(CEILINGS.values())
    plain, _, _ = step(model, context, drawn, 100)
    pulled, metrics, _ = step(model, context, drawn, 100, CEILINGS, mode="pathwise", pathwise_weight=0.5)
    mass = by_hand(model, drawn, context, lambda logp, _, skill, layer, __: logp.exp()[torch.from_numpy(MEMBER[skill, layer])].sum().clamp(max=q[skill]))
    close(difference(pulled, plain), [-0.5 * gradient for gradient in mass[0]])
    assert metrics["earl/pathwise"] == pytest.approx(mass[1], rel=1e-5)
    assert difference(pulled, plain)[1][0].abs().max() > 0, "an expert outside every cluster gives way"


def test_router_pg_is_the_policy_gradient_of_the_order_of_the_experts(model, context, drawn):
    plain, _, _ = step(model, context, drawn, 100)
    taught, metrics, _ = step(model, context, drawn, 100, mode="router_pg", router_weight=0.5)

    def surrogate(logp, experts, skill, layer, index):
        first, second = experts.tolist()
        return ADVANTAGES[index] * (logp[first] + logp[second] - torch.log1p(-logp[first].exp()))

    close(difference(taught, plain), [-0.5 * gradient for gradient in by_hand(model, drawn, context, surrogate)[0]])
    assert metrics["earl/route_clipfrac"] == 0


@pytest.mark.parametrize("earl", [{"mode": "pathwise", "pathwise_weight": 0.5}, {"mode": "router_pg", "router_kl": 0.1}])
def test_terms_do_not_depend_on_micro_batches_shards_or_a_pass_before(model, context, drawn, earl):
    start = {router.layer_number: 1.3 * router.weight.detach() for router in model.module.decoder.routers()}
    whole, metrics, _ = step(model, context, drawn, 100, CEILINGS, start, **earl)
    for changes in ({"micro_batch": 1}, {"micro_batch": 5, "prepare": True}, {"micro_batch": 4, "dp_size": 2}):
        parts, told, _ = step(model, context, drawn, ceilings=CEILINGS, start=start, **earl, **changes)
        close(parts, whole, rtol=1e-3)
        assert told == pytest.approx(metrics, rel=1e-4)


def test_without_a_term_watching_changes_no_bit(model, context, drawn):
    start = {router.layer_number: 1.3 * router.weight.detach() for router in model.module.decoder.routers()}
    plain, told, _ = step(model, context, drawn, 5)
    watched, metrics, _ = step(model, context, drawn, 5, start=start)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert metrics["earl/router_kl"] > 0 and "earl/router_kl" not in told


def test_the_distance_of_routers_that_have_not_moved_is_zero(model, context, drawn):
    start = {router.layer_number: router.weight.detach().clone() for router in model.module.decoder.routers()}
    _, metrics, _ = step(model, context, drawn, 5, start=start)
    assert abs(metrics["earl/router_kl"]) < 1e-6


def test_a_ceiling_is_the_75th_percentile_of_the_first_answers_and_pulls_from_the_next_step_on(model, context, drawn):
    plain, _, _ = step(model, context, drawn, 100)
    first, metrics, learnt = step(model, context, drawn, 5, mode="pathwise")
    assert all(torch.equal(a, b) or (a - b).abs().max() < 1e-7 for a, b in zip(first, plain, strict=True)) and metrics["earl/pathwise"] == 0
    masses = {0: [], 1: []}
    with torch.no_grad():
        for answer, goal_T, (logits, _) in zip(drawn, goals(drawn).of_rollouts, logits_of(model, drawn, context), strict=True):
            for t, goal in enumerate(goal_T):
                for layer in range(LAYERS) if goal else ():
                    if MEMBER[goal - 1, layer].any():
                        p = torch.softmax(logits[answer.rollout.response_rows[0] + t, layer].float(), -1)
                        masses[goal - 1].append(float(p[torch.from_numpy(MEMBER[goal - 1, layer])].sum()))
    for index, skill in enumerate(("ocr", "count")):
        below = np.mean(np.array(masses[index]) <= learnt[skill] + 1 / 4096)
        assert below >= 0.75 and np.mean(np.array(masses[index]) < learnt[skill] - 1 / 4096) <= 0.75
    kept = step(model, context, drawn, 5, ceilings=learnt, mode="pathwise")[2]
    assert kept == learnt, "what was learnt stays"


def test_routes_that_are_drawn_depend_on_nothing_but_seed_and_position(model, context, drawn):
    alone = rollouts_of(model, context, DRAWN, batch_size=1)
    for ours, theirs in zip(alone, drawn, strict=True):
        assert ours.rollout.response_T.tolist() == theirs.rollout.response_T.tolist()
        assert np.array_equal(ours.rollout.routes.experts_SLK, theirs.rollout.routes.experts_SLK)


def test_only_the_layers_of_the_cluster_are_drawn_and_only_for_what_is_written(model, context, drawn):
    """Live routes at the drawn answers' own tokens: the other layer agrees everywhere, the prompt in every layer, the drawn ones not always."""
    differ = np.zeros(LAYERS)
    for answer, (logits_SLE, experts_SLK) in zip(drawn, logits_of(model, drawn, context), strict=True):
        live = logits_SLE.topk(2, dim=-1).indices
        prompt = len(answer.rollout.prompt.tokens_S)
        real = len(answer.rollout.routes)
        assert torch.equal(live[:prompt], experts_SLK[:prompt])
        differ += (live[prompt:real] != experts_SLK[prompt:real]).any(-1).sum(0).numpy()
    assert differ[1] == 0 and differ[0] > 0 and differ[2] > 0


def test_greedy_answers_take_the_most_likely_routes(model, context):
    plain, greedy = rollouts_of(model, context, (), greedy=True), rollouts_of(model, context, (), greedy=True, batch_size=2)
    assert [answer.rollout.response_T.tolist() for answer in plain] == [answer.rollout.response_T.tolist() for answer in greedy]


def test_a_parcel_without_goals_teaches_nothing(model, context, drawn):
    config = config_of(mode="pathwise")
    taught = RouterGoals(config, context, CEILINGS, {})
    (parcel,) = plan_parcels(drawn, ADVANTAGES, minibatches=1, dp_size=1, multiple=1, pad_id=0)[0]
    batch = policy_batch(unpack(parcel), context.device, 0)
    assert batch.shard.goal_BS is None
    taught.begin([batch])
    Policy([model], [], config, USABLE, context, taught).forward(model, batch)
    assert taught.finish() == {}
    assert replace(batch.shard, goal_BS=np.zeros((1, 1), np.int16)).clusters is None
