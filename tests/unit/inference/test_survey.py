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
    table = survey_table(answers, config)
    shuffled = survey_table(unpacked(packed(random.Random(0).sample(answers, len(answers)))), config)
    assert table["key_N"].tolist() == sorted(rollout.prompt.key for rollout in rollouts) == shuffled["key_N"].tolist()
    for name in ("mass_NLE", "prompt_mass_NLE", "control_NLE"):
        assert table[name].shape == (9, 3, 8)
        np.testing.assert_allclose(table[name].sum(-1), 1, atol=2e-3)
        np.testing.assert_allclose(table[name], shuffled[name], atol=1e-12)
    first = rollouts[0]
    np.testing.assert_array_equal(table["mass_NLE"][0], gate_mass(first.routes, 8, len(first.prompt.tokens_S) - 1, len(first.routes.experts_SLK)))
