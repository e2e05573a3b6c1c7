"""The survey's table: one row an answer, masses that sum to one, the answer's positions and nobody else's; answers wait for it as bytes."""

from __future__ import annotations

import random

import numpy as np

from megatron_ext.batch import gate_mass
from megatron_ext.config.schema import RolloutConfig, RunConfig
from megatron_ext.inference.engine import Engine
from megatron_ext.inference.survey import Correct, packed, survey_table, unpacked
from megatron_ext.model.assembly import build_model
from megatron_ext.parallel.groups import ParallelContext
from tests.support.models import IMAGE, Words, small_config, small_prompts


def test_rows_come_in_the_order_of_their_keys_whatever_rank_answered(context: ParallelContext) -> None:
    engine = Engine(build_model(small_config(), IMAGE, context, seed=5), context, Words(), RolloutConfig(max_new_tokens=6))
    rollouts = engine.generate(small_prompts(9), 1, seeds=lambda index, _: index, version=0)
    answers = [Correct.of(rollout) for rollout in rollouts]
    config = RunConfig(model=small_config())
    table = survey_table(answers, config, IMAGE)
    shuffled = survey_table(unpacked(packed(random.Random(0).sample(answers, len(answers)))), config, IMAGE)
    assert table["key_N"].tolist() == sorted(rollout.prompt.key for rollout in rollouts) == shuffled["key_N"].tolist()
    for name in ("mass_NLE", "prompt_mass_NLE", "control_NLE"):
        assert table[name].shape == (9, 3, 8)
        np.testing.assert_allclose(table[name].sum(-1), 1, atol=2e-3)
        np.testing.assert_allclose(table[name], shuffled[name], atol=1e-12)
    first = rollouts[0]
    np.testing.assert_array_equal(table["mass_NLE"][0], gate_mass(first.routes, 8, len(first.prompt.tokens_S) - 1, len(first.routes.experts_SLK)))


def test_image_and_question_are_logged_apart_from_each_other_and_from_the_answer(context: ParallelContext) -> None:
    """The prompt's mass is the mean of both over their tokens; its last position is the answer's. A prompt without an image has no mass there."""
    engine = Engine(build_model(small_config(), IMAGE, context, seed=5), context, Words(), RolloutConfig(max_new_tokens=3))
    rollouts = engine.generate(small_prompts(3), 1, seeds=lambda index, _: index, version=0)
    table = survey_table([Correct.of(rollout) for rollout in rollouts], RunConfig(model=small_config()), IMAGE)
    for row, rollout in enumerate(rollouts):
        tokens = rollout.prompt.tokens_S[:-1]
        images, texts = int((tokens == IMAGE).sum()), int((tokens != IMAGE).sum())
        image, question, prompt = (table[f"{name}_mass_NLE"][row] for name in ("image", "question", "prompt"))
        assert np.isnan(image).all() == (images == 0)
        np.testing.assert_allclose((images * np.nan_to_num(image) + texts * question) / (images + texts), prompt, atol=1e-12)
    first = rollouts[0]
    np.testing.assert_allclose(table["image_mass_NLE"][0], gate_mass(first.routes, 8, 1, 5), atol=1e-12)
