"""The loop against ten-line fakes: what a step does, in which order, what is trained on, when it saves and when it stops."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from megatron_ext.batch import NO_TILES, FailedRollout, Prompt, Rollout, RouteTrace, ScoredRollout
from megatron_ext.errors import StoppedForRequeue, UserError
from megatron_ext.rl.loop import Recipe, StepReport, run_loop
from megatron_ext.rl.sampling import keep_differing

LOG: list[str] = []


@pytest.fixture(autouse=True)
def fresh_log():
    LOG.clear()


class FakeFleet:
    """Answers "<version>" to everything."""

    version = -1

    def generate(self, prompts, samples, step):
        LOG.append(f"generate {step} with version {self.version}")
        return [answer(prompt, sample, self.version) for prompt in prompts for sample in range(samples)]

    def publish(self, weights):
        LOG.append(f"publish {weights}")
        self.version = weights
        return {"sync/bytes": 8.0}


class FakeScorer:
    """Sample n earns n; prompts whose key starts with "alike" earn 1, and those whose key starts with "broken" cannot be scored."""

    def score(self, rollouts):
        LOG.append(f"score {len(rollouts)}")
        return [
            FailedRollout(rollout.prompt, rollout.sample, "reward_raised", "no gold answer")
            if rollout.prompt.key.startswith("broken")
            else ScoredRollout(rollout, 1.0 if rollout.prompt.key.startswith("alike") else float(rollout.sample), {})
            for rollout in rollouts
        ]


class FakeLearner:
    version = 0

    def update(self, scored, advantages_R, step):
        LOG.append(f"update {step} on {len(scored)}")
        self.version += 1
        return {"actor/loss": float(np.sum(advantages_R))}

    def weights(self):
        return self.version

    def save(self, step):
        LOG.append(f"save {step}")


def answer(prompt, sample, version):
    routes = RouteTrace(np.zeros((2, 1, 1), np.uint8), np.ones((2, 1, 1), np.float16))
    return Rollout(prompt, sample, 0, np.array([5, 6]), np.zeros(2, np.float32), np.full(2, version, np.int32), "stop", str(version), routes)


def prompt(key):
    return Prompt(key, "count", np.array([1], np.int32), NO_TILES, "3")


def recipe(steps=2, keys=("a", "b"), reports=None, **changes):
    reports = [] if reports is None else reports
    return Recipe(
        steps=steps,
        samples=2,
        draw=lambda step: [prompt(key) for key in keys],
        credit=lambda scored, step: (np.array([one.reward - 0.5 for one in scored]), {"advantage/mean": 0.0}),
        after_step=reports.append,
        **changes,
    )


def run(recipe, **arguments):
    run_loop(recipe, FakeFleet(), FakeScorer(), FakeLearner(), **arguments)


def test_a_step_generates_scores_updates_and_publishes_in_this_order():
    run(recipe(steps=1))
    assert LOG == ["publish 0", "generate 0 with version 0", "score 4", "update 0 on 4", "publish 1", "save 1"]


def test_every_step_samples_with_the_weights_that_the_step_before_made():
    run(recipe(steps=3))
    assert [line for line in LOG if line.startswith("generate")] == [f"generate {step} with version {step}" for step in range(3)]


def test_a_resumed_run_starts_at_its_step():
    run(recipe(steps=3), first_step=2)
    assert [line for line in LOG if line.startswith(("generate", "save"))] == ["generate 2 with version 0", "save 3"]


def test_checkpoints_are_written_every_so_often_and_once_at_the_end():
    run(recipe(steps=5, save_every=2))
    assert [line for line in LOG if line.startswith("save")] == ["save 2", "save 4", "save 5"]


def test_failed_rollouts_are_reported_and_never_trained_on():
    reports: list[StepReport] = []
    run(recipe(steps=1, keys=("a", "broken"), reports=reports))
    assert "update 0 on 2" in LOG
    assert [failed.prompt.key for failed in reports[0].failed] == ["broken", "broken"]
    assert [one.rollout.prompt.key for one in reports[0].scored] == ["a", "a"]


def test_a_step_in_which_everything_failed_stops_the_run_and_says_why():
    with pytest.raises(UserError, match="step 0: all 2 rollouts failed; the first: reward_raised: no gold answer"):
        run(recipe(keys=("broken",)))


def refilling(reports, draws):
    """Prompts a0 and a1 of the first draw of step 0 teach nothing; of later draws, whose numbers start at the run's steps, everything does."""

    def draw(number):
        return [prompt(f"{'p' if number else 'alike'}/{number}/{letter}") for letter in "ab"]

    return replace(recipe(steps=2, reports=reports, draws=draws, choose=partial(keep_differing, wanted=2)), draw=draw)


def test_a_step_without_enough_groups_to_learn_from_asks_further_prompts():
    reports: list[StepReport] = []
    run(refilling(reports, draws=3))
    assert [line for line in LOG if line.startswith(("generate", "update"))] == [
        "generate 0 with version 0",
        "generate 0 with version 0",
        "update 0 on 4",
        "generate 1 with version 1",
        "update 1 on 4",
    ]
    assert [one.rollout.prompt.key for one in reports[0].scored] == ["p/2/a", "p/2/a", "p/2/b", "p/2/b"]
    assert [one.rollout.prompt.key for one in reports[0].set_aside] == ["alike/0/a", "alike/0/a", "alike/0/b", "alike/0/b"]
    assert not reports[1].set_aside


def test_a_step_asks_no_more_often_than_it_may():
    reports: list[StepReport] = []
    run(refilling(reports, draws=1))
    assert len([line for line in LOG if line.startswith("generate 0")]) == 1
    assert [one.rollout.prompt.key for one in reports[0].scored] == ["alike/0/a", "alike/0/a", "alike/0/b", "alike/0/b"]


def test_the_report_joins_the_metrics_of_every_role_with_their_seconds():
    reports: list[StepReport] = []
    run(recipe(steps=1, reports=reports))
    metrics = reports[0].metrics
    assert metrics["actor/loss"] == 0.0 and metrics["sync/bytes"] == 8.0 and metrics["advantage/mean"] == 0.0
    assert {f"timing_s/{role}" for role in ("generate", "reward", "update", "sync", "step")} <= metrics.keys()
    assert metrics["timing_s/step"] >= metrics["timing_s/generate"]


def test_a_stop_request_ends_the_run_after_its_step_with_a_checkpoint():
    with pytest.raises(StoppedForRequeue, match="step 1 of 3"):
        run(recipe(steps=3, stop_requested=lambda: True))
    assert LOG[-1] == "save 1"


def test_a_stop_request_during_the_last_step_changes_nothing():
    run(recipe(steps=1, stop_requested=lambda: True))
    assert LOG[-1] == "save 1"
