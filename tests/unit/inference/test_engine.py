"""The rollout engine on a small real model: exact log-probs, complete routes, the same answers whatever stands beside them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_ext.batch import NO_TILES, Prompt, Rollout, route_digest
from megatron_ext.config.schema import RolloutConfig
from megatron_ext.errors import UserError
from megatron_ext.inference.admission import Request, WaitingRoom
from megatron_ext.inference.engine import Engine
from megatron_ext.inference.sampling import rollout_seed
from megatron_ext.model.assembly import build_model
from megatron_ext.model.heads import policy_logits
from megatron_ext.model.inputs import model_inputs
from megatron_ext.model.memory import Footprint
from megatron_ext.model.token_scores import token_logprobs
from megatron_ext.model.weight_storage import store_for_generation
from megatron_ext.parallel.groups import ParallelContext
from tests.support.models import EOS, IMAGE, Words, open_gates, small_config, small_prompts


@pytest.fixture(scope="module")
def engine(context: ParallelContext) -> Engine:
    model = build_model(small_config(init_std=0.3), IMAGE, context, seed=5)
    open_gates(model)
    store_for_generation(model)
    return Engine(model, context, Words(), RolloutConfig(max_new_tokens=12, batch_size=32))


def generate(engine: Engine, prompts: list[Prompt], samples: int = 4, greedy: bool = False) -> list[Rollout]:
    def seeds(index: int, sample: int) -> int:
        return rollout_seed(0, 0, prompts[index].key, sample)

    return engine.generate(prompts, samples, seeds=seeds, version=3, greedy=greedy)


def test_rollouts_come_prompt_by_prompt_and_end_at_their_end_token_or_at_the_limit(engine: Engine) -> None:
    prompts = small_prompts(11)
    rollouts = generate(engine, prompts)
    assert [(r.prompt.key, r.sample) for r in rollouts] == [(p.key, g) for p in prompts for g in range(4)]
    assert {r.finish for r in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        ends = np.flatnonzero(rollout.response_T == EOS)
        assert (ends.tolist() == [len(rollout.response_T) - 1]) if rollout.finish == "stop" else (len(ends) == 0 and len(rollout.response_T) == 12)
        assert rollout.version == 3 and IMAGE not in rollout.response_T and rollout.response_T.max() < 60


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused(engine: Engine) -> None:
    (prompt,) = small_prompts(1)
    long = replace(prompt, tokens_S=np.full(501, 9, np.int32), tiles=NO_TILES)
    with pytest.raises(UserError, match=r"rollout.max_new_tokens: 12 after a prompt of 501 tokens exceeds model.max_positions = 512"):
        generate(engine, [long])


def test_log_probs_and_routes_equal_a_full_forward_with_replay(engine: Engine) -> None:
    """What the learner will recompute: the same log-probabilities to 1e-5, the same routes to the last id, without replay too."""
    for rollout in generate(engine, small_prompts(6))[::3]:
        tokens = np.concatenate([rollout.prompt.tokens_S, rollout.response_T])[None]
        inputs = model_inputs(tokens, rollout.prompt.tiles, np.zeros((1, 1)) - (not len(rollout.prompt.tiles)), torch.device("cpu"))
        with torch.no_grad(), engine.model.router_tap.record() as routes:
            logits = engine.model.eval()(inputs)
        logprobs = token_logprobs(policy_logits(logits[:-1], 1.0, engine.passes.banned_V), inputs.tokens_BS[:, 1:], engine.context.pgs.tp)
        start, stop = rollout.response_rows
        np.testing.assert_allclose(rollout.logprobs_T, logprobs[0, start:stop].numpy(), atol=1e-4)
        assert route_digest(routes.experts(tokens.size)[:-1].numpy()) == route_digest(rollout.routes.experts_SLK)
        np.testing.assert_allclose(rollout.routes.gates_SLK.sum(-1), 1, atol=2e-3)


def test_the_answers_to_a_prompt_share_its_routes(engine: Engine) -> None:
    rollouts = generate(engine, small_prompts(2))
    shared = {(rollout.prompt.key, id(rollout.routes.rows(0, len(rollout.prompt.tokens_S)))) for rollout in rollouts}
    assert len(rollouts) == 8 and len(shared) == 2


def test_an_answer_does_not_depend_on_its_company(engine: Engine) -> None:
    prompts = small_prompts(10)
    together = generate(engine, prompts)
    alone = generate(engine, prompts[7:8])
    for one, other in zip(alone, together[28:32], strict=True):
        assert one.response_T.tolist() == other.response_T.tolist()


@pytest.mark.parametrize("batch_size", [1, 5, 8])
def test_fewer_places_change_no_answer(engine: Engine, context: ParallelContext, batch_size: int) -> None:
    """Rows join as others leave; whoever stands beside them, tokens and routes are those of all at once, log-probs to rounding."""
    prompts = small_prompts(7)
    narrow = Engine(engine.model, context, Words(), engine.config.model_copy(update={"batch_size": batch_size, "prefill_tokens": 20}))
    for one, other in zip(generate(narrow, prompts, samples=2), generate(engine, prompts, samples=2), strict=True):
        assert (one.prompt.key, one.sample, one.response_T.tolist(), one.finish) == (other.prompt.key, other.sample, other.response_T.tolist(), other.finish)
        assert route_digest(one.routes.experts_SLK) == route_digest(other.routes.experts_SLK)
        np.testing.assert_allclose(one.logprobs_T, other.logprobs_T, atol=1e-4)


def test_an_answer_ends_where_it_completes_a_stop_text_and_keeps_it(engine: Engine, context: ParallelContext) -> None:
    """The two tokens in the middle of what an answer says without one."""
    prompts = small_prompts(6)
    free = max(generate(engine, prompts, samples=1), key=lambda rollout: len(rollout.response_T))
    assert len(free.response_T) == 12
    stop = " {} {} ".format(*free.response_T[5:7])[:-1]
    bound = Engine(engine.model, context, Words(), engine.config.model_copy(update={"stop": ("never said", stop)}))
    (ended,) = [rollout for rollout in generate(bound, prompts, samples=1) if rollout.prompt.key == free.prompt.key]
    assert ended.finish == "stop" and ended.text.endswith(stop) and ended.text.count(stop) == 1
    assert ended.response_T.tolist() == free.response_T[: len(ended.response_T)].tolist()


@pytest.mark.parametrize("at_once", [1, 3, 7])
def test_a_prompt_read_in_parts_is_answered_as_one_read_at_once(engine: Engine, context: ParallelContext, at_once: int) -> None:
    prompts = small_prompts(4)
    assert max(len(prompt.tokens_S) for prompt in prompts) > 7
    parts = Engine(engine.model, context, Words(), engine.config.model_copy(update={"prefill_tokens": at_once}))
    for one, other in zip(generate(parts, prompts, samples=2), generate(engine, prompts, samples=2), strict=True):
        assert one.response_T.tolist() == other.response_T.tolist()
        assert route_digest(one.routes.experts_SLK) == route_digest(other.routes.experts_SLK)
        np.testing.assert_allclose(one.logprobs_T, other.logprobs_T, atol=1e-4)


def test_answers_that_outgrow_their_memory_are_begun_again_and_say_the_same(context: ParallelContext) -> None:
    """Room for 32 tokens an answer at first, then for 64: of eight answers a few have to wait."""
    model = build_model(small_config(init_std=0.3), IMAGE, context, seed=5)
    roomy = RolloutConfig(max_new_tokens=60, batch_size=8)
    prompts = small_prompts(8)
    whole = generate(Engine(model, context, Words(), roomy), prompts, samples=1)
    tight = Engine(model, context, Words(), roomy.model_copy(update={"cache_gib": Footprint.of(model.model_config, 1).token * 450 / 2**30}))
    put_off: list[int] = []
    original = WaitingRoom.put_back

    def counted(room: WaitingRoom, requests: Iterable[Request]) -> None:
        kept = list(requests)
        put_off.extend(request.number for request in kept)
        original(room, kept)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WaitingRoom, "put_back", counted)
        assert [r.text for r in generate(tight, prompts, samples=1)] == [r.text for r in whole]
    assert put_off


def test_memory_that_one_answer_may_outgrow_is_refused_at_once(engine: Engine, context: ParallelContext) -> None:
    small = Engine(engine.model, context, Words(), RolloutConfig(max_new_tokens=12, cache_gib=1e-6))
    with pytest.raises(UserError, match=r"rollout.cache_gib: 1e-06 GiB do not hold 12 tokens after a prompt of \d+; give at least"):
        generate(small, small_prompts(1))


def test_answers_come_as_they_finish(engine: Engine) -> None:
    """The stream's first answers are the shortest ones, and all of them are there in the end."""
    prompts = small_prompts(11)
    streamed = [rollout for _, rollout in engine.stream(prompts, 2, seeds=lambda number, sample: 10 * number + sample, version=0)]
    lengths = [len(rollout.response_T) for rollout in streamed]
    assert lengths == sorted(lengths) and len(set(lengths)) > 1
    assert {(r.prompt.key, r.sample) for r in streamed} == {(p.key, s) for p in prompts for s in (0, 1)}


@pytest.mark.parametrize("changes", [{}, {"num_experts": 0}, {"dense_layers": (1,)}, {"moe_score_function": "sigmoid", "moe_expert_bias": True}])
def test_a_step_straight_from_the_weights_equals_the_layers_of_training(context: ParallelContext, changes: dict[str, object]) -> None:
    model = build_model(small_config(init_std=0.3, **changes), IMAGE, context, seed=5)
    open_gates(model)
    store_for_generation(model)
    engine = Engine(model, context, Words(), RolloutConfig(max_new_tokens=12, batch_size=16))
    fast = generate(engine, small_prompts(5), samples=2)
    assert model.decodes_whole
    model.decodes_whole = False
    for one, other in zip(fast, generate(engine, small_prompts(5), samples=2), strict=True):
        assert one.response_T.tolist() == other.response_T.tolist()
        assert route_digest(one.routes.experts_SLK) == route_digest(other.routes.experts_SLK)
        np.testing.assert_allclose(one.logprobs_T, other.logprobs_T, atol=1e-5)


def test_samples_of_a_prompt_differ_and_the_same_seed_repeats_them(engine: Engine) -> None:
    first, second = generate(engine, small_prompts(1), samples=8), generate(engine, small_prompts(1), samples=8)
    assert [r.text for r in first] == [r.text for r in second]
    assert len({r.text for r in first}) > 4


def test_greedy_is_the_most_likely_token_each_time(engine: Engine) -> None:
    rollouts = generate(engine, small_prompts(3), samples=2, greedy=True)
    assert rollouts[0].text == rollouts[1].text


def test_temperature_zero_is_greedy(engine: Engine, context: ParallelContext) -> None:
    cold = Engine(engine.model, context, Words(), RolloutConfig(temperature=0, max_new_tokens=12))
    assert [r.text for r in generate(cold, small_prompts(3))] == [r.text for r in generate(engine, small_prompts(3), greedy=True)]


def test_no_prompts_give_no_rollouts(engine: Engine) -> None:
    assert generate(engine, []) == []


def test_answers_without_some_experts_are_those_of_a_full_forward_without_them(engine: Engine) -> None:
    """Prompts are read, and tokens written, under the mask; afterwards everything is as it was."""
    prompts, cluster = small_prompts(6), [(0, 3), (0, 6), (2, 1)]
    before = generate(engine, prompts, 1, greedy=True)
    with engine.model.router_tap.mask(cluster):
        masked = generate(engine, prompts, 1, greedy=True)
        for rollout in masked:
            tokens = np.concatenate([rollout.prompt.tokens_S, rollout.response_T])[None]
            inputs = model_inputs(tokens, rollout.prompt.tiles, np.zeros((1, 1)) - (not len(rollout.prompt.tiles)), torch.device("cpu"))
            with torch.no_grad(), engine.model.router_tap.record() as routes:
                logits = engine.model.eval()(inputs)
            logprobs = token_logprobs(policy_logits(logits[:-1], 1.0, engine.passes.banned_V), inputs.tokens_BS[:, 1:], engine.context.pgs.tp)
            np.testing.assert_allclose(rollout.logprobs_T, logprobs[0, slice(*rollout.response_rows)].numpy(), atol=1e-4)
            assert route_digest(routes.experts(tokens.size)[:-1].numpy()) == route_digest(rollout.routes.experts_SLK)
            assert not any((rollout.routes.experts_SLK[:, layer] == expert).any() for layer, expert in cluster)
    after = generate(engine, prompts, 1, greedy=True)
    assert [route_digest(r.routes.experts_SLK) for r in before] == [route_digest(r.routes.experts_SLK) for r in after]
    assert [r.response_T.tolist() for r in before] != [r.response_T.tolist() for r in masked]
