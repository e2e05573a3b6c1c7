"""The loop against ten-line fakes: what a step does, in which order, what is trained on, when it saves and when it stops."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ext.errors import StoppedForRequeue
from megatron_ext.rl.loop import Recipe, StepReport, run_loop
from megatron_ext.rl.roles import Taken
from tests.support.rl_fakes import FakeLearner, FakeScorer, answer, prompt


class FakeSource:
    """Two answers to a question of every step."""

    def __init__(self, log):
        self.log, self.version = log, -1

    def take(self, step, clock):
        self.log.append(f"take {step} of version {self.version}")
        scored = FakeScorer([]).score([answer(prompt(f"p{step}"), sample, self.version) for sample in range(2)])
        clock.lap("generate")
        return Taken(scored, [], [])

    def publish(self, weights):
        self.log.append(f"publish {weights.version}")
        self.version = weights.version
        return {"sync/bytes": 8.0}


def recipe(steps=2, reports=None, **changes):
    reports = [] if reports is None else reports
    credit = changes.pop("credit", lambda scored, step: (np.array([one.reward - 0.5 for one in scored]), {"advantage/mean": 0.0}))
    return Recipe(steps=steps, credit=credit, after_step=reports.append, **changes)


def run(recipe, **arguments):
    log: list[str] = []
    try:
        run_loop(recipe, FakeSource(log), FakeLearner(log), **arguments)
    finally:
        run.log = log
    return log


def test_a_step_takes_answers_updates_and_publishes_in_this_order():
    assert run(recipe(steps=1)) == ["publish 0", "take 0 of version 0", "update 0 on 2", "publish 1", "save 1"]


def test_every_step_publishes_the_weights_that_it_made():
    assert [line for line in run(recipe(steps=3)) if line.startswith("take")] == [f"take {step} of version {step}" for step in range(3)]


def test_a_resumed_run_starts_at_its_step():
    assert [line for line in run(recipe(steps=3), first_step=2) if line.startswith(("take", "save"))] == ["take 2 of version 0", "save 3"]


def test_checkpoints_are_written_every_so_often_and_once_at_the_end():
    assert [line for line in run(recipe(steps=5, save_every=2)) if line.startswith("save")] == ["save 2", "save 4", "save 5"]


def test_the_report_joins_the_metrics_of_every_role_with_their_seconds():
    reports: list[StepReport] = []
    run(recipe(steps=1, reports=reports))
    metrics = reports[0].metrics
    assert metrics["actor/loss"] == 0.0 and metrics["sync/bytes"] == 8.0 and metrics["advantage/mean"] == 0.0
    assert {f"timing_s/{phase}" for phase in ("generate", "advantages", "update", "sync", "step")} <= metrics.keys()
    assert metrics["timing_s/step"] >= metrics["timing_s/generate"]


def test_a_stop_request_ends_the_run_after_its_step_with_a_checkpoint():
    with pytest.raises(StoppedForRequeue, match="step 1 of 3"):
        run(recipe(steps=3, stop_requested=lambda: True))
    assert run.log[-1] == "save 1"


def test_a_stop_request_during_the_last_step_changes_nothing():
    assert run(recipe(steps=1, stop_requested=lambda: True))[-1] == "save 1"
