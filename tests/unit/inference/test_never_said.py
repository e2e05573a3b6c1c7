"""What answers cannot hold: tokens that would mean another computation to whoever reads the whole conversation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_ext.batch import Markers
from megatron_ext.config.schema import RolloutConfig
from megatron_ext.inference.engine import Engine
from megatron_ext.model.assembly import VisionLanguageModel, build_model
from megatron_ext.parallel.groups import ParallelContext
from tests.support.generation import logprobs_of_a_full_pass
from tests.support.models import IMAGE, TANH_GATE, Words, open_gates, small_config, small_prompts

TURN = 57


def looking(inject: str, context: ParallelContext) -> VisionLanguageModel:
    """A model that would rather like to begin a turn."""
    config = small_config(init_std=0.3, clvr=TANH_GATE.model_copy(update={"inject": inject}))
    model = build_model(config, IMAGE, context, seed=5, markers=Markers(TURN))
    open_gates(model)
    with torch.no_grad():
        model.output_layer.weight[TURN] = 10 * model.output_layer.weight[:40].mean(0)
    return model


@pytest.mark.parametrize(("inject", "never"), [("text", (IMAGE,)), ("all", (IMAGE,)), ("response", (IMAGE, TURN))])
def test_only_a_model_that_looks_in_responses_cannot_begin_a_turn(inject: str, never: tuple[int, ...], context: ParallelContext) -> None:
    assert looking(inject, context).never_said == never


def test_answers_that_look_have_the_log_probs_of_a_full_pass(context: ParallelContext) -> None:
    """A turn that an answer began itself would be a question to that pass, and nothing would look in it."""
    engine = Engine(looking("response", context), context, Words(), RolloutConfig(max_new_tokens=12))
    prompts = [
        replace(prompt, tokens_S=np.concatenate([[TURN], np.where(prompt.tokens_S == TURN, 9, prompt.tokens_S), [TURN, 10]]).astype(np.int32))
        for prompt in small_prompts(6)
    ]
    rollouts = engine.generate(prompts, 4, seeds=lambda index, sample: 10 * index + sample, version=0)
    assert len(rollouts) == 24 and not any(np.isin(rollout.response_T, (TURN, IMAGE)).any() for rollout in rollouts)
    for rollout in rollouts:
        np.testing.assert_allclose(logprobs_of_a_full_pass(engine, rollout), rollout.logprobs_T, atol=1e-4)
