"""Answers of a model whose taps look at memory tokens: what is said, what is measured, what a trace shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ext.batch import Markers, Prompt
from megatron_ext.config.schema import RolloutConfig
from megatron_ext.inference.engine import Engine
from megatron_ext.inference.looks import look
from megatron_ext.inference.passes import prompt_inputs
from megatron_ext.inference.trace import trace_answer
from megatron_ext.model.assembly import build_model
from megatron_ext.model.gaze import record_gaze
from megatron_ext.model.weight_storage import store_for_generation
from megatron_ext.parallel.groups import ParallelContext
from tests.support.generation import logprobs_of_a_full_pass
from tests.support.models import EOS, IMAGE, TANH_GATE, Pieces, open_gates, small_config, small_prompts

SLOTS = (58, 59)


class Remembering(Pieces):
    slot_ids = SLOTS


@pytest.fixture(scope="module")
def engine(context: ParallelContext) -> Engine:
    clvr = TANH_GATE.model_copy(update={"inject": "slots", "num_slots": 2})
    model = build_model(small_config(init_std=0.3, clvr=clvr), IMAGE, context, seed=5, markers=Markers(slots=SLOTS))
    open_gates(model)
    with torch.no_grad():
        model.output_layer.weight[list(SLOTS)] = 3 * model.output_layer.weight[:40].mean(0)  # rather likely
    store_for_generation(model)
    return Engine(model, context, Remembering(), RolloutConfig(max_new_tokens=12))


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    """Each ends with its memory tokens and two tokens of the answer's header."""

    def remembering(prompt: Prompt) -> Prompt:
        words_S = np.where(np.isin(prompt.tokens_S, SLOTS), 9, prompt.tokens_S)
        return replace(prompt, tokens_S=np.concatenate([words_S, [*SLOTS, 10, 11]]).astype(np.int32), meta={**prompt.meta, "boxes": [[0, 0, 8, 8]]})

    return [remembering(prompt) for prompt in small_prompts(9)]


def test_memory_tokens_are_never_said_and_the_log_probs_are_those_of_a_full_pass(engine: Engine, prompts: list[Prompt]) -> None:
    """The answer looks at nothing of its own: keys and values of images are gone once a prompt is read."""
    rollouts = engine.generate(prompts, 4, seeds=lambda index, sample: 10 * index + sample, version=0)
    assert len(rollouts) == 36 and not any(np.isin(rollout.response_T, (*SLOTS, IMAGE)).any() for rollout in rollouts)
    assert engine.passes.banned_V.nonzero()[:, 0].tolist() == [IMAGE, *SLOTS, 60, 61, 62, 63]
    for rollout in rollouts[::4]:
        np.testing.assert_allclose(logprobs_of_a_full_pass(engine, rollout), rollout.logprobs_T, atol=1e-4)


def test_what_is_measured_is_the_gaze_of_the_last_questions_memory_tokens(engine: Engine, prompts: list[Prompt]) -> None:
    """Of two prompts of different lengths, the second with a turn before: entropy of the mean map of both memory tokens."""
    first, other, *_ = [prompt for prompt in prompts if len(prompt.tiles)]
    second = replace(other, tokens_S=np.concatenate([other.tokens_S, [20, 21, EOS, 22, *SLOTS, 10]]).astype(np.int32))
    for prompt, found in zip((first, second), look(engine, [first, second], [True] * 2, [True] * 2, 16), strict=True):
        last = int(np.flatnonzero(prompt.tokens_S == SLOTS[1])[-1])
        inputs, _ = prompt_inputs([prompt], EOS, 1, engine.context.device)
        with torch.no_grad(), record_gaze(engine.model, slice(last - 1, last + 1)) as gaze:
            engine.model.eval()(inputs)
        maps = [weights_BTNV[0].double().mean((0, 1)) for weights_BTNV in gaze.weights()]
        expected = [float(-(map_V * map_V.log()).sum() / np.log(16)) for map_V in maps]
        assert found.entropy == pytest.approx(expected, abs=1e-5) and max(expected) < 0.999
        assert found.pointing is not None


def test_a_trace_has_no_maps_of_answers_that_do_not_look(engine: Engine, prompts: list[Prompt]) -> None:
    (rollout,) = engine.generate(prompts[:1], 1, seeds=lambda *_: 0, version=0, greedy=True)
    trace = trace_answer(engine, Remembering(), rollout, Path("runs/x"), {})
    assert trace.taps == [] and len(trace.pictures) == 1 and "58" not in trace.question.split()
    np.testing.assert_allclose(trace.logprobs_T, rollout.logprobs_T, atol=1e-4)
