"""What a step asks, and what is kept of it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.batch import NO_TILES, FailedRollout, Prompt, Rollout, RouteTrace, ScoredRollout
from megatron_ext.config.schema import DataConfig, RLConfig, RunConfig
from megatron_ext.data.suite import SKILLS
from megatron_ext.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_ext.rl.bank.bank import open_bank
from megatron_ext.rl.loop import StepReport
from megatron_ext.rl.questions import prompts_of_step, skill_counts
from megatron_ext.rl.record import Recorder, rollout_metrics


def config(prompts=10, seed=0, **mix):
    return RunConfig(seed=seed, rl=RLConfig(prompts_per_step=prompts, mix=mix or {"qa": 1.0, "composite": 1.0}))


@given(st.integers(0, 1000), st.integers(1, 70), st.floats(0, 5), st.floats(0.01, 5))
def test_the_prompts_of_every_step_sum_to_what_was_asked_for(step, prompts, qa, composite):
    assert sum(skill_counts(step, config(prompts, qa=qa, composite=composite)).values()) == prompts


@settings(max_examples=20)
@given(st.integers(1, 40), st.floats(0.2, 5))
def test_no_step_is_off_a_skills_share_by_a_prompt_or_more_and_over_many_steps_shares_are_exact(prompts, weight):
    setting = config(prompts, qa=1.0, composite=weight)
    counts = np.array([list(skill_counts(step, setting).values()) for step in range(400)])
    share = prompts * np.array([1 / len(SKILLS)] * len(SKILLS) + [weight]) / (1 + weight)
    assert (np.abs(counts - share) < 1 + 1e-6).all()
    assert np.abs(counts.mean(0) - share).max() < 0.12


def test_a_kind_of_weight_zero_is_never_asked():
    assert all(skill_counts(step, config(7, qa=1.0, composite=0.0))["composite"] == 0 for step in range(50))


def test_prompts_are_a_function_of_seed_and_step_and_never_come_twice(tmp_path):
    train_tokenizer(DataConfig(), tmp_path, 0)
    tokenizer = load_tokenizer(tmp_path)
    steps = [[prompt.key for prompt in prompts_of_step(step, config(), tokenizer)] for step in range(4)]
    assert steps[1] == [prompt.key for prompt in prompts_of_step(1, config(), tokenizer)]
    assert max(Counter(key for keys in steps for key in keys).values()) == 1
    assert not set(steps[0]) & {prompt.key for prompt in prompts_of_step(0, config(seed=1), tokenizer)}


def answer(sample, reward, tokens, finish="stop", key="p/0", **parts):
    routes = RouteTrace(np.zeros((tokens + 1, 1, 1), np.uint8), np.ones((tokens + 1, 1, 1), np.float16))
    prompt = Prompt(key, "ocr", np.array([1, 2], np.int32), NO_TILES, "42")
    versions = np.full(tokens, 3, np.int32)
    rollout = Rollout(prompt, sample, 9 + sample, np.arange(tokens), np.zeros(tokens, np.float32), versions, finish, "41", routes)
    return ScoredRollout(rollout, reward, parts)


FAILED = FailedRollout(Prompt("p/1", "ocr", np.array([1], np.int32), NO_TILES, ""), 0, "reward_timeout", "no result within 10 s")


def test_metrics_of_rollouts_count_failures_apart_from_rewards():
    metrics = rollout_metrics([answer(0, 1.0, 2, correct=1.0), answer(1, 0.0, 4, "length", correct=0.0), answer(2, 0.5, 3)], [FAILED])
    assert metrics["reward/mean"] == 0.5 and metrics["reward/max"] == 1 and metrics["reward/std"] == pytest.approx(np.std([1, 0, 0.5]))
    assert metrics["reward/correct/mean"] == 0.5 and metrics["reward/skill/ocr/mean"] == 0.5
    assert metrics["response_length/mean"] == 3 and metrics["response_length/max"] == 4 and metrics["response_length/clip_ratio"] == pytest.approx(1 / 3)
    assert metrics["rollout/failed_count"] == 1 and metrics["rollout/failed_ratio"] == 0.25 and metrics["rollout/failed/reward_timeout"] == 1


def test_metrics_are_of_all_groups_and_say_how_many_were_set_aside():
    metrics = rollout_metrics([answer(0, 1.0, 2), answer(1, 0.0, 2)], [], [answer(0, 1.0, 8, key="p/2")])
    assert metrics["reward/frac_zero_std_groups"] == metrics["sampling/groups_set_aside"] / metrics["sampling/groups"] == 0.5
    assert metrics["reward/mean"] == pytest.approx(2 / 3) and metrics["response_length/max"] == 8


def test_the_advantages_of_a_step_are_noted_beside_its_answers_also_of_one_that_is_run_again(tmp_path):
    report = StepReport(6, [answer(0, 1.0, 2, correct=1.0)], [], [FAILED], np.array([0.7071067]), {"timing_s/step": 2.0, "timing_s/update": 0.5})
    bank = open_bank(tmp_path)
    bank.put(9, report.scored, report.failed)
    bank.train(6, [(9, "p/0")])
    for _ in range(2):
        published = {}
        Recorder(bank, 4)(report, {"val/x": 1.0}, lambda step, metrics, to=published: to.update({step: metrics}))
        assert published[7]["val/x"] == 1 and published[7]["perf/overlap"] == 0.25
        lines = pq.read_table(tmp_path / "advantages").to_pylist()
        assert lines == [{"step": 6, "draw": 9, "key": "p/0", "sample": 0, "advantage": 0.7071067}]
