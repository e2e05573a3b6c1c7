"""Answers in slices of steps are those of one call; new weights may come in between, and every token says which it is of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from megatron_ext.batch import Rollout, route_digest
from megatron_ext.config.schema import RolloutConfig
from megatron_ext.errors import UserError
from megatron_ext.inference.admission import Request
from megatron_ext.inference.engine import Engine
from megatron_ext.inference.sampling import rollout_seed
from megatron_ext.inference.session import Session
from megatron_ext.model.assembly import VisionLanguageModel, build_model
from megatron_ext.model.heads import policy_logits
from megatron_ext.model.inputs import model_inputs
from megatron_ext.model.token_scores import token_logprobs
from megatron_ext.model.weight_storage import store_for_generation
from megatron_ext.parallel.groups import ParallelContext
from tests.support.models import IMAGE, Words, open_gates, small_config, small_prompts

Answers = dict[tuple[str, int], Rollout]
FAST = RolloutConfig(max_new_tokens=20, batch_size=6)
EXACT = FAST.model_copy(update={"deterministic": True})


@pytest.fixture(scope="module")
def model(context: ParallelContext) -> VisionLanguageModel:
    model = build_model(small_config(init_std=0.3), IMAGE, context, seed=5)
    open_gates(model)
    store_for_generation(model)
    return model


def requests(count: int = 6, samples: Sequence[int] = (0, 1, 2), greedy: bool = False) -> list[Request]:
    return [
        Request(number, prompt, tuple((sample, rollout_seed(0, prompt.key, sample)) for sample in samples), greedy)
        for number, prompt in enumerate(small_prompts(count))
    ]


def by_key(rollouts: Sequence[tuple[int, Rollout]]) -> Answers:
    found = {(rollout.prompt.key, rollout.sample): rollout for _, rollout in rollouts}
    assert len(found) == len(rollouts), "no answer comes twice"
    return found


def slices(session: Session, steps: int, version: int = 0) -> Iterator[list[tuple[int, Rollout]]]:
    while not session.idle:
        yield session.advance(steps, version)


def in_slices(session: Session, steps: int) -> Answers:
    return by_key([answer for part in slices(session, steps) for answer in part])


def at_once(model: VisionLanguageModel, context: ParallelContext, config: RolloutConfig, asked: Sequence[Request]) -> Answers:
    session = Engine(model, context, Words(), config).session()
    session.ask(asked)
    return by_key(session.advance(math.inf, 0))


def require_same(found: Answers, expected: Answers) -> None:
    """In every bit."""
    assert found.keys() == expected.keys()
    for key, rollout in found.items():
        other = expected[key]
        assert (rollout.response_T.tolist(), rollout.finish, rollout.text) == (other.response_T.tolist(), other.finish, other.text)
        assert rollout.logprobs_T.tolist() == other.logprobs_T.tolist() and rollout.versions_T.tolist() == other.versions_T.tolist()
        assert route_digest(rollout.routes.experts_SLK) == route_digest(other.routes.experts_SLK)
        assert rollout.routes.gates_SLK.tolist() == other.routes.gates_SLK.tolist()


@pytest.fixture(scope="module", params=[FAST, EXACT], ids=["fast", "deterministic"])
def case(request: pytest.FixtureRequest, model: VisionLanguageModel, context: ParallelContext) -> tuple[RolloutConfig, Answers]:
    return request.param, at_once(model, context, request.param, requests())


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_slices_give_the_answers_of_one_call_in_every_bit(model, context, case, steps):
    config, expected = case
    session = Engine(model, context, Words(), config).session()
    session.ask(requests())
    parts = list(slices(session, steps))
    assert len(parts) > 20 // steps and sum(bool(part) for part in parts) > 1, "answers come as they finish"
    require_same(by_key([answer for part in parts for answer in part]), expected)


def test_a_deterministic_answer_does_not_know_when_it_was_asked(model, context):
    """The last three prompts first, and one by one the others, between slices of two steps."""
    session, found = Engine(model, context, Words(), EXACT).session(), []
    session.ask(requests()[3:])
    for request in requests()[:3]:
        found += session.advance(2, 0)
        session.ask([request])
    found += [answer for part in slices(session, 2) for answer in part]
    require_same(by_key(found), at_once(model, context, EXACT, requests()))


def test_who_was_asked_first_is_read_first(model, context):
    """Six places, all taken: of the longer prompts that are asked later none comes before the shorter ones that wait."""
    ordered = sorted(requests(9), key=lambda request: len(request.prompt.tokens_S))
    session = Engine(model, context, Words(), FAST).session()
    session.ask(ordered[:4])
    session.advance(1, 0)
    session.ask(ordered[4:])
    finished = [number for part in slices(session, 1) for number, _ in part]
    assert set(finished[:12]) == {request.number for request in ordered[:4]}


def test_new_weights_in_the_middle_of_answers(context):
    """Once the first answer has ended, the head is doubled, which changes log-probs and no key or value. Tokens before that are as they would have been and
    have version 4; those after it have 5, and the log-probs of a whole forward pass with the new head."""
    model = build_model(small_config(init_std=0.3), IMAGE, context, seed=5)
    config = FAST.model_copy(update={"batch_size": 18})
    expected = at_once(model, context, config, requests())
    engine = Engine(model, context, Words(), config)
    session, split = engine.session(), min(len(rollout.response_T) for rollout in expected.values())
    session.ask(requests())
    early = session.advance(split, 4)
    with torch.no_grad():
        model.output_layer.weight.mul_(2)
    late = by_key(session.advance(math.inf, 5))
    assert early and len(late) == 18 - len(early) and session.idle
    assert all(rollout.on_policy(4) for _, rollout in early)
    for key, rollout in late.items():
        other = expected[key]
        assert rollout.versions_T.tolist() == [4] * split + [5] * (len(rollout.response_T) - split)
        assert rollout.response_T[:split].tolist() == other.response_T[:split].tolist()
        assert rollout.logprobs_T[:split].tolist() == other.logprobs_T[:split].tolist()
        tokens = np.concatenate([rollout.prompt.tokens_S, rollout.response_T])[None]
        inputs = model_inputs(tokens, rollout.prompt.tiles, np.zeros((1, 1)) - (not len(rollout.prompt.tiles)), torch.device("cpu"))
        with torch.no_grad():
            logits = policy_logits(model.eval()(inputs)[:-1], 1.0, engine.passes.banned_V)
        logprobs = token_logprobs(logits, inputs.tokens_BS[:, 1:], context.pgs.tp)[0, slice(*rollout.response_rows)]
        np.testing.assert_allclose(rollout.logprobs_T[split:], logprobs[split:].numpy(), atol=1e-4)


def test_keys_and_values_that_old_weights_left_stay(context):
    model = build_model(small_config(init_std=0.3), IMAGE, context, seed=5)
    session = Engine(model, context, Words(), FAST).session()
    session.ask(requests(2))
    session.advance(3, 0)

    def held() -> list[list[list[float]]]:
        shelves, places = (session._memory._prompts, session._memory._answers), (slice(None), slice(2))
        return [shelf.used(layer, None)[0][:2, :, place].tolist() for shelf, place in zip(shelves, places, strict=True) for layer in range(3)]

    before = held()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    session.advance(1, 1)
    assert held() == before


def test_greedy_and_sampled_answers_go_side_by_side(model, context):
    session = Engine(model, context, Words(), EXACT).session()
    session.ask(requests(3))
    session.ask(requests(3, samples=(-1,), greedy=True))
    together = in_slices(session, 4)
    require_same(together, at_once(model, context, EXACT, requests(3)) | at_once(model, context, EXACT, requests(3, samples=(-1,), greedy=True)))


def test_what_is_forgotten_does_not_come_back_and_others_are_as_ever(model, context):
    session = Engine(model, context, Words(), FAST).session()
    session.ask(requests(9)[6:])
    session.advance(3, 0)
    session.forget()
    assert session.idle and session.advance(5, 0) == []
    session.ask(requests())
    require_same(in_slices(session, 5), at_once(model, context, FAST, requests()))


def test_memory_is_let_go_once_nothing_is_under_way(model, context):
    session = Engine(model, context, Words(), FAST).session()
    session.ask(requests())
    session.advance(2, 0)
    assert session._memory.num_bytes() > 0
    in_slices(session, 50)
    assert session._memory.num_bytes() == 0


def test_a_session_does_not_disturb_another_one(model, context):
    engine = Engine(model, context, Words(), FAST)
    session = engine.session()
    session.ask(requests())
    found = session.advance(4, 0)
    prompts = small_prompts(2)
    beside = engine.generate(prompts, 2, seeds=lambda number, sample: rollout_seed(0, prompts[number].key, sample), version=0)
    assert np.all([len(rollout.response_T) for rollout in beside])
    require_same(by_key([*found, *(answer for part in slices(session, 4) for answer in part)]), at_once(model, context, FAST, requests()))


def test_a_request_without_room_is_refused_with_all_that_were_asked_with_it(model, context):
    session = Engine(model, context, Words(), FAST.model_copy(update={"max_new_tokens": 505})).session()
    with pytest.raises(UserError, match=r"rollout.max_new_tokens: 505 after a prompt of \d+ tokens exceeds"):
        session.ask(requests())
    assert session.idle and session.advance(3, 0) == []
