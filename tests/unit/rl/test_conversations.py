"""Conversations of several turns: over a fake fleet, step by step; and with a real model, whose learner recomputes every sampled token's log-prob."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from megatron_ext.batch import FailedRollout, Prompt, Rollout, RouteTrace, ScoredRollout, Tiles
from megatron_ext.batch.metric import merge_metrics
from megatron_ext.config.schema import RLConfig, RolloutConfig, RunConfig
from megatron_ext.data.suite import draw_prompts
from megatron_ext.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_ext.errors import UserError
from megatron_ext.inference.engine import Engine
from megatron_ext.inference.sampling import rollout_seed
from megatron_ext.model.assembly import build_model
from megatron_ext.rl.batching import unpack
from megatron_ext.rl.conversations import Conversation, Rules
from megatron_ext.rl.environments import Observation, Turn, zoom
from megatron_ext.rl.parcels import plan_parcels
from megatron_ext.rl.policy_step import Policy, policy_batch
from megatron_ext.rl.scoring.pool import Failure
from megatron_ext.training.megatron_engine import build_engine
from tests.support.conversing import converse
from tests.support.models import open_gates
from tests.support.rl_run import rl_config


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    config = rl_config(tmp_path_factory.mktemp("talks"))
    train_tokenizer(config.data, config.run_dir / "tokenizer", 0)
    return config.model_copy(update={"rollout": RolloutConfig(max_new_tokens=6, temperature=0.8), "rl": RLConfig(max_logprob_diff=1e-4)})


@pytest.fixture(scope="module")
def tokenizer(config):
    return load_tokenizer(config.run_dir / "tokenizer")


@pytest.fixture(scope="module")
def rules(config, tokenizer):
    return replace(Rules.of(config, tokenizer), max_turns=3)


def prompts(config, tokenizer, count=1):
    return draw_prompts("train", ["count", "color"], count, 0, config.data, tokenizer, config.model.vision)


def said(prompt: Prompt, sample: int, text: str, tokenizer, version=3, finish="stop", expert=0) -> Rollout:
    """A turn with this text."""
    tokens = [*tokenizer.encode(text), *([tokenizer.eos_id] if finish == "stop" else [])]
    rows = len(prompt.tokens_S) + len(tokens) - 1
    routes = RouteTrace(np.full((rows, 1, 1), expert, np.uint8), np.ones((rows, 1, 1), np.float16))
    logprobs = -np.arange(1, len(tokens) + 1, dtype=np.float32)
    return Rollout(prompt, sample, 7, np.array(tokens, np.int32), logprobs, np.full(len(tokens), version, np.int32), finish, text, routes)


class Scripted:
    """A fleet that says the next line of its script, the same for every sample; remembers what it was asked."""

    def __init__(self, tokenizer, *lines: str, **more) -> None:
        self.tokenizer, self.lines, self.more, self.asked = tokenizer, list(lines), more, []

    def __call__(self, prompts, samples, step):
        self.asked.append([prompt.key for prompt in prompts])
        text = self.lines.pop(0)
        return [said(prompt, sample, text, self.tokenizer, **self.more) for prompt in reversed(prompts) for sample in range(samples)]


def acting(environment):
    return lambda talks: [environment(prompt, turns) for prompt, turns in talks]


def ask_again(prompt, turns):
    return Observation("look again", (np.full((32, 32, 3), len(turns), np.uint8),)) if "red" not in turns[-1].text else None


def test_turns_and_observations_become_one_rollout_that_says_what_was_sampled(config, tokenizer, rules):
    fleet = Scripted(tokenizer, "4", "red")
    ((prompt, _),) = [prompts(config, tokenizer)]
    answers = list(converse(fleet, acting(ask_again), [prompt], 2, 5, rules))
    assert sorted(answer.sample for answer in answers) == [0, 1]
    assert fleet.asked == [[prompt.key], [f"{prompt.key}#0@1", f"{prompt.key}#1@1"]] or fleet.asked[1] == [f"{prompt.key}#1@1", f"{prompt.key}#0@1"]
    for answer in answers:
        assert answer.prompt is prompt and answer.text == "red" and answer.finish == "stop" and answer.seed == 7
        context = "<img>" + "<IMG_CONTEXT>" * rules.tokens_per_tile + "</img>"
        whole = f"4<|im_end|>\n<|im_start|>user\n{context}\nlook again<|im_end|>\n<|im_start|>assistant\nred<|im_end|>"
        assert tokenizer.decode(answer.response_T.tolist()) == whole
        assert tokenizer.decode(answer.response_T[answer.sampled_T].tolist()) == "4<|im_end|>red<|im_end|>"
        assert answer.logprobs_T[answer.sampled_T].tolist() == [-1, -2, -1, -2] and not answer.logprobs_T[~answer.sampled_T].any()
        assert (answer.version, answer.newest, answer.num_sampled) == (3, 3, 4)
        assert answer.further.pixels_IHWC.tolist() == np.full((1, 32, 32, 3), 1).tolist()
        start = len(prompt.tokens_S) - 1
        assert answer.sampled_rows == [(start, start + 2), (start + len(answer.response_T) - 2, start + len(answer.response_T))]


def test_a_conversation_ends_with_its_last_turn_or_where_there_is_no_room(config, tokenizer, rules):
    prompt = prompts(config, tokenizer)[0]
    fleet = Scripted(tokenizer, "1", "2", "3", "never said")
    (answer,) = converse(fleet, acting(ask_again), [prompt], 1, 0, rules)
    assert (answer.text, answer.finish, len(answer.further)) == ("3", "stop", 2)
    narrow = Rules(tokenizer, rules.tokens_per_tile, 3, len(prompt.tokens_S) + 10)
    (answer,) = converse(Scripted(tokenizer, "1"), acting(ask_again), [prompt], 1, 0, narrow)
    assert (answer.text, answer.finish, len(answer.further)) == ("1", "length", 0)
    (answer,) = converse(Scripted(tokenizer, "1", finish="length"), acting(ask_again), [prompt], 1, 0, rules)
    assert (answer.text, answer.finish) == ("1", "length")


def test_what_an_environment_is_told_grows_with_the_conversation(config, tokenizer, rules):
    told = []
    environment = lambda prompt, turns: told.append(turns) or (Observation(f"seen {len(turns)}") if len(turns) < 2 else None)  # noqa: E731
    (answer,) = converse(Scripted(tokenizer, "1", "2"), acting(environment), prompts(config, tokenizer)[:1], 1, 0, rules)
    assert told == [(Turn("1"),), (Turn("1", Observation("seen 1")), Turn("2"))] and len(answer.further) == 0


def test_failures_end_their_own_conversation_with_a_reason(config, tokenizer, rules):
    first, second = prompts(config, tokenizer)
    act = lambda talks: [Failure("environment_timeout", "late") if prompt is first else ask_again(prompt, turns) for prompt, turns in talks]  # noqa: E731

    def fleet(asked, samples, step):
        for prompt in asked:
            yield FailedRollout(prompt, 0, "prompt_too_long", "so long") if "@" in prompt.key else said(prompt, 0, "4", tokenizer)

    answers = {answer.prompt.key: answer for answer in converse(fleet, act, [first, second], 1, 0, rules)}
    assert [(answers[prompt.key].reason, answers[prompt.key].sample) for prompt in (first, second)] == [("environment_timeout", 0), ("prompt_too_long", 0)]


def test_a_conversation_that_was_routed_otherwise_when_it_was_read_again_has_failed(config, tokenizer, rules):
    prompt = prompts(config, tokenizer)[0]
    talk = Conversation.of(said(prompt, 0, "4", tokenizer))
    seen = Observation("again")
    again = talk.next_prompt(seen, rules)
    assert isinstance(talk.after(seen, said(again, 0, "5", tokenizer)).rollout(), Rollout)
    assert talk.after(seen, said(again, 0, "5", tokenizer, expert=1)).rollout().reason == "conversation_rerouted"
    newer = talk.after(seen, said(again, 0, "5", tokenizer, expert=1, version=4)).rollout()  # other weights may route otherwise
    assert (newer.version, newer.newest) == (3, 4) and not newer.routes.experts_SLK[: len(prompt.tokens_S) + 1].any() and newer.routes.experts_SLK[-1].all()


@pytest.mark.parametrize("inject", ["text", "slots"])
def test_the_learner_recomputes_every_sampled_token_of_a_real_conversation_and_learns_nothing_from_observations(config, rules, context, tmp_path, inject):
    """Tokens, tiles, what CLVR may see of them and routes are the same in three readings of the engine and one pass of the learner."""
    model = config.model.model_copy(update={"clvr": config.model.clvr.model_copy(update={"inject": inject})})
    config = config.model_copy(update={"model": model, "output_dir": tmp_path})
    train_tokenizer(config.data, config.tokenizer_dir, 0, model)
    tokenizer = load_tokenizer(config.tokenizer_dir)
    rules = replace(rules, tokenizer=tokenizer)
    built = build_model(config.model, tokenizer.image_id, context, seed=3, markers=tokenizer.markers)
    open_gates(built)
    model = build_engine([built], config.rl.optimizer, 10, context).wrapped[0]
    engine = Engine(built, context, tokenizer, config.rollout)

    def generate(asked, samples, step):
        return engine.generate(asked, samples, seeds=lambda index, sample: rollout_seed(step, asked[index].key, sample), version=0)

    def environment(prompt, turns):
        """A random model calls no tool: the call is put into its mouth."""
        corners = ((0, 0, 0.5, 0.5), (0.25, 0.5, 1, 1))[len(turns) - 1]
        return zoom(prompt, [*turns[:-1], Turn("<zoom>{},{},{},{}</zoom>".format(*corners))])

    def act(talks):
        return [environment(*talk) for talk in talks]

    stopped = partial(_stopping, generate)
    answers = list(converse(stopped, act, prompts(config, tokenizer, 2), 2, 0, rules))
    assert len(answers) == 8 and all(isinstance(answer, Rollout) and len(answer.further) == 2 for answer in answers)
    assert {np.isin(answer.response_T, tokenizer.slot_ids).sum() for answer in answers} == {2 * len(tokenizer.slot_ids)}, "those of two observations"
    (shard,) = [unpack(parcels[0]) for parcels in plan_parcels(_scored(answers), np.linspace(-1, 1, 8), minibatches=1, dp_size=1, multiple=1, pad_id=0)]
    batch = policy_batch(shard, context.device, 0)
    learner = Policy([model], [], config, tokenizer.vocab_size, context)
    logits = learner.forward(model, batch)
    logits.retain_grad()
    loss, divisor, metrics = learner.loss(model, batch, logits)
    metrics = merge_metrics([metrics])
    assert int(divisor) == sum(answer.num_sampled for answer in answers)
    assert metrics["mismatch/logprob_abs_diff_max"].value < 1e-5
    assert metrics["route/digest_ok"].value == metrics["route/coverage"].value == 1
    loss.backward()
    decides_BS = torch.nn.functional.pad(batch.mask_BS[:, 1:], (0, 1))
    moved_BS = logits.grad.transpose(0, 1).abs().amax(-1) > 0
    assert not moved_BS[~decides_BS].any() and moved_BS[decides_BS].float().mean() > 0.9

    swapped = Tiles(answers[0].further.pixels_IHWC[::-1].copy(), answers[0].further.places_I5)
    assert not np.array_equal(swapped.pixels_IHWC, answers[0].further.pixels_IHWC)
    wrong = [ScoredRollout(replace(answers[0], further=swapped), 1.0, {}), *_scored(answers[1:])]
    (shard,) = [unpack(parcels[0]) for parcels in plan_parcels(wrong, np.linspace(-1, 1, 8), minibatches=1, dp_size=1, multiple=1, pad_id=0)]
    batch = policy_batch(shard, context.device, 0)
    logits = learner.forward(model, batch)
    with pytest.raises(UserError, match=r"max_logprob_diff"):  # and were a picture another one, it would be noticed
        learner.loss(model, batch, logits)


def _scored(answers):
    return [ScoredRollout(answer, 1.0, {}) for answer in answers]


def _stopping(generate, asked, samples, step):
    """As if every answer had ended by itself: a random model rarely says the end token."""
    return [replace(rollout, finish="stop") for rollout in generate(asked, samples, step)]
